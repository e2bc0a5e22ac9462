"""Sets as wholes: faults are found, sums are right, duplicates are named, and joined sets hold the same bytes."""

import json
import os
import shutil

import numpy as np
import pytest

from diffdoctor.cli import main
from diffdoctor.data.identity import picture_hash, picture_uid
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.detector.balance import category_statistics
from diffdoctor.sets.duplicates import clusters_of
from support.pictures import tree

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


def texture(seed, side=48):
    """A picture (side, side, 3) uint8 like no other, and smooth enough to have a perceptual hash of its own."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def samples(seeds, labelled=True, category=lambda seed: ("cat", "dog", "sign")[seed % 3]):
    for seed in seeds:
        sample = {"picture": texture(seed), "key": f"{seed:04d}", "category": category(seed), "generator": "G"}
        mask = np.zeros((48, 48), np.float32)
        if labelled and seed % 2:
            mask[8 : 8 + 4 * (seed % 5 + 1), 8:40] = 1
        yield sample | {"mask": mask}


@pytest.fixture
def data(tmp_path):
    write_shards(samples(range(9)), tmp_path / "data", shard_size=4)
    return tmp_path / "data"


def command(*words):
    return main(["set", *map(str, words)])


def joined(folders, output, *options):
    assert command("join", *folders, "--output", output, "--shard_size", 4, *options) == 0
    return ShardData(output)


def test_joined_sets_hold_the_same_bytes_and_may_be_read_like_any(data, tmp_path, capsys):
    write_shards(samples(range(20, 25)), tmp_path / "more", picture_type="jpg")
    result, sources = (
        joined([data, tmp_path / "more"], tmp_path / "out"),
        [ShardData(data), ShardData(tmp_path / "more")],
    )
    originals = [(each, index) for each in sources for index in range(len(each))]
    assert len(result) == len(originals) == 14
    for index, (source, row) in enumerate(originals):
        ours, theirs = result.members(index), source.members(row)
        assert json.loads(ours.pop("json")) == json.loads(theirs.pop("json"))
        assert ours == theirs
        assert np.array_equal(result[index]["mask"], source[row]["mask"])
    assert command("check", tmp_path / "out", "--pixels", "--hashes") == 0
    assert "14 pictures, no faults" in capsys.readouterr().out
    before = tree(tmp_path / "out")
    joined([data, tmp_path / "more"], tmp_path / "out")
    assert tree(tmp_path / "out") == before
    assert command("join", data, "--output", tmp_path / "out") == 2
    assert "of a run with another chosen, plan;" in capsys.readouterr().err


def test_a_picture_that_several_have_takes_the_last_label(data, tmp_path, capsys):
    theirs = [sample | {"mask": np.full((48, 48), 0.5, np.float32), "label": "human"} for sample in samples([3, 4])]
    write_shards(theirs, tmp_path / "labels")
    result = joined([data, tmp_path / "labels"], tmp_path / "out")
    assert len(result) == 9
    assert [result[i]["label"] for i in range(9)] == [
        "real",
        "injected",
        "real",
        "human",
        "human",
        *["injected", "real"] * 2,
    ]
    assert np.array_equal(result[3]["picture"], texture(3))
    assert abs(result[4]["mask"] - 0.5).max() < 0.01
    # Another picture of the same key is no label of this one.
    write_shards((s | {"key": "0003"} for s in samples([33])), tmp_path / "other")
    assert command("join", data, tmp_path / "other", "--output", tmp_path / "two") == 2
    assert "0003: expected one picture of this key, got two, in " in capsys.readouterr().err
    both = joined([data, tmp_path / "other"], tmp_path / "two", "--prefix", "true")
    assert [both.keys[3], both.keys[9]] == ["00_0003", "01_0003"]


def test_sums_are_those_of_the_pictures(data, tmp_path, capsys):
    result = joined([data], tmp_path / "out")
    assert command("stats", tmp_path / "out", "--output", tmp_path / "page", "--previous", data, "--samples", 4) == 0
    metrics = json.loads((tmp_path / "page" / "metrics.json").read_text())
    found = [result[index] for index in range(9)]
    means, flags = [s["mask"].mean() for s in found], [(s["mask"] >= 0.5).mean() >= 0.02 for s in found]
    expected = {s.category: s for s in category_statistics([s["category"] for s in found], means, flags)}
    assert (metrics["pictures"], metrics["flagged"], metrics["labels"]) == (9, 4, {"injected": 4, "real": 5})
    assert [each["category"] for each in metrics["categories"]] == list(expected)
    for each in metrics["categories"]:
        theirs = expected[each["category"]]
        assert (each["pictures"], each["flagged"], each["verdict"]) == (theirs.pictures, theirs.flagged, theirs.verdict)
        assert each["z"] == pytest.approx(theirs.z, abs=1e-4)
    assert sum(metrics["areas"]) == 9
    assert metrics["areas"][0] == 5
    assert all(row["flagged"][0] == row["flagged"][1] for row in metrics["drift"])
    page = (tmp_path / "page" / "quality.html").read_text()
    assert page.count("data:image/jpeg") == 4
    assert "Since the round before" in page
    assert "9 pictures, 4 flagged" in capsys.readouterr().out


def test_what_is_not_as_it_should_be_is_named(data, tmp_path, capsys):
    joined([data], tmp_path / "out")
    for break_it, options, message in (
        (lambda f: (f / "shard-000001.tar").unlink(), (), "shard-000001.tar is missing, of "),
        (lambda f: (f / "shard-000001.tar").write_bytes(b"x" * 2000), (), "0004: its picture would end at byte "),
        (_flip, ("--hashes",), "shard-000000.tar has other bytes than those that were committed"),
        (_flip, ("--pixels",), "0000: another picture than the one that was recorded"),
        (_twice, (), "the key '0000' comes twice"),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / "broken")
        break_it(tmp_path / "broken")
        assert command("check", tmp_path / "out", tmp_path / "broken", *options) == 2
        said = capsys.readouterr()
        assert f"{tmp_path}/broken: {message}" in said.err
        assert f"{tmp_path}/out: 9 pictures, no faults" in said.out
        shutil.rmtree(tmp_path / "broken")


def _flip(folder):
    """Another picture, of the same size in bytes, in the place of the first."""
    from diffdoctor.data.codec import encode_picture

    data = ShardData(folder)
    offset, size = data.byte_ranges[0, :2]
    other = encode_picture(np.zeros((48, 48, 3), np.uint8), "png")
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[offset : offset + size] = other + bytes(size - len(other))
    shard.write_bytes(content)


def _twice(folder):
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(folder / "manifest.parquet")
    keys = table.column("key").to_pylist()
    keys[5] = keys[0]
    parquet.write_table(
        table.set_column(table.column_names.index("key"), "key", pa.array(keys)), folder / "manifest.parquet"
    )


def test_duplicates_are_named_and_left_out_and_test_pictures_refused(data, tmp_path, capsys):
    more = tmp_path / os.fsdecode(b"m\xf6re")  # no Unicode
    near = texture(2).astype(np.int16) + np.random.default_rng(0).integers(-2, 3, (48, 48, 3))
    extra = [
        {"picture": texture(1), "key": "again"},
        {"picture": np.clip(near, 0, 255).astype(np.uint8), "key": "near"},
    ]
    write_shards([*extra, *samples([40])], more)
    assert command("dedup", data, more, "--output", tmp_path / "dedup", "--distance", 4) == 0
    assert "2 of 12 pictures are superfluous, 1 of them equal" in capsys.readouterr().err
    result = joined([data, more], tmp_path / "out", "--without", tmp_path / "dedup")
    uids = {picture_uid(result.picture(index)) for index in range(len(result))}
    assert len(result) == len(uids) == 10
    assert picture_uid(texture(1)) in uids
    write_shards([*samples([50]), extra[1]], tmp_path / "test")
    words = ("dedup", data, "--test", tmp_path / "test", "--output", tmp_path / "leaks")
    assert command(*words, "--distance", 4) == 2
    assert "got 1, such as 0002 in " in capsys.readouterr().err
    assert json.loads((tmp_path / "leaks" / "metrics.json").read_text())["leaks"] == 1
    assert command(*words, "--distance", "null") == 0


def test_clusters_are_those_of_all_pairs_that_share_a_band():
    rng = np.random.default_rng(0)
    bases = rng.integers(-(2**63), 2**63, 40)
    flips = [np.bitwise_or.reduce(np.int64(1) << rng.integers(0, 63, rng.integers(0, 7))) for _ in range(200)]
    hashes = bases[rng.integers(0, 40, 200)] ^ np.array(flips, np.int64)
    uids = np.array([f"{number:03d}" for number in range(200)], object)
    uids[7] = uids[150]
    found = clusters_of(uids, hashes, 5)
    bands = (hashes.view(np.uint64)[:, None] >> (16 * np.arange(4, dtype=np.uint64))) & np.uint64(0xFFFF)
    apart = np.array(
        [[bin(int(a) ^ int(b)).count("1") for b in hashes.view(np.uint64)] for a in hashes.view(np.uint64)]
    )
    linked = (apart <= 5) & (bands[:, None] == bands[None]).any(2) | (uids[:, None] == uids[None])
    parents = np.arange(200)
    for _ in range(200):  # each takes the lowest among those that it is linked with
        parents = np.where(linked, parents[None], 200).min(1)
    assert np.array_equal(found, parents)
    assert picture_hash(texture(0)) != picture_hash(texture(1))
