"""Units done by processes of this machine: one that dies is replaced, and its unit tried again."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

from diffdoctor.data.store_path import Location
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.tally import Tally, ends_run
from diffdoctor.engine.units import Place, Unit, WorkerSpec
from diffdoctor.runs.errors import UserError, first_line
from diffdoctor.runs.workers import begin_worker, worker_context

_LOG_LINES = 20
# Workers that use no accelerator, one for each core: each loads torch and holds a unit's pictures.
_MOST_ON_CPU = 16


def run(tally: Tally, spec: WorkerSpec, options: EngineConfig) -> None:
    """Do all waiting units.

    Raises:
        UserError: a worker cannot be built, or says that the work cannot be done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = options.actors or _default_count(spec.uses_accelerator, cores)
    threads = options.cpus or max(1, cores // count)
    workers: list[_Process] = []
    try:
        while tally.waiting or any(worker.unit for worker in workers):
            while len(workers) < min(count, len(tally.waiting) + sum(worker.unit is not None for worker in workers)):
                taken = {worker.place.number for worker in workers}
                place = Place(min(set(range(count)) - taken), count)
                workers.append(_Process(tally.commits.output, spec, place, threads))
            for worker in workers:
                if worker.is_ready and worker.unit is None and tally.waiting:
                    worker.give(tally.waiting.popleft())
            _listen(workers, options.unit_timeout)
            for worker in list(workers):
                if not worker.attend(tally):
                    workers.remove(worker)
            _kill_late(workers, options.unit_timeout)
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.close()


def _default_count(uses_accelerator: bool, cores: int) -> int:
    from diffdoctor.training.devices import accelerator_count

    return (accelerator_count() or 2) if uses_accelerator else min(cores, _MOST_ON_CPU)


def _listen(workers: list[_Process], limit: float | None) -> None:
    """Wait until a worker says something, dies, or is late."""
    left = [limit - worker.busy_for() for worker in workers if limit and worker.unit]
    wait([part for worker in workers for part in worker.waited_for()], max(0, min(left)) if left else None)


def _kill_late(workers: list[_Process], limit: float | None) -> None:
    for worker in workers:
        if limit and worker.unit and worker.busy_for() >= limit:
            worker.late = f"it took more than {limit:g} seconds"
            worker.process.kill()


class _Process:
    """A worker process as its parent sees it."""

    def __init__(self, output: Location, spec: WorkerSpec, place: Place, threads: int):
        self.place, self.unit, self.is_ready, self.late, self._since = place, None, False, "", 0.0
        context = worker_context()
        self.connection, theirs = context.Pipe()
        descriptor, name = tempfile.mkstemp(prefix="diffdoctor-worker-", suffix=".log")
        os.close(descriptor)
        self.log = Path(name)
        arguments = (theirs, str(self.log), dict(os.environ), output, spec, place, threads)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def give(self, unit: Unit) -> None:
        self.unit, self._since = unit, time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # it has died, as will be seen
            self.connection.send(unit)

    def busy_for(self) -> float:
        return time.monotonic() - self._since

    def waited_for(self) -> list:
        return [self.connection, self.process.sentinel]

    def attend(self, tally: Tally) -> bool:
        """Hear what the worker has to say; whether it is alive."""
        try:
            while self.connection.poll():
                self._hear(tally, *self.connection.recv())
        except (EOFError, ConnectionError):
            self.process.join()
        if self.process.is_alive():
            return True
        with contextlib.suppress(EOFError, ConnectionError):
            while self.connection.poll():  # said right before its end
                self._hear(tally, *self.connection.recv())
        unit, self.unit = self.unit, None
        log = self.close()
        reason = self.late or f"the process that did it ended ({_ending(self.process.exitcode)})"
        if unit is not None:
            tally.commits.discard(unit.id)
            tally.died(unit, reason, log)
        elif not self.is_ready:
            tally.never_ready(reason, log)
        return False

    def _hear(self, tally: Tally, what: str, text: str) -> None:
        if what == "stop":
            raise UserError(text)
        if what == "ready":
            self.is_ready = True
            tally.ready()
        elif what == "raised":
            self.late = text
        else:
            self.unit = None
            tally.done()

    def dismiss(self) -> None:
        """Tell it to end; one that is doing something is killed, whose attempt then counts for nothing."""
        if self.unit is not None or not self.is_ready:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self.connection.send(None)

    def close(self) -> str:
        """Wait for its end; returns the last lines that it wrote, all of which are shown here."""
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        self.log.unlink(missing_ok=True)
        if text.strip():
            print(text.rstrip(), file=sys.stderr)
        return "\n".join(text.splitlines()[-_LOG_LINES:])


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, probably out of memory" if name == "SIGKILL" else name


def _serve(
    connection: Connection,
    log: str,
    environment: dict[str, str],
    output: Location,
    spec: WorkerSpec,
    place: Place,
    threads: int,
) -> None:
    """The worker process: units in, commits on the disk, a word to the parent after each."""
    begin_worker(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    faulthandler.enable()
    import torch

    torch.set_num_threads(threads)
    try:
        worker, commits = spec.build(place), commits_at(output)
    except (UserError, OSError) as error:
        connection.send(("stop", str(error)))
        return
    connection.send(("ready", ""))
    while (unit := connection.recv()) is not None:
        try:
            commits.attempt(unit, worker, f"worker {place.number}")
        except Exception as error:
            if ends_run(error):
                connection.send(("stop", str(error)))
                return
            # What raised it may have broken more than the unit: this process is not used again.
            traceback.print_exc()
            connection.send(("raised", f"{type(error).__name__}: {first_line(error)}"))
            sys.stderr.flush()
            os._exit(1)
        connection.send(("done", ""))
