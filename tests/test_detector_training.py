"""Training a detector: it learns; resumes, workers and processes change nothing; losses are their formulas."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffdoctor._errors import UserError
from diffdoctor.detector import ArtifactDetector, ConvDetector, DetectorTrainingConfig, load_detector, train_detector
from diffdoctor.detector.balance import category_statistics, sampling_weights
from diffdoctor.detector.feeding import ResampledSamples, StepPlan
from diffdoctor.detector.losses import detector_loss
from diffdoctor.detector.samples import ArrayData, AugmentConfig, JoinedData, StepSamples, augment, shrink_and_pad
from diffdoctor.detector.shards import ShardData, write_shards
from diffdoctor.detector.streaming import ShardStream
from diffdoctor.evaluate.detector import quick_measures

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


def shapes(count=60, side=16, seed=0, **fields):
    """Clean pictures: soft discs on a dark ground."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:side, 0:side]
    pictures = np.zeros((count, side, side, 3), np.uint8)
    for picture in pictures:
        y, x, r = rng.uniform(4, side - 4), rng.uniform(4, side - 4), rng.uniform(2, 5)
        picture[:] = (220 * np.clip(r - np.hypot(ys - y, xs - x), 0, 1))[..., None] * rng.uniform(0.6, 1, 3)
    return ArrayData(pictures, **fields)


def quick(**changes):
    options = {"steps": 12, "batch_size": 8, "warmup": 3, "bce": 1.0, "mse": 0.5, "dice": 0.5, "seed": 3}
    return DetectorTrainingConfig(**{**options, **changes})


def fresh(seed=0, kind="conv"):
    torch.manual_seed(seed)
    return ConvDetector((8, 16)) if kind == "conv" else ArtifactDetector.tiny()


def weights_of(detector):
    return torch.cat([p.detach().flatten() for p in detector.parameters()])


def held_out():
    from diffdoctor.detector.inject import inject

    clean = shapes(60, seed=9)
    rng = np.random.default_rng(1)
    pairs = [inject(clean.pictures[i], rng, ["texture_noise"], area=(0.1, 0.3)) for i in range(30)]
    pictures = np.concatenate([[p.picture for p in pairs], clean.pictures[30:]])
    return ArrayData(pictures, np.concatenate([[p.mask for p in pairs], np.zeros((30, 16, 16), np.float32)]))


@pytest.mark.parametrize("kind", ["conv", "segformer"])
def test_a_detector_learns_to_find_damage_on_other_pictures(kind):
    augmentation = AugmentConfig(kinds=("texture_noise",), area=(0.1, 0.3))
    steps = {"conv": 120, "segformer": 150}[kind]
    config = quick(steps=steps, batch_size=16, learning_rate=4e-3, augment=augmentation, bce=1, mse=0, dice=0)
    result = train_detector(config, shapes(), detector=fresh(kind=kind), validation=held_out(), progress=False)
    assert len(result.history) == steps
    final = result.validations[-1]
    assert final["step"] == steps
    assert final["map50"] > 0.7
    assert final["hit_rate"] > 0.9
    assert final["false_positive_rate"] < 0.1
    assert not result.detector.training


def test_any_module_from_images_to_logits_can_be_trained():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1))
    result = train_detector(quick(steps=40, learning_rate=1e-2), shapes(), detector=module, progress=False)
    losses = [entry["loss"] for entry in result.history]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])


def test_the_same_seed_gives_the_same_bits_and_leaves_the_caller_s_random_state():
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first, second = (train_detector(quick(), shapes(), progress=False) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.history == second.history
    assert torch.equal(weights_of(first.detector), weights_of(second.detector))
    other = train_detector(quick(seed=4), shapes(), progress=False)
    assert other.history != first.history


def test_workers_change_nothing():
    runs = [train_detector(quick(steps=4, workers=w), shapes(), detector=fresh(), progress=False) for w in (0, 2)]
    assert runs[0].history == runs[1].history


def test_accumulation_changes_nothing_but_rounding():
    runs = [train_detector(quick(accumulate=a), shapes(), detector=fresh(), progress=False) for a in (1, 4)]
    losses = [[entry["loss"] for entry in run.history] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)


def test_samples_are_a_function_of_seed_step_and_place():
    data, config = shapes(), AugmentConfig()
    one, two = (StepSamples(data, 8, 5, config) for _ in range(2))
    keys = [(step, place) for step in range(12) for place in range(8)]
    forward = {key: one[key] for key in keys}
    for key in reversed(keys):
        assert all(torch.equal(a, b) for a, b in zip(two[key], forward[key], strict=True))
    # Without weights every picture is seen once in a pass over the data.
    seen = [one.index_of(*divmod(i, 8)) for i in range(120)]
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60))
    assert seen[:60] != seen[60:]


