"""What each bad argument of weighted_loss raises, on every backend, before any work; and the statistics."""

import pytest
import torch
import torch.nn.functional as F

import diffdoctor
from diffdoctor import Packed, Target
from diffdoctor.backends.select import BackendUnavailable
from support.backends import BACKENDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

P = torch.randn(2, 3, 4, 6)
TOKENS = torch.randn(2, 6, 12)
MAP = torch.rand(2, 8, 8)

BAD = {
    "pred kind": (TypeError, "model_pred: expected a tensor, got list", {"model_pred": [1.0]}),
    "pred dtype": (TypeError, "model_pred: expected a tensor of dtype .* got torch.int64", {"model_pred": P.long()}),
    "pred rank": (ValueError, r"model_pred: expected shape .* got \(2, 3\)", {"model_pred": torch.randn(2, 3)}),
    "pred sparse": (TypeError, "strided", {"model_pred": torch.zeros(1, 1, 2, 2).to_sparse()}),
    "target kind": (TypeError, "target: expected a tensor or a diffdoctor.Target, got NoneType", {"target": None}),
    "target shape": (ValueError, r"target: expected model_pred's shape \(2, 3, 4, 6\), got", {"target": P[:1]}),
    "target dtype": (TypeError, "target: expected a tensor of dtype", {"target": P.long()}),
    "target grad": (
        ValueError,
        r"target: expected a tensor that requires no gradient .*target\.detach",
        {"target": P.clone().requires_grad_()},
    ),
    "target factor": (
        ValueError,
        r"target's factor: expected shape \(2,\)",
        {"target": Target((P,), (torch.ones(3),))},
    ),
    "map kind": (TypeError, "confidence: expected a tensor or None, got list", {"confidence": [[0.5]]}),
    "map dtype": (
        TypeError,
        "confidence: expected a tensor of dtype .*uint8, bool, got torch.int32",
        {"confidence": MAP.int()},
    ),
    "map rank": (ValueError, "confidence: expected shape", {"confidence": MAP[0]}),
    "map batch": (ValueError, "confidence: expected shape .* with 1 or 2 maps", {"confidence": torch.rand(3, 8, 8)}),
    "map channels": (ValueError, "confidence: expected shape", {"confidence": torch.rand(2, 3, 8, 8)}),
    "map video": (ValueError, "confidence: expected shape", {"confidence": torch.rand(2, 1, 2, 8, 8)}),
    "map empty": (ValueError, "confidence: expected a map that is not empty", {"confidence": torch.rand(2, 0, 8)}),
    "map grad": (
        ValueError,
        "confidence: expected a tensor that requires no gradient",
        {"confidence": MAP.clone().requires_grad_()},
    ),
    "mask kind": (TypeError, "mask: expected a tensor", {"mask": 1.0}),
    "mask meta": (
        ValueError,
        "mask: expected a tensor on model_pred's device cpu, got one on meta",
        {"mask": MAP.to("meta")},
    ),
    "weighting kind": (TypeError, "weighting: expected a tensor", {"weighting": 2.0}),
    "weighting dtype": (TypeError, "weighting: expected a tensor of dtype", {"weighting": torch.ones(2).long()}),
    "weighting length": (
        ValueError,
        "weighting: expected length 2 or 1 of one dim, which is per sample",
        {"weighting": torch.ones(6)},
    ),
    "weighting shape": (ValueError, r"one that broadcasts to \(2, 3, 4, 6\)", {"weighting": torch.ones(2, 1, 1, 1, 1)}),
    "weighting grad": (
        ValueError,
        "weighting: expected a tensor that requires no gradient",
        {"weighting": torch.ones(2, requires_grad=True)},
    ),
    "artifact_weight kind": (
        TypeError,
        "artifact_weight: expected a number, got Tensor",
        {"artifact_weight": torch.tensor(2.0)},
    ),
    "clean_weight nan": (ValueError, "clean_weight: expected a finite number, got nan", {"clean_weight": float("nan")}),
    "artifact_grad kind": (TypeError, "artifact_grad: expected a number, got str", {"artifact_grad": "1"}),
    "clean_grad inf": (ValueError, "clean_grad: expected a finite number", {"clean_grad": float("inf")}),
    "threshold": (ValueError, r"threshold: expected a number in \[0, 1\], got 1.5", {"threshold": 1.5}),
    "gamma": (ValueError, "gamma: expected a finite number > 0, got 0", {"gamma": 0.0}),
    "gamma inf": (ValueError, "gamma: expected a finite number > 0, got inf", {"gamma": float("inf")}),
    "interpolation": (ValueError, "interpolation: expected one of .*'area'.* got 'cubic'", {"interpolation": "cubic"}),
    "interpolation kind": (TypeError, "interpolation: expected one of", {"interpolation": 3}),
    "loss_type": (ValueError, "loss_type: expected one of .* got 'mse'", {"loss_type": "mse"}),
    "loss_type kind": (TypeError, "loss_type: expected one of .* or a dict", {"loss_type": ["l2"]}),
    "loss_type empty": (ValueError, "loss_type: expected at least one loss", {"loss_type": {}}),
    "loss_type strength": (TypeError, r"loss_type\['l2'\]: expected a number", {"loss_type": {"l2": "1"}}),
    "huber_c": (ValueError, "huber_c: expected a finite number >= 0, got -1", {"huber_c": -1.0}),
    "huber_c shape": (ValueError, r"huber_c: expected shape \(2,\), \(1,\) or \(\)", {"huber_c": torch.ones(3)}),
    "normalize": (ValueError, "normalize: expected one of None, 'sample', 'batch', got 'mean'", {"normalize": "mean"}),
    "normalizer shape": (ValueError, "normalizer: expected shape", {"normalizer": torch.ones(2, 1)}),
    "normalizer twice": (
        ValueError,
        "normalizer: expected None beside normalize, whose place it takes",
        {"normalizer": 1.0, "normalize": "batch"},
    ),
    "reduction": (ValueError, "reduction: expected one of .* got 'none'", {"reduction": "none"}),
    "layout kind": (TypeError, "layout: expected None or a diffdoctor.Packed, got str", {"layout": "packed"}),
    "layout shape": (ValueError, r"model_pred: expected shape \(B, 6, D\)", {"layout": Packed(4, 6)}),
    "return_stats": (TypeError, "return_stats: expected a bool", {"return_stats": 1}),
    "token map": (
        ValueError,
        r"confidence: expected shape \(2, 6\) for tokens",
        {"model_pred": TOKENS, "target": TOKENS, "confidence": MAP},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(backend, name):
    error, message, change = BAD[name]
    arguments = {"model_pred": P, "target": P, **change}
    with pytest.raises(error, match=message):
        diffdoctor.weighted_loss(arguments.pop("model_pred"), arguments.pop("target"), backend=backend, **arguments)


def test_a_target_that_requires_a_gradient_is_fine_without_grad_mode(backend):
    with torch.no_grad():
        diffdoctor.weighted_loss(P, P.clone().requires_grad_(), backend=backend)


def test_a_cached_plan_does_not_hide_a_bad_argument(backend):
    weighting = torch.ones(2)
    diffdoctor.weighted_loss(P, P, weighting=weighting, backend=backend)
    with pytest.raises(ValueError, match="weighting: expected a tensor that requires no gradient"):
        diffdoctor.weighted_loss(P, P, weighting=weighting.requires_grad_(), backend=backend)


def test_backend_names(backend):
    with pytest.raises(ValueError, match="backend: expected one of cuda, triton, cpu, reference, got 'gpu'"):
        diffdoctor.weighted_loss(P, P, backend="gpu")
    with pytest.raises(TypeError, match="backend: expected None or one of"):
        diffdoctor.weighted_loss(P, P, backend=3)
    with pytest.raises(BackendUnavailable, match="'cuda'"):
        diffdoctor.weighted_loss(P, P, backend="cuda")


def test_threshold_is_rounded_to_fp32(backend):
    level = torch.full((1, 2, 2), 0.3)  # 0.3 in fp32 is above 0.3 in fp64
    loss = diffdoctor.weighted_loss(
        torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), level, threshold=0.3, backend=backend
    )
    torch.testing.assert_close(loss, torch.tensor(1.3))


def test_statistics(backend):
    torch.manual_seed(0)
    pred, target, c, k = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), torch.rand(2, 4, 6), torch.rand(2, 4, 6)
    k[:, 0] = 0
    v = torch.tensor([0.5, 2.0])
    pred[1, 1, 2, 3] = float("inf")
    _, stats = diffdoctor.weighted_loss(
        pred, target, c, mask=k, weighting=v, threshold=0.4, return_stats=True, backend=backend
    )
    u = torch.where(c >= 0.4, c, 0.0)[:, None].expand(2, 3, 4, 6)
    omega = k[:, None] * (1 + u)
    loss = (pred - target) ** 2
    chosen = omega > 0
    first = (v.view(2, 1, 1, 1) * omega * loss).sum((1, 2, 3))
    torch.testing.assert_close(stats.numerator[0], first[0])
    assert stats.numerator[1] == float("inf")
    torch.testing.assert_close(stats.weight_sum, omega.sum((1, 2, 3)))
    torch.testing.assert_close(stats.artifact_share, u.mean())
    assert stats.nonfinite.item() == 1
    assert stats.nonfinite.dtype == torch.int64
    pred[1, 1, 2, 3] = 0
    loss = (pred - target) ** 2
    _, stats = diffdoctor.weighted_loss(
        pred, target, c, mask=k, weighting=v, threshold=0.4, return_stats=True, backend=backend
    )
    torch.testing.assert_close(stats.loss_artifact, (u * loss)[chosen].sum() / u[chosen].sum())
    torch.testing.assert_close(stats.loss_clean, ((1 - u) * loss)[chosen].sum() / (1 - u)[chosen].sum())
    assert not any(value.requires_grad for value in vars(stats).values())


