"""Object stores: sets are read from and written to URLs as they are in folders, whole and exactly once."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from diffdoctor.annotate.project import Project
from diffdoctor.cli import main
from diffdoctor.data import store as stores
from diffdoctor.data.manifest import read_manifest
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.data.store import Store, store_of
from diffdoctor.data.store_cache import cached
from diffdoctor.data.store_path import StorePath, at
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.running import run, settle
from diffdoctor.engine.store_commits import StoreCommits
from diffdoctor.engine.store_run import run_folder
from diffdoctor.runs.errors import UserError
from support.engine import Spec, plan_of
from support.sets import write_set_and_detector

pytest.importorskip("fsspec")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDOCTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.001)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A set of ten pictures in three shards, and a detector."""
    folder = tmp_path_factory.mktemp("files")
    write_set_and_detector(folder, pictures=5, shard_size=4)
    return folder


@pytest.fixture
def bucket():
    """The URL of an empty bucket in memory."""
    url = "memory://bucket"
    memory = store_of(url).files
    memory.store.clear()
    yield url
    memory.store.clear()


@pytest.fixture
def pool(files, bucket):
    """The set's URL."""
    for path in (files / "set").iterdir():
        store_of(bucket).put(path, f"{bucket}/pool/{path.name}")
    return f"{bucket}/pool"


def names(url):
    return set(store_of(url).listing(url, deep=True))


def label(files, pool, output, *options):
    words = ["diagnose", str(pool), "--detector", f"{files}/detector", "--output", str(output), "--write", "shards"]
    return main([*words, "--gallery", "2", "--batch_size", "4", *options])


def failing(monkeypatch, method, *faults):
    """Let the next calls of a method of the memory's file system raise these, or do them and raise then."""
    files, left = store_of("memory://bucket").files, list(faults)
    real = getattr(files, method)

    def call(*args, **options):
        fault = left.pop(0) if left else None
        result = fault(lambda: real(*args, **options), args) if callable(fault) else None
        if isinstance(fault, Exception):
            raise fault
        return result if callable(fault) else real(*args, **options)

    monkeypatch.setattr(files, method, call)
    return left


def test_a_set_at_a_url_is_read_as_one_in_a_folder(files, pool, cache):
    here, there = ShardData(files / "set"), ShardData(pool)
    assert there.fingerprint() == here.fingerprint()
    for index in (9, 0, 4):
        one, other = here[index], there[index]
        assert all(np.array_equal(one[name], other[name]) for name in ("picture", "mask"))
    assert [s["key"] for s in read_shards(pool)] == [s["key"] for s in read_shards(files / "set")]
    assert read_manifest(pool) == read_manifest(files / "set")
    # What no manifest names was left by a writer that died.
    store_of(pool).write(f"{pool}/shard-000001.0a1b2c3d.tar", b"half")
    assert len(list(read_shards(pool, strict=True))) == 10
    # The manifest and three shards, once each.
    assert len([path for path in (cache / "objects").iterdir() if not path.name.startswith("lock-")]) == 4


def test_a_label_set_in_a_store_has_the_same_labels_and_resumes(files, pool, bucket, tmp_path, monkeypatch, capsys):
    assert label(files, files / "set", tmp_path / "here") == 0
    labels = f"{bucket}/labels"
    left = failing(monkeypatch, "put_file", *[lambda do, _: do()] * 5, *[OSError("the store is down")] * 5)
    assert label(files, pool, labels) == 2
    assert not left
    assert "cannot be written (OSError: the store is down); tried 5 times" in capsys.readouterr().err
    assert len([name for name in names(labels) if name.startswith("commits/")]) == 1
    assert "manifest.parquet" not in names(labels)
    assert label(files, pool, labels, "--batch_size", "2") == 2
    assert "holds" in (error := capsys.readouterr().err) and "another batch_size" in error and labels in error
    assert label(files, pool, labels, "--engine", "none") == 0
    here, there = ShardData(tmp_path / "here"), ShardData(labels)
    assert there.keys.tolist() == here.keys.tolist()
    for index in range(len(here)):
        one, other = here[index], there[index]
        assert all(np.array_equal(one.pop(name), other.pop(name)) for name in ("picture", "mask"))
        assert one == other
    assert set(there.picture_files) == {f"../pool/shard-{number:06d}.tar" for number in range(3)}
    found = names(labels)
    assert {"metrics.json", "diagnosis.jsonl", "gallery.html", "config.yaml", "run.json", "plan.parquet"} <= found
    assert len([name for name in found if name.startswith(("shard-", "parts/"))]) == 9
    assert len([name for name in found if name.startswith("maps/")]) == 2
    lines = store_of(labels).read(f"{labels}/diagnosis.jsonl").decode().splitlines()
    assert [json.loads(line)["path"].partition("://")[0] for line in lines] == ["memory"] * 10
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("attempt-")]
    # A folder here of labels of pictures there, but not the other way round.
    assert label(files, pool, tmp_path / "mine") == 0
    assert np.array_equal(ShardData(tmp_path / "mine")[3]["picture"], here[3]["picture"])
    assert label(files, files / "set", f"{bucket}/wrong") == 2
    assert "expected shards in a store" in capsys.readouterr().err


