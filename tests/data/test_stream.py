"""Streams of samples from shards: each once in an order of its own, or drawn alike; what is broken is left out."""

import itertools

import numpy as np
import pytest
import torch

from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.stream import ShardStream
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError
from support.shards import GOOD, members_of, samples_of, write_tar

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


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