class _StopAt:
    """Data that end the run, as a kill would, when a picture is asked for the n-th time."""

    def __init__(self, data, reads):
        self.data, self.reads = data, reads

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return self.data[index]


@pytest.mark.parametrize("kind", ["conv", "segformer"])
@pytest.mark.parametrize("reads", [0, 20, 35, 50, 90])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, reads, kind):
    config = quick(checkpoint_every=3, validate_every=4)
    whole = train_detector(config, shapes(), detector=fresh(kind=kind), validation=held_out(), progress=False)
    options = {"validation": held_out(), "output_dir": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, _StopAt(shapes(), reads), detector=fresh(kind=kind), **options)
    # From the first checkpoint on, the weights that the run is started with do not matter.
    started = any((tmp_path / "checkpoints").glob("step-*"))
    assert started == (reads >= 35)
    resumed = train_detector(config, shapes(), detector=fresh(7 if started else 0, kind), **options)
    assert resumed.history == whole.history
    assert resumed.validations == whole.validations
    assert torch.equal(weights_of(resumed.detector), weights_of(whole.detector))
    assert torch.equal(weights_of(load_detector(tmp_path / "detector")), weights_of(whole.detector))
    assert (tmp_path / "best" / "detector.json").is_file()
    # A finished run is not trained again.
    again = train_detector(config, _StopAt(shapes(), 0), detector=fresh(7, kind), **options)
    assert torch.equal(weights_of(again.detector), weights_of(whole.detector))


# One process that has imported everything forks the runs, and kills each at a random moment.
KILLER = """
import os, random, signal, sys, time
import test_detector_training as t
t.torch.set_num_threads(1)
output, config, chance, kills = sys.argv[1], t.quick(steps=16, checkpoint_every=2), random.Random(0), 0

def train(folder):
    t.train_detector(config, t.shapes(), detector=t.fresh(kills), output_dir=folder, progress=False)

train(output + "-imports")
start = time.monotonic()
train(output + "-timing")
whole = time.monotonic() - start
while True:
    child = os.fork()
    if child == 0:
        train(output)
        os._exit(0)
    # Longer from life to life, so that it ends although the machine becomes busier.
    time.sleep(whole * (chance.uniform(0.1, 0.4) + 0.05 * kills))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(0 if os.WEXITSTATUS(status) == 0 and kills else f"{status} after {kills} kills")
    kills += 1
"""


def test_kill_minus_nine_at_random_moments_changes_no_bit(tmp_path):
    config = quick(steps=16, checkpoint_every=2)
    whole = train_detector(config, shapes(), detector=fresh(), output_dir=tmp_path / "whole", progress=False)
    # The first life's initial weights must hold for all, so its first checkpoint is made before the killing starts.
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, _StopAt(shapes(), 20), detector=fresh(), output_dir=tmp_path / "run", progress=False)
    subprocess.run([sys.executable, "-c", KILLER, str(tmp_path / "run")], check=True, env=_environment(), timeout=500)
    assert torch.equal(weights_of(load_detector(tmp_path / "run" / "detector")), weights_of(whole.detector))
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000014", "step-00000016"]


def _environment():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train_detector(quick(checkpoint_every=4), shapes(), detector=fresh(), output_dir=tmp_path, progress=False)
    with pytest.raises(UserError, match=r"other settings \(learning_rate\)"):
        train_detector(
            quick(checkpoint_every=4, learning_rate=1e-4),
            shapes(),
            detector=fresh(),
            output_dir=tmp_path,
            progress=False,
        )
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


PROCESSES = """
import json, sys
import torch
import test_detector_training as t
from accelerate import PartialState
torch.set_num_threads(1)
losses = {kind: t.losses_of_twenty_steps(kind) for kind in ("conv", "segformer")}
if PartialState().is_main_process:
    json.dump({"processes": PartialState().num_processes, **losses}, open(sys.argv[1], "w"))
"""


def losses_of_twenty_steps(kind):
    result = train_detector(quick(steps=20), shapes(), detector=fresh(kind=kind), progress=False)
    return [entry["loss"] for entry in result.history]


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_losses(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "losses.json"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(script), str(out)], check=True, env=_environment(), timeout=300)
    two = json.loads(out.read_text())
    assert two["processes"] == 2
    for kind in ("conv", "segformer"):
        one = losses_of_twenty_steps(kind)
        np.testing.assert_allclose(one, two[kind], rtol=0, atol=1e-5)
        assert one[-1] < one[0]


