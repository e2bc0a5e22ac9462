"""S3 by its protocol: one of many creates an object, whoever is killed, and whatever the store answers."""

import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from diffdoctor.cli import main
from diffdoctor.data import store as stores
from diffdoctor.data.shards import ShardData
from diffdoctor.data.store import Store
from support.launch import environment
from support.s3 import ENVIRONMENT, failing, serving
from support.sets import write_set_and_detector

pytest.importorskip("s3fs")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")
pytestmark = pytest.mark.slow

POOL, LABELS = "s3://bucket/pool", "s3://bucket/labels"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_set_and_detector(folder, pictures=12, shard_size=3)
    return folder


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """The port of a store with the set in it."""
    with serving(tmp_path) as port:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DIFFDOCTOR_CACHE", str(tmp_path / "cache"))
        with at(monkeypatch, port) as place:
            for path in (files / "set").iterdir():
                place.put(path, f"{POOL}/{path.name}")
            yield port


class at:
    """The store behind this port, for this process and those that it starts."""

    def __init__(self, monkeypatch, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        stores._stores.clear()

    def __enter__(self):
        return Store("s3")

    def __exit__(self, *_):
        stores._stores.clear()


def words(files, *more):
    found = ["diagnose", POOL, "--detector", f"{files}/detector", "--output", LABELS, "--write", "shards"]
    return [*found, "--gallery", "2", "--batch_size", "3", *more]


def start(files, cache, *more):
    variables = environment() | {"DIFFDOCTOR_CACHE": str(cache)}
    command = [sys.executable, "-m", "diffdoctor", *words(files, *more)]
    return subprocess.Popen(command, env=variables, start_new_session=True)


def check(files):
    """The label set is whole, and nothing lies there that does not count."""
    data, pictures = ShardData(LABELS), ShardData(files / "set")
    assert sorted(data.keys) == sorted(pictures.keys)
    rows = {key: row for row, key in enumerate(pictures.keys)}
    assert all(np.array_equal(data[i]["picture"], pictures[rows[key]]["picture"]) for i, key in enumerate(data.keys))
    names = Store("s3").listing(LABELS, deep=True)
    made = {name for name in names if name.startswith(("shard-", "parts/"))}
    assert len(made) == 3 * len([name for name in names if name.startswith("commits/")])
    assert {name for name in made if name.startswith("shard-")} == set(data.shards)
    assert main(["set", "check", LABELS, "--hashes", "true", "--pixels", "true"]) == 0


def test_of_many_that_create_an_object_one_succeeds(server):
    won, gate = {"one": [], "terse": []}, threading.Barrier(4)

    def create(number):
        place = Store("s3")
        for name, answers in won.items():
            gate.wait()
            answers.append(place.create(f"s3://bucket/{name}", str(number).encode()))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(answers) for answers in won.values()] == [[False, False, False, True]] * 2


def test_a_store_that_fails_loses_nothing(files, server, monkeypatch):
    with failing(server, 0.15) as (port, counts), at(monkeypatch, port):
        assert main(words(files)) == 0
    assert min(counts.values()) >= 3, counts
    with at(monkeypatch, server):
        check(files)


@pytest.mark.study
def test_two_commands_at_once_on_two_machines_and_processes_make_one_set(files, server, tmp_path):
    both = [start(files, tmp_path / name, "--engine", "processes") for name in ("one", "other")]
    assert [process.wait() for process in both] == [0, 0]
    check(files)


@pytest.mark.study
def test_workers_of_a_training_fetch_each_shard_once(files, server, tmp_path):
    words = ["train-detector", POOL, "--architecture", "conv", "--min_side", "16", "--training.size", "16"]
    words += ["--training.steps", "6", "--training.batch_size", "4", "--training.workers", "2"]
    words += ["--validation_share", "0"]
    # The parent has used the store before it forks.
    assert main([*words, "--training.order", "blocks", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "s3.log").read_text().count("GET /bucket/pool/shard") == 8


@pytest.mark.study
def test_commands_and_workers_are_killed_at_random_moments(files, server, tmp_path):
    draws, kills, ended = random.Random(0), 0, None
    while ended != 0:
        process = start(files, tmp_path / f"cache-{draws.randrange(2)}", "--engine", "processes")
        try:
            ended = process.wait(draws.uniform(4, 20) if kills < 12 else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if draws.random() < 0.7 else process.kill()
            kills, ended = kills + 1, process.wait()
    print(kills, "kills")
    check(files)
