"""Units: each is done once, whoever dies, and however many do it."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from diffdoctor.detector.commands.inject_units import InjectWorkerSpec
from diffdoctor.engine import ranks
from diffdoctor.engine.attempt import Attempt
from diffdoctor.engine.commits import Commits
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.processes import _default_count
from diffdoctor.engine.running import run, settle
from diffdoctor.engine.tally import Tally
from diffdoctor.engine.units import Plan, Unit
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.progress import progress
from diffdoctor.sets.join import JoinWorkerSpec
from diffdoctor.training import devices
from support.engine import Spec, check, plan_of
from support.launch import environment
from support.pictures import tree

pytest.importorskip("pyarrow")


def finish(plan, output, **options):
    """The report of a run and its commits."""
    report = run(plan, Spec(str(output)), output, EngineConfig(**options))
    return report, list(settle(plan, output, report))


def test_a_plan_is_read_back_and_told_from_another(tmp_path):
    plan = Plan([Unit("000000", ("a\udcff.png", "b"), 0, 2, "1@2", {"names": ["ü"]}), Unit("000001")])
    plan.write(tmp_path / "plan.parquet")
    again = Plan.read(tmp_path / "plan.parquet")
    assert again.units == plan.units
    assert again.digest() == plan.digest()
    assert Plan(plan.units[:1]).digest() != plan.digest()


def test_of_two_attempts_one_counts_and_the_other_leaves_nothing(tmp_path):
    plan, commits = plan_of(1), Commits(tmp_path)
    commits.begin()
    spec = Spec(str(tmp_path))

    def late(unit, attempt):
        assert commits.attempt(unit, spec)  # another one is done meanwhile
        return spec(unit, attempt)

    assert not commits.attempt(plan.units[0], late)
    assert not commits.attempt(plan.units[0], spec)
    assert spec.tries("000000") == 2
    (left,) = (tmp_path / ".attempts").iterdir()
    assert left.name == f"000000.{commits.read('000000')['attempt']}.made-000000.txt"
    assert commits.settle("000000")["files"] == commits.settle("000000")["files"]


def test_an_interruption_right_after_the_commit_keeps_its_files(tmp_path, monkeypatch):
    commits = Commits(tmp_path)
    commits.begin()
    link = os.link

    def interrupted(*names):
        link(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commits.attempt(plan_of(1).units[0], Spec(str(tmp_path)))
    monkeypatch.undo()
    assert commits.settle("000000")["records"] == 3


def test_a_run_goes_on_where_it_was_stopped_and_clears_what_does_not_count(tmp_path):
    plan = plan_of(5, refuses=[3])
    with pytest.raises(UserError, match="this cannot be done"):
        finish(plan, tmp_path, kind="none")
    orphan = Attempt(tmp_path, "000004").path("made-000004.txt")
    orphan.write_text("of a process that was killed")
    os.utime(orphan, (0, 0))
    plan = plan_of(5)
    check(plan, tmp_path, *finish(plan, tmp_path, kind="none"))
    before = tree(tmp_path)
    check(plan, tmp_path, *finish(plan, tmp_path, kind="none"))
    assert tree(tmp_path) == before
    assert [Spec(str(tmp_path)).tries(unit.id) for unit in plan] == [1, 1, 1, 2, 1]


def test_what_is_missing_or_was_changed_is_named(tmp_path):
    plan = plan_of(3)
    report, _ = finish(plan, tmp_path, kind="none")
    (tmp_path / "made-000001.txt").write_text("shorter")
    message = r"made-000001\.txt: expected 18 bytes, got 7 bytes; remove .*000001\.json, and the same command"
    with pytest.raises(UserError, match=message):
        list(settle(plan, tmp_path, report))
    (tmp_path / "commits" / "000001.json").unlink()
    with pytest.raises(UserError, match="the units 000001 are missing"):
        list(settle(plan, tmp_path, report))
    check(plan, tmp_path, *finish(plan, tmp_path, kind="none"))


def test_a_file_system_without_exclusive_creation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdoctor.engine.commits.create_exclusively", lambda path, data: True)
    with pytest.raises(UserError, match="lets two processes create one file"):
        finish(plan_of(1), tmp_path)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.undo()
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=r"expected a file system on which .* got Operation not permitted"):
        finish(plan_of(1), tmp_path)


def test_two_drivers_at_once_do_every_unit_once(tmp_path):
    plan = plan_of(24)
    (tmp_path / "out").mkdir()
    spec, reports = Spec(str(tmp_path / "out"), seconds=0.002), []
    threads = [
        threading.Thread(target=lambda: reports.append(run(plan, spec, tmp_path / "out", EngineConfig())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.done for report in reports] == [24, 24]
    check(plan, tmp_path / "out", reports[0], list(settle(plan, tmp_path / "out", reports[0])))


def test_the_main_process_does_what_a_dead_one_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "SILENT", 0.2)
    plan, commits = plan_of(6), Commits(tmp_path)
    commits.begin()
    for number in (1, 0):
        units = commits.missing(plan)
        with progress(6, desc="", unit="", enabled=False) as bar:
            if number == 1:  # dies after one of its three
                units = units[:2]
            ranks.run(plan, Tally(commits, units, 3, bar), Spec(str(tmp_path)), number, 2)
    assert sorted(commits.done()) == [unit.id for unit in plan]
    assert all(Spec(str(tmp_path)).tries(unit.id) == 1 for unit in plan)
    assert "dead process" in commits.read("000005")["worker"]


def test_a_unit_is_given_up_after_so_many_deaths_and_none_that_was_committed(tmp_path):
    (unit, other), commits = plan_of(2), Commits(tmp_path)
    commits.begin()
    with progress(2, desc="", unit="", enabled=False) as bar:
        tally = Tally(commits, [], 3, bar)
        for _ in range(2):
            tally.died(unit, "it ended")
            assert tally.waiting.popleft() == unit
        tally.died(unit, "it ended", "a last word")
        commits.attempt(other, Spec(str(tmp_path)))
        tally.died(other, "it ended after its commit")
    assert not tally.waiting
    assert commits.reasons() == {"000000": "it ended, 3 times"}
    assert json.loads((tmp_path / "failed" / "000000.json").read_text())["log"] == "a last word"


def test_workers_that_die_before_they_are_ready_end_the_run(tmp_path):
    with progress(1, desc="", unit="", enabled=False) as bar:
        tally = Tally(Commits(tmp_path), [], 3, bar)
        tally.never_ready("exit code 1")
        tally.never_ready("exit code 1")
        tally.ready()
        tally.never_ready("exit code 1")
        tally.never_ready("exit code 1")
        with pytest.raises(UserError, match=r"3 workers in a row .* exit code 1 \(no such library\)"):
            tally.never_ready("exit code 1", "a\nno such library\n")


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match="No space left") as error:
        finish(plan_of(2, full=[1]), tmp_path, kind="none")
    assert error.value.filename == str(tmp_path)


def test_a_dead_worker_is_replaced_and_a_unit_that_kills_is_given_up(tmp_path):
    plan = plan_of(5, poison=[2])
    report, commits = finish(plan, tmp_path, kind="processes", actors=1, retries=1)
    check(plan, tmp_path, report, commits, ["000002"])
    assert report.deaths == 1
    assert "SIGKILL" in report.failed["000002"]
    assert [Spec(str(tmp_path)).tries(unit.id) for unit in plan] == [1, 1, 1, 1, 1]
    # It stays given up until it is asked for again.
    assert finish(plan, tmp_path, kind="none")[0].failed == report.failed
    healed = plan_of(5)
    check(healed, tmp_path, *finish(healed, tmp_path, kind="none", retry_failed=True))


@pytest.mark.study
def test_units_that_hang_or_raise_are_given_up_with_their_last_words(tmp_path):
    plan = plan_of(8, hangs=[1], raises=[3], poison=[5], once=[6])
    report, commits = finish(plan, tmp_path, kind="processes", actors=2, retries=2, unit_timeout=2)
    assert report.deaths == 7
    check(plan, tmp_path, report, commits, ["000001", "000003", "000005"])
    assert report.failed["000001"] == "it took more than 2 seconds, 2 times"
    assert report.failed["000003"] == "RuntimeError: an odd unit, 2 times"
    said = json.loads((tmp_path / "failed" / "000003.json").read_text())
    assert "Traceback" in said["log"]
    with pytest.raises(UserError, match="No space left on device"):
        finish(plan_of(3, full=[1]), tmp_path / "full", kind="processes", actors=1)
    with pytest.raises(UserError, match="no unit could be done; 000000: RuntimeError"):
        finish(plan_of(1, raises=[0]), tmp_path / "none", kind="processes", actors=1, retries=1)


DRIVER = """
import sys
from pathlib import Path
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.running import run
from support.engine import Spec, plan_of