def test_training_reads_shards_like_arrays(tmp_path):
    data = shapes(20)
    write_shards((data[i] for i in range(20)), tmp_path / "set", shard_size=8)
    runs = [
        train_detector(quick(steps=5), d, detector=fresh(), progress=False) for d in (data, ShardData(tmp_path / "set"))
    ]
    assert runs[0].history == runs[1].history


def test_bf16_learns_as_fp32_does():
    runs = [
        train_detector(quick(steps=30, precision=p), shapes(), detector=fresh(), progress=False)
        for p in ("fp32", "bf16")
    ]
    losses = [np.mean([entry["loss"] for entry in run.history[-5:]]) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert runs[0].history != runs[1].history


def test_the_averaged_weights_are_the_result():
    config = quick(ema_decay=0.0)
    plain = train_detector(config, shapes(), detector=fresh(), progress=False)
    averaged = train_detector(dataclasses.replace(config, ema_decay=0.999), shapes(), detector=fresh(), progress=False)
    assert plain.history == averaged.history
    start, last, mean = weights_of(fresh()), weights_of(plain.detector), weights_of(averaged.detector)
    # Early on the decay is (1 + step) / (10 + step): the average lies between the start and the end.
    assert 0 < (mean - start).norm() < (last - start).norm()


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(UserError, match="lower learning_rate"):
        train_detector(
            quick(steps=60, learning_rate=1e30, warmup=0, max_grad_norm=0), shapes(), detector=fresh(), progress=False
        )


def test_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 1, 5, 7, dtype=torch.float64), torch.rand(3, 1, 5, 7, dtype=torch.float64)
    c = logits.sigmoid()
    assert detector_loss(logits, mask, mse=2.0).item() == pytest.approx(2 * ((c - mask) ** 2).mean().item())
    bce = -(mask * c.log() + (1 - mask) * (1 - c).log()).mean()
    assert detector_loss(logits, mask, mse=0, bce=1.0).item() == pytest.approx(bce.item())
    dice = [1 - (2 * (a * b).sum() + 1) / ((a * a).sum() + (b * b).sum() + 1) for a, b in zip(c, mask, strict=True)]
    assert detector_loss(logits, mask, mse=0, dice=1.0).item() == pytest.approx(sum(dice).item() / 3)
    # Each has its minimum at the mask itself, soft values included.
    for weights in ({"mse": 1.0}, {"mse": 0, "bce": 1.0}, {"mse": 0, "dice": 1.0}):
        at_mask = torch.logit(mask).requires_grad_()
        (gradient,) = torch.autograd.grad(detector_loss(at_mask, mask, **weights), at_mask)
        assert gradient.abs().max() < 1e-12


def test_logits_are_brought_to_the_mask_s_size():
    logits = torch.zeros(1, 1, 4, 4)
    assert detector_loss(logits, torch.full((1, 1, 16, 16), 0.5)).item() == 0


def test_balanced_weights_even_out_categories_and_damage():
    masks = np.zeros((10, 16, 16), np.float32)
    masks[:7] = 1
    categories = ["hand"] * 8 + ["tree"] * 2  # 7 of 8 hands are damaged, no tree is
    data = ArrayData(shapes(10).pictures, masks, category=categories)
    weights = sampling_weights(data)
    assert weights.sum() == pytest.approx(1)
    assert weights[:7].sum() == pytest.approx(0.25)
    assert weights[7] == pytest.approx(0.25)
    assert weights[8:].sum() == pytest.approx(0.5)
    samples = StepSamples(data, 8, 0, AugmentConfig.none(), weights)
    drawn = np.bincount([samples.index_of(*divmod(i, 8)) for i in range(4000)], minlength=10) / 4000
    np.testing.assert_allclose(drawn, weights, atol=0.03)


