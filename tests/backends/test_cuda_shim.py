"""The CUDA kernels, run on the CPU through tests/cuda_shim, against the reference over the shared cases and
the trainers' formulas."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import diffdoctor
from benchmarks.ops import host
from diffdoctor import Target
from diffdoctor.backends import select
from diffdoctor.backends.cuda import artifact_loss as cuda_artifact
from diffdoctor.backends.cuda import device as cuda_device
from diffdoctor.backends.cuda import policy_loss as cuda_policy
from diffdoctor.backends.cuda import weighted_loss as _cuda
from diffdoctor.backends.native_call import native_plan, policy_arguments
from diffdoctor.lowering.plan import LOSS_KINDS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, OperandPlan
from diffdoctor.lowering.policy_loss import WRITE_LOG_PROB
from diffdoctor.ops import policy_call
from diffdoctor.ops.call import plans
from support import artifact, case_lists, cases, later_calls, policy, search
from support.all_formulas import FORMULAS
from support.cuda_shim import ROOT, build_module, build_race, compiler, run

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

TILED = case_lists.tiled_cases()


@pytest.fixture(scope="module")
def shim():
    return build_module()


@pytest.fixture
def cuda(shim, monkeypatch):
    """The backend's glue over the host build of its kernels, with workspaces of its own."""
    monkeypatch.setattr(cuda_device, "native", shim)
    monkeypatch.setattr(cuda_device, "_workspaces", {})
    yield _cuda
    # Every launch leaves the workspace's head as it found it.
    assert all(not workspace[:4096].any() for workspace in cuda_device._workspaces.values())


@pytest.fixture
def public(cuda, monkeypatch):
    """The public functions on CPU tensors, served by the CUDA backend."""
    monkeypatch.setitem(select._chosen, ("cpu", "weighted_loss"), cuda)
    monkeypatch.setitem(select._chosen, ("cpu", "artifact_loss"), cuda_artifact)
    monkeypatch.setitem(select._chosen, ("cpu", "policy_loss"), cuda_policy)
    # A plan holds its backend's form: those of other tests would lead around the kernels, and these around theirs.
    host.forget_plans()
    monkeypatch.delenv("DIFFDOCTOR_BACKEND", raising=False)
    yield diffdoctor
    host.forget_plans()


def solve(cuda, inputs, outputs=WRITE_LOSS | WRITE_GRAD | WRITE_SUMS):
    problem = cases.lower(inputs, outputs, weight_mean=cuda.weight_mean)
    cuda.weighted_loss(problem)
    return problem


@pytest.mark.parametrize("case", case_lists.all_cases(), ids=lambda case: case.id)
def test_weighted_loss_equals_the_reference(cuda, case):
    inputs = cases.build(case)
    cases.check(solve(cuda, inputs), cases.expected(inputs))


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.id)
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


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.id)
def test_the_order_of_blocks_and_threads_does_not_matter(cuda, shim, case):
    inputs = cases.build(case)
    answers = []
    for seed in (1, 2):
        shim.seed(seed)
        answers.append(solve(cuda, inputs))
    for name in ("loss", "grad", "sums"):
        assert torch.equal(getattr(answers[0], name), getattr(answers[1], name))


@pytest.mark.parametrize("case", policy.every_case(), ids=lambda case: case.id)
def test_policy_loss_equals_the_reference(cuda, case):
    policy_call.plans.clear()  # a plan holds its backend's form
    inputs = policy.build(case)
    problem = policy.lower(inputs)
    cuda_policy.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))
    problem = policy.lower(inputs | {"old_log_prob": None}, WRITE_LOG_PROB)
    cuda_policy.policy_loss(problem)
    want = policy.log_prob_of(problem, case.options.get("layout"))
    torch.testing.assert_close(problem.log_prob.double(), want, rtol=1e-5, atol=1e-6)
    policy_call.plans.clear()


