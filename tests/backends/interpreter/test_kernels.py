"""The Triton kernels, executed by Triton's interpreter, against the reference over the shared cases."""

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings

import diffdoctor
from diffdoctor.backends import triton_tiles
from diffdoctor.backends.triton import artifact_loss as triton_artifact
from diffdoctor.backends.triton import policy_loss as triton_policy
from diffdoctor.backends.triton import weighted_loss as _triton
from diffdoctor.backends.triton_tiles import index_type, make_box
from diffdoctor.kernels.common import to_storage
from diffdoctor.kernels.element_loss import element_loss
from diffdoctor.kernels.weighted_loss import count_of, decode
from diffdoctor.lowering.plan import LOSS_KINDS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from diffdoctor.lowering.policy_loss import WRITE_LOG_PROB
from support import artifact, case_lists, cases, later_calls, policy, search


@triton.jit
def store_as(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, to_storage(tl.load(x_ptr + offs), out_ptr.dtype.element_ty, True))


@triton.jit
def losses_of(d_ptr, loss_ptr, slope_ptr, c: tl.float64, KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    one, none = tl.full([], 1.0, ACC), tl.full([], 0.0, ACC)
    strength = (one if KIND == 0 else none, one if KIND == 1 else none, one if KIND == 2 else none,
                one if KIND == 3 else none, one if KIND == 4 else none, one if KIND == 5 else none,
                one if KIND == 6 else none, one if KIND == 7 else none)  # fmt: skip
    loss, slope = element_loss(tl.load(d_ptr + offs), tl.full([], c, ACC), strength, ACC)
    tl.store(loss_ptr + offs, loss)
    tl.store(slope_ptr + offs, slope)


@triton.jit
def offsets_of(linear_ptr, out_ptr, sizes, strides, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, decode(tl.load(linear_ptr + offs), sizes, strides, UNIT))


@triton.jit
def count_to_memory(out_ptr, units, UNIT: tl.constexpr, IDX: tl.constexpr):
    tl.store(out_ptr, count_of(units, UNIT, IDX))


def outputs(problem):
    return [x.clone() for x in (problem.loss, problem.grad, problem.sums) if x is not None]


def brief(every, slow):
    """Parameters of a test: those of the cases whose name is in `slow`, seconds each here, under `-m study`."""
    return [pytest.param(case, id=case.id, marks=pytest.mark.study if case.id in slow else ()) for case in every]


@pytest.mark.parametrize("case", brief(case_lists.all_cases(), {"large", "large-bf16"}))
def test_weighted_loss_equals_the_reference(case):
    inputs = cases.build(case)
    want = cases.expected(inputs)
    if case.dtype == torch.float16:  # nothing is kept: loss in forward, gradient in backward
        work = (WRITE_LOSS | WRITE_SUMS, WRITE_GRAD)
    else:
        work = (WRITE_LOSS | WRITE_GRAD | (WRITE_SUMS if case.confidence or case.mask else 0),)
    for part in work:
        problem = cases.lower(inputs, part, weight_mean=_triton.weight_mean)
        _triton.weighted_loss(problem)
        cases.check(problem, want)


F32, BF16, U8, BOOL = torch.float32, torch.bfloat16, torch.uint8, torch.bool
SELECTED = (
    cases.Case("same-map", shape=(2, 3, 33, 31), confidence=((2, 33, 31), F32), normalizer="tensor"),
    cases.Case("resampled", shape=(2, 2, 17, 16), confidence=((2, 34, 24), F32)),
    cases.Case("bytes-bf16", shape=(2, 2, 33, 16), dtype=BF16, target="contrastive", confidence=((2, 33, 16), U8)),
    cases.Case("held-still", shape=(2, 2, 33, 16), confidence=((1, 33, 16), F32), mask=((2, 33, 16), BOOL),
               options={"clean_grad": 0.0, "artifact_grad": 2.0, "threshold": 0.4, "reduction": "sample"}),
    cases.Case("video-cut", shape=(2, 3, 7, 5, 6), dtype=BF16, target="flow", confidence=((2, 5, 6), F32)),
    cases.Case("channels-last", shape=(2, 3, 17, 16), pred_view="channels_last", target_view="channels_last",
               mask=((2, 17, 16), F32), options={"loss_type": {"l2": 0.3}}),
)  # fmt: skip


@pytest.mark.parametrize("programs", [2, 8192])
@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.id)
def test_without_statistics_as_with_them_however_many_tiles_a_program_visits(case, programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "MANY_PROGRAMS", programs)
    inputs = cases.build(case)
    grads = []
    for outputs in (WRITE_LOSS | WRITE_GRAD, WRITE_LOSS | WRITE_GRAD | WRITE_SUMS):
        problem = cases.lower(inputs, outputs)
        problem.plan = dataclasses.replace(problem.plan, cache={})
        box = make_box(problem.plan)
        assert (box.turns > 1) == (box.tiles * problem.plan.batch >= 2 * programs and case.id != "resampled")
        _triton.weighted_loss(problem)
        cases.check(problem, cases.expected(inputs))
        grads.append(problem.grad)
    assert torch.equal(*grads)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(case=search.cases(max_side=9))