if __name__ == "__main__":
    output = Path(sys.argv[1])
    output.mkdir(exist_ok=True)
    run(plan_of(40), Spec(str(output), 0.3), output, EngineConfig(kind="processes", actors=2))
"""


@pytest.mark.study
@pytest.mark.parametrize("whom", ["workers", "driver"])
def test_killed_at_random_moments_every_unit_counts_once(tmp_path, whom):
    import random

    chance, output, kills = random.Random(0), tmp_path / "out", 0
    (tmp_path / "driver.py").write_text(DRIVER)
    for number in range(7):
        driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py"), str(output)], env=environment())
        while driver.poll() is None and number < 6:
            time.sleep(chance.uniform(3, 8) if whom == "driver" else chance.uniform(1, 2))
            children = _children(driver.pid)
            if whom == "driver":
                driver.kill()
            elif children:
                os.kill(chance.choice(children), 9)
            kills += driver.poll() is None or driver.returncode == -9
        if driver.wait() == 0:
            break
    assert driver.returncode == 0
    assert kills >= 2
    plan = plan_of(40)
    check(plan, output, *finish(plan, output, kind="none"))


def _children(pid):
    """The workers of a driver: children of the process from which they are forked."""
    return [worker for child in _of(pid) if "forkserver" in _command(child) for worker in _of(child)]


def _of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def _command(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def test_work_that_uses_no_accelerator_takes_the_cores(monkeypatch):
    for accelerators, with_them in ((0, 2), (1, 1), (4, 4)):
        monkeypatch.setattr(devices, "accelerator_count", lambda count=accelerators: count)
        assert _default_count(True, cores=8) == with_them
        assert _default_count(False, cores=8) == 8
    assert _default_count(False, cores=96) == 16
    assert not InjectWorkerSpec.uses_accelerator
    assert not JoinWorkerSpec.uses_accelerator
