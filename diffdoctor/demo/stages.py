"""Stages that are stored when they are done, so that an interrupted run resumes after the last finished one."""

import json
import time
from pathlib import Path

from diffdoctor.runs.files import atomic_dir, atomic_write_json, reading
from diffdoctor.runs.record import RunFolder
from diffdoctor.runs.units import Units

RECORD = "stage.json"


class Stages:
    """A run's folder of finished stages.

    A stage is a folder `<output>/stages/<name>`, renamed into place when all of its files are written; a folder that
    lacks its record, or that was left under a temporary name, is made anew.

    Args:
        output: the run's folder; made when it is not there.
        settings: what decides the results.
        kind: of run.
        overwrite: delete the stages of a run with other settings instead of refusing.
        alone: whether no other process makes stages there; only then is what a kill left half-written removed.

    Raises:
        UserError: if the folder cannot be written, or holds a run with other settings or of another kind.
    """

    def __init__(self, output, settings: dict, *, kind: str = "demo", overwrite: bool = False, alone: bool = True):
        self.output = Path(output)
        self.stages = Units(self.output / "stages", f"/{RECORD}")
        self.seconds: dict[str, float] = {}
        advice = "choose another folder, or --overwrite true to start again"
        run = RunFolder(self.output, kind, settings, {"stages": None}, advice=advice)
        run.begin(settings, overwrite=overwrite, alone=alone)

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self.stages.path(name).parent

    def done(self, name: str) -> bool:
        """Whether the stage is finished."""
        return self.stages.is_done(name)

    def run(self, name: str, make) -> Path:
        """The folder of the stage `name`, made by `make(folder)` when it is not there yet.

        `make` writes its files into the folder that it is given. Its seconds are added to `self.seconds`, those of
        stages that were finished earlier as they were measured then.
        """
        if not self.done(name):
            started = time.perf_counter()
            with atomic_dir(self.path(name)) as folder:
                make(folder)
                atomic_write_json(folder / RECORD, {"seconds": time.perf_counter() - started})
        with reading(self.path(name), "remove this folder, and the same command makes it again"):
            self.seconds[name] = json.loads(self.stages.path(name).read_text(encoding="utf-8"))["seconds"]
        return self.path(name)