def test_any_weighted_loss_equals_the_reference(case):
    inputs = cases.build(case)
    problem = cases.lower(inputs, weight_mean=_triton.weight_mean)
    _triton.weighted_loss(problem)
    cases.check(problem, cases.expected(inputs))


@pytest.mark.parametrize("case", policy.interpreted_cases(), ids=lambda case: case.id)
def test_policy_loss_equals_the_reference(case):
    inputs = policy.build(case)
    problem = policy.lower(inputs)
    triton_policy.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))
    problem = policy.lower(inputs | {"old_log_prob": None}, WRITE_LOG_PROB)
    triton_policy.policy_loss(problem)
    want = policy.log_prob_of(problem, case.options.get("layout"))
    torch.testing.assert_close(problem.log_prob.double(), want, rtol=1e-5, atol=1e-6)


REDUCTIONS = {f"{method}-{reduction}" for method in ("max", "mean", "sum") for reduction in ("mean", "sum")}


# The reductions differ in the last few additions alone, and dtypes in the loads.
@pytest.mark.parametrize("case", brief(artifact.every_case(), {*REDUCTIONS, "mean-bf16", "sum-bf16", "larger"}))
def test_artifact_loss_equals_the_reference(case):
    logits = artifact.build(case)
    problem = artifact.lower(case, logits)
    triton_artifact.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = artifact.expected(case, logits, g)
    rtol = 1e-12 if case.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(problem.loss, want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype)
    triton_artifact.artifact_loss_backward(problem.unit_grad, problem.factor, g, grad)
    scale = want_grad.abs().max().item()
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=cases.GRAD_TOLERANCE[case.dtype] * scale + 1e-30)


@pytest.mark.parametrize("method", ["threshold", "mean", "max"])
def test_artifact_loss_without_a_gradient_visits_each_pixel_once(method):
    case = artifact.Case(method, shape=(2, 5, 6), size=(17, 24), method=method, reduction="sample")
    logits = artifact.build(case)
    problem = artifact.lower(case, logits)
    problem.unit_grad = problem.factor = None
    triton_artifact.artifact_loss(problem)
    want, _ = artifact.expected(case, logits, torch.ones(2))
    torch.testing.assert_close(problem.loss, want, rtol=3e-6, atol=0)


@pytest.mark.parametrize("case", artifact.nan_cases(), ids=lambda case: case.id)
def test_a_nan_logit_gives_the_gradient_that_the_reference_gives(case):
    logits = artifact.build_with_nan(case)
    problem = artifact.lower(case, logits)
    triton_artifact.artifact_loss(problem)
    grad = torch.empty_like(logits)
    triton_artifact.artifact_loss_backward(problem.unit_grad, problem.factor, torch.ones(2), grad)
    artifact.check(case, problem.loss, grad, artifact.expected(case, logits, torch.ones(2)))


def test_the_same_bits_twice_and_counters_left_at_zero(monkeypatch):
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(_triton, "counters", lambda device, count, keep: kept)
    case = cases.Case("many-programs", shape=(2, 3, 33, 31), confidence=((2, 33, 31), torch.float32))
    inputs = cases.build(case)
    problem = cases.lower(inputs)
    assert make_box(problem.plan).programs > 4
    _triton.weighted_loss(problem)
    first = outputs(problem)
    assert not kept.any()
    _triton.weighted_loss(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(problem), strict=True))
    assert not kept.any()


def test_triton_serves_cpu_tensors_by_its_name(monkeypatch):
    """As docs/install.md promises for TRITON_INTERPRET=1."""
    pred, target, confidence = torch.randn(2, 1, 4, 5), torch.randn(2, 1, 4, 5), torch.rand(2, 8, 10)
    calls = {
        "weighted_loss": lambda x, name: diffdoctor.weighted_loss(
            x, target, confidence, artifact_weight=0.5, return_stats=True, backend=name
        )[0],
        "artifact_loss": lambda x, name: diffdoctor.artifact_loss(x, size=(8, 10), backend=name),
    }
    for call in calls.values():
        found = []
        for name in ("triton", "reference"):
            x = pred.clone().requires_grad_()
            loss = call(x, name)
            loss.backward()
            found.append((loss.detach(), x.grad))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", "triton")
    x = pred.clone().requires_grad_()
    diffdoctor.modulate_gradient(x, confidence, artifact_grad=2.0).sum().backward()
    assert x.grad.min() >= 1.0


