"""The CUDA kernels of weighted_loss, run on the CPU through tests/cuda_shim, against the reference."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import diffdoctor
from diffdoctor.backends.cuda import device as cuda_device
from diffdoctor.backends.native_call import native_plan
from diffdoctor.lowering.plan import LOSS_KINDS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from support import case_lists, cases, search

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def solve(cuda, inputs, outputs=WRITE_LOSS | WRITE_GRAD | WRITE_SUMS):
    problem = cases.lower(inputs, outputs, weight_mean=cuda.weight_mean)
    cuda.weighted_loss(problem)
    return problem


@pytest.mark.parametrize("case", case_lists.all_cases(), ids=lambda case: case.id)
def test_weighted_loss_equals_the_reference(cuda, case):
    inputs = cases.build(case)
    cases.check(solve(cuda, inputs), cases.expected(inputs))


@pytest.mark.parametrize("case", case_lists.tiled_cases(), ids=lambda case: case.id)
def test_tiled_samples_equal_the_reference(cuda, case):
    inputs = cases.build(case)
    # In fp64: PyTorch's fp32 sum over an expanded dim is off by 1e-4 at 17,000 elements.
    cases.check(solve(cuda, inputs), cases.expected(inputs, upcast=True))


@pytest.mark.parametrize("case", [*case_lists.fast_cases(), *case_lists.odd_cases()], ids=lambda case: case.id)
def test_the_fast_kernels_equal_the_reference_whatever_their_tiles(cuda, shim, case):
    inputs = cases.build(case)
    want = cases.expected(inputs, upcast=True)
    plan = native_plan(cases.lower(inputs, WRITE_LOSS, weight_mean=cuda.weight_mean).plan, shim)
    assert shim.l2_serves(plan, WRITE_LOSS | WRITE_GRAD)
    assert not shim.l2_serves(plan, WRITE_LOSS | WRITE_SUMS)
    for tiles in (170, 1):  # a vector for each thread, as many as there ever are
        before = shim.set_tiles_per_vector(tiles)
        try:
            answers = []
            for seed in (1, 2):
                shim.seed(seed)
                blocks = shim.blocks()
                answers.append(solve(cuda, inputs, WRITE_LOSS | WRITE_GRAD))
                if answers[-1].z is None or not answers[-1].z_is_mean:
                    assert shim.blocks() - blocks == shim.l2_blocks(plan)["odd" not in case.id or "no-map" in case.id]
                cases.check(answers[-1], want)
            assert torch.equal(answers[0].grad, answers[1].grad)
            assert torch.equal(answers[0].loss, answers[1].loss)
            for outputs in (WRITE_LOSS, WRITE_GRAD):
                cases.check(solve(cuda, inputs, outputs), want)
        finally:
            shim.set_tiles_per_vector(before)


def test_samples_that_start_in_the_middle_of_a_vector_stay_fast(cuda, shim):
    """As views into a larger buffer do, where all tensors are at the same place of one."""
    options = {"dtype": BF16, "target_dtype": BF16, "confidence": ((2, 19, 24), F32)}
    for shape, confidence in (((2, 3, 19, 24), True), ((2, 3, 19, 23), False)):
        inputs = cases.build(cases.Case("", shape=shape, **options if confidence else {**options, "confidence": None}))
        want = cases.expected(inputs, upcast=True)
        for name in ("model_pred", "target"):
            inputs[name] = cases.shifted(inputs[name], 3)
        problem = cases.lower(inputs, WRITE_LOSS | WRITE_GRAD)
        problem.grad = cases.shifted(problem.grad, 3)
        blocks = shim.blocks()
        cuda.weighted_loss(problem)
        assert shim.blocks() - blocks == shim.l2_blocks(native_plan(problem.plan, shim))[not confidence]
        cases.check(problem, want)


@pytest.mark.parametrize("case", case_lists.token_cases(), ids=lambda case: case.id)
def test_the_kernels_for_tokens_equal_the_reference(cuda, shim, case):
    inputs = cases.build(case)
    plan = native_plan(cases.lower(inputs, WRITE_LOSS, weight_mean=cuda.weight_mean).plan, shim)
    assert shim.tokens_serve(plan)
    assert not shim.l2_serves(plan, WRITE_LOSS | WRITE_GRAD)
    want, answers = cases.expected(inputs, upcast=True), []
    for seed, outputs in ((1, WRITE_LOSS | WRITE_GRAD), (2, WRITE_LOSS | WRITE_GRAD), (3, WRITE_LOSS), (4, WRITE_GRAD)):
        shim.seed(seed)
        answers.append(solve(cuda, inputs, outputs))
        cases.check(answers[-1], want)
    assert torch.equal(answers[0].grad, answers[1].grad)
    assert torch.equal(answers[0].loss, answers[1].loss)


def test_tokens_at_odd_addresses_or_in_other_orders_go_elsewhere(cuda, shim):
    """The module ends the process where an access is not aligned."""
    layout = diffdoctor.Packed(12, 74)
    case = cases.Case("", shape=(2, 222, 20), dtype=BF16, target_dtype=BF16, target="image",
                      confidence=((2, 12, 74), F32), options={"layout": layout})  # fmt: skip
    inputs = cases.build(case)
    want = cases.expected(inputs)
    for name in ("model_pred", "target"):
        cases.check(solve(cuda, inputs | {name: cases.shifted(inputs[name], 1)}, WRITE_LOSS | WRITE_GRAD), want)
    for options in ({"layout": diffdoctor.Packed(12, 74, 2, "ph pw c")}, {"layout": layout, "loss_type": "l1"}):
        other = cases.build(dataclasses.replace(case, options=options))
        plan = native_plan(cases.lower(other, WRITE_LOSS, weight_mean=cuda.weight_mean).plan, shim)
        assert not shim.tokens_serve(plan)


def test_what_is_left_out_of_tokens_reaches_nothing(cuda):
    layout = diffdoctor.Packed(12, 74)
    case = cases.Case("", shape=(1, 222, 20), target="image", confidence=((1, 12, 74), F32),
                      options={"clean_weight": 0.0, "layout": layout})  # fmt: skip
    inputs = cases.build(case)
    clean = layout.pack((inputs["confidence"] == 0)[:, None].expand(1, 5, 12, 74))
    inputs["model_pred"][clean] = float("nan")
    problem = solve(cuda, inputs, WRITE_LOSS | WRITE_GRAD)
    assert torch.isfinite(problem.loss)
    assert not problem.grad[clean].any()
    assert problem.grad[~clean].all()


def test_what_is_left_out_reaches_nothing_in_the_fast_kernels(cuda, shim):
    """NaN under a weight of 0 and under a modulation of 0, an infinite factor of the gradient elsewhere."""
    case = cases.Case("", shape=(1, 2, 16, 32), confidence=((1, 16, 32), F32), options={"clean_weight": 0.0})
    inputs = cases.build(case)
    clean = (inputs["confidence"] == 0).expand(1, 2, 16, 32).reshape(1, 2, 16, 32)
    inputs["model_pred"][clean] = float("nan")
    problem = solve(cuda, inputs, WRITE_LOSS | WRITE_GRAD)
    assert torch.isfinite(problem.loss)
    assert not problem.grad[clean].any()
    assert problem.grad[~clean].all()
    inputs |= {"clean_weight": 1.0, "artifact_weight": 1.0, "clean_grad": 0.0, "artifact_grad": 1.0}
    problem = solve(cuda, inputs, WRITE_LOSS | WRITE_GRAD)
    assert problem.loss.isnan()
    assert not problem.grad[clean].any()


def test_every_byte_of_a_map_is_its_level(cuda):
    inputs = cases.build(cases.Case("", shape=(1, 1, 1, 256), confidence=((1, 1, 256), torch.uint8)))
    inputs["confidence"].copy_(torch.arange(256).view(1, 1, 256))
    inputs |= {"model_pred": torch.ones(1, 1, 1, 256), "target": torch.zeros(1, 1, 1, 256), "clean_weight": 0.0,
               "artifact_weight": 1.0, "reduction": "sum"}  # fmt: skip
    problem = solve(cuda, inputs, WRITE_GRAD)
    assert torch.equal(problem.grad.flatten(), problem.grad.max() * (torch.arange(256, dtype=F32) / 255))


@pytest.mark.parametrize("place", [cases.shifted, cases.spaced])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["f32", "bf16", "f16", "f64"])
def test_dense_but_unaligned_tensors_are_not_read_sixteen_bytes_at_a_time(cuda, dtype, place):
    """The module ends the process where an access is not aligned."""
    inputs = cases.build(cases.Case("", shape=(2, 8, 8, 16), dtype=dtype, target_dtype=BF16,
                                    confidence=((2, 8, 16), F32)))  # fmt: skip
    want = cases.expected(inputs)
    for name in ("model_pred", "target"):
        problem = solve(cuda, inputs | {name: place(inputs[name], 1)})
        assert problem.plan.contiguous or place is cases.spaced
        cases.check(problem, want)
    problem = cases.lower(inputs, WRITE_GRAD)
    problem.grad = cases.shifted(problem.grad, 1)
    cuda.weighted_loss(problem)
    cases.check(problem, want)


@pytest.mark.parametrize("outputs", [WRITE_LOSS, WRITE_LOSS | WRITE_GRAD, WRITE_LOSS | WRITE_SUMS, WRITE_GRAD])
def test_each_output_alone(cuda, outputs):
    inputs = cases.build(cases.Case("", shape=(2, 3, 16, 24), dtype=F16, confidence=((2, 8, 8), F32)))
    cases.check(solve(cuda, inputs, outputs), cases.expected(inputs))


@settings(max_examples=150, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # fmt: skip
@given(case=search.cases(max_side=19))
def test_search(cuda, case):
    inputs = cases.build(case)
    cases.check(solve(cuda, inputs), cases.expected(inputs))


@pytest.mark.parametrize("case", case_lists.tiled_cases(), ids=lambda case: case.id)
def test_the_order_of_blocks_and_threads_does_not_matter(cuda, shim, case):
    inputs = cases.build(case)
    answers = []
    for seed in (1, 2):
        shim.seed(seed)
        answers.append(solve(cuda, inputs))
    for name in ("loss", "grad", "sums"):
        assert torch.equal(getattr(answers[0], name), getattr(answers[1], name))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("count", [1, 7, 64, 5000])
def test_scale_gradient(cuda, dtype, count):
    acc = F64 if dtype == F64 else F32
    grad = torch.randn(3, count, dtype=F64).to(dtype)
    g = torch.tensor([1.0, 9.0, -0.5, 9.0, 0.0, 9.0], dtype=acc)[::2]
    want = (grad.to(acc) * g[:, None]).to(dtype)
    out = torch.full_like(grad, float("nan"))
    cuda.scale_gradient(grad, g, out, 3, count)
    assert torch.equal(out, want)
    in_place = grad.clone()
    cuda.scale_gradient(in_place, g, in_place, 3, count)
    assert torch.equal(in_place, want)
    cuda.scale_gradient(grad, torch.ones((), dtype=acc).expand(3), out, 3, count)
    assert torch.equal(out, grad)


@pytest.mark.parametrize("side", [98, 97], ids=["fours", "odd"])
@pytest.mark.parametrize("blocks", [2112, 1], ids=["few-positions", "many-positions"])
@pytest.mark.parametrize(
    ("confidence", "mask"),
    [(F32, None), (None, torch.uint8), (BF16, torch.bool), (torch.uint8, F16), (F64, F32)],
    ids=["f32", "u8-mask", "bf16-bool", "u8-f16", "f64-f32"],
)
def test_the_mean_of_maps_in_rows(cuda, shim, confidence, mask, blocks, side):
    """At positions of two samples, of which the last thread's are not all there."""
    grid = (2, side, side)
    given = {"confidence": confidence and (grid, confidence), "mask": mask and (grid, mask)}
    options = {"clean_weight": 0.25, "threshold": 0.3, "normalize": "sample"}
    inputs = cases.build(cases.Case("", shape=(2, 2, side, side), **given, options=options))
    before = shim.set_blocks_for_visits(blocks)
    try:
        problem = solve(cuda, inputs, WRITE_LOSS)
    finally:
        shim.set_blocks_for_visits(before)

    def level(name, absent):
        values = inputs[name]
        if values is None:
            return torch.full(grid, absent, dtype=F64)
        return values.double() / (255 if values.dtype == torch.uint8 else 1)

    u = level("confidence", 0.0)
    u = torch.where(u.float() >= 0.3, u, 0.0)
    want = (level("mask", 1.0) * (0.25 + (2.0 - 0.25) * u)).mean((1, 2))
    torch.testing.assert_close(problem.z.data.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.0, 0.25, 3.0])
