"""What each bad argument of weighted_loss raises, on every backend, before any work; and the statistics."""

import math

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
MAP = torch.rand(2, 8, 12)

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
    "map batch": (ValueError, "confidence: expected shape .* with 1 or 2 maps", {"confidence": torch.rand(3, 8, 12)}),
    "map channels": (ValueError, "confidence: expected shape", {"confidence": torch.rand(2, 3, 8, 12)}),
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
    "artifact_weight missing": (
        TypeError,
        r"artifact_weight: expected a number beside confidence \(0\.0 where .* broken in training pictures.*above 1\.0 "
        r"where .*artifact_grad alone is to act\), got None",
        {"confidence": MAP, "artifact_weight": None},
    ),
    "map aspect": (
        ValueError,
        "confidence: expected a map of the aspect ratio of the grid, 4 x 6, to within a cell, got 12 x 8: crop",
        {"confidence": MAP.transpose(1, 2)},
    ),
    "mask aspect": (ValueError, "mask: expected a map of the aspect ratio", {"mask": torch.ones(1, 1, 6)}),
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
    "loss_type": (ValueError, "loss_type: expected one of .* got 'cosine'$", {"loss_type": "cosine"}),
    "loss_type mse": (ValueError, "loss_type: .* got 'mse', which is 'l2' here", {"loss_type": "mse"}),
    "loss_type L1": (ValueError, "loss_type: .* got 'L1', which is 'l1' here", {"loss_type": {"L1": 1.0}}),
    "interpolation linear": (ValueError, "which is 'bilinear' here", {"interpolation": "linear"}),
    "interpolation dash": (ValueError, "which is 'nearest-exact' here", {"interpolation": "nearest_exact"}),
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
    "reduction": (ValueError, "reduction: expected one of .* got 'none', which is 'sample'", {"reduction": "none"}),
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
    arguments = {"model_pred": P, "target": P, "artifact_weight": 2.0, **change}
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
    with pytest.raises(ValueError, match="got 'torch', which is 'reference' here"):
        diffdoctor.weighted_loss(P, P, backend="torch")
    with pytest.raises(TypeError, match="backend: expected None or one of"):
        diffdoctor.weighted_loss(P, P, backend=3)
    with pytest.raises(BackendUnavailable, match="'cuda'"):
        diffdoctor.weighted_loss(P, P, backend="cuda")


def test_threshold_is_rounded_to_fp32(backend):
    level = torch.full((1, 2, 2), 0.3)  # 0.3 in fp32 is above 0.3 in fp64
    loss = diffdoctor.weighted_loss(
        torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), level, artifact_weight=2.0, threshold=0.3, backend=backend
    )
    torch.testing.assert_close(loss, torch.tensor(1.3))


def test_statistics(backend):
    torch.manual_seed(0)
    pred, target, c, k = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), torch.rand(2, 4, 6), torch.rand(2, 4, 6)
    k[:, 0] = 0
    v = torch.tensor([0.5, 2.0])
    pred[1, 1, 2, 3] = float("inf")
    _, stats = diffdoctor.weighted_loss(
        pred, target, c, mask=k, artifact_weight=2.0, weighting=v, threshold=0.4, return_stats=True, backend=backend
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
        pred, target, c, mask=k, artifact_weight=2.0, weighting=v, threshold=0.4, return_stats=True, backend=backend
    )
    torch.testing.assert_close(stats.loss_artifact, (u * loss)[chosen].sum() / u[chosen].sum())
    torch.testing.assert_close(stats.loss_clean, ((1 - u) * loss)[chosen].sum() / (1 - u)[chosen].sum())
    assert not any(value.requires_grad for value in vars(stats).values())