def test_maps_outside_the_unit_interval_are_clamped_and_counted():
    odd = torch.tensor([-3.0, 0.25, 1.0, 1.5, 200.0, math.nan, math.inf, -math.inf])
    pred = torch.randn(1, 2, 1, 8)
    for maps in ({"confidence": odd[None, None], "artifact_weight": 0.0}, {"mask": odd[None, None]}):
        answers = [
            diffdoctor.weighted_loss(pred, 0 * pred, **maps, return_stats=True, backend=name)
            for name in ("triton", "reference")
        ]
        (loss, stats), (want, expected) = answers
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        assert (stats.map_nan, stats.map_outside) == (expected.map_nan, expected.map_outside) == (2, 10)


def test_a_tensor_without_memory_is_refused():
    freed = torch.randn(1, 2, 1, 8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="target: expected a tensor whose memory holds its values, got address 0"):
        diffdoctor.weighted_loss(torch.randn(1, 2, 1, 8), freed, backend="triton")


def test_later_calls_equal_the_reference(served):
    later_calls.check("everything")


@pytest.mark.parametrize("zero", ["mask", "weighting", "clean_weight", "element_weighting", "normalizer"])
def test_nan_under_zero_weight_reaches_nothing(served, zero):
    pred = torch.randn(2, 3, 4, 5)
    target = torch.randn(2, 3, 4, 5)
    broken = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    broken[1] = True
    clean, options = pred.clone(), {}
    pred[1] = float("nan")
    clean[1] = 0
    if zero == "mask":
        options = {"mask": ~broken}
    elif zero in ("weighting", "normalizer"):
        options = {zero: torch.tensor([1.0, 0.0])}
    elif zero == "clean_weight":
        options = {"confidence": (~broken).float(), "artifact_weight": 2.0, "clean_weight": 0.0}
    else:
        options = {"weighting": (~broken).float()}
    pred.requires_grad_()
    loss = diffdoctor.weighted_loss(pred, target, **options)
    loss.backward()
    torch.testing.assert_close(loss, diffdoctor.weighted_loss(clean, target, **options), rtol=1e-6, atol=0)
    assert torch.isfinite(pred.grad).all()
    assert not pred.grad[1].any()


def test_nan_where_the_gradient_is_held_still_reaches_the_loss_alone(served):
    pred, confidence = torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5)
    confidence[0] = 1
    pred[1, 0, 0, 0] = float("nan")
    pred.requires_grad_()
    options = {"artifact_weight": 2.0, "artifact_grad": 3.0, "clean_grad": 0.0, "reduction": "sample"}
    loss = diffdoctor.weighted_loss(pred, torch.randn(2, 3, 4, 5), confidence, **options)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True]
    assert not pred.grad[1].any()
    assert pred.grad[0].all()


def test_an_empty_mask_gives_zero(served):
    pred = torch.randn(2, 3, 4, 5, requires_grad=True)
    mask = torch.zeros(2, 4, 5)
    loss = diffdoctor.weighted_loss(pred, torch.randn(2, 3, 4, 5), mask=mask, normalize="sample", reduction="sample")
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert not pred.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_a_second_backward_over_a_kept_graph_gives_the_same(served, dtype, reduction):
    pred = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    target, confidence = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5)
    options = {"artifact_weight": 2.0, "artifact_grad": 2.0, "reduction": reduction}
    loss = diffdoctor.weighted_loss(pred, target, confidence, **options)
    g = torch.full(loss.shape, 3.0)
    (first,) = torch.autograd.grad(loss, pred, g, retain_graph=True)
    (second,) = torch.autograd.grad(loss, pred, g)
    assert torch.equal(first, second)
    reference = pred.detach().clone().requires_grad_()
    again = diffdoctor.weighted_loss(reference, target, confidence, backend="reference", **options)
    (want,) = torch.autograd.grad(again, reference, g)
    scale = want.abs().max().item()
    bound = 2 * cases.GRAD_TOLERANCE[dtype] * scale  # a kept gradient is rounded twice
    torch.testing.assert_close(first, want, rtol=0, atol=bound)


def test_modulate_gradient_equals_the_reference(served):
    confidence = torch.rand(2, 1, 9, 11)
    options = {"artifact_grad": 2.0, "clean_grad": 0.25, "threshold": 0.3, "gamma": 1.5}
    grads = []
    for function in (diffdoctor.modulate_gradient, diffdoctor.reference.modulate_gradient):
        x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5).requires_grad_()
        function(x, confidence, **options).pow(3).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=3e-6, atol=1e-7)