@pytest.mark.parametrize("case", policy.lanes_cases(), ids=lambda case: case.id)
def test_the_fast_policy_loss_equals_the_reference_whatever_its_tiles(cuda, shim, case):
    policy_call.plans.clear()
    inputs = policy.build(case)
    want = policy.expected(inputs)
    for tiles in (170, 1):  # a group of pixels for each four lanes, as many as there ever are
        before = shim.set_tiles_per_vector(tiles)
        try:
            answers = []
            for seed, outputs in ((1, policy.ALL_OUTPUTS), (2, policy.ALL_OUTPUTS), (3, WRITE_LOSS), (4, WRITE_GRAD)):
                shim.seed(seed)
                problem = policy.lower(inputs, outputs)
                assert shim.policy_lanes_serve(native_plan(problem.plan, shim), policy_arguments(problem))
                cuda_policy.policy_loss(problem)
                policy.check(problem, want)
                answers.append(problem)
            for name in ("loss", "grad", "sums"):
                assert torch.equal(getattr(answers[0], name), getattr(answers[1], name))
            problem = policy.lower(inputs | {"old_log_prob": None}, WRITE_LOG_PROB)
            cuda_policy.policy_loss(problem)
            want_log_prob = policy.log_prob_of(problem, case.options.get("layout"))
            torch.testing.assert_close(problem.log_prob.double(), want_log_prob, rtol=1e-5, atol=1e-6)
        finally:
            shim.set_tiles_per_vector(before)
    policy_call.plans.clear()


def test_the_fast_policy_loss_selects_out_what_is_not_finite(cuda, shim):
    policy_call.plans.clear()
    inputs = policy.build(policy.Case("", shape=(2, 16, 8, 40), dtype=BF16, step_dtype=BF16, ref=BF16,
                                      mask=((2, 1, 8, 40), F32)))  # fmt: skip
    out = torch.zeros(2, 1, 8, 40, dtype=torch.bool)
    out[..., ::3] = True
    inputs["mask"].masked_fill_(out, 0.0)
    for name in ("model_pred", "next_latents", "ref_pred"):
        inputs[name].masked_fill_(out, float("nan"))
    problem = policy.lower(inputs)
    assert shim.policy_lanes_serve(native_plan(problem.plan, shim), policy_arguments(problem))
    cuda_policy.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))
    policy_call.plans.clear()


@pytest.mark.parametrize("case", artifact.every_case(), ids=lambda case: case.id)
def test_artifact_loss_equals_the_reference(cuda, case):
    logits = artifact.build(case)
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = artifact.expected(case, logits, g)
    rtol = 1e-12 if case.dtype == F64 else 3e-6
    torch.testing.assert_close(problem.loss, want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype)
    cuda_artifact.artifact_loss_backward(problem.unit_grad, problem.factor, g, grad)
    scale = want_grad.abs().max().item()
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=cases.GRAD_TOLERANCE[case.dtype] * scale + 1e-30)


def test_artifact_loss_shares_ties_and_passes_nan_on(cuda):
    case = artifact.Case("", shape=(2, 3, 4), size=(12, 16), method="max", reduction="sample")
    logits = torch.zeros(case.shape)
    logits[1, 1, 2] = float("nan")
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    assert problem.loss[0] == 0.5
    assert problem.loss[1].isnan()
    torch.testing.assert_close((problem.unit_grad[0] * problem.factor[0]).sum(), torch.tensor(0.25))


@pytest.mark.parametrize("case", artifact.nan_cases(), ids=lambda case: case.id)
def test_a_nan_logit_gives_the_gradient_that_the_reference_gives(cuda, case):
    logits = artifact.build_with_nan(case)
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    grad = torch.empty_like(logits)
    cuda_artifact.artifact_loss_backward(problem.unit_grad, problem.factor, torch.ones(2), grad)
    artifact.check(case, problem.loss, grad, artifact.expected(case, logits, torch.ones(2)))


