"""The order of pictures in blocks of shards: each once in a pass, as often as weights say, found without a search."""

import pickle
import time

import numpy as np
import pytest
import torch

from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.data.stream import ShardStream
from diffdoctor.detector import train_detector
from diffdoctor.detector.balance import training_weights
from diffdoctor.detector.block_plan import BlockPlan, WeightedBlocks, floor_sum
from diffdoctor.detector.samples import ArrayData, JoinedData
from diffdoctor.runs.errors import UserError
from support.detector import fresh, quick, shapes, weights_of

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


def test_floor_sum_is_its_definition():
    rng = np.random.default_rng(0)
    for count, modulus, step, offset in rng.integers([0, 1, 0, 0], [60, 40, 50, 80], (300, 4)).tolist():
        assert floor_sum(count, modulus, step, offset) == sum((step * i + offset) // modulus for i in range(count))


def test_each_row_once_in_a_pass_and_neighbours_together():
    counts = [30, 50, 0, 70, 20, 40]
    plan, again = BlockPlan(counts, 5, shards=2), BlockPlan(counts, 5, shards=2)
    shard_of = np.repeat(np.arange(6), counts)
    passes = [[plan.row(number * 210 + offset) for offset in range(210)] for number in range(3)]
    assert all(sorted(rows) == list(range(210)) for rows in passes)
    assert passes[0] != passes[1]
    # three blocks of two shards, one after another
    changes = [{int(shard_of[row]) for row in passes[0][start : start + 10]} for start in range(0, 210, 10)]
    assert all(len(shards) <= 4 for shards in changes)
    # in any order, and after a way to another process
    copy = pickle.loads(pickle.dumps(plan))
    for draw in (400, 3, 209, 210, 12):
        assert again.row(draw) == copy.row(draw) == passes[draw // 210][draw % 210]
    with pytest.raises(ValueError, match="counts: expected the numbers of rows"):
        BlockPlan([0, 0])


def test_a_hundred_million_rows_are_planned_at_once():
    started = time.process_time()
    plan = BlockPlan(np.full(100_000, 950), 0)
    rows = {plan.row(10**12 + draw) for draw in range(1000)}
    assert len(rows) == 1000
    assert time.process_time() - started < 5  # some ten milliseconds on an idle machine


def test_weights_hold_in_every_stretch_of_draws():
    weights = np.where(np.arange(1000) % 10 == 0, 5.0, 1.0)
    weights[7] = 0
    blocks = WeightedBlocks(np.repeat(np.arange(40), 25), weights, 3, block=4)
    drawn = np.array([blocks.row(draw) for draw in range(14000)])
    times = np.bincount(drawn, minlength=1000)
    heavy = weights == 5
    assert times[7] == 0
    assert set(times[heavy]) <= {49, 50, 51, 52}
    assert set(times[(weights == 1)]) <= {9, 10, 11}
    # 500 of 1399: in any 32 draws as many as there should be, but for two
    share = np.convolve(heavy[drawn], np.ones(32), "valid")
    assert abs(share - 32 * 500 / 1399).max() < 2.5


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks") / "set"
    data = shapes(40)
    samples = [{**data[i], "category": ("hand", "tree")[i % 3 == 0]} for i in range(40)]
    write_shards(iter(samples), folder, shard_size=6)
    return folder


def test_balance_within_each_step(shards):
    data = JoinedData([ShardData(shards)]).where(np.arange(3, 40))
    assert data.shard_numbers.tolist() == [i // 6 for i in range(3, 40)] or len(set(data.shard_numbers)) == 7
    weights = training_weights(data, balance=True)
    blocks = WeightedBlocks(data.shard_numbers, weights, 0, block=2)
    categories = np.asarray(data.categories)
    for step in range(30):
        rows = [blocks.row(8 * step + slot) for slot in range(8)]
        assert abs(np.sum(categories[rows] == "hand") - 4) <= 1


def test_a_run_in_blocks_resumes_to_the_same_bits_with_any_workers(shards, tmp_path, monkeypatch):
    config = quick(steps=8, checkpoint_every=3, order="blocks", balance=True)
    whole = train_detector(config, JoinedData([ShardData(shards)]), detector=fresh(), progress=False)
    other = quick(steps=8, checkpoint_every=3, order="blocks", balance=True, workers=2)
    by_workers = train_detector(other, JoinedData([ShardData(shards)]), detector=fresh(), progress=False)
    assert torch.equal(weights_of(by_workers.detector), weights_of(whole.detector))
    read, reads = ShardData.__getitem__, []

    def stopping(self, index):
        reads.append(index)
        if len(reads) > 5 * config.batch_size:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(ShardData, "__getitem__", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, JoinedData([ShardData(shards)]), detector=fresh(), output_dir=tmp_path, progress=False)
    monkeypatch.setattr(ShardData, "__getitem__", read)
    resumed = train_detector(
        config, JoinedData([ShardData(shards)]), detector=fresh(7), output_dir=tmp_path, progress=False
    )
    assert resumed.history == whole.history
    assert torch.equal(weights_of(resumed.detector), weights_of(whole.detector))
    shuffled = train_detector(quick(steps=8), JoinedData([ShardData(shards)]), detector=fresh(), progress=False)
    assert shuffled.history != whole.history


def test_what_loading_processes_get_can_be_pickled(shards, tmp_path, monkeypatch):
    """As Windows and macOS send it to them."""
    loader, sent = torch.utils.data.DataLoader, []

    def pickled(dataset, *, num_workers, collate_fn=None, worker_init_fn=None, **options):
        words = pickle.dumps((dataset, collate_fn, worker_init_fn))
        sent.append((num_workers, type(dataset).__name__))
        dataset, collate_fn, _ = pickle.loads(words)
        return loader(dataset, collate_fn=collate_fn, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", pickled)
    config = quick(steps=2, workers=2)
    for data in (JoinedData([ShardData(shards)]), ShardStream(shards, buffer=6, resampled=True), shapes(8)):
        train_detector(config, data, detector=fresh(), progress=False)
    assert sent == [(2, "PlannedSamples"), (2, "ResampledSamples"), (2, "PlannedSamples")]


def test_a_set_in_memory_has_no_blocks():
    data = ArrayData(shapes(4).pictures)
    with pytest.raises(UserError, match="order: expected shuffled for a set that does not lie in shards, got blocks"):
        train_detector(quick(steps=1, order="blocks"), data, detector=fresh(), progress=False)
    with pytest.raises(ValueError, match="order: expected shuffled or blocks, got 'sorted'"):
        quick(order="sorted")