def test_scale_gradient_writes_nothing_in_place_where_g_is_one():
    grad = torch.randn(3, 700)
    kept = grad.clone()
    _triton.scale_gradient(grad, torch.tensor([1.0, 2.0, 1.0]), grad, 3, 700)
    assert torch.equal(grad[::2], kept[::2])
    assert torch.equal(grad[1], kept[1] * 2)
    out = torch.full_like(grad, float("nan"))
    _triton.scale_gradient(kept, torch.ones(()), out, 1, kept.numel())
    assert torch.equal(out, kept)
    _triton.scale_gradient(kept, torch.tensor(0.5).expand(3), out, 3, 700)
    assert torch.equal(out, kept * 0.5)


def test_bf16_stores_round_to_nearest_even():
    bits = torch.randint(0, 2**31, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    x = (bits * 2 - 2**31).to(torch.int32).view(torch.float32).clone()
    x[:6] = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 3.4e38, 1.00390625])
    out = torch.empty(4096, dtype=torch.bfloat16)
    store_as[(1,)](x, out, BLOCK=4096)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_element_losses_are_exact_near_zero_and_far_away(kind, dtype):
    magnitude = torch.logspace(-6, 2, 511, dtype=torch.float64)
    d = torch.cat([magnitude, -magnitude, torch.tensor([0.0, 1.0])]).to(dtype)
    exact = d.double().requires_grad_()
    c = 0.25
    want = diffdoctor.reference.losses.ELEMENT_LOSSES[kind](exact, torch.tensor(c, dtype=torch.float64))
    want.sum().backward()
    loss, slope = torch.empty_like(d), torch.empty_like(d)
    number = LOSS_KINDS.index(kind)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    losses_of[(1,)](d, loss, slope, c, KIND=number, ACC=acc, BLOCK=1024)
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), want.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(slope.double(), exact.grad, rtol=rtol, atol=0)


@pytest.mark.parametrize("unit", [1, 16])
def test_offsets_beyond_two_to_the_31(unit):
    linear = torch.arange(2**40, 2**40 + 8, dtype=torch.int64)
    out = torch.empty_like(linear)
    sizes, strides = (2**21, 2**20, 3), (7 * 2**21, 5, 2**31 // unit)
    offsets_of[(1,)](linear, out, sizes, strides, UNIT=unit, BLOCK=8)
    want = [i // (3 * 2**20) * strides[0] + i // 3 % 2**20 * strides[1] + i % 3 * strides[2] for i in linear.tolist()]
    assert out.tolist() == [unit * offset for offset in want]
    few = torch.arange(3, 11, dtype=torch.int64)
    offsets_of[(1,)](few, out, (11,), (2**31 // unit,), UNIT=unit, BLOCK=8)
    assert out.tolist() == [2**31 * i for i in few.tolist()]


@pytest.mark.parametrize("count", [1, 48, 2**31 + 4096])
def test_counts_beyond_two_to_the_31(count):
    unit = math.gcd(count, 16)
    out = torch.empty(1, dtype=torch.int64)
    count_to_memory[(1,)](out, count // unit, UNIT=unit, IDX=tl.int64)
    assert out.item() == count


def test_large_tensors_have_programs_enough_and_not_too_many():
    def box_of(shape, size, batch):
        plan = cases.lower(cases.build(cases.Case("small", shape=shape, confidence=((2, *shape[-2:]), F32)))).plan
        size = (*(1 for _ in range(len(plan.size) - len(size))), *size)
        return make_box(dataclasses.replace(plan, size=size, batch=batch, count=math.prod(size)))

    picture = box_of((2, 3, 4, 6), (3, 2048 * 2048), 6)
    assert (picture.turns, picture.steps, picture.programs) == (3, 3, 1366)
    video = box_of((2, 3, 5, 4, 6), (16 * 21, 90 * 160), 14)
    assert (video.turns, video.steps, video.programs) == (1, 9, 15 * 38)
    latents = box_of((2, 3, 4, 6), (16, 128 * 128), 8)
    assert (latents.turns, latents.steps, latents.programs) == (1, 2, 16 * 8)


def test_the_index_type_follows_the_reach():
    inputs = cases.build(cases.Case("small", confidence=((2, 50, 70), torch.float32)))
    plan = cases.lower(inputs).plan
    assert index_type(plan) is tl.int32
    wide = dataclasses.replace(plan, pred=dataclasses.replace(plan.pred, strides=(0, *(2**30 for _ in plan.size))))
    assert index_type(wide) is tl.int64
