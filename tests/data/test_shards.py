"""Shards: what is written comes back; broken and hostile archives are left out, counted, and write nothing."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import torch

from diffdoctor.data import codec
from diffdoctor.data import tar as archive
from diffdoctor.data.manifest import read_manifest
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.data.stream import ShardStream
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.tar_writer import TarWriter
from diffdoctor.runs.errors import UserError

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


def samples_of(count, size=(12, 17), seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        mask = rng.uniform(size=size).astype(np.float32) * (i % 2)
        yield {
            "picture": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            "mask": mask,
            "prompt": f"a picture of ünïcode № {i}",
            "category": ("cat", "dog")[i % 2],
            "generator": "test",
            "label": ("real", "injected")[i % 2],
            "round": i // 3,
            "extra": {"seed": i, "list": [1, 2]},
        }


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


def test_the_manifest_has_a_row_for_each_picture(tmp_path):
    write_shards(samples_of(6), tmp_path / "set", shard_size=4)
    rows = read_manifest(tmp_path / "set")
    assert rows["shard"] == ["shard-000000.tar"] * 4 + ["shard-000001.tar"] * 2
    assert rows["category"] == ["cat", "dog"] * 3
    assert [m > 0 for m in rows["mask_max"]] == [False, True] * 3
    assert set(rows["height"]) == {12}


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


def members_of(key, **changes):
    """A good sample's members {name: bytes}, with changes: extension with dots as __, None leaves it out."""
    picture = np.full((20, 20, 3), 7, np.uint8)
    members = {
        f"{key}.png": codec.encode_picture(picture, "png"),
        f"{key}.mask.png": codec.encode_mask(np.zeros((20, 20), np.uint8)),
        f"{key}.json": json.dumps({"label": "injected"}).encode(),
    }
    for extension, data in changes.items():
        name = f"{key}.{extension.replace('__', '.')}"
        members = {k: v for k, v in members.items() if k != name} | ({name: data} if data is not None else {})
    return members


def write_tar(path, entries):
    """entries: (TarInfo or name, bytes) in order."""
    with tarfile.open(path, "w") as tar:
        for info, data in entries:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