def test_statistics_without_a_map(backend):
    pred = torch.randn(2, 3, 4, 6, requires_grad=True)
    loss, stats = diffdoctor.weighted_loss(pred, torch.zeros(2, 3, 4, 6), return_stats=True, backend=backend)
    torch.testing.assert_close(stats.numerator.sum() / stats.weight_sum.sum(), loss.detach())
    assert stats.artifact_share == 0
    assert stats.loss_artifact == 0
    loss.backward()
    assert pred.grad is not None


def test_small_residuals_of_pseudo_huber_and_log_cosh_keep_their_digits(backend):
    d = torch.tensor([1e-4, 1e-3, 0.03, 0.9, 1.1, 30.0])
    exact = d.double()
    x = d.reshape(1, 1, 1, 6)
    for loss_type, want in (
        ("pseudo_huber", exact**2 / ((exact**2 + 1).sqrt() + 1)),
        (
            "log_cosh",
            torch.where(
                exact < 1e-2,
                exact**2 / 2 - exact**4 / 12,
                exact + torch.log1p(torch.exp(-2 * exact)) - torch.log(torch.tensor(2.0, dtype=torch.float64)),
            ),
        ),
    ):
        for i in range(6):
            got = diffdoctor.weighted_loss(
                x[..., i : i + 1], torch.zeros(1, 1, 1, 1), loss_type=loss_type, huber_c=1.0, backend=backend
            )
            torch.testing.assert_close(got.double(), want[i], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest", "nearest-exact"])
def test_resampling_is_interpolate(backend, mode):
    c = torch.rand(2, 1, 19, 7)
    want = F.interpolate(c, size=(8, 11), mode=mode)
    zeros, ones = torch.zeros(2, 1, 8, 11), torch.ones(2, 1, 8, 11, requires_grad=True)
    loss = diffdoctor.weighted_loss(
        ones, zeros, c, artifact_weight=1.0, clean_weight=0.0, interpolation=mode, reduction="sum", backend=backend
    )
    loss.backward()
    torch.testing.assert_close(ones.grad / 2, want, rtol=3e-7, atol=1e-7)