def test_the_loops_of_the_cpu_have_the_losses_that_cuda_has(shim, c):
    magnitude = torch.cat([torch.logspace(-6, 1.9, 400), torch.tensor([0.0, c, 1.0])])
    for d in torch.cat([magnitude, -magnitude]).tolist():
        losses = shim.element_losses(d, c)
        assert tuple(losses) == LOSS_KINDS
        for kind, (defined, in_loop) in losses.items():
            # 4e-7 and 3e-7 relative are what log_cosh's two forms are off by; every other kind is one function.
            assert in_loop == pytest.approx(defined, rel=7e-7 if kind == "log_cosh" else 0, abs=0), (kind, d)
    for kind, (defined, in_loop) in shim.element_losses(float("nan"), c).items():
        assert all(value != value for value in (defined[0], in_loop[0])), kind


def test_every_kernel_is_loaded_at_the_first_use(shim):
    # weighted_loss: 25 fast ones and 15 for odd sizes, 5 for tokens, 8 general ones; weight_mean 4; policy_loss: 18
    # fast ones and 8 general ones; artifact_loss 4, scale_gradient 12.
    assert shim.kernels() == 25 + 15 + 5 + 8 + 4 + 18 + 8 + 4 + 12
    assert shim.cuda_problem() is None


def test_the_current_stream_is_used(cuda, shim, monkeypatch):
    monkeypatch.setattr(cuda_device, "raw_stream", lambda device: 0x1234)
    solve(cuda, cases.build(cases.Case("")))
    assert shim.stream() == 0x1234
    assert (torch.device("cpu"), 0x1234) in cuda_device._workspaces