@pytest.mark.parametrize("method", ["threshold", "mean", "max"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_logit_that_is_not_finite_reaches_no_neighbour_of_the_same_size(cuda, method, value):
    case = artifact.Case(method, shape=(2, 13, 12), size=(13, 12), method=method, reduction="sample")
    logits = artifact.build(case)
    logits[0, 2, 3] = value
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    want, _ = artifact.expected(case, logits, torch.ones(2))
    torch.testing.assert_close(problem.loss, want, rtol=3e-6, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
def test_one_call_equals_the_trainers_formula(public, formula):
    formula.run(backend=None)


def describe(shim, case):
    problem = cases.lower(cases.build(case), WRITE_GRAD, weight_mean=_cuda.weight_mean)
    plan = native_plan(problem.plan, shim)
    return problem.plan, plan, shim.tiling(plan)


@pytest.mark.parametrize("case", case_lists.all_cases() + TILED, ids=lambda case: case.id)
def test_tiles_hold_every_element_once(cuda, shim, case):
    plan, native, tiling = describe(shim, case)
    tiles = [shim.tile(native, index) for index in range(tiling["tiles"])]
    assert sum(size for _, _, size in tiles) == plan.count
    assert min(first for first, _, _ in tiles) == 0
    assert max(last for _, last, _ in tiles) == plan.count - 1
    assert tiling["positions"] <= 16384


@pytest.mark.parametrize(
    "case_id",
    [
        "runs",
        "runs-bf16-resampled",
        "outers-channels-last",
        "outers-packed",
        "outers-packed-f64",
        "outers-tokens",
        "uniform-f64",
        "full-weighting",
    ],
)
def test_usual_layouts_move_sixteen_bytes(cuda, shim, case_id):
    case = next(case for case in TILED if case.id == case_id)
    assert describe(shim, case)[2]["aligned"]


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


def test_offsets_beyond_two_to_the_thirty_one(cuda, shim):
    plan, _, _ = describe(shim, cases.Case("", shape=(1, 4, 8, 8), confidence=((1, 8, 8), F32)))
    pixels = 1 << 31
    operand = OperandPlan(F32, (4 * pixels, 0, 0, 0, 0, pixels, 1))
    huge = dataclasses.replace(
        plan, count=4 * pixels, size=(1, 1, 1, 1, 4, pixels), ndim=2, pred=operand, grad=operand, terms=(operand,),
        confidence=dataclasses.replace(plan.confidence, strides=(pixels, 0, 0, 0, 0, 0, 1)),
        cache={},
    )  # fmt: skip
    native = native_plan(huge, shim)
    tiling = shim.tiling(native)
    assert not tiling["narrow"]
    assert (tiling["outer"], tiling["free"], tiling["inner"]) == (1, 4, pixels)
    first, last, _ = shim.tile(native, tiling["tiles"] - 1)
    assert last == 4 * pixels - 1
    assert 0 < first < pixels
    assert shim.weighted_loss_cuda_workspace(native, WRITE_LOSS) > 4 * tiling["tiles"]


def test_autograd_keeps_one_gradient_and_launches_twice(public, shim):
    pred = torch.randn(2, 4, 16, 16, requires_grad=True)
    target, confidence = torch.randn(2, 4, 16, 16), torch.rand(2, 1, 64, 64)
    before = shim.launches()
    loss = public.weighted_loss(pred, target, confidence, artifact_weight=2.0)
    assert shim.launches() == before + 1
    loss.backward()
    assert shim.launches() == before + 2
    want = pred.detach().clone().requires_grad_()
    diffdoctor.reference.weighted_loss(want, target, confidence, artifact_weight=2.0).backward()
    torch.testing.assert_close(pred.grad, want.grad, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("kind", later_calls.KINDS)
def test_later_calls_equal_the_reference(public, shim, kind):
    before = shim.launches()
    later_calls.check(kind)
    assert all((known.bound is None) == (kind == "half normalized") for known in plans.values())
    assert shim.launches() == before + 3 * (3 if kind in ("everything", "contrastive", "half normalized") else 2)


@pytest.mark.parametrize("kind", later_calls.POLICY_KINDS)
def test_later_policy_calls_equal_the_reference(public, shim, kind):
    before = shim.launches()
    later_calls.check_policy(kind)
    assert len(policy_call.bound_calls) == (0 if kind == "policy" else 1)  # its clip_range is a list
    assert shim.launches() == before + 3 * (3 if kind == "policy sample" else 2)


def test_a_compiled_graph_leaves_no_workspace_behind(public, cuda):
    target, confidence, logits = torch.randn(2, 4, 8, 8), torch.rand(2, 1, 16, 16), torch.randn(2, 1, 4, 4)

    def loss(x):
        one = public.weighted_loss(x, target, confidence, artifact_weight=2.0, normalize="sample")
        return one + public.artifact_loss(logits, size=(16, 16))

    pred = torch.randn(2, 4, 8, 8, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(pred)
    compiled.backward()
    assert not cuda_device._workspaces
    torch.testing.assert_close(compiled, loss(pred))
    assert len(cuda_device._workspaces) == 1


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_a_retained_graph_gives_the_same_gradient(public, dtype):
    pred = torch.randn(3, 2, 9, 9).to(dtype).requires_grad_()
    loss = public.weighted_loss(pred, torch.randn(3, 2, 9, 9), reduction="sample", weighting=torch.rand(3))
    g = torch.tensor([2.0, -1.0, 0.5])
    (first,) = torch.autograd.grad(loss, pred, g, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, pred, g)
    assert torch.equal(first, second)


def test_fp16_under_a_loss_scale(public):
    pred = torch.randn(2, 3, 200, 200).half().requires_grad_()
    target = torch.randn(2, 3, 200, 200).half()
    (public.weighted_loss(pred, target) * 65536).backward()
    exact = 65536 * 2 * (pred.detach().double() - target.double()) / pred.numel()
    assert (pred.grad.double() - exact).norm() / exact.norm() <= 5e-4


def test_nan_under_zero_weight_does_not_leak(public):
    pred = torch.randn(2, 3, 12, 16)
    pred[0, :, :, 3] = float("nan")
    pred.requires_grad_()
    mask = torch.ones(2, 12, 16)
    mask[0, :, 3] = 0
    loss = public.weighted_loss(pred, torch.randn(2, 3, 12, 16), mask=mask, normalize="sample")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(pred.grad).all()
    assert not pred.grad[0, :, :, 3].any()


def test_an_empty_mask_gives_zero(public):
    pred = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = public.weighted_loss(pred, torch.randn(2, 3, 8, 8), mask=torch.zeros(2, 8, 8), normalize="batch")
    loss.backward()
    assert loss == 0
    assert not pred.grad.any()


def test_modulate_gradient(public):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    confidence = torch.rand(2, 1, 32, 32)
    options = {"artifact_grad": 2.0, "clean_grad": 0.1, "threshold": 0.4}
    (got,) = torch.autograd.grad((public.modulate_gradient(x, confidence, **options) ** 3).sum(), x)
    (want,) = torch.autograd.grad((diffdoctor.reference.modulate_gradient(x, confidence, **options) ** 3).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_artifact_loss_through_autograd(public):
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    public.artifact_loss(logits, size=(32, 32)).backward()
    want = logits.detach().clone().requires_grad_()
    diffdoctor.reference.artifact_loss(want, size=(32, 32)).backward()
    torch.testing.assert_close(logits.grad, want.grad, rtol=3e-5, atol=1e-9)


@pytest.fixture
def called_before():
    """A prediction and a target of which another backend has a plan, before and after the test."""
    pred, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    diffdoctor.weighted_loss(pred, target)
    yield pred, target
    torch.testing.assert_close(diffdoctor.weighted_loss(pred, target), torch.nn.functional.mse_loss(pred, target))


def test_a_failed_launch_is_raised_and_forgotten(called_before, public, shim):
    pred, target = called_before
    shim.fail_next(9)
    with pytest.raises(RuntimeError, match="CUDA could not launch weighted_loss: invalid configuration argument"):
        public.weighted_loss(pred, target)
    torch.testing.assert_close(public.weighted_loss(pred, target), torch.nn.functional.mse_loss(pred, target))


def test_the_current_stream_is_used(cuda, shim, monkeypatch):
    monkeypatch.setattr(cuda_device, "raw_stream", lambda device: 0x1234)
    solve(cuda, cases.build(cases.Case("")))
    assert shim.stream() == 0x1234
    assert (torch.device("cpu"), 0x1234) in cuda_device._workspaces


def test_targets_built_in_the_kernel(public):
    latents, noise, levels = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2)
    pred = torch.randn(2, 4, 8, 8)
    velocity = levels.sqrt()[:, None, None, None] * noise - (1 - levels).sqrt()[:, None, None, None] * latents
    torch.testing.assert_close(
        public.weighted_loss(pred, Target.velocity(latents, noise, levels)),
        torch.nn.functional.mse_loss(pred, velocity),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"), ("-fsanitize=thread", "-DCUDA_SHIM_THREADS")],
    ids=["address-undefined", "thread"],
)
def test_sanitizers_find_nothing(tmp_path, flags):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        run(compiler(), *flags[:1], probe, "-o", tmp_path / "probe")
        run(tmp_path / "probe")
    except pytest.fail.Exception as error:
        pytest.skip(f"this compiler cannot build or run {flags[0]}: {str(error).splitlines()[-1]}")
    # Optimising would take twice as long as all the rest, and hide accesses from the sanitizers.
    assert "all equal" in run(build_race(*flags, "-O0", "-g1"), cwd=ROOT)
