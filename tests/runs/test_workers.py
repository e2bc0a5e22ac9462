"""Jobs in processes of their own: order, reading ahead, and every way in which it can end."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.workers import AHEAD, ordered_map, worker_context

PROGRAM = """
import os, sys, time
from diffdoctor.runs.workers import ordered_map

def job(number):
    return os.getpid() if number < 2 else time.sleep(3600)

if __name__ == "__main__":
    results = ordered_map(job, range(4), 2, os.getpid)
    print(next(results), next(results), flush=True)
    next(results)
"""


def negative(number):
    return -number


def large(number):
    return bytes(4_000_000)


def marks(job):
    folder, number = job
    (folder / str(number)).touch()
    while number == 1 and not (folder / "go").exists():
        time.sleep(0.01)
    return number


def ends(number):
    os._exit(3)


def fails(number):
    if number == 2:
        raise UserError(f"job {number} cannot be done")
    return number


def says(name, value):
    os.environ[name] = value


def said(name):
    return os.environ.get(name)


def refuses():
    raise RuntimeError("not here")


def test_results_come_in_order_and_little_is_read_ahead():
    numbers = itertools.count()
    results = ordered_map(negative, numbers, 2, os.getpid)
    assert [next(results) for _ in range(100)] == [-number for number in range(100)]
    read = next(numbers)
    assert 100 <= read <= 100 + 2 * AHEAD
    results.close()
    assert next(numbers) == read + 1


def test_fewer_jobs_than_processes_and_none():
    assert list(ordered_map(negative, [1], 2, os.getpid)) == [-1]
    assert list(ordered_map(negative, [], 2, os.getpid)) == []


def test_each_process_is_started_with_the_arguments():
    assert set(ordered_map(said, ["DIFFDOCTOR_TEST"] * 8, 2, says, "DIFFDOCTOR_TEST", "7")) == {"7"}
    assert "DIFFDOCTOR_TEST" not in os.environ


def test_workers_have_the_environment_of_now(monkeypatch):
    for value in ("1", "2"):
        monkeypatch.setenv("DIFFDOCTOR_TEST", value)
        assert list(ordered_map(said, ["DIFFDOCTOR_TEST"], 1, os.getpid)) == [value]


@pytest.mark.skipif(sys.platform == "darwin" or sys.version_info < (3, 11), reason="workers are not forked")
def test_where_no_socket_can_be_made_each_worker_is_started_anew(monkeypatch):
    def refused():
        raise OSError("AF_UNIX path too long")

    assert worker_context().get_start_method() == "forkserver"
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", refused)
    assert worker_context().get_start_method() == "spawn"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.timeout(600)
def test_closed_while_results_are_being_sent():
    # Far more than a pipe holds: the workers are in the middle of sending when the others are given up.
    for taken in (0, 5):
        results = ordered_map(large, itertools.count(), 2, os.getpid)
        for _ in range(taken):
            next(results)
        results.close()


@pytest.mark.timeout(600)
def test_jobs_that_wait_in_a_process_are_not_begun_any_more(tmp_path):
    results = ordered_map(marks, [(tmp_path, number) for number in range(AHEAD)], 1, os.getpid)
    assert next(results) == 0
    # The second is being done, and it waits for this test.
    while not (tmp_path / "1").exists():
        time.sleep(0.01)
    ended = results.gi_frame.f_locals["ended"]
    closing = threading.Thread(target=results.close)
    closing.start()
    while not ended.is_set():
        time.sleep(0.01)
    (tmp_path / "go").touch()
    closing.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "go"]


def test_an_error_of_a_job_is_raised_in_its_place():
    results = ordered_map(fails, range(4), 2, os.getpid)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match="job 2 cannot be done"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("job", "start"), [(ends, os.getpid), (negative, refuses)])
def test_a_process_that_ends_by_itself_is_an_error(job, start):
    with pytest.raises(UserError, match="workers: a worker process ended by itself"):
        list(ordered_map(job, range(8), 2, start))


@pytest.mark.timeout(600)
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_of_a_killed_process_end(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    # What lies where it is started is not what it imports, and neither do the workers.
    (tmp_path / "here" / "diffdoctor").mkdir(parents=True)
    (tmp_path / "here" / "diffdoctor" / "__init__.py").write_text("raise RuntimeError('from the current folder')")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "cwd": tmp_path / "here"}
    with subprocess.Popen([sys.executable, str(script)], **options) as process:
        workers = {int(number) for number in process.stdout.readline().split()}
        assert workers and process.pid not in workers
        process.kill()
    while any(_runs(number) for number in workers):
        time.sleep(0.05)


def _runs(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            # Z: it has ended, and nobody has asked about it yet.
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
