"""Training a detector: it learns; workers and accumulation change nothing; losses are their formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from diffdoctor.detector import DetectorTrainingConfig, train_detector
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.losses import detector_loss
from diffdoctor.detector.samples import ArrayData
from diffdoctor.runs.errors import UserError
from support.detector import fresh, held_out, quick, shapes, weights_of

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


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


@pytest.mark.cpu
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


def test_bf16_learns_as_fp32_does():
    runs = [
        train_detector(quick(steps=30, precision=p), shapes(), detector=fresh(), progress=False)
        for p in ("fp32", "bf16")
    ]
    losses = [np.mean([entry["loss"] for entry in run.history[-5:]]) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert runs[0].history != runs[1].history


@pytest.mark.cpu
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
            quick(steps=60, learning_rate=1e30, warmup_steps=0, max_grad_norm=0),
            shapes(),
            detector=fresh(),
            progress=False,
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"mse": 0.0}, "mse, bce, dice"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp8"}, "precision"),
        ({"size": 0}, "size: expected >= 1 pixels, got 0"),
        ({"size": -3}, "size"),
        ({"betas": (2.0, 3.0)}, "betas: expected two numbers"),
        ({"betas": (0.9,)}, "betas"),
        ({"seed": -1}, "seed: expected >= 0"),
        ({"augment": {"inject_share": 2}}, "inject_share"),
        ({"augment": {"kinds": ("foo",)}}, "kinds: .*foo"),
        ({"augment": {"area": (2.0, 3.0)}}, "area: expected low <= high"),
        ({"augment": {"strength": (0.0, 1.0)}}, "strength"),
        ({"augment": {"visible": 5.0}}, "visible"),
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
