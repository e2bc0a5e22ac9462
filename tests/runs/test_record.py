"""An output folder: whose it is, what is refused, what is deleted, and what is left alone."""

import json
import os
import subprocess
import sys

import pytest

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.record import RunFolder, differences
from diffdoctor.runs.units import Units

RESULTS = {"maps": None, "best": ["weights"], "table-*.csv": None}


def folder(path, identity=None, **options):
    return RunFolder(path, "test", {"seed": 0} if identity is None else identity, RESULTS, **options)


def tree(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def with_results(path, identity=None):
    run = folder(path, identity)
    run.begin({"asked": 1})
    (path / "maps").mkdir()
    (path / "maps" / "a.png").write_text("map")
    (path / "table-1.csv").write_text("1")
    return run


def test_differences_are_named_with_both_values_where_these_are_short():
    theirs = {"seed": 0, "digest": "0" * 64, "size": None, "kinds": ["a"], "gone": 1, "same": 2}
    ours = {"seed": 1, "digest": "1" * 64, "size": 8, "kinds": ["b"], "new": 1, "same": 2}
    expected = ["digest", "gone", "kinds", "new", "seed (expected 0, got 1)", "size (expected None, got 8)"]
    assert differences(theirs, ours) == expected


def test_the_same_run_resumes_and_keeps_what_is_there(tmp_path):
    run = with_results(tmp_path / "out", {"seed": 0, "sizes": (1, 2)})
    before = tree(tmp_path)
    again = folder(tmp_path / "out", {"sizes": [1, 2], "seed": 0})
    assert again.check()
    assert again.begin({"asked": 1}) == []
    assert tree(tmp_path) == before
    assert json.loads((tmp_path / "out" / "run.json").read_text())["run"] == run.kind


def test_an_option_that_came_later_and_is_not_given_makes_no_other_run(tmp_path):
    with_results(tmp_path)
    before = tree(tmp_path)
    for identity in ({"seed": 0, "later": None}, {"seed": 0}):
        assert folder(tmp_path, identity).check()
        folder(tmp_path, identity).begin()
    assert tree(tmp_path) == before


def test_results_of_another_run_are_refused_by_what_differs_and_nothing_changes(tmp_path):
    with_results(tmp_path / "out")
    before = tree(tmp_path)
    other = folder(tmp_path / "out", {"seed": 1, "more": True})
    message = r"out: holds maps and table-\*\.csv of a run with another more, seed \(expected 0, got 1\); choose"
    for call in (other.check, other.begin):
        with pytest.raises(UserError, match=message):
            call()
    assert tree(tmp_path) == before


def test_a_run_that_left_no_result_does_not_bind_the_next(tmp_path):
    folder(tmp_path / "out").begin()
    (tmp_path / "out" / "maps").mkdir()
    (tmp_path / "out" / "maps" / ".a.png.diffdoctor-tmp-0a1b2c3d.png").write_text("half")
    other = folder(tmp_path / "out", {"seed": 1})
    assert not other.check()
    assert other.begin() == []
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"] == {"seed": 1}
    assert tree(tmp_path / "out").keys() == {"run.json", "maps"}


def test_results_are_deleted_where_that_was_asked_for_and_nothing_else(tmp_path):
    with_results(tmp_path / "out")
    (tmp_path / "out" / "metrics.json").write_text("{}")
    for name in ("mine.txt", ".project.20240102.old", "maps2"):
        (tmp_path / "out" / name).write_text("mine")
    other = folder(tmp_path / "out", {"seed": 1})
    assert other.begin(overwrite=True) == ["seed (expected 0, got 1)"]
    assert tree(tmp_path / "out").keys() == {"run.json", "config.yaml", "mine.txt", ".project.20240102.old", "maps2"}
    other.remove()
    assert tree(tmp_path / "out").keys() == {"mine.txt", ".project.20240102.old", "maps2"}


@pytest.mark.parametrize("calls", range(12))
def test_deleting_that_is_cut_short_is_finished_by_the_next(tmp_path, monkeypatch, calls):
    class Killed(BaseException):
        pass

    left = [calls]

    def counted(function):
        def call(*arguments, **options):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)

        return call

    with_results(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        for module, name in ((os, "replace"), (os, "rmdir"), (os, "unlink"), (os, "open")):
            patch.setattr(module, name, counted(getattr(module, name)))
        folder(tmp_path / "out", {"seed": 1}).begin(overwrite=True)
        raise Killed
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    if identity == {"seed": 0}:
        # Nothing was begun.
        assert folder(tmp_path / "out").check()
        assert (tmp_path / "out" / "maps" / "a.png").exists()
    else:
        # It needs no leave to delete what is known to be void.
        folder(tmp_path / "out", {"seed": 1}).begin()
        assert tree(tmp_path / "out").keys() <= {"run.json", "config.yaml"}


@pytest.mark.parametrize(
    "text",
    ["[]", "not JSON", '{"seed": 0}', '{"run": "test", "identity": 5}', '{"run": "other", "identity": {"seed": 0}}'],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_json_of_somebody_else_is_never_replaced(tmp_path, text, overwrite):
    (tmp_path / "run.json").write_text(text)
    what = "a run of other, not" if "other" in text else "something else than"
    run = folder(tmp_path)
    for call in (run.check, run.begin):
        with pytest.raises(UserError, match=f"holds {what} a run of test"):
            call(overwrite=overwrite)
    assert tree(tmp_path) == {"run.json": text.encode()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_results_of_which_no_run_is_known_are_refused(tmp_path, overwrite):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "mine.png").write_text("mine")
    with pytest.raises(UserError, match=r"holds maps of another run \(no run\.json says of which\)"):
        folder(tmp_path).begin(overwrite=overwrite)
    (tmp_path / "maps" / "mine.png").rename(tmp_path / "mine.png")
    folder(tmp_path).check()
    with pytest.raises(UserError, match="holds something else than a run of test"):
        folder(tmp_path, exclusive=True).check(overwrite=overwrite)


def test_a_folder_that_is_replaced_as_a_whole_must_hold_nothing_else(tmp_path):
    run = folder(tmp_path)
    run.begin()
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "weights").write_text("")
    assert run.check()
    (tmp_path / "best" / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"best: would be replaced, but holds 'mine\.txt'"):
        run.begin()


def test_a_result_that_a_kill_kept_from_its_name_still_binds(tmp_path):
    with_results(tmp_path)
    hidden = tmp_path / ".maps.diffdoctor-old-0a1b2c3d"
    hidden.mkdir()
    (tmp_path / "maps").rename(hidden / "maps")
    (tmp_path / "table-1.csv").unlink()
    with pytest.raises(UserError, match="holds maps of a run with another seed"):
        folder(tmp_path, {"seed": 1}).begin()
    assert (hidden / "maps" / "a.png").exists()
    folder(tmp_path).begin()
    assert (tmp_path / "maps" / "a.png").read_text() == "map"
    assert not hidden.exists()


HIDDEN = (".vimrc.20240101.old", ".notes.deadbeef.tmp", ".a.diffdoctor-tmp-0a1b2c3d")


def test_leftovers_are_cleared_only_where_a_run_has_written(tmp_path):
    for name in HIDDEN:
        for where in (tmp_path, tmp_path / "thesis"):
            where.mkdir(exist_ok=True)
            (where / name).write_text("mine")
    before = tree(tmp_path)
    folder(tmp_path).begin()
    assert tree(tmp_path).items() >= before.items()
    (tmp_path / "maps" / "b").mkdir(parents=True)
    for name in HIDDEN:
        (tmp_path / "maps" / "b" / name).write_text("mine")
    folder(tmp_path).begin()
    left = {name for name in tree(tmp_path) if name.endswith(HIDDEN)}
    assert left == {f"thesis/{name}" for name in HIDDEN} | {f"{p}{n}" for p in ("", "maps/b/") for n in HIDDEN[:2]}


BEGINNER = """
import sys
from diffdoctor.runs.record import RunFolder
from pathlib import Path
with RunFolder(sys.argv[1], "test", {"seed": int(sys.argv[2])}, {"maps": None}) as run:
    run.begin()
    (run.path / "maps").mkdir(exist_ok=True)
    (run.path / "maps" / "theirs").touch()
    if sys.argv[3] == "stay":
        print("begun", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_what_was_checked_before_the_lock_is_checked_after_it(tmp_path, seed):
    pytest.importorskip("fcntl")
    with folder(tmp_path / "out") as run:
        assert not run.check()
        subprocess.run([sys.executable, "-c", BEGINNER, str(tmp_path / "out"), str(seed), "go"], check=True)
        before = tree(tmp_path)
        message = "another process has been at work there meanwhile" if seed == 0 else "a run with another seed"
        with pytest.raises(UserError, match=message):
            run.begin()
        assert tree(tmp_path) == before


def test_a_folder_in_which_another_process_is_at_work_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", BEGINNER, str(tmp_path / "out"), "0", "stay"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        with pytest.raises(UserError, match="out: another process is at work there"), folder(tmp_path / "out"):
            pass
        # One process of several that share the work locks for all.
        with folder(tmp_path / "out", main=False) as run:
            assert run.check()
        process.kill()
    with folder(tmp_path / "out") as run:
        run.begin()


def test_what_was_measured_is_known_of_this_run_alone(tmp_path):
    assert folder(tmp_path).finished() is None
    run = folder(tmp_path)
    run.begin()
    assert run.finished() is None
    (tmp_path / "metrics.json").write_text('{"rate": 0.5}')
    assert run.finished() == {"rate": 0.5}
    assert folder(tmp_path, {"seed": 1}).finished() is None
    for damaged in ("{", "[]", "[" * 100_000):
        (tmp_path / "metrics.json").write_text(damaged)
        with pytest.raises(UserError, match=r"metrics\.json: is damaged .*; remove it, and the same command"):
            run.finished()


def test_a_unit_is_done_when_its_file_is_whole(tmp_path):
    units = Units(tmp_path / "units", ".bin")
    assert units.done() == []
    with pytest.raises(RuntimeError), units.writing("a") as file:
        file.write(b"half")
        raise RuntimeError
    with units.writing("b", ".more") as file:
        file.write(b"beside it")
    assert units.missing("abc") == ["a", "b", "c"]
    with units.writing("b") as file:
        file.write(b"whole")
    assert units.done() == ["b"]
    assert units.missing("abc") == ["a", "c"]
    assert (units.path("b").read_bytes(), units.path("b", ".more").read_bytes()) == (b"whole", b"beside it")