ODD = torch.tensor([-3.0, -0.0, 0.25, 1.0, 1.5, 200.0, math.nan, math.inf, -math.inf])
TAKEN = torch.tensor([0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("width", [9, 9 * 37])
def test_maps_are_clamped_and_what_was_outside_is_counted(backend, dtype, gamma, width):
    """A map of 0..255 in floats with artifact_weight=0.0 would else be gradient ascent."""
    shape = (2, 3, 4, width)
    odd, taken = (x.repeat(width // 9).expand(2, 1, 4, width) for x in (ODD, TAKEN))
    pred, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    options = {"artifact_weight": 0.0, "artifact_grad": 0.5, "gamma": gamma, "normalize": "sample", "backend": backend}
    for name in ("confidence", "mask"):
        beside = {"mask": odd.flip(-1)} if name == "confidence" else {}
        found = []
        for value in (odd, taken):
            maps = {name: value.to(dtype), **({"mask": value.flip(-1).to(dtype)} if beside else {})}
            loss, stats = diffdoctor.weighted_loss(pred, target, **maps, **options, return_stats=True)
            found.append((loss.detach(), torch.autograd.grad(loss, pred)[0], stats))
        (loss, grad, stats), (want, want_grad, clean) = found
        assert torch.equal(loss, want)
        assert torch.equal(grad, want_grad)
        assert loss.isfinite()
        assert torch.equal(stats.weight_sum, clean.weight_sum)
        each = shape[0] * shape[1] * shape[2] * width // 9
        assert stats.map_nan == (2 if beside else 1) * each
        # -3, 1.5, 200 and both infinities; beside a flipped mask at 9 of 9 places but for the middle one's 1.5
        outside = (odd < 0) | (odd > 1)
        outside = outside | outside.flip(-1) if beside else outside
        assert stats.map_outside == 3 * outside.sum()
        assert clean.map_nan == clean.map_outside == 0


def test_a_modulation_is_clamped_too(backend, monkeypatch):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", backend)
    grads = []
    for value in (ODD, TAKEN):
        x = torch.ones(1, 2, 1, 9, requires_grad=True)
        diffdoctor.modulate_gradient(x, value[None, None], artifact_grad=3.0, clean_grad=0.5).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_resampled_map_is_clamped_behind_the_resampling(backend):
    """A window with a NaN is NaN as a whole; one whose mean is above 1 counts as 1."""
    level = torch.tensor([[[0.5, math.nan, 255.0, 1.0], [0.5, 0.5, 0.0, 0.0]]])
    pred = torch.ones(1, 1, 1, 2)
    loss, stats = diffdoctor.weighted_loss(
        pred, 0 * pred, level, artifact_weight=3.0, reduction="sum", return_stats=True, backend=backend
    )
    assert loss == 1.0 + 3.0
    assert (stats.map_nan, stats.map_outside) == (1, 1)


@pytest.mark.parametrize("size", [(4, 6), (512, 768), (513, 768), (512, 765), (1, 1), (2, 3), (1, 2), (4, 7)], ids=str)
def test_a_map_of_the_grids_aspect_to_within_a_cell_is_taken(backend, size):
    assert diffdoctor.weighted_loss(P, P, torch.ones(1, *size), artifact_weight=0.5, backend=backend) == 0


@pytest.mark.parametrize("size", [(768, 512), (512, 512), (512, 1100), (1, 6), (4, 9)], ids=str)
def test_a_map_of_another_aspect_is_refused(backend, size):
    with pytest.raises(ValueError, match="confidence: expected a map of the aspect ratio of the grid"):
        diffdoctor.weighted_loss(P, P, torch.ones(1, *size), artifact_weight=0.5, backend=backend)


def test_a_token_is_the_cell_of_packed_tokens(backend):
    tokens, layout = torch.randn(1, 6, 12), Packed(4, 6)
    options = {"artifact_weight": 0.5, "layout": layout, "backend": backend}
    diffdoctor.weighted_loss(tokens, tokens, torch.ones(1, 40, 90), **options)
    with pytest.raises(ValueError, match="aspect ratio"):
        diffdoctor.weighted_loss(tokens, tokens, torch.ones(1, 40, 130), **options)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bilinear_mask_is_0_at_a_row_of_zeros(backend, dtype):
    """A position that is a whole number must come out as one: else a mask of 0 is 1e-16, and selects its element."""
    for rows, size in ((3, 7), (3, 19), (3, 21), (5, 13), (7, 39), (13, 14), (2, 26)):
        levels = torch.tensor([1.0, 0.0], dtype=dtype).repeat(7)[:rows]
        position = (levels.new_tensor(rows) / size * (torch.arange(size, dtype=dtype) + 0.5) - 0.5).clamp(min=0)
        low = position.long().clamp(max=rows - 1)
        share = position - low
        want = (1 - share) * levels[low] + share * levels[(low + 1).clamp(max=rows - 1)]
        pred = torch.ones(1, 1, size, 9, dtype=dtype, requires_grad=True)
        mask = levels[None, :, None].expand(1, rows, max(1, 9 * rows // size))
        loss = diffdoctor.weighted_loss(
            pred, torch.zeros_like(pred), mask=mask, interpolation="bilinear", reduction="sum", backend=backend
        )
        (grad,) = torch.autograd.grad(loss, pred)
        assert torch.equal(grad[0, 0] == 0, (want == 0)[:, None].expand(size, 9)), (rows, size)


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest", "nearest-exact"])
def test_resampling_is_interpolate(backend, mode):
    c = torch.rand(2, 1, 19, 26)
    want = F.interpolate(c, size=(8, 11), mode=mode)
    zeros, ones = torch.zeros(2, 1, 8, 11), torch.ones(2, 1, 8, 11, requires_grad=True)
    loss = diffdoctor.weighted_loss(
        ones, zeros, c, artifact_weight=1.0, clean_weight=0.0, interpolation=mode, reduction="sum", backend=backend
    )
    loss.backward()
    torch.testing.assert_close(ones.grad / 2, want, rtol=3e-7, atol=1e-7)
