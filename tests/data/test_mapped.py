"""Columns on the disk are those of the manifest, for one process and for others."""

import pickle
import threading

import numpy as np
import pytest

from diffdoctor.data import mapped
from diffdoctor.data.mapped import CodedTexts, MappedData, open_set
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.detector.balance import training_weights
from diffdoctor.detector.samples import JoinedData

pytest.importorskip("pyarrow")

COLUMNS = ("keys", "categories", "generators", "labels", "shards", "mask_max", "picture_files")
COLUMNS += ("sizes", "byte_ranges", "ignore_ranges")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDOCTOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "columns"


def samples(count, first=0):
    rng = np.random.default_rng(first)
    for index in range(first, first + count):
        mask = np.zeros((8, 12), np.float32)
        mask[: index % 3] = 1
        sample = {
            "picture": rng.integers(0, 255, (8, 12, 3), np.uint8),
            "mask": mask,
            "key": f"k{index}" * (index % 4 + 1),
        }
        ignore = {"ignore": np.eye(8, 12, dtype=bool)} if index % 5 == 0 else {}
        yield sample | ignore | {"category": ("cat", "Ü", "")[index % 3], "generator": "G"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # Groups of 7 rows, and parts of several of them.
    write_shards(samples(60), tmp_path / "set", shard_size=7)
    parts = mapped.column_parts
    monkeypatch.setattr(mapped, "column_parts", lambda *words: parts(*words, rows=16))
    return tmp_path / "set"


def test_columns_are_those_of_the_manifest_and_so_is_all_that_is_read(folder, cache):
    plain, data = ShardData(folder), MappedData(folder)
    for again in (data, pickle.loads(pickle.dumps(data)), MappedData(folder)):
        for name in COLUMNS:
            assert np.array_equal(np.asarray(getattr(again, name)), getattr(plain, name)), name
        assert again.fingerprint() == plain.fingerprint()
        for index in (0, 25, 59):
            one, other = plain[index], again[index]
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in ("picture", "mask", *({"ignore"} & {*one})))
    assert len(pickle.dumps(data)) < 4000
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    # A training sees the same.
    sets = [JoinedData([each, ShardData(folder)], shares=[1, 2]) for each in (plain, data)]
    assert sets[0].fingerprint() == sets[1].fingerprint()
    assert np.array_equal(sets[0].shard_numbers, sets[1].shard_numbers)
    assert np.array_equal(*(training_weights(each, balance=True) for each in sets))
    rows = np.arange(60) % 4 == 1
    assert np.array_equal(*(each.where(np.concatenate([rows, rows])).keys for each in sets))


def test_another_manifest_has_other_columns_and_threads_write_them_once(folder, cache, monkeypatch):
    calls, write = [], mapped._write
    monkeypatch.setattr(mapped, "_write", lambda *words: (calls.append(1), write(*words)))
    threads = [threading.Thread(target=MappedData, args=(folder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    write_shards(samples(9, first=100), folder)
    assert list(MappedData(folder).keys) == list(ShardData(folder).keys)
    monkeypatch.setattr(mapped, "MAPPED_FROM", 9)
    assert type(open_set(folder)) is MappedData
    monkeypatch.setattr(mapped, "MAPPED_FROM", 10)
    assert type(open_set(folder)) is ShardData


def test_coded_texts_read_as_a_column():
    texts = CodedTexts(np.array([1, 0, 1]), np.array(["a", "b"], object))
    assert (list(texts), texts[0], texts[1:].tolist()) == (["b", "a", "b"], "b", ["a", "b"])
    assert (texts == "b").tolist() == [True, False, True]
    assert (texts != np.array(["b", "b", "b"], object)).tolist() == [False, True, False]
