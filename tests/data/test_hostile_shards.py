"""Broken and hostile archives are left out and counted, at a bounded cost; those of other writers are read."""

import io
import tarfile

import numpy as np
import pytest

from diffdoctor.data import codec
from diffdoctor.data import tar as archive
from diffdoctor.data.manifest import read_manifest
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import read_shards
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError
from support.shards import GOOD, members_of, samples_of, write_tar

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


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


def test_shards_without_masks_can_be_read_for_their_pictures(tmp_path):
    write_tar(tmp_path / "a.tar", members_of("one", mask__png=None).items())
    assert [s["key"] for s in read_shards(tmp_path)] == []
    assert [s["mask"].any() for s in read_shards(tmp_path, masks="optional", strict=True)] == [False]
    assert ["mask" in s for s in read_shards(tmp_path, masks="ignored", strict=True)] == [False]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_other_writers_are_read(tmp_path, format):
    long = "x" * 90
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for name, data in [*members_of("one").items(), *members_of(long).items()]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.5 if format == tarfile.PAX_FORMAT else 1, "someone"
            tar.addfile(info, io.BytesIO(data))
    assert [s["key"] for s in read_shards(tmp_path, strict=True)] == ["one", long]


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
