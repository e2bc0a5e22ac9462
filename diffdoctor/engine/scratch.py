"""Units that write files of their own, by which it is known what is done: an engine only shares them out."""

from __future__ import annotations

from pathlib import Path

from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.running import run
from diffdoctor.engine.units import Plan, WorkerSpec
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import clear_leftovers, delete_dir
from diffdoctor.runs.lock import make_folder


def is_shared_out(engine: EngineConfig, processes: int) -> bool:
    """Whether an engine's own workers do the work, and not this process and those that a launcher started beside it.

    Args:
        engine: the options.
        processes: that the launcher started.

    Raises:
        UserError: there are both.
    """
    if engine.kind not in ("processes", "ray"):
        return False
    if processes > 1:
        raise UserError(expected("engine", f"ranks in {processes} processes of a launcher", engine.kind))
    return True


def share_out(plan: Plan, spec: WorkerSpec, place: Path, engine: EngineConfig, *, desc: str) -> None:
    """Let an engine do the units of a plan.

    Args:
        plan: of what is not done yet.
        spec: how a worker is made that does it.
        place: a folder for the engine's state, which is deleted at the end; one that a killed run left goes first.
        engine: the options.
        desc: name of the bar.

    Raises:
        UserError: see `running.run`; or a unit was given up.
    """
    remove_scratch(place)
    if not len(plan):
        return
    make_folder(place)
    try:
        report = run(plan, spec, place, engine, desc=desc)
    finally:
        remove_scratch(place)
    if report.failed:
        unit, reason = next(iter(report.failed.items()))
        raise UserError(f"{len(report.failed)} of {report.units} units were given up; {unit}: {reason}")


def remove_scratch(place: Path) -> None:
    """Delete the state of an engine whose run has ended or was killed, if it is there."""
    clear_leftovers(place.parent, place.name)
    if place.is_dir():
        delete_dir(place)
