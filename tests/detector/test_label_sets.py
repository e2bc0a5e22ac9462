"""`diagnose --write shards`: masks beside a set of pictures, which stay where they are; any engine makes the same."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffdoctor.annotate.pool import Diagnosis
from diffdoctor.cli import main
from diffdoctor.data.codec import decode
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.detector import ConvDetector
from diffdoctor.detector.commands.diagnose_shards import _LabelWorker
from support.pictures import tree
from support.sets import write_set_and_detector

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_set_and_detector(folder, pictures=5, shard_size=4)
    # As others write them: each key once in its shard, and again in the next.
    for number in range(2):
        with tarfile.open(folder / f"theirs-{number}.tar", "w") as shard:
            for key, suffix, kind in (("000", "input.jpg", "jpeg"), ("001", "webp", "webp")):
                buffer = io.BytesIO()
                Image.new("RGB", (24, 16), (40 * number, 200, 90)).save(buffer, kind)
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = buffer.tell()
                shard.addfile(member, io.BytesIO(buffer.getvalue()))
    return folder


def label(files, output, *options, pictures=("pictures", "set", "theirs-0.tar", "theirs-1.tar")):
    words = ["diagnose", *(f"{files}/{name}" for name in pictures), "--detector", f"{files}/detector"]
    return main([*words, "--output", str(output), "--write", "shards", "--shard_size", "3", "--gallery", "3", *options])


@pytest.fixture(scope="module")
def labels(files):
    assert label(files, files / "labels", "--round", "2") == 0
    return files / "labels"


def test_a_label_set_has_the_detectors_maps_and_the_pictures_as_they_are(files, labels):
    data = ShardData(labels)
    records = {r["key"]: r for r in map(json.loads, (labels / "diagnosis.jsonl").read_text().splitlines())}
    assert len(data) == len(records) == 5 + 10 + 4
    theirs, proposals = ShardData(files / "set"), Diagnosis(labels)
    sources = {f"set/{key}": theirs[index]["picture"] for index, key in enumerate(theirs.keys)}
    detector = ConvDetector.from_pretrained(files / "detector")
    for index, key in enumerate(data.keys):
        sample, record = data[index], records[key]
        if key in theirs.keys:  # the set's own keys, which are unique in it
            picture = sources[f"set/{key}"]
        elif record["path"].endswith(".tar"):
            pictures = {s["key"]: s["picture"] for s in read_shards(record["path"], masks="ignored")}
            picture = pictures[record["name"].rpartition("/")[2]]
        else:
            picture = decode(record["path"], "RGB")
        assert np.array_equal(sample["picture"], picture)
        confidence = detector.confidence(picture)[0, 0].numpy()
        assert np.abs(sample["mask"] - confidence).max() <= 0.51 / 255
        assert (sample["label"], sample["round"], sample["name"]) == ("pseudo", 2, record["name"])
        assert record["mean"] == sample["mean"]
        assert np.array_equal(proposals.map(record["name"]), np.rint(sample["mask"] * 255))
    assert {sample["category"] for sample in map(data.__getitem__, range(5))} == {"cats", "dogs"}
    # The masks alone are here.
    with tarfile.open(labels / "shard-000000.tar") as shard:
        assert [name.partition(".")[2] for name in shard.getnames()] == ["mask.png", "json"] * 3


def test_pictures_are_found_from_another_working_folder_too(tmp_path, monkeypatch):
    worker, sample = _LabelWorker(SimpleNamespace(output="labels"), None), {"path": str(tmp_path / "a.tar")}
    for folder, found in ((tmp_path, "../a.tar"), (tmp_path / "one" / "two", "../../../a.tar")):
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        assert worker._picture_at(sample | {"picture_at": (512, 9)}) == (found, 512, 9)


def test_maps_of_the_gallery_alone_are_files(labels):
    found = tree(labels)
    assert sum(name.startswith("maps/") for name in found) == sum(name.startswith("overlays/") for name in found) == 3
    metrics = json.loads(found["metrics.json"])
    assert (metrics["pictures"], metrics["units"], metrics["failed_units"]) == (19, 2 + 3 + 2, {})
    assert found["gallery.html"].count(b"largest confidence") >= 3


def test_processes_make_the_same_files_as_one(files, labels, tmp_path):
    assert label(files, tmp_path / "out", "--round", "2", "--engine", "processes") == 0
    ours, theirs = tree(tmp_path / "out"), tree(labels)
    assert ours.keys() == theirs.keys()
    other = {name for name in ours if ours[name] != theirs[name]}
    # Where the pictures are is said from the folder; who did what, and when.
    assert all(name.startswith(("commits/", "parts/", "manifest", "config", "gallery", "run")) for name in other), other
    data, expected = ShardData(tmp_path / "out"), ShardData(labels)
    assert list(data.keys) == list(expected.keys)
    assert all(np.array_equal(data[i]["picture"], expected[i]["picture"]) for i in range(len(data)))


def test_train_detector_takes_it_and_streams_refuse_it(files, labels, tmp_path, capsys):
    words = ["train-detector", str(labels), "--architecture", "conv", "--min_side", "16", "--training.size", "16"]
    words += ["--training.steps", "1", "--training.batch_size", "2", "--validation_share", "0"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert main([*words, "--output", str(tmp_path / "other"), "--resampled", "true"]) == 2
    assert "a label set, whose pictures are elsewhere" in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused_in_one_line(files, labels, capsys):
    before = tree(labels)
    for options, named in (
        (("--round", "2", "--tile", "64"), "tile (expected None, got 64)"),
        (("--round", "3"), "round (expected 2, got 3)"),
        (("--round", "2", "--write", "maps"), "batch_size, bits, overlays, plan, round, write"),
    ):
        assert label(files, labels, *options) == 2
        assert f"of a run with another {named};" in capsys.readouterr().err
    assert label(files, labels, "--round", "2", pictures=("pictures",)) == 2
    assert "of a run with another plan;" in capsys.readouterr().err
    assert tree(labels) == before
    assert label(files, labels, "--round", "2") == 0
    assert tree(labels) == before


def test_a_list_of_files_stands_for_looking_through_folders(files, tmp_path, capsys):
    import pyarrow as pa
    from pyarrow import parquet

    paths = sorted((files / "pictures").rglob("*.png"))[:3]
    columns = {"path": [str(path) for path in paths], "category": ["a", "b", None], "prompt": ["x", None, "y"]}
    parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert label(files, tmp_path / "out", "--files", str(tmp_path / "list.parquet"), pictures=()) == 0
    data = ShardData(tmp_path / "out")
    assert [data[i]["category"] for i in range(3)] == ["a", "b", ""]
    assert [data[i].get("prompt") for i in range(3)] == ["x", "", "y"]
    parquet.write_table(pa.table({"path": ["a.txt"]}), tmp_path / "list.parquet")
    assert label(files, tmp_path / "other", "--files", str(tmp_path / "list.parquet"), pictures=()) == 2
    assert "list.parquet: row 1: expected a path ending in .png" in capsys.readouterr().err
    for options, message in (
        (("--engine", "processes", "--write", "maps"), "write: expected shards with --engine processes, got maps"),
        (("--engine=none", "--address", "here:1"), "engine.address: expected none without --engine ray, got here:1"),
        (("--config", str(tmp_path / "o.yaml")), "engine: expected one of none, ranks, processes, ray, got 'nowhere'"),
    ):
        (tmp_path / "o.yaml").write_text("engine: nowhere")
        assert label(files, tmp_path / "other", *options) == 2
        assert message in capsys.readouterr().err
