"""Which files of a folder are read, under which names, with which captions; and that training reads the same ones."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from diffdoctor.data.folders import names_of
from diffdoctor.data.sources import find_sources, read_source
from diffdoctor.data.tar import SkipCounts
from diffdoctor.maps import find_map, read_folder, write_map
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_json, file_name, ignores_case
from support.pictures import picture

Image = pytest.importorskip("PIL.Image")


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed=seed)).save(path, format="PNG")


def write_shard(path, names):
    data = io.BytesIO()
    Image.fromarray(picture()).save(data, "PNG")
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))


def record_of_a_run(folder, kind):
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "run.json", {"run": kind, "identity": {}})


def found(folder):
    """The names of the sources, and what was left out."""
    counts = SkipCounts()
    return [source.name for source in find_sources([folder], counts)], counts.reasons


def test_training_reads_what_diagnose_reads(tmp_path):
    for name in ("a.png", "B.JPG", "sub/c.TIFF", "sub/d.gif", "e.avif", ".hidden.png", "._a.png", "a.mask.png"):
        save(tmp_path / "set" / name)
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png"):
        save(tmp_path / "set" / name)
    for name in ("photo.heic", "x.eps", "notes.md"):
        (tmp_path / "set" / name).write_bytes(b"x")
    os.symlink("nowhere.png", tmp_path / "set" / "link.png")
    save(tmp_path / "elsewhere" / "f.png")
    os.symlink("../elsewhere", tmp_path / "set" / "linked")
    os.symlink("..", tmp_path / "set" / "sub" / "loop")
    names, left_out = found(tmp_path / "set")
    assert names == ["B", "a", "e", "linked/f", "sub/c", "sub/d"]
    assert left_out == {
        "a file of a format that is not read": 2,
        "a name that leads to no file": 1,
        "a linked folder that is read already": 1,
    }
    with pytest.warns(UserWarning, match=r"left out: .*2 x a file of a format that is not read \(first: .*photo\.heic"):
        records = read_folder(tmp_path / "set")
    assert [str(record.picture) for record in records] == [str(s.path) for s in find_sources([tmp_path / "set"])]
    assert [bool(record.confidence) for record in records] == [False, True, False, False, False, False]


def test_outputs_below_the_input_are_not_its_pictures(tmp_path):
    for name in (
        "a.png",
        "eval/pictures/before/0.png",
        "out/maps/a.png",
        "set/contact_sheet.png",
    ):
        save(tmp_path / name)
    write_shard(tmp_path / "set" / "shard-000000.tar", ["x.png"])
    for name, kind in (("eval", "evaluate model"), ("out", "diagnose"), ("set", "inject")):
        record_of_a_run(tmp_path / name, kind)
    names, left_out = found(tmp_path)
    assert names == ["a"]
    assert left_out == {f"an output folder of {kind}": 1 for kind in ("evaluate model", "diagnose", "inject")}
    with pytest.warns(UserWarning, match="an output folder of evaluate model") as warned:
        (record,) = read_folder(tmp_path, tmp_path / "out" / "maps")
    assert "of diagnose" not in str(warned[0].message)
    assert record.confidence == tmp_path / "out" / "maps" / "a.png"
    # Named itself, a set of shards is read, and other outputs are refused.
    assert found(tmp_path / "set")[0] == ["shard-000000"]
    assert found(str(tmp_path / "ev*" / "pictures"))[0] == ["before/0"]
    for folder in ("eval", "out"):
        with pytest.raises(UserError, match=rf"{folder}: expected a folder of pictures, got an output folder of"):
            find_sources([tmp_path / folder])
    with pytest.raises(UserError, match=r"got an output folder of inject \(see ShardRecords\)"):
        read_folder(tmp_path / "set")


def test_a_record_of_others_is_none_of_ours(tmp_path):
    for index, text in enumerate(('{"run": 5, "identity": {}}', '{"run": "x"}', "[]", "\xff", "[" * 10**5)):
        save(tmp_path / str(index) / "a.png")
        (tmp_path / str(index) / "run.json").write_text(text, encoding="latin-1")
    assert found(tmp_path) == ([f"{index}/a" for index in range(5)], {})


def test_names_tell_all_pictures_apart(tmp_path):
    def names(*files):
        return names_of([tmp_path / name for name in files], tmp_path)

    assert names("a.jpg", "b.png") == ["a", "b"]
    assert names("a.jpg", "a.png") == ["a.jpg", "a.png"]
    assert names("a.jpg", "a.png", "a.png.png") == ["a.jpg", "a.png", "a.png.png"]
    assert names("a.png", "a.png.png") == ["a", "a.png"]
    assert names("s.tar", "s/x.png") == ["s.tar", "s/x"]
    assert names("s.tar", "s.png", "s/x.png") == ["s.tar", "s.png", "s/x"]
    assert names("s.tar", "s/t.tar", "s/t/x.png") == ["s.tar", "s/t.tar", "s/t/x"]
    assert names("v.mp4", "v/x.png", "w.mov") == ["v.mp4", "v/x", "w"]
    # Where letter case does not count, their maps would be one file; a suffix alone does not help the last two.
    assert names("A.jpg", "a.png", "B.png", "b.png") == ["A.jpg", "a.png", "B", "b"]
    assert names("D/a.jpg", "d/a.png") == ["D/a", "d/a"]  # which no folder by itself would say
    assert names("e\u0301.jpg", "\u00e9.png") == ["e\u0301.jpg", "\u00e9.png"]


def test_a_video_beside_a_picture_of_its_name_takes_no_map_away(tmp_path):
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.mp4").write_bytes(b"")
    write_map(tmp_path / "maps" / "a.png.png", np.zeros((3, 4)))  # as diagnose, which reads both, calls it
    (record,) = read_folder(tmp_path / "set", tmp_path / "maps")
    assert record.confidence == find_map(record.picture, tmp_path / "maps") == tmp_path / "maps" / "a.png.png"


def test_each_picture_gets_the_map_of_its_own_name(tmp_path):
    for name in ("a.jpg", "a.png", "a.png.png", "b.png"):
        save(tmp_path / "set" / name)
    for name in ("a.jpg", "a.png", "a.png.png", "b"):
        write_map(tmp_path / "maps" / f"{name}.png", np.zeros((3, 4)))
    records = read_folder(tmp_path / "set", tmp_path / "maps")
    expected = ["a.jpg.png", "a.png.png", "a.png.png.png", "b.png"]
    assert [record.confidence.name for record in records] == expected
    assert [find_map(record.picture, tmp_path / "maps").name for record in records] == expected
    for name in ("a.jpg", "a.png.png"):
        (tmp_path / "maps" / f"{name}.png").unlink()
    # One map of the stem is that of both pictures, and never another picture's own.
    write_map(tmp_path / "maps" / "a.png", np.zeros((3, 4)))
    found = [
        record.confidence and record.confidence.name for record in read_folder(tmp_path / "set", tmp_path / "maps")
    ]
    assert found == ["a.png", "a.png.png", None, "b.png"]


def test_a_stray_archive_hides_no_picture(tmp_path):
    for index in range(3):
        save(tmp_path / f"{index}.png")
    write_shard(tmp_path / "notes.tar", ["readme.md"])
    write_shard(tmp_path / "B.TAR", ["x.png"])
    (tmp_path / "more.tar.gz").write_bytes(b"x")
    names, left_out = found(tmp_path)
    assert names == ["0", "1", "2", "B", "notes"]
    assert left_out == {"a file of a format that is not read": 1}
    counts, read = SkipCounts(), []
    for source in find_sources([tmp_path]):
        read += [sample["name"] for sample in read_source(source, counts=counts)]
    assert read == ["0", "1", "2", "B/x"]
    assert counts.reasons == {"a shard without pictures": 1}


def test_a_place_that_is_named_twice_is_read_once(tmp_path):
    for name in ("a[1].png", "b*.png", "c.png"):
        save(tmp_path / "set" / name)
        (tmp_path / "set" / name).with_suffix(".txt").write_text("a cat")
    place = tmp_path / "set"
    names = ["a[1]", "b*", "c"]
    for paths in ([place, place], [place, place / "a[1].png"], sorted(place.iterdir()), [f"{place}/*"], [f"{place}/."]):
        assert [source.name for source in find_sources(paths)] == names
    with pytest.raises(UserError, match=r"c\.txt: expected pictures .* got none here"):
        find_sources([place / "c.txt"])
    save(tmp_path / "other" / "c.png")
    with pytest.raises(UserError, match="has the same name as"):
        find_sources([place, tmp_path / "other"])


def test_captions_are_read_alike(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from\u2028metadata"}) + "\n")
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "b.txt").write_bytes("\ufeffein Käse\n".encode())
    prompts = [sample["prompt"] for source in find_sources([tmp_path]) for sample in read_source(source)]
    assert prompts == [record.caption for record in read_folder(tmp_path)] == ["from\u2028metadata", "ein Käse", ""]
    (tmp_path / "c.txt").write_bytes("caf\xe9".encode("cp1252"))
    counts = SkipCounts()
    (last,) = read_source(find_sources([tmp_path])[2], counts=counts)
    assert last["prompt"] == ""
    assert counts.reasons == {"a caption that cannot be read": 1}
    assert "c.txt" in counts.examples["a caption that cannot be read"]
    assert "line 1" in counts.examples["a caption that cannot be read"]
    with pytest.raises(UserError, match=r"c\.txt, line 1: expected text in UTF-8"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match=r"c\.txt: a caption that cannot be read"):
        list(read_source(find_sources([tmp_path])[2], strict=True))


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    from diffdoctor.data import folders

    save(tmp_path / "a.png")
    (tmp_path / "locked").mkdir()
    listdir = os.listdir
    denied = PermissionError(13, "Permission denied")

    def refusing(path):
        if str(path).endswith("locked"):
            raise denied
        return listdir(path)

    monkeypatch.setattr(folders.os, "listdir", refusing)
    assert found(tmp_path) == (["a"], {"a folder that cannot be read": 1})


def test_letter_case_is_looked_up_where_the_folder_is(tmp_path, monkeypatch):
    assert not ignores_case(tmp_path / "Not There")
    monkeypatch.setattr(os.path, "samefile", lambda path, other: str(path).lower() == str(other).lower())
    assert ignores_case(tmp_path / "Not There")


def test_no_file_name_is_longer_than_a_file_system_takes():
    assert file_name("a/b", ".png") == "a/b.png"
    long = "k" * 251
    assert file_name(long, ".png") == f"{long}.png"
    for name in ("k" * 252, "ü" * 200, "x/" + "y" * 300 + "/z"):
        short = file_name(name, ".png")
        assert all(len(os.fsencode(part)) <= 255 for part in short.split("/"))
        assert short != file_name(name + "!", ".png")