def test_training_evaluation_and_the_set_commands_take_urls(files, pool, bucket, tmp_path, capsys):
    words = ["train-detector", pool, "--architecture", "conv", "--min_side", "16", "--training.size", "16"]
    words += ["--training.steps", "1", "--training.batch_size", "2", "--validation_share", "0"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert main([*words, "--output", str(tmp_path / "streamed"), "--resampled", "true"]) == 0
    assert label(files, pool, f"{bucket}/labels") == 0
    assert main(["set", "check", pool, f"{bucket}/labels", "--pixels", "true", "--hashes", "true"]) == 0
    assert main(["set", "stats", f"{bucket}/labels"]) == 0
    assert main(["set", "join", pool, f"{bucket}/labels", "--output", f"{bucket}/joined", "--shard_size", "4"]) == 0
    joined = ShardData(f"{bucket}/joined")
    assert (len(joined), set(joined.labels)) == (10, {"pseudo"})
    assert main(["set", "dedup", f"{bucket}/joined", "--output", str(tmp_path / "dedup")]) == 0
    store_of(pool).delete(f"{pool}/shard-000001.tar")
    capsys.readouterr()
    assert main(["set", "check", pool]) == 2
    assert "shard-000001.tar" in capsys.readouterr().err
    assert main(["inject", str(files / "pictures"), "--output", f"{bucket}/injected"]) == 2
    assert "output: expected a folder, or a URL with --engine" in capsys.readouterr().err
    # Before anything is loaded.
    for words in (["evaluate", "detector", "nowhere", "--detector", "none"], ["train-detector", "nowhere"]):
        assert main([*words, "--output", f"{bucket}/report"]) == 2
        assert "alone write to object stores" in capsys.readouterr().err


def test_pictures_of_a_store_are_injected_with_damage_and_become_tasks(files, pool, bucket, tmp_path, monkeypatch):
    words = ["inject", pool, "--kinds", '["tint"]', "--output"]
    assert main([*words, str(tmp_path / "set")]) == 0
    assert len(ShardData(tmp_path / "set")) == 10
    # In units, interrupted and resumed, it is the same in a store as in a folder.
    left = failing(monkeypatch, "put_file", *[lambda do, _: do()] * 6, *[OSError("the store is down")] * 5)
    assert main([*words, f"{bucket}/made", "--engine", "none"]) == 2
    assert not left
    assert main([*words, f"{bucket}/made", "--engine", "none"]) == 0
    assert main([*words, str(tmp_path / "made"), "--engine", "none"]) == 0
    here, there = ShardData(tmp_path / "made"), ShardData(f"{bucket}/made")
    assert here.keys.tolist() == there.keys.tolist()
    assert all(np.array_equal(here[index]["picture"], there[index]["picture"]) for index in range(10))
    assert {"metrics.json", "contact_sheet.png", "config.yaml", "run.json", "plan.parquet"} <= names(f"{bucket}/made")
    words = ["annotate", "add", str(tmp_path / "project"), "--pool", pool, "--strategy", "random", "--budget", "4"]
    assert main([*words, "--gold", pool, "--gold_share", "0.5"]) == 0
    with closing(sqlite3.connect(tmp_path / "project" / "annotate.db")) as database:
        places = [json.loads(row[0]) for row in database.execute("SELECT place FROM picture")]
    assert places
    assert all(place["file"].startswith(f"{pool}/shard-") for place in places)
    with pytest.raises(UserError, match="project: expected a folder, got s3://bucket/project"):
        Project("s3://bucket/project", create=True)


def test_a_store_that_fails_is_asked_again_and_loses_nothing(bucket, tmp_path, monkeypatch):
    place, data = store_of(bucket), bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(data)

    def cut(do, args):
        do()
        os.truncate(args[1], 100)

    def lost(do, args):
        do()
        raise TimeoutError("no answer")

    failing(monkeypatch, "put_file", OSError("500"), lost)
    place.put(tmp_path / "file", f"{bucket}/a.bin")
    failing(monkeypatch, "get_file", cut, OSError("503"), cut)
    with at(f"{bucket}/a.bin").open() as file:
        assert file.read() == data
    # Made at the first attempt, whose answer was lost; another's is not ours.
    failing(monkeypatch, "pipe_file", lost)
    assert place.create(f"{bucket}/b", b"ours")
    assert not place.create(f"{bucket}/b", b"theirs")
    failing(monkeypatch, "get_file", *[cut] * 5)
    place.write(f"{bucket}/c.bin", data)
    with pytest.raises(UserError, match=r"c\.bin: cannot be read \(OSError: 100 bytes came of 10,240\); tried 5 times"):
        at(f"{bucket}/c.bin").open()
    failing(monkeypatch, "info", PermissionError("Forbidden"))
    with pytest.raises(UserError, match=r"c\.bin: cannot be read \(PermissionError: Forbidden\)$"):
        at(f"{bucket}/c.bin").stat()


def test_a_condition_that_does_not_hold_says_that_an_object_is_there(bucket, monkeypatch):
    """As s3fs words it of stores that do not say which condition it was."""
    error = OSError("At least one of the pre-conditions you specified did not hold")
    error.__cause__ = Exception()
    error.__cause__.response = {"ResponseMetadata": {"HTTPStatusCode": 412}}
    store_of(bucket).write(f"{bucket}/one", b"theirs")
    left = failing(monkeypatch, "pipe_file", *[error] * 5)
    assert not store_of(bucket).create(f"{bucket}/one", b"ours")
    assert store_of(bucket).create(f"{bucket}/one", b"theirs")  # an earlier attempt, whose answer was lost
    assert len(left) == 3


def test_an_object_that_was_replaced_is_read_anew(bucket):
    place, path = store_of(bucket), at(f"{bucket}/folder/a.bin")
    place.write(path.url, b"one")
    (pinned,) = path.parent.iterdir()
    assert path.open().read() == pinned.open().read() == b"one"
    place.write(path.url, b"two")
    assert path.open().read() == b"two"
    place.write(path.url, b"six")
    (pinned,) = path.parent.iterdir()
    place.write(path.url, b"ten")
    with pytest.raises(UserError, match="another object has taken its place"):
        pinned.open()
    with pytest.raises(FileNotFoundError):
        at(f"{bucket}/none").open()


def test_the_cache_keeps_to_its_size_and_fetches_once(bucket, cache, monkeypatch):
    place, calls = store_of(bucket), []
    monkeypatch.setenv("DIFFDOCTOR_CACHE_GIB", str(2500 / 2**30))
    for name in "abc":
        place.write(f"{bucket}/{name}", name.encode() * 1000)

    def read(name):
        with at(f"{bucket}/{name}").open() as file:
            return file.read()

    real = Store.fetch
    monkeypatch.setattr(Store, "fetch", lambda self, url, *rest: (calls.append(url[-1]), real(self, url, *rest)))
    threads = [threading.Thread(target=read, args=("a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["a"]
    half = cache / "objects" / ".x.diffdoctor-tmp-0a1b2c3d"
    half.write_bytes(bytes(400))
    os.utime(half, (0, 0))
    assert read("b") == b"b" * 1000
    assert read("c") == b"c" * 1000
    assert not half.exists()
    assert sum(path.stat().st_size for path in (cache / "objects").iterdir()) == 2000
    assert read("b") == b"b" * 1000
    assert calls == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"DIFFDOCTOR_CACHE_GIB: expected at least .* for memory://bucket/d"):
        cached(f"{bucket}/d", 2501, "", lambda path: None)
    (cache / "file").touch()
    monkeypatch.setenv("DIFFDOCTOR_CACHE", str(cache / "file"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); set DIFFDOCTOR_CACHE to another"):
        read("a")


def test_units_count_once_in_a_store_and_what_does_not_count_goes(bucket, tmp_path):
    plan, place = plan_of(3, raises=[2]), at(f"{bucket}/out")
    with pytest.raises(RuntimeError):
        run(plan, Spec(str(tmp_path)), place, EngineConfig(kind="none"))
    commits, unit = StoreCommits(place), plan.units[1]

    def late(unit, attempt):
        (tmp_path / "other").mkdir()
        store_of(bucket).delete((place / f"commits/{unit.id}.json").url)
        assert commits.attempt(unit, Spec(str(tmp_path)))  # another one is done meanwhile
        return Spec(str(tmp_path))(unit, attempt)

    store_of(bucket).delete((place / f"commits/{unit.id}.json").url)
    assert not commits.attempt(unit, late)
    # Of a worker that was killed between its files and its commit.
    store_of(bucket).write((place / "made-000001.0a1b2c3d.txt").url, b"")
    commits.fail("000002", "an odd unit")
    report = run(plan, Spec(str(tmp_path)), place, EngineConfig(kind="none"))
    made = {file["name"] for commit in settle(plan, place, report) for file in commit["files"]}
    assert (report.done, report.failed) == (2, {"000002": "an odd unit"})
    left = names(place.url)
    assert {name for name in left if name.startswith("made-00000") and "000002" not in name} == made
    assert len(made) == 2
    assert not [name for name in left if name.startswith(".attempts")]


def test_what_was_put_for_a_unit_that_was_given_up_goes_a_day_later(bucket):
    place = at(f"{bucket}/out")
    commits, day = StoreCommits(place), 24 * 3600
    left = [(place / f"made-{unit}.0a1b2c3d.txt").url for unit in ("000000", "000001", "000002")]
    for url in left:
        store_of(bucket).write(url, b"")
    commits.fail("000000", "an odd unit")
    commits.fail("000001", "an odd unit")

    def there():
        return sorted(url for url in left if store_of(bucket).files.exists(url))

    now = store_of(bucket).written_at(left[0])
    commits.clear_attempts(now + day - 1)
    assert there() == left
    # Another machine commits the second while this one clears up.
    commits.failed = lambda: {"000000", "000001"}
    store_of(bucket).write((place / "commits/000001.json").url, b"{}")
    commits.clear_attempts(now + day + 1)
    assert there() == left[1:]


def test_two_machines_may_begin_one_run_at_the_same_time(bucket, tmp_path, monkeypatch):
    def run_of(identity):
        return run_folder(f"{bucket}/out", "test", {"of": identity}, dict.fromkeys((".attempts", "commits")))

    with run_of("a") as first:  # looks at the place, where nothing is yet
        monkeypatch.setenv("DIFFDOCTOR_CACHE", str(tmp_path / "cache of another machine"))
        with run_of("a") as second:
            assert not second.check()
            second.begin()
            store_of(bucket).write(f"{bucket}/out/.attempts/000000", b"")
            first.check()
            first.begin()
        with run_of("b") as other, pytest.raises(UserError, match=r"holds \.attempts of a run with another of"):
            other.check()


def test_urls_and_paths_are_told_apart_and_stay_in_their_bucket(bucket):
    assert at("s3://bucket//a/../b").url == at("S3://bucket/b").url == "s3://bucket/b"
    assert (at(f"{bucket}/set") / "../pool/x.tar").url == f"{bucket}/pool/x.tar"
    with pytest.raises(UserError, match="expected a place in bucket, got one outside"):
        at(f"{bucket}/set") / "../../other/x.tar"
    with pytest.raises(UserError, match="no bucket"):
        at("s3://")
    assert not isinstance(at("ftp://a/b"), StorePath)


def test_without_fsspec_the_error_names_the_extra_and_nothing_else_imports_it(files):
    script = (
        "import sys; sys.modules['s3fs'] = None\n"
        "import diffdoctor\n"
        "from diffdoctor.data.shards import ShardData, read_shards\n"
        f"assert len(list(read_shards({str(files / 'set')!r}))) == len(ShardData({str(files / 'set')!r}))\n"
        "assert 'fsspec' not in sys.modules\n"
        "from diffdoctor.runs.errors import UserError\n"
        "try: ShardData('s3://bucket/set')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "s3fs is not installed: run `pip install '.[store]'`", done.stderr
