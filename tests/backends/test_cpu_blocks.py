"""The CPU kernel at sizes of several blocks, where it takes its fast ways: against the reference, in fp64 too."""

import pytest
import torch

import diffdoctor
from diffdoctor import Packed, Target
from diffdoctor.ops import checks
from support.backends import needs_cpu

pytestmark = needs_cpu
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOATS = [F32, BF16, F16, F64]
IDS = ["f32", "bf16", "f16", "f64"]
# One unit in the last place: the same number in fp32 but for its last digits may round to either neighbour.
ROUNDING = {F32: 3e-6, BF16: 2**-7, F16: 2**-10, F64: 1e-12}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def any_aspect(monkeypatch):
    """The kernels resample along each axis by itself: also what the public function refuses."""
    monkeypatch.setattr(checks, "check_aspect", lambda *_: None)


def check(pred, target, confidence=None, **options):
    """Loss, gradient and statistics of the CPU backend against the reference."""
    options = {"artifact_weight": 2.0, **options}
    results = []
    for backend in ("cpu", "reference"):
        leaf = pred.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        loss = diffdoctor.weighted_loss(leaf, target, confidence, backend=backend, **options)
        loss.backward(torch.ones_like(loss))
        with torch.no_grad():
            again, stats = diffdoctor.weighted_loss(
                leaf, target, confidence, backend=backend, return_stats=True, **options
            )
        torch.testing.assert_close(again, loss.detach(), rtol=2e-6, atol=0)
        results.append((loss.detach(), leaf.grad, stats))
    (loss, grad, stats), (want_loss, want_grad, want_stats) = results
    tolerance = 1e-12 if pred.dtype == F64 else 3e-6
    torch.testing.assert_close(loss, want_loss, rtol=tolerance, atol=0)
    atol = 2**-24 if pred.dtype == F16 else float(want_grad.abs().max()) * ROUNDING[F32]
    torch.testing.assert_close(grad, want_grad, rtol=ROUNDING[pred.dtype], atol=atol)
    for name in (
        "numerator",
        "weight_sum",
        "loss_artifact",
        "loss_clean",
        "artifact_share",
        "nonfinite",
        "map_nan",
        "map_outside",
    ):
        torch.testing.assert_close(
            getattr(stats, name), getattr(want_stats, name), rtol=max(tolerance, 1e-5), atol=1e-6
        )
    return grad


@pytest.mark.parametrize("dtype", FLOATS, ids=IDS)
@pytest.mark.parametrize("term", FLOATS, ids=IDS)
@pytest.mark.parametrize("terms", [1, 2])
def test_terms_of_every_dtype(dtype, term, terms):
    pred = torch.randn(2, 3, 37, 41).to(dtype)
    parts = [torch.randn(2, 3, 37, 41).to(term) for _ in range(terms)]
    parts[-1] = parts[-1].to(F32 if term == BF16 else term)  # the two need not agree
    target = Target(parts, (torch.rand(2) + 0.5, -0.5)[:terms], 1.25)
    check(pred, target, torch.rand(2, 37, 41), artifact_weight=3.0)
    check(pred, target, torch.rand(2, 37, 41), artifact_grad=0.5, clean_grad=2.0, weighting=torch.rand(2, 3, 37, 41))
    check(pred, target)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=IDS[:3])
