"""One process at a time in an output folder."""

import os
import signal
import subprocess
import sys

import pytest

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.lock import FolderLock, locked_folder

pytest.importorskip("fcntl")

HOLDER = """
import sys
from diffdoctor.runs.lock import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `out`, until its input ends or it is killed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_ends(holder, tmp_path):
    with pytest.raises(UserError, match="out: another process is at work there"), locked_folder(tmp_path / "out"):
        pass
    holder.stdin.close()
    holder.wait()
    with locked_folder(tmp_path / "out"):
        pass
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked_folder(tmp_path / "out"):
        pass


def test_those_who_share_a_folder_keep_others_out(tmp_path):
    with locked_folder(tmp_path / "out") as first:
        with pytest.raises(UserError, match="another process is at work there"):
            FolderLock(tmp_path / "out").acquire(shared=True)
        first.share()
        with locked_folder(tmp_path / "out", shared=True):
            first.release()
            with pytest.raises(UserError, match="another process is at work there"):
                FolderLock(tmp_path / "out").acquire()
    with locked_folder(tmp_path / "out"):
        pass


PARENT = """
import os, sys, time
from diffdoctor.runs.lock import FolderLock
lock = FolderLock(sys.argv[1])
lock.acquire()
child = os.fork()
if child == 0:
    # One write, so that the two lines do not mix.
    os.write(1, b"forked\\n")
    time.sleep(600)
    os._exit(0)
os.write(1, b"%d\\n" % child)
sys.stdin.read()
if sys.argv[2] == "release":
    lock.release()
    print("released", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["kill", "release"])
def test_a_child_does_not_hold_its_parent_s_folder_on(tmp_path, how):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PARENT, str(tmp_path / "out"), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (child,) = map(int, lines - {"forked"})
        try:
            if how == "kill":
                parent.kill()
                parent.wait()
            else:
                parent.stdin.close()
                assert parent.stdout.readline() == "released\n"
            with locked_folder(tmp_path / "out"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()


def test_a_lock_is_acquired_once_the_folder_is_there(tmp_path):
    first, second = FolderLock(tmp_path / "out"), FolderLock(tmp_path / "out")
    first.acquire()
    (tmp_path / "out").mkdir()
    second.acquire()
    second.acquire()
    with pytest.raises(UserError, match="another process"):
        first.acquire()
    second.release()
    second.release()
    first.acquire()
    first.release()


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked_folder(tmp_path / "file"):
        pass


def test_studies_and_the_demo_are_refused_where_another_is_at_work(holder, tmp_path, capsys):
    for module in ("diffusers", "peft", "skimage", "sklearn"):
        pytest.importorskip(module)
    from benchmarks.studies.detector.__main__ import main as detector_study
    from benchmarks.studies.treatment.__main__ import main as treatment
    from diffdoctor.cli import main

    out = str(tmp_path / "out")
    for command, arguments in (
        (treatment, ["--output", out]),
        (treatment, ["--output", str(tmp_path / "study"), "--demo", out]),
        (detector_study, ["--output", out]),
        (main, ["demo", "--output", out]),
    ):
        assert command(arguments) == 2
        assert "out: another process is at work there" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
