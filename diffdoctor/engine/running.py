"""A run: its units by whichever engine, then its results from the commits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from diffdoctor.data.store_path import Location, StorePath, at
from diffdoctor.engine.commits import Commits
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.tally import Tally
from diffdoctor.engine.units import Place, Plan, WorkerSpec
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.progress import progress


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a plan.

    Attributes:
        units: of the plan.
        done: units that are committed.
        failed: {id: reason} of those that were given up.
        deaths: of workers, in this attempt at the run.
        seconds: that this attempt took.
        started: when it began, by this machine's clock.
    """

    units: int
    done: int
    failed: dict[str, str]
    deaths: int
    seconds: float
    started: float

    @property
    def given_up(self) -> str:
        """The end of a sentence on what was made: how many units are missing, or nothing."""
        return f"; {len(self.failed)} of {self.units} units were given up" if self.failed else ""


def run(
    plan: Plan, spec: WorkerSpec, output: str | Location, options: EngineConfig, *, state=None, desc: str = "units"
) -> Report:
    """Do the units of a plan that are not done yet; each counts once, whoever dies, and however many do it.

    The caller keeps the folder to this run (see `runs.record.RunFolder`), whose identity holds `plan.digest()` and all
    else that the results depend on.

    Args:
        plan: what is to be done.
        spec: how a worker is made that does it.
        output: folder of the run, which is there, or a place in a store.
        options: which engine, and how patient.
        state: Accelerate's, for the engine ranks.
        desc: name of the bar.

    Returns:
        What became of the plan; on other than the main process, of this process's share.

    Raises:
        UserError: the file system has no exclusive creation; a worker cannot be built, or says that the work cannot be
            done; or no unit at all could be done.
    """
    output, started, clock = at(output), time.time(), time.monotonic()
    commits = commits_at(output)
    several = options.kind == "ranks" and state is not None and state.num_processes > 1
    if several and isinstance(output, StorePath):
        raise UserError(expected("engine", f"none, processes or ray with an output in a store ({output})", "ranks"))
    main = not several or state.is_main_process
    if main:
        commits.begin()
        commits.write_plan(plan)
        if options.retry_failed:
            commits.retry_failed()
    if several:
        state.wait_for_everyone()  # the last time: from here on, one of them may be dead
    missing = commits.missing(plan)
    try:
        deaths = _work(plan, spec, commits, missing, options, state if several else None, desc, main)
    except BaseException:
        if main and not commits.done():
            # Nothing is there yet that other options could be mixed with.
            commits.remove_plan()
        raise
    report = _report(plan, commits, deaths, time.monotonic() - clock, started)
    if report.failed and len(report.failed) == report.units:
        first, reason = next(iter(report.failed.items()))
        raise UserError(f"{output}: no unit could be done; {first}: {reason}")
    return report


def _work(plan, spec, commits, missing, options, state, desc, show) -> int:
    """Do the missing units by the engine of the options; returns how many workers died."""
    with progress(len(plan), desc=desc, unit="unit", enabled=show) as bar:
        bar.update(len(plan) - len(missing))
        tally = Tally(commits, missing, options.retries, bar)
        if state is not None:
            from diffdoctor.engine import ranks

            ranks.run(plan, tally, spec, state.process_index, state.num_processes)
        elif missing:
            _ENGINES[options.kind](tally, spec, options)
    return tally.deaths


def _report(plan: Plan, commits: Commits, deaths: int, seconds: float, started: float) -> Report:
    known = {unit.id for unit in plan}
    failed = {unit: reason for unit, reason in commits.reasons().items() if unit in known}
    return Report(len(plan), len(known & commits.done()), failed, deaths, seconds, started)


def _in_this_process(tally: Tally, spec: WorkerSpec, options: EngineConfig) -> None:
    worker = spec.build(Place())
    while tally.waiting:
        tally.commits.attempt(tally.waiting.popleft(), worker)
        tally.done()


def _in_processes(tally: Tally, spec: WorkerSpec, options: EngineConfig) -> None:
    from diffdoctor.engine import processes

    processes.run(tally, spec, options)


def _on_ray(tally: Tally, spec: WorkerSpec, options: EngineConfig) -> None:
    from diffdoctor.engine import ray

    ray.run(tally, spec, options)


_ENGINES = {"none": _in_this_process, "ranks": _in_this_process, "processes": _in_processes, "ray": _on_ray}


def settle(plan: Plan, output: str | Location, report: Report) -> Iterator[dict[str, Any]]:
    """The commits of a run in the order of its plan, the files of each under their own names when it is given.

    Args:
        plan: of the run.
        output: its folder.
        report: of `run`.

    Raises:
        UserError: a unit is neither committed nor given up, or a file is not there or not as it was committed.
    """
    commits = commits_at(at(output))
    done, failed = commits.done(), commits.failed()
    if lost := [unit.id for unit in plan if unit.id not in done | failed]:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise UserError(f"{output}: the units {', '.join(lost[:5])}{more} are missing; run this again to resume")
    for unit in plan:
        if unit.id in done:
            yield commits.settle(unit.id)
    commits.clear_attempts(report.started)
