import contextlib
import errno
import json
import os

import pytest

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import (
    atomic_dir,
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    clear_leftovers,
    leftovers,
    refuse_foreign,
)


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "metrics.json"
    atomic_write_json(path, {"rate": 0.5})
    with pytest.raises(TypeError, match="JSON"):
        atomic_write_json(path, {"rate": object()})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"rate": 0.5}
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("writing", [atomic_path, atomic_dir])
@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "by a library"])
def test_a_full_disk_names_the_file(tmp_path, writing, wrapped):
    with pytest.raises((OSError, RuntimeError)) as raised, writing(tmp_path / "made"):
        try:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        except OSError as error:
            if wrapped:
                raise RuntimeError("the writer failed") from error
            raise
    error = raised.value.__cause__ if wrapped else raised.value
    assert (error.errno, error.filename) == (errno.ENOSPC, str(tmp_path / "made"))


def test_an_error_of_reading_keeps_its_own_name_or_none(tmp_path):
    for one in (OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full", "other"), OSError("nothing more")):
        filename = one.filename
        with pytest.raises(OSError) as raised, atomic_path(tmp_path / "made"):  # noqa: PT011
            raise one
        assert raised.value.filename == filename


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with atomic_dir(tmp_path / "stage") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "stage") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (tmp_path / "stage" / "a").read_text() == "old"
    with atomic_dir(tmp_path / "stage") as folder:
        (folder / "b").write_text("new")
    assert os.listdir(tmp_path / "stage") == ["b"]
    assert os.listdir(tmp_path) == ["stage"]


def test_a_folder_with_anything_but_our_files_is_refused(tmp_path):
    place = tmp_path / "detector"
    refuse_foreign(place, ("part-*",))
    place.mkdir()
    (place / "part-1").write_text("")
    refuse_foreign(place, ("part-*",))
    (place / "part-2").mkdir()
    with pytest.raises(UserError, match=r"detector: .*'part-2', which is none of the files"):
        refuse_foreign(place, ("part-*",))
    (place / "part-2").rmdir()
    (place / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"detector: .*'mine\.txt'"):
        refuse_foreign(place, ("part-*",))
    with pytest.raises(UserError, match="expected a folder or nothing, got a file"):
        refuse_foreign(place / "mine.txt", ("mine.txt",))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_mount_that_cannot_synchronise_folders_ends_no_run(tmp_path, monkeypatch, number):
    synchronise = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            atomic_write_text(tmp_path / "a", "x")
        return
    atomic_write_text(tmp_path / "a", "x")
    with atomic_dir(tmp_path / "b") as folder:
        (folder / "c").mkdir()
        (folder / "c" / "d").write_text("y")
    assert (tmp_path / "a").read_text() + (tmp_path / "b" / "c" / "d").read_text() == "xy"


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "name",
    [
        ".vimrc.20240101.old", ".notes.deadbeef.tmp", ".a.deadbeef.tmp.json", ".project.20240102.old",
        "a.diffdoctor-tmp-deadbeef", ".a.diffdoctor-tmp-notes", ".diffdoctor-tmp-deadbeef", ".diffdoctor-tmp.yaml",
    ],
)  # fmt: skip
def test_hidden_files_of_ones_own_are_no_leftovers(tmp_path, name):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / name).write_text("mine")
    (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "folder" / name / "was").write_text("mine")
    before = tree(tmp_path)
    clear_leftovers(tmp_path, deep=True)
    assert tree(tmp_path) == before


class Killed(BaseException):
    """Stands for kill -9: nothing is tidied."""


@pytest.mark.parametrize("name", ["set", "a" * 250, "ä" * 120], ids=["short", "long", "long in bytes"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_kill_leaves_is_known_by_its_mark_and_put_back_or_removed(tmp_path, monkeypatch, name, renames):
    with atomic_dir(tmp_path / name) as folder:
        (folder / "a").write_text("old")
    done, replace = [], os.replace

    def replacing(*arguments):
        if len(done) == renames:
            raise Killed
        done.append(arguments)
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        patch.setattr(type(tmp_path), "unlink", lambda *_, **__: None)
        with pytest.raises(Killed) if renames < 2 else contextlib.nullcontext(), atomic_dir(tmp_path / name) as folder:
            (folder / "a").write_text("new")
    left = leftovers(tmp_path)
    assert left == leftovers(tmp_path, name)
    assert len(left) == (1 if renames == 2 else 2)
    (tmp_path / "other").mkdir()
    clear_leftovers(tmp_path, "other")
    assert leftovers(tmp_path) == left
    clear_leftovers(tmp_path, name)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "other"])
    assert (tmp_path / name / "a").read_text() == ("new" if renames == 2 else "old")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_results_have_the_modes_of_the_umask_whoever_writes_them(tmp_path, mask):
    def secretive(path):
        """As safetensors does: a file for its owner alone, renamed to `path`."""
        path.with_suffix(".x").write_text("x")
        os.chmod(path.with_suffix(".x"), 0o600)
        os.replace(path.with_suffix(".x"), path)

    group = tmp_path / "group"
    group.mkdir()
    os.chmod(group, 0o2775)
    before = os.umask(mask)
    try:
        with atomic_dir(group / "set") as folder:
            secretive(folder / "a")
            (folder / "b").mkdir()
            secretive(folder / "b" / "c")
        with atomic_path(group / "d") as path:
            secretive(path)
    finally:
        os.umask(before)
    for path in group.rglob("*"):
        mode = path.stat().st_mode
        assert mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
        assert not path.is_dir() or mode & 0o2000, path


def test_a_path_that_is_no_unicode_has_one_that_is(tmp_path):
    from diffdoctor.runs.files import unicode_path

    with unicode_path(tmp_path) as same:
        assert same == tmp_path
    place = tmp_path / os.fsdecode(b"K\xe4se")
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    (place / "a.txt").write_text("x")
    with unicode_path(place / "a.txt") as link:
        str(link).encode()
        assert (link.suffix, link.read_text()) == (".txt", "x")
    assert not link.exists()
    assert (place / "a.txt").read_text() == "x"