@pytest.mark.parametrize("order", ["c ph pw", "ph pw c"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_packed_tokens_against_a_target_on_the_grid(dtype, order, patch, any_aspect):
    layout = Packed(24, 48, patch, order)
    pred = layout.pack(torch.randn(2, 16, 24, 48)).to(dtype)
    target = Target.flow(torch.randn(2, 16, 24, 48).to(dtype), torch.randn(2, 16, 24, 48).to(BF16))
    check(pred, target, layout=layout)
    for size in ((24, 48), (96, 96), (12, 100)):
        check(pred, target, torch.rand(2, *size), layout=layout, weighting=torch.rand(2))
    check(pred, layout.pack(torch.randn(2, 16, 24, 48)), mask=torch.rand(1, 24, 48), layout=layout)


@pytest.mark.parametrize("pred_view", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target_view", ["contiguous", "channels_last", "reversed_channels", "expanded"])
def test_memory_in_another_order_than_the_prediction(pred_view, target_view):
    pred = torch.randn(2, 20, 32, 40)
    if pred_view == "channels_last":
        pred = pred.contiguous(memory_format=torch.channels_last)
    target = torch.randn(2, 20, 32, 40).to(BF16)
    if target_view == "channels_last":
        target = target.contiguous(memory_format=torch.channels_last)
    elif target_view == "reversed_channels":
        target = target.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    elif target_view == "expanded":
        target = target[:, :1].expand(-1, 20, -1, -1)
    check(pred, target, torch.rand(2, 64, 80), weighting=torch.rand(20, 1, 1))
    check(pred, target, torch.rand(1, 32, 40))


def a_map(size, dtype):
    if dtype == torch.bool:
        return torch.rand(size) < 0.5
    return (255 * torch.rand(size)).to(dtype) if dtype == torch.uint8 else torch.rand(size).to(dtype)


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest", "nearest-exact"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.bool], ids=[*IDS, "uint8", "bool"])
@pytest.mark.parametrize("acc", [F32, F64], ids=["f32", "f64"])
def test_maps_of_every_dtype_and_ratio(mode, dtype, acc, any_aspect):
    pred, target = torch.randn(2, 4, 24, 40).to(acc), torch.randn(2, 4, 24, 40)
    for rows, columns in ((2, 2), (3, 4), (8, 8), (16, 16), (1, 3)):
        check(pred, target, a_map((2, 24 * rows, 40 * columns), dtype), interpolation=mode)
    for size in ((7, 100), (100, 7), (23, 41)):
        check(pred, target, a_map((2, *size), dtype), mask=a_map((1, 24, 200), dtype), interpolation=mode)
    # Columns that do not lie side by side.
    check(pred, target, a_map((2, 320, 192), dtype).transpose(1, 2), interpolation=mode)


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest", "nearest-exact"])
def test_a_map_resampled_in_time(mode):
    pred, target = torch.randn(2, 3, 9, 24, 20), torch.randn(2, 3, 9, 24, 20)
    for frames in (3, 9, 18, 20):
        check(pred, target, torch.rand(2, 1, frames, 48, 40), interpolation=mode)


def test_levels_are_divided_as_the_division_rounds():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    for size, factor in ((16, 1), (16, 2)):
        u8 = levels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        pred, zero = torch.full((1, 1, size, size), 1.0, requires_grad=True), torch.zeros(1, 1, size, size)
        loss = diffdoctor.weighted_loss(
            pred, zero, mask=u8, loss_type={"l2": 0.5}, reduction="sum", interpolation="nearest", backend="cpu"
        )
        loss.backward()
        assert torch.equal(pred.grad[0], levels.float() / 255)


@pytest.mark.parametrize("dtype", FLOATS, ids=IDS)
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_left_out_reaches_nothing_and_what_is_not_does(dtype, modulated, bad):
    """l2 is tried as if all were finite and done again where it was not: in the first, a middle and the last block."""
    options = {"artifact_weight": 0.0, "clean_grad": 0.5 if modulated else 1.0}
    pred, target = torch.randn(2, 4, 64, 67).to(dtype), torch.randn(2, 4, 64, 67).to(dtype)
    confidence = torch.zeros(2, 64, 67)
    places = [(0, 0, 0, 0), (0, 3, 40, 11), (1, 1, 20, 33), (1, 3, 63, 66)]
    for b, _, y, x in places:
        confidence[b, y, x] = 1.0
    clean = check(pred, target, confidence, **options)
    for b, c, y, x in places:
        pred[b, c, y, x] = bad
    assert torch.equal(check(pred, target, confidence, **options), clean)
    pred[1, 2, 30, 5] = bad  # and one that counts
    leaf = pred.clone().requires_grad_()
    loss = diffdoctor.weighted_loss(leaf, target, confidence, backend="cpu", **options)
    loss.backward()
    assert not loss.isfinite()
    assert not leaf.grad[1, 2, 30, 5].isfinite()
    leaf.grad[1, 2, 30, 5] = clean[1, 2, 30, 5]
    assert torch.equal(leaf.grad, clean)


def test_one_plan_serves_other_tensors_and_values():
    """What a plan keeps from its first call must not be that call's numbers."""

    def inputs(seed):
        torch.manual_seed(seed)
        latents, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
        yield Target.velocity(latents, noise, torch.rand(3)), {"huber_c": torch.rand(3), "loss_type": "huber"}
        yield (
            Target.preconditioned(latents, noise, torch.rand(3, dtype=F64), -torch.rand(())),
            {"normalizer": torch.rand(3)},
        )
        yield Target.flow(latents, noise), {"weighting": torch.rand(6)[::2], "reduction": "sample"}
        yield noise, {"weighting": torch.rand(3, 1, 16, 1), "mask": torch.rand(3, 16, 16), "reduction": "sum"}
        yield noise, {"weighting": torch.rand(3, 1, 1, 1).to(BF16), "normalizer": torch.rand(())}

    pred = torch.randn(3, 4, 16, 16)
    for seed in range(3):
        for target, options in inputs(seed):
            check(pred, target, torch.rand(3, 16, 16), **options)


def test_the_same_bits_for_any_number_of_threads_and_twice():
    pred, latents, noise = (torch.randn(2, 16, 64, 64).to(BF16) for _ in range(3))
    layout = Packed(64, 64)
    tokens = layout.pack(pred)
    confidence = torch.rand(2, 512, 512)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            for x, packed in ((pred, None), (tokens, layout)):
                leaf = x.clone().requires_grad_()
                loss = diffdoctor.weighted_loss(
                    leaf,
                    Target.flow(latents, noise),
                    confidence,
                    artifact_weight=2.0,
                    layout=packed,
                    loss_type={"l2": 1.0, "log_cosh": 0.5},
                )
                loss.backward()
                found.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for k in range(2, len(found)):
        assert torch.equal(found[k][0], found[k % 2][0]) and torch.equal(found[k][1], found[k % 2][1])
