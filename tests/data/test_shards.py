"""Shards: what is written comes back, in parts, from the middle, and without what a writer that failed had left."""

import io
import tarfile

import numpy as np
import pytest

from diffdoctor.data import tar as archive
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.tar_writer import TarWriter
from support.shards import samples_of

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


@pytest.mark.parametrize("picture_type", ["png", "webp", "jpg"])
def test_what_is_written_comes_back(tmp_path, picture_type):
    originals = list(samples_of(7))
    assert write_shards(originals, tmp_path / "set", shard_size=3, picture_type=picture_type) == 7
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "manifest.parquet",
        *(f"shard-{i:06d}.tar" for i in range(3)),
    ]
    stream, data = list(read_shards(tmp_path / "set", strict=True)), ShardData(tmp_path / "set")
    assert len(stream) == len(data) == 7
    for i in (6, 0, 3, 1, 2, 5, 4):
        for got in (stream[i], data[i]):
            if picture_type != "jpg":
                assert np.array_equal(got["picture"], originals[i]["picture"])
            assert got["picture"].shape == (12, 17, 3)
            assert np.abs(got["mask"] - originals[i]["mask"]).max() <= 0.5 / 255 + 1e-6
            for name in ("prompt", "category", "generator", "label", "round", "extra"):
                assert got[name] == originals[i][name]


def test_webdataset_reads_them_too(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    originals = list(samples_of(5))
    write_shards(originals, tmp_path / "set", shard_size=5)
    url = str(tmp_path / "set" / "shard-000000.tar")
    read = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert len(read) == 5
    for got, original in zip(read, originals, strict=True):
        assert np.array_equal(got["png"], original["picture"])
        assert got["json"]["prompt"] == original["prompt"]


def test_parts_share_the_shards_without_overlap(tmp_path):
    write_shards(samples_of(10), tmp_path / "set", shard_size=2)
    keys = [[s["key"] for s in read_shards(tmp_path / "set", split=(i, 3))] for i in range(3)]
    assert sorted(key for part in keys for key in part) == [f"{i:09d}" for i in range(10)]


def test_a_failed_writer_leaves_the_old_set_and_nothing_else(tmp_path):
    write_shards(samples_of(2), tmp_path / "set")

    def failing():
        yield from samples_of(1)
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="power"):
        write_shards(failing(), tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert len(list(read_shards(tmp_path / "set", strict=True))) == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"picture": np.zeros((4, 4, 3))}, "picture: expected .H, W, 3. uint8"),
        ({"mask": np.zeros((4, 5))}, "mask: expected"),
        ({"mask": np.full((12, 17), 1.2)}, r"mask: expected values in \[0, 1\]"),
        ({"key": "../../etc/passwd"}, "key: expected"),
        ({"label": "guess"}, "label: expected"),
    ],
)
def test_bad_samples_are_refused(tmp_path, change, match):
    sample = {**next(iter(samples_of(1))), **change}
    with pytest.raises(ValueError, match=match):
        write_shards([sample], tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_key_twice_is_refused(tmp_path):
    sample = {**next(iter(samples_of(1))), "key": "same"}
    with pytest.raises(ValueError, match="same"):
        write_shards([sample, sample], tmp_path / "set")


def test_memory_does_not_grow_with_the_set(tmp_path):
    import tracemalloc

    peaks = {}
    for count in (150, 600):
        write_shards(samples_of(count), tmp_path / str(count), shard_size=count)
        list(read_shards(tmp_path / str(count), split=(0, 2)))
        tracemalloc.start()
        read = sum(1 for _ in read_shards(tmp_path / str(count), strict=True))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == count
    # What grows is the set of keys that were seen, about 100 bytes each.
    assert peaks[600] - peaks[150] < 450 * 300


def test_a_shard_read_from_its_middle_gives_every_sample_once(tmp_path):
    write_shards(samples_of(9), tmp_path / "set", shard_size=9)
    path = tmp_path / "set" / "shard-000000.tar"
    firsts = set()
    for start in np.linspace(0, 0.999, 40):
        counts = SkipCounts()
        groups = list(archive.read_groups(path, True, counts, start))
        assert sorted(key for key, _ in groups) == [f"{i:09d}" for i in range(9)]
        assert all({"png", "mask.png", "json"} == set(members) for _, members in groups)
        order = [int(key) for key, _ in groups]
        assert order == [*range(order[0], 9), *range(order[0])]
        firsts.add(order[0])
    assert firsts == set(range(9))


def test_the_writer_holds_no_row_of_what_is_written(tmp_path):
    import tracemalloc

    def peak(count):
        tracemalloc.start()
        write_shards(samples_of(count, (3, 3)), tmp_path / str(count), shard_size=50)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(50)
    # A shard's rows of the manifest are held, and the hashes of up to 4096 keys.
    assert peak(700) - peak(350) < 350 * 150


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".set.diffdoctor-tmp-abcd1234").mkdir()
    (tmp_path / ".set.diffdoctor-tmp-abcd1234" / "shard-000000.tar").write_bytes(b"half")
    (tmp_path / ".other.diffdoctor-tmp-abcd1234").mkdir()
    write_shards(samples_of(2), tmp_path / "set")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.diffdoctor-tmp-abcd1234", "set"]


def test_the_writer_s_bytes_are_those_of_tarfile(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"{'k' * length}.{kind}" for length in (1, 80) for kind in ("png", "mask.png", "json")]
    members = {name: rng.bytes(size) for name, size in zip(names, (0, 1, 511, 512, 513, 12_000), strict=True)}
    writer = TarWriter(tmp_path / "ours.tar")
    ranges = {name: writer.add(name, data) for name, data in members.items()}
    writer.close()
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    written = (tmp_path / "ours.tar").read_bytes()
    assert written == (tmp_path / "theirs.tar").read_bytes()
    assert {name: written[offset : offset + size] for name, (offset, size) in ranges.items()} == members
    writer = TarWriter(tmp_path / "long.tar")
    with pytest.raises(ValueError, match="up to 100 bytes"):
        writer.add("k" * 101, b"")
    writer.close()