def things(hands, count, damaged, seed):
    """Rings ("hands") or squares on dark ground, the first `damaged` of them grained; the mask is the whole thing."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:16, 0:16]
    pictures, masks = np.zeros((count, 16, 16, 3)), np.zeros((count, 16, 16), np.float32)
    for index in range(count):
        y, x, r = *rng.uniform(5, 11, 2), rng.uniform(3, 4.5)
        distance = np.hypot(ys - y, xs - x) if hands else np.maximum(abs(ys - y), abs(xs - x))
        light = 0.2 + 0.5 * np.clip(r - distance, 0, 1) * ((distance > r - 2.2) if hands else 1)
        pictures[index] = light[..., None] + rng.normal(0, 0.02, (16, 16, 3))
        if index < damaged:
            masks[index] = distance < r
            pictures[index] += masks[index][..., None] * rng.normal(0, 0.15, (16, 16, 1))
    pictures = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
    return ArrayData(pictures, masks, category=["hand" if hands else "square"] * count)


def test_balance_takes_away_the_shortcut_that_hands_are_always_broken():
    # 190 of 200 hands are damaged, 10 of 200 squares: without balance, to find hands is nearly as good.
    train = JoinedData([things(True, 200, 190, 0), things(False, 200, 10, 1)])
    shifted = dataclasses.replace(AugmentConfig.none(), shift=0.15, exposure=0.1)
    rates = {}
    for balance in (False, True):
        config = quick(steps=300, batch_size=16, learning_rate=5e-3, bce=1, mse=0, dice=0, ema_decay=0.9)
        config = dataclasses.replace(config, balance=balance, augment=shifted)
        detector = train_detector(config, train, detector=fresh(), progress=False).detector
        clean = quick_measures(detector, things(True, 100, 0, 2))["false_positive_rate"]
        rates[balance] = clean, quick_measures(detector, things(True, 100, 100, 3))["hit_rate"]
    assert rates[False][0] > 0.5
    assert rates[True][0] <= 0.5 * rates[False][0]
    assert rates[True][1] > 0.9


def test_category_statistics_name_the_abnormal():
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(8) for _ in range(20)] + ["hands"] * 20 + ["sky"] * 5
    means = np.concatenate([rng.normal(0.1, 0.01, 160), rng.normal(0.6, 0.01, 20), np.zeros(5)])
    result = {s.category: s for s in category_statistics(names, means, means > 0.3)}
    assert next(iter(result)) == "hands"
    assert result["hands"].verdict == "over-flagged"
    assert result["hands"].flagged == 1
    assert result["sky"].verdict == "under-flagged"
    assert result["sky"].pictures == 5
    assert all(result[f"c{i}"].verdict == "" for i in range(8))


def test_shrinking_keeps_the_whole_picture_and_pads_with_the_border_s_colour():
    picture = np.full((40, 40, 3), 10, np.uint8)
    picture[10:30, 10:30] = 200
    for seed in range(20):
        small = shrink_and_pad(picture, np.random.default_rng(seed))
        assert small.shape == picture.shape
        bright = (small > 100).all(axis=2).sum()
        assert 0.35**2 * 400 < bright < 0.95**2 * 400
        assert (small[[0, -1]] == 10).any()


def test_damaged_pictures_are_never_damaged_again_or_shrunk():
    config = AugmentConfig(inject_share=1, shrink_share=1, shift=0, exposure=0, noise=0)
    picture, mask = shapes(1)[0]["picture"], np.zeros((16, 16), np.float32)
    mask[4:8, 4:8] = 1
    got = augment(picture, mask, config, np.random.default_rng(0))
    assert np.array_equal(got[0], picture)
    assert np.array_equal(got[1], mask)
    got = augment(picture, np.zeros_like(mask), config, np.random.default_rng(0))
    assert got[1].any()


def test_picture_and_mask_move_together():
    rng = np.random.default_rng(0)
    mask = np.zeros((32, 32), np.float32)
    mask[10:14, 20:26] = 1
    picture = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    config = dataclasses.replace(AugmentConfig.none(), shift=0.2, flip_share=0.5)
    places = set()
    for _ in range(20):
        moved, moved_mask = augment(picture, mask, config, rng)
        assert np.array_equal(moved[..., 0] > 127, moved_mask > 0.5)
        places.add(tuple(np.argwhere(moved_mask > 0)[0]))
    assert len(places) > 5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"mse": 0.0}, "mse, bce, dice"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp8"}, "precision"),
        ({"augment": {"inject_share": 2}}, "inject_share"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        DetectorTrainingConfig(**options)


def test_bad_data_are_refused():
    with pytest.raises(ValueError, match="data: expected at least one"):
        train_detector(quick(), ArrayData(np.zeros((0, 16, 16, 3), np.uint8)), detector=fresh(), progress=False)
    with pytest.raises(ValueError, match="masks: expected one entry"):
        ArrayData(np.zeros((2, 16, 16, 3), np.uint8), np.zeros((3, 16, 16)))
    with pytest.raises(UserError, match="batch_size: expected a multiple"):
        train_detector(quick(batch_size=9, accumulate=2), shapes(), detector=fresh(), progress=False)
    assert math.isfinite(train_detector(quick(steps=1), shapes(2), detector=fresh(), progress=False).history[0]["loss"])


def a_set(folder, count=30, broken=(), **fields):
    """Shards of shapes, the second half of them damaged; the pictures with these indices are broken."""
    clean = shapes(count)
    grain = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3))
    masks = np.zeros((count, 16, 16), np.float32)
    masks[count // 2 :, 3:9, 5:11] = 1
    for index in range(count // 2, count):
        clean.pictures[index, 3:9, 5:11] = grain[index]
    write_shards((ArrayData(clean.pictures, masks, **fields)[i] for i in range(count)), folder, shard_size=7)
    data = ShardData(folder)
    for index in broken:
        with open(folder / data.shards[index], "r+b") as file:
            file.seek(int(data.places[index][0]))
            file.write(bytes(int(data.places[index][1])))
    return data


def test_a_resampled_stream_trains_as_a_set_does(tmp_path):
    data = a_set(tmp_path / "set", 60)
    options = {"steps": 80, "batch_size": 16, "learning_rate": 4e-3, "bce": 1, "mse": 0, "dice": 0, "accumulate": 2}
    config = quick(**options, augment=AugmentConfig.none())
    validation = a_set(tmp_path / "other", 40)
    stream = ShardStream(tmp_path / "set", buffer=20, resampled=True)
    runs = [train_detector(config, d, detector=fresh(), validation=validation, progress=False) for d in (data, stream)]
    for run in runs:
        assert np.mean([entry["loss"] for entry in run.history[-20:]]) < 0.5 * run.history[0]["loss"]
        assert run.validations[-1]["hit_rate"] > 0.9
    assert runs[0].history != runs[1].history


def test_a_stream_s_parts_depend_on_the_workers_and_the_segment_alone(tmp_path):
    a_set(tmp_path / "set")
    stream = ShardStream(tmp_path / "set", buffer=6, resampled=True, seed=4)

    def parts(start, workers, process=0):
        plan = StepPlan(start, 9, process, share=4, parts=2, segment=4)
        samples = ResampledSamples(stream, plan, AugmentConfig(), None)
        loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers)
        return [(pictures, masks) for pictures, masks, _ in loader]

    for workers in (0, 2):
        whole, rest = parts(0, workers), parts(4, workers)
        assert len(whole) == 18
        assert all(pictures.shape == (2, 3, 16, 16) for pictures, _ in whole)
        for one, two in zip(whole[8:], rest, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
        other = parts(0, workers, process=1)
        assert not any(torch.equal(one[0], two[0]) for one, two in zip(whole, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_replaced_and_named_or_stops_the_run(tmp_path, workers):
    data = a_set(tmp_path / "set", 16, broken=(3, 12))
    config = quick(steps=4, workers=workers)
    result = train_detector(config, data, detector=fresh(), progress=False)
    assert sorted(where.split(":")[1] for where in result.broken) == ["000000003", "000000012"]
    assert set(result.broken.values()) == {"a broken picture"}
    with pytest.raises(UserError, match=r"shard-00000.*: a broken picture$"):
        train_detector(dataclasses.replace(config, strict=True), data, detector=fresh(), progress=False)
    stream = ShardStream(tmp_path / "set", buffer=4, resampled=True)
    assert set(train_detector(config, stream, detector=fresh(), progress=False).broken.values()) == {"a broken picture"}


def test_the_command_streams_and_refuses_early_what_cannot_be(tmp_path):
    from diffdoctor.detector.training import TrainDetectorConfig, run_train_detector

    a_set(tmp_path / "set", broken=(1,))
    a_set(tmp_path / "other", 8)
    write_shards([{"picture": np.zeros((20, 30, 3), np.uint8)}], tmp_path / "large")
    train, other = [str(tmp_path / "set")], [str(tmp_path / "other")]

    def run(data, validation, training=None, **options):
        options = {"architecture": "conv", "training": training or quick(steps=3), **options}
        return run_train_detector(TrainDetectorConfig(data, str(tmp_path / "run"), validation, **options))

    with pytest.raises(UserError, match="validation: expected folders"):
        run(train, [], resampled=True)
    with pytest.raises(UserError, match="balance: a stream"):
        run(train, other, quick(balance=True), resampled=True)
    with pytest.raises(UserError, match=r"training.size: expected a side in pixels.*2 sizes \(16x16, 30x20\)"):
        run([*train, str(tmp_path / "large")], other)
    assert not (tmp_path / "run").exists()
    metrics = run(train, other, resampled=True, shuffle_buffer=8)
    with pytest.raises(UserError, match=r"a broken picture$"):
        run_train_detector(
            TrainDetectorConfig(train, str(tmp_path / "strict"), other, training=quick(steps=5), strict=True)
        )
    assert metrics["pictures"] is None
    assert metrics["validation_pictures"] == 8
    assert set(metrics["skipped"]) <= {"a broken picture"}