GOOD = [*members_of("first").items()], [*members_of("last").items()]
FAULTS = {
    "absolute path": ([("/tmp/evil.png", b"x")], "absolute"),
    "parent path": ([("../evil.png", b"x")], "'..'"),
    "windows path": ([("..\\evil.png", b"x")], "'..'"),
    "symbolic link": ([special("evil.png", tarfile.SYMTYPE, "/etc/passwd")], "not a plain file"),
    "hard link": ([special("evil.png", tarfile.LNKTYPE, "first.png")], "not a plain file"),
    "device": ([special("evil.png", tarfile.CHRTYPE)], "not a plain file"),
    "no extension": ([("README", b"x")], "key.extension"),
    "nested name": ([("a/b.png", b"x")], "broken picture"),
    "name without end": ([("n" * 2000 + ".png", b"x")], "more than 1024 letters"),
    "several pictures": ([("bad.a.png", GOOD[0][0][1]), ("bad.b.png", GOOD[0][0][1])], "several pictures"),
    "category that is no Unicode": (list(members_of("bad", json=b'{"category": "\\ud800"}').items()), "no text"),
    "prompt that is a list": (list(members_of("bad", json=b'{"prompt": ["a"]}').items()), "no text"),
    "round that is a text": (list(members_of("bad", json=b'{"round": "abc"}').items()), "no whole number"),
    "round without end": (
        list(members_of("bad", json=b'{"round": 100000000000}').items()),
        "no whole number",
    ),
    "broken picture": (list(members_of("bad", png=b"not a picture").items()), "broken picture"),
    "cut picture": (list(members_of("bad", png=GOOD[0][0][1][:40]).items()), "broken picture"),
    "no picture": (list(members_of("bad", png=None).items()), "without a picture"),
    "no mask": (list(members_of("bad", mask__png=None).items()), "without a mask"),
    "broken mask": (list(members_of("bad", mask__png=b"x").items()), "broken mask"),
    "broken json": (list(members_of("bad", json=b"{").items()), "broken JSON"),
    "deep json": (list(members_of("bad", json=b"[" * 100_000).items()), "broken JSON"),
    "json list": (list(members_of("bad", json=b"[]").items()), "broken JSON"),
    "key twice": (list(members_of("first").items()), "key twice"),
    "mask of another size": (
        list(members_of("bad", mask__png=codec.encode_mask(np.zeros((4, 4), np.uint8))).items()),
        "another size",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_or_hostile_is_left_out_and_counted(tmp_path, fault):
    entries, reason = FAULTS[fault]
    # A bad key between the good ones; "key twice" needs another sample in between to be a second group.
    between = list(members_of("middle").items())
    write_tar(tmp_path / "shard-000000.tar", [*GOOD[0], *between, *entries, *GOOD[1]])
    before = sorted(tmp_path.rglob("*"))
    counts = SkipCounts()
    keys = [s["key"] for s in read_shards(tmp_path, counts=counts)]
    assert keys == ["first", "middle", "last"]
    assert counts.total == 1
    assert reason in next(iter(counts.reasons))
    with pytest.raises(UserError, match=r"shard-000000\.tar"):
        list(read_shards(tmp_path, strict=True))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["./x.png"], ["x"]),
        (["photos", "photos/", "photos/x.png", "photos/y.JPG"], ["photos/x", "photos/y"]),
        (["my photo (1).png", "ünï 日本.PNG", "k" * 240 + ".png"], ["my photo (1)", "ünï 日本", "k" * 240]),
        (["a.input.png"], ["a"]),
        (["v1.0/x.png", "v1.0/x.json"], ["v1.0/x"]),
        ([".hidden.png", "__MACOSX/._a.png", "b.png"], ["b"]),
        (["a.tiff"], ["a"]),
    ],
)
def test_shards_of_others_are_read_by_the_rule_of_webdataset(tmp_path, names, keys):
    picture = codec.encode_picture(np.full((20, 20, 3), 7, np.uint8), "png")
    with tarfile.open(tmp_path / "A.TAR", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            if name in ("photos", "photos/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            data = b"{}" if name.endswith("json") else picture
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [sample["key"] for sample in read_shards(tmp_path, masks="optional", strict=True)] == keys


def long_name(size, data):
    """A header whose data are the name of the member after it."""
    info = tarfile.TarInfo("L")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT) + data


def sparse_file(path, data, hole):
    with open(path, "wb") as file:
        file.write(data)
        file.seek(hole, 1)
        file.write(bytes(1024))


def test_headers_cost_a_bounded_amount(tmp_path):
    import tracemalloc

    write_tar(tmp_path / "good.tar", [*GOOD[0], *GOOD[1]])
    good = (tmp_path / "good.tar").read_bytes().rstrip(b"\0")
    good = good.ljust(-(-len(good) // 512) * 512, b"\0")
    negative = bytearray(tarfile.TarInfo("x.png").tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:]) + 8 * 32)
    for data, hole, words in (
        (long_name(10, bytes(512)) * 5000, 0, "more than 16 headers"),
        (long_name(3 * 2**30, b""), 3 * 2**30, "a header of more than 65,536 bytes"),
        (bytes(negative), 0, "negative size"),
    ):
        sparse_file(tmp_path / "bad.tar", good + data, hole)
        counts = SkipCounts()
        tracemalloc.start()
        assert [sample["key"] for sample in read_shards(tmp_path / "bad.tar", counts=counts)] == ["first"]
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()
        assert words in counts.examples["a shard cut short or not a tar file"]


def test_a_real_picture_needs_no_mask(tmp_path):
    members = members_of("photo", mask__png=None, json=b'{"label": "real"}')
    write_tar(tmp_path / "a.tar", members.items())
    (sample,) = read_shards(tmp_path, strict=True)
    assert sample["mask"].shape == (20, 20)
    assert not sample["mask"].any()


def test_a_shard_cut_short_gives_its_whole_samples(tmp_path):
    write_shards(samples_of(6), tmp_path / "set", shard_size=6)
    path = tmp_path / "set" / "shard-000000.tar"
    whole = path.read_bytes()
    rows = read_manifest(tmp_path / "set")
    end = rows["json_offset"][-1] + rows["json_size"][-1]
    for length in (0, 100, 700, 512 * 5, 512 * 5 + 7, end // 2, end - 1, end):
        path.write_bytes(whole[:length])
        counts = SkipCounts()
        keys = [s["key"] for s in read_shards(path, counts=counts)]
        assert keys == [f"{i:09d}" for i in range(len(keys))]
        assert len(keys) < 6
        assert length < end or len(keys) == 5
        assert counts.total == 1


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "MAX_PIXELS", 300)
    write_tar(tmp_path / "a.tar", members_of("big").items())
    counts = SkipCounts()
    assert list(read_shards(tmp_path, counts=counts)) == []
    assert counts.reasons == {"a picture of more than 300 pixels": 1}
    monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", 10)
    counts = SkipCounts()
    list(read_shards(tmp_path, counts=counts))
    assert "more than 10 bytes" in next(iter(counts.reasons))


def test_a_manifest_that_does_not_fit_is_named(tmp_path):
    write_shards(samples_of(3), tmp_path / "set", shard_size=2)
    (tmp_path / "set" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="shard-000001"):
        ShardData(tmp_path / "set")
    (tmp_path / "set" / "manifest.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="manifest"):
        ShardData(tmp_path / "set")
    with pytest.raises(UserError, match="elsewhere: expected a folder of shards or a shard, got nothing"):
        list(read_shards(tmp_path / "elsewhere"))


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_of_a_stream_gives_every_sample_once_in_another_order_each_time(tmp_path, workers):
    write_shards(samples_of(23), tmp_path / "set", shard_size=3)
    orders = []
    for epoch, process in ((0, (0, 1)), (0, (0, 1)), (1, (0, 1))):
        stream = ShardStream(tmp_path / "set", buffer=5, seed=1, epoch=epoch, process=process)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
        orders.append([sample["key"] for sample in loader])
    everything = [f"{i:09d}" for i in range(23)]
    assert sorted(orders[0]) == sorted(orders[2]) == everything
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != everything
    halves = [[s["key"] for s in ShardStream(tmp_path / "set", process=(i, 2))] for i in range(2)]
    assert sorted(halves[0] + halves[1]) == everything


def test_a_resampled_stream_draws_all_samples_alike(tmp_path):
    write_shards(samples_of(20), tmp_path / "set", shard_size=6)  # the last shard holds two
    stream = ShardStream(tmp_path / "set", buffer=4, resampled=True, seed=3)
    drawn = [sample["key"] for sample in itertools.islice(stream, 4000)]
    counts = np.array([drawn.count(f"{i:09d}") for i in range(20)])
    # Whole shards are drawn, about 800 of them: the share of a shard has a standard deviation of 0.06 of itself.
    assert counts.sum() == 4000
    assert counts.min() > 0.75 * 200
    assert counts.max() < 1.25 * 200
    assert drawn == [sample["key"] for sample in itertools.islice(stream, 4000)]
    other = [sample["key"] for sample in itertools.islice(stream.worker_stream(1, 0, SkipCounts()), 100)]
    assert other != drawn[:100]


def test_a_stream_leaves_out_what_is_broken_and_ends_where_nothing_is_whole(tmp_path):
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", [*GOOD[0], *members_of("bad", png=b"x").items(), *GOOD[1]])
    stream = ShardStream(tmp_path / "set", resampled=True, buffer=2)
    assert {s["key"] for s in itertools.islice(stream, 30)} == {"first", "last"}
    assert set(stream.counts.reasons) == {"a broken picture"}
    with pytest.raises(UserError, match="broken picture"):
        list(itertools.islice(ShardStream(tmp_path / "set", resampled=True, strict=True), 30))
    write_tar(tmp_path / "set" / "a.tar", members_of("bad", png=b"x").items())
    with pytest.raises(UserError, match="no complete sample"):
        next(iter(ShardStream(tmp_path / "set", resampled=True, buffer=2)))
    write_tar(tmp_path / "set" / "a.tar", [])
    with pytest.raises(UserError, match="no samples in these 1 shards"):
        next(iter(ShardStream(tmp_path / "set", resampled=True)))


def test_shards_without_masks_can_be_read_for_their_pictures(tmp_path):
    write_tar(tmp_path / "a.tar", members_of("one", mask__png=None).items())
    assert [s["key"] for s in read_shards(tmp_path)] == []
    assert [s["mask"].any() for s in read_shards(tmp_path, masks="optional", strict=True)] == [False]
    assert ["mask" in s for s in read_shards(tmp_path, masks="ignored", strict=True)] == [False]


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


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_other_writers_are_read(tmp_path, format):
    long = "x" * 90
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for name, data in [*members_of("one").items(), *members_of(long).items()]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.5 if format == tarfile.PAX_FORMAT else 1, "someone"
            tar.addfile(info, io.BytesIO(data))
    assert [s["key"] for s in read_shards(tmp_path, strict=True)] == ["one", long]


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


def test_a_changed_header_is_noticed(tmp_path):
    write_shards(samples_of(3), tmp_path / "set")
    path = tmp_path / "set" / "shard-000000.tar"
    whole = path.read_bytes()
    second = read_manifest(tmp_path / "set")["picture_offset"][1] - 512
    for place, byte in (
        (0, b"z"),
        (100, b"1"),
        (124, b"1"),
        (130, b"9"),
        (148, b"1"),
        (156, b"2"),
        (257, b"x"),
        (345, b"a"),
    ):
        path.write_bytes(whole[: second + place] + byte + whole[second + place + 1 :])
        counts = SkipCounts()
        assert [s["key"] for s in read_shards(path, counts=counts)] in (["000000000"], [])
        assert counts.total == 1, place


def write_manifest(folder, **changes):
    """The set's manifest with other columns."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(folder / "manifest.parquet")
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    parquet.write_table(pa.table(columns | changes), folder / "manifest.parquet")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"picture_offset": ["5"] * 3}, "numbers in the column picture_offset, got string"),
        ({"picture_offset": [None] * 3}, "numbers in the column picture_offset, got null"),
        ({"picture_offset": [1, None, 2]}, "a number in every row of the column picture_offset"),
        ({"picture_size": [[1]] * 3}, "numbers in the column picture_size"),
        ({"height": ["16"] * 3}, "numbers in the column height"),
        ({"shard": [5] * 3}, "text in the column shard, got int64"),
        ({"key": [b"\xff"] * 3}, "text in the column key, got binary"),
        ({"key": ["k" * 2_000_000, "b", "c"]}, "up to 1,024 characters in the column key"),
        ({"shard": [None] * 3}, "names the shard ''"),
    ],
)
def test_a_manifest_of_other_types_is_named(tmp_path, changes, words):
    write_shards(samples_of(3), tmp_path / "set")
    write_manifest(tmp_path / "set", **changes)
    with pytest.raises(UserError, match=words):
        ShardData(tmp_path / "set")


def test_a_manifest_of_more_rows_than_its_shards_hold_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    write_shards(samples_of(1), tmp_path / "set")
    table = parquet.read_table(tmp_path / "set" / "manifest.parquet")
    rows = pa.concat_tables([table] * 5000)
    parquet.write_table(rows, tmp_path / "set" / "manifest.parquet")
    with pytest.raises(UserError, match=r"expected up to \d+ rows, which its shards can hold, got 5,000"):
        ShardData(tmp_path / "set")
    parquet.write_table(pa.table([[1], [2]], names=["key", "key"]), tmp_path / "set" / "manifest.parquet")
    with pytest.raises(UserError, match="expected the columns"):
        read_manifest(tmp_path / "set")
