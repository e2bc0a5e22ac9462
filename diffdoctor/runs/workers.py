"""A function over many jobs, done by several processes, in order."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from diffdoctor.runs.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 4  # jobs per process that are read and whose results are not yet taken: they are held in memory


def ordered_map(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, start: Callable[..., Any], *arguments
) -> Iterator[Result]:
    """`map(function, jobs)`, worked out by processes; the results come in the order of the jobs.

    Reads at most `AHEAD * workers` jobs ahead of the results. The processes end when the iterator does (exhausted,
    closed, or by an error), each after the job that it is doing, and when this process is killed.

    Args:
        function: of a module, like whatever it takes and gives, so that it can be sent to another process.
        jobs: read in the calling thread.
        workers: processes, 1 or more.
        start: called with `arguments` once in each process, before its first job.

    Raises:
        UserError: a process ended by itself: killed, most often because memory ran out, or `start` failed.
    """
    # Not multiprocessing.Pool: ended early, it kills its processes, and one that is just writing a result leaves a
    # half of it in the pipe, for whose rest the parent then waits for ever.
    context = worker_context()
    ended = context.Event()
    begin = ended, dict(os.environ), start, *arguments
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin, begin)
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_do, function, job))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "workers: a worker process ended by itself, probably out of memory; fewer workers need less"
        ) from error
    finally:
        # Some jobs are with the processes already and cannot be cancelled any more.
        ended.set()
        pool.shutdown(cancel_futures=True)


def worker_context() -> multiprocessing.context.BaseContext:
    """How worker processes are started: from a process that has imported torch and done nothing else, where there can
    be one, so that a hundred workers import it once; else each anew.

    A process that has used threads, or a GPU, must not be forked itself. Such workers begin with `begin_worker`.
    """
    # Not on macOS: Apple's libraries, which torch loads, may not be used in a fork. Before Python 3.11 that process
    # cannot be kept from importing what lies in the current folder.
    is_safe = sys.platform != "darwin" and sys.version_info >= (3, 11)
    if not is_safe or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    forkserver.set_forkserver_preload([__name__])
    # Control-C reaches the whole group; it must not meet that process or a worker while it imports. The tracker, which
    # would be started with it, unblocks the signal.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _same_modules():
            forkserver.ensure_running()
    except OSError:  # the temporary folder has too long a name for a socket, or a file system without them
        return multiprocessing.get_context("spawn")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def _same_modules() -> Iterator[None]:
    """A Python that is started inside imports what this one does, and nothing from the current folder besides."""
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    chosen = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_ended = None  # in a worker: set when no more results are wanted


def _begin(ended, environment: dict[str, str], start: Callable[..., Any], *arguments) -> None:
    global _ended
    _ended = ended
    begin_worker(environment)
    start(*arguments)


def _do(function: Callable[[Job], Result], job: Job) -> Result | None:
    return None if _ended.is_set() else function(job)


def begin_worker(environment: dict[str, str]) -> None:
    """In a process of `worker_context`, before all else: end at once when its parent has ended, however that was.

    Args:
        environment: the parent's; this process has that of the first worker's time.
    """
    # Control-C reaches the whole group; it is the parent that ends, and its workers with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if environment != os.environ:
        os.environ.clear()
        os.environ.update(environment)
    # A worker holds both ends of its queue and would wait for the jobs of a dead parent for ever.
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
