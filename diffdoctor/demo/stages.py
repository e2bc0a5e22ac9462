"""Stages that are stored when they are done, so that an interrupted run goes on from the last finished one."""

import json
import shutil
import time
from pathlib import Path

import yaml

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_dir, atomic_write_json, atomic_write_text, clear_leftovers

RECORD = "stage.json"


class Stages:
    """A folder of finished stages.

    A stage is a folder `<output>/stages/<name>`, renamed into place when all of its files are written; a folder that
    lacks its record, or that was left under a temporary name, is made anew.

    Args:
        output: the run's folder; made when it is not there.
        settings: what decides the results; kept in `<output>/config.yaml`.
        overwrite: delete the stages of a run with other settings instead of refusing.

    Raises:
        UserError: if the folder cannot be written, or holds a run with other settings.
    """

    def __init__(self, output, settings: dict, *, overwrite: bool = False):
        self.output = Path(output)
        self.folder = self.output / "stages"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_settings(settings, overwrite)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another folder") from None
        clear_leftovers(self.folder)
        self.seconds = {}

    def _check_settings(self, settings, overwrite):
        path = self.output / "config.yaml"
        if path.is_file():
            try:
                earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError:
                earlier = None
            if earlier != settings:
                if not overwrite:
                    earlier = earlier if isinstance(earlier, dict) else {}
                    names = [name for name in settings if earlier.get(name) != settings[name]] or ["settings"]
                    raise UserError(
                        f"--output {self.output} holds a run with another {', '.join(names)}: "
                        "choose another folder, or --overwrite true to start again"
                    )
                shutil.rmtree(self.folder)
                self.folder.mkdir()
        atomic_write_text(path, yaml.safe_dump(settings, sort_keys=False))

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self.folder / name

    def done(self, name: str) -> bool:
        """Whether the stage is finished."""
        return (self.path(name) / RECORD).is_file()

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
        self.seconds[name] = json.loads((self.path(name) / RECORD).read_text(encoding="utf-8"))["seconds"]
        return self.path(name)
