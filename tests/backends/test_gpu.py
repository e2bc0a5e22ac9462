"""Both GPU backends on a GPU: the shared cases, layouts, autograd, graphs, streams, devices, memory, no waiting.

Every test that takes `name` runs once on `cuda` and once on `triton`.
"""

import importlib
import threading

import pytest
import torch

import diffdoctor
from diffdoctor import Target, available_backends
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS
from support import artifact, case_lists, cases

try:
    from hypothesis import HealthCheck, given, settings

    from support import search
except ImportError:  # a GPU machine may hold torch, Triton and pytest alone
    search = None

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture
def name(gpu_backend):
    return gpu_backend


@pytest.fixture
def glue(name):
    return importlib.import_module(f"diffdoctor.backends.{name}.weighted_loss")


def solve(glue, inputs, device="cuda"):
    problem = cases.lower(inputs, weight_mean=glue.weight_mean, device=device)
    glue.weighted_loss(problem)
    return problem


def assert_same_bits(first, again):
    for output in ("loss", "grad", "sums"):
        got, want = getattr(first, output), getattr(again, output)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), f"{output} differs between two equal calls"


# ---- the shared cases


@pytest.mark.parametrize("case", case_lists.all_cases(), ids=lambda case: case.id)
def test_weighted_loss_equals_the_reference(glue, case):
    inputs = cases.build(case)
    first = solve(glue, inputs)
    cases.check(first, cases.expected(inputs))
    assert_same_bits(first, solve(glue, inputs))


@pytest.mark.parametrize("case", case_lists.tiled_cases(), ids=lambda case: case.id)
def test_many_programs_equal_the_reference(glue, case):
    inputs = cases.build(case)
    first = solve(glue, inputs)
    # In fp64: PyTorch's fp32 sum over an expanded dim is off by 1e-4 at 17,000 elements.
    cases.check(first, cases.expected(inputs, upcast=True))
    assert_same_bits(first, solve(glue, inputs))


if search is not None:

    @settings(max_examples=100, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(case=search.cases(max_side=40))
    def test_search(case):
        reason = available_backends()["cuda"]  # Triton would compile a kernel for most of the examples
        if reason is not None:
            pytest.skip(reason)
        inputs = cases.build(case)
        cases.check(
            solve(importlib.import_module("diffdoctor.backends.cuda.weighted_loss"), inputs), cases.expected(inputs)
        )


@pytest.mark.parametrize("place", [cases.shifted, cases.spaced], ids=["shifted", "spaced"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_dense_but_unaligned_tensors(glue, dtype, place):
    case = cases.Case("", shape=(2, 8, 8, 16), dtype=dtype, target_dtype=BF16, confidence=((2, 8, 16), F32))
    inputs = cases.build(case)
    want = cases.expected(inputs)
    there = {key: cases._move(value, "cuda") for key, value in inputs.items()}
    for key in ("model_pred", "target"):
        cases.check(solve(glue, there | {key: place(there[key], 1)}, device=None), want)
    problem = cases.lower(there, WRITE_GRAD)
    problem.grad = cases.shifted(problem.grad, 1)
    glue.weighted_loss(problem)
    cases.check(problem, want)


@pytest.mark.parametrize("case", artifact.every_case(), ids=lambda case: case.id)
def test_artifact_loss_equals_the_reference(glue, case):
    logits = artifact.build(case)
    strided = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda").copy_(logits)
    problem = artifact.lower(case, strided)
    glue.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = artifact.expected(case, logits, g)
    rtol = 1e-12 if case.dtype == F64 else 3e-6
    torch.testing.assert_close(problem.loss.cpu(), want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype, device="cuda")
    glue.artifact_loss_backward(problem.kept, problem.factor, g.cuda(), grad)
    atol = cases.GRAD_TOLERANCE[case.dtype] * want_grad.abs().max().item() + 1e-30
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=0, atol=atol)


@pytest.mark.parametrize("case", artifact.nan_cases(), ids=lambda case: case.id)
def test_a_nan_logit_gives_the_gradient_that_the_reference_gives(glue, case):
    logits = artifact.build_with_nan(case)
    problem = artifact.lower(case, logits.cuda())
    glue.artifact_loss(problem)
    grad = torch.empty_like(logits, device="cuda")
    glue.artifact_loss_backward(problem.kept, problem.factor, torch.ones(2).cuda(), grad)
    artifact.check(case, problem.loss, grad, artifact.expected(case, logits, torch.ones(2)))


@pytest.mark.parametrize("confidence_grid", [(4, 5), (9, 8)], ids=["grid", "pixel"])
def test_modulate_gradient_equals_the_reference(name, monkeypatch, confidence_grid):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", name)
    confidence = torch.rand(2, 1, *confidence_grid, generator=torch.Generator().manual_seed(0))
    options = {"artifact_grad": 2.0, "clean_grad": 0.25, "threshold": 0.3, "gamma": 1.5}
    grads = []
    for function, device in ((diffdoctor.modulate_gradient, "cuda"), (diffdoctor.reference.modulate_gradient, "cpu")):
        x = torch.linspace(-1, 1, 2 * 3 * 4 * 5, device=device).reshape(2, 3, 4, 5).requires_grad_()
        function(x, confidence.to(device), **options).pow(3).sum().backward()
        grads.append(x.grad.cpu())
    torch.testing.assert_close(*grads, rtol=5e-6, atol=1e-7)


# ---- what is at the edges


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sample", "sum"])
def test_an_empty_tensor_gives_zero(name, shape, reduction):
    pred = torch.empty(shape, device="cuda", requires_grad=True)
    loss = diffdoctor.weighted_loss(pred, torch.empty(shape, device="cuda"), reduction=reduction, backend=name)
    loss.sum().backward()
    assert not loss.any()
    assert pred.grad.shape == shape


def test_nan_under_zero_weight_and_an_empty_mask(name):
    pred = torch.randn(2, 3, 12, 16, device="cuda")
    pred[0, :, :, 3] = float("nan")
    pred.requires_grad_()
    mask = torch.ones(2, 12, 16, device="cuda")
    mask[0, :, 3] = 0
    target = torch.randn(2, 3, 12, 16, device="cuda")
    loss = diffdoctor.weighted_loss(pred, target, mask=mask, normalize="sample", backend=name)
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert not grad[0, :, :, 3].any()
    loss = diffdoctor.weighted_loss(pred, target, mask=torch.zeros_like(mask), normalize="batch", backend=name)
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("method", ["threshold", "mean", "max"])
def test_a_nan_logit_does_what_it_does_to_the_reference(glue, method):
    case = artifact.Case(method, shape=(2, 13, 12), size=(13, 12), method=method, reduction="sample")
    logits = artifact.build(case)
    logits[0, 2, 3] = float("nan")
    problem = artifact.lower(case, logits.cuda())
    glue.artifact_loss(problem)
    want, _ = artifact.expected(case, logits, torch.ones(2))
    torch.testing.assert_close(problem.loss.cpu(), want, rtol=3e-6, atol=0, equal_nan=True)


def test_ties_share_the_gradient_of_the_maximum(glue):
    case = artifact.Case("", shape=(1, 3, 4), size=(12, 16), method="max", reduction="sample")
    problem = artifact.lower(case, torch.zeros(case.shape, device="cuda"))
    glue.artifact_loss(problem)
    assert problem.loss.item() == 0.5
    torch.testing.assert_close((problem.kept * problem.factor).sum().cpu(), torch.tensor(0.25))


def test_fp16_under_a_loss_scale(name):
    pred = torch.randn(1, 16, 21, 90, 160, device="cuda").half().requires_grad_()
    target = torch.randn(1, 16, 21, 90, 160, device="cuda").half()
    (diffdoctor.weighted_loss(pred, target, backend=name) * 65536).backward()
    exact = 65536 * 2 * (pred.detach().double() - target.double()) / pred.numel()
    assert (pred.grad.double() - exact).norm() / exact.norm() <= 5e-4


def test_more_than_two_to_the_thirty_one_elements(name):
    count = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("needs 17 GB of free GPU memory")
    pred = torch.zeros(1, 1, count // 4096, 4096, dtype=BF16, device="cuda")
    target = torch.zeros_like(pred)
    pred[0, 0, -1, -8:] = 1
    pred.requires_grad_()
    loss = diffdoctor.weighted_loss(pred, target, reduction="sum", backend=name)
    loss.backward()
    assert loss == 8
    assert pred.grad[0, 0, -1].sum() == 16
    assert pred.grad.count_nonzero() == 8


@pytest.mark.parametrize("far", ["batch", "channel"])
def test_offsets_beyond_two_to_the_thirty_one(glue, far):
    """Few elements, far apart."""
    if torch.cuda.mem_get_info()[0] < 6 * (1 << 31):
        pytest.skip("needs 13 GB of free GPU memory")
    memory = torch.empty((2 << 31) + 64, dtype=BF16, device="cuda")
    shape, strides = ((3, 1), (1 << 31, 32)) if far == "batch" else ((1, 3), (0, 1 << 31))
    pred = memory.as_strided((*shape, 4, 8), (*strides, 8, 1))
    pred.copy_(torch.randn(pred.shape, device="cuda"))
    inputs = {"model_pred": pred, "target": torch.randn(pred.shape, device="cuda"),
              "confidence": torch.rand(1, 4, 8, device="cuda")}  # fmt: skip
    problem = cases.lower(inputs, WRITE_LOSS)
    glue.weighted_loss(problem)
    want = cases.expected({key: value.cpu() for key, value in (inputs | {"model_pred": pred.clone()}).items()})
    torch.testing.assert_close(problem.loss.cpu(), want["loss"], rtol=3e-6, atol=0)


# ---- in a training loop


class Step:
    """A training loop's loss on latents, with everything that could tempt a backend into a synchronisation."""

    def __init__(self, name, dtype=BF16, device="cuda", **options):
        g = torch.Generator(device).manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=g, device=device)

        self.name = name
        self.pred = normal(2, 16, 64, 64).to(dtype).requires_grad_()
        self.latents, self.noise = normal(2, 16, 64, 64), normal(2, 16, 64, 64)
        self.levels, self.weighting = normal(2).sigmoid(), normal(2).exp()
        self.confidence, self.logits = normal(2, 1, 512, 512).sigmoid(), normal(2, 1, 32, 32).requires_grad_()
        self.options = {"normalize": "sample", "loss_type": "pseudo_huber", "weighting": self.weighting} | options

    def loss(self):
        target = Target.velocity(self.latents, self.noise, self.levels)
        loss = diffdoctor.weighted_loss(self.pred, target, self.confidence, backend=self.name, **self.options)
        if self.options.get("return_stats"):
            loss, self.stats = loss
        return loss.sum() + diffdoctor.artifact_loss(self.logits, size=(128, 128), backend=self.name)

    def run(self):
        self.pred.grad = self.logits.grad = None
        loss = self.loss()
        (3 * loss).backward()
        return loss.detach().clone(), self.pred.grad.clone(), self.logits.grad.clone()


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


OPTIONS = {
    "plain": {},
    "stats": {"return_stats": True},
    "sample": {"reduction": "sample"},
    "batch": {"normalize": "batch", "huber_c": torch.tensor([0.2, 0.3])},
    "mixture": {"loss_type": {"l2": 1.0, "l1": 0.5, "log_cosh": 0.5}, "normalize": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_nothing_synchronises(name, dtype, options, monkeypatch):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", name)
    step = Step(name, dtype, **{key: cases._move(value, "cuda") for key, value in options.items()})
    modulator = diffdoctor.GradientModulator(artifact_grad=2.0)
    schedule = torch.linspace(0.99, 0.01, 1000, device="cuda")
    timesteps = torch.tensor([3, 900], device="cuda")
    guided = step.latents.clone().requires_grad_()

    def run():
        modulator.set(step.confidence)
        outcome = step.run()
        step.options["weighting"] = diffdoctor.snr_weights(timesteps, schedule, 5.0, "v_prediction")
        return *outcome, *torch.autograd.grad(modulator(guided).square().sum(), guided)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x).all() for x in got)


def test_a_second_backward_gives_the_same(name):
    step = Step(name)
    loss = step.loss()
    first = torch.autograd.grad(3 * loss, (step.pred, step.logits), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (step.pred, step.logits))
    assert_equal(first, again)


def test_autocast_changes_nothing(name):
    step = Step(name, F32)
    want = step.run()
    with torch.autocast("cuda", dtype=BF16):
        assert_equal(step.run(), want)


def test_one_gradient_is_all_that_is_kept(name):
    pred = torch.randn(4, 16, 256, 256, device="cuda").to(BF16).requires_grad_()
    target, confidence = torch.randn_like(pred), torch.rand(4, 1, 1024, 1024, device="cuda")
    diffdoctor.weighted_loss(pred, target, confidence, backend=name).backward()
    pred.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = diffdoctor.weighted_loss(pred, target, confidence, backend=name)
    size = pred.numel() * pred.element_size()
    assert torch.cuda.memory_allocated() - before <= size + (1 << 20)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= size + (1 << 20)


# ---- graphs


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_a_captured_graph_replays_on_new_values(name, dtype):
    step = Step(name, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    step.pred.grad = step.logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.loss()
        (3 * loss).backward()
    captured = step.pred.grad, step.logits.grad
    for seed in (1, 2):
        values = torch.randn(step.pred.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
        step.pred.data.copy_(values)
        graph.replay()
        got = loss.detach().clone(), captured[0].clone(), captured[1].clone()
        assert_equal(got, step.run())


def test_a_replay_and_an_eager_call_may_overlap(name):
    """A graph owns its workspace, whichever stream it was captured on."""
    step, other = Step(name), Step(name)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        want = step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = step.loss()
    torch.cuda.synchronize()
    got = []
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(side):
            got.append(other.run())
    torch.cuda.synchronize()
    assert torch.equal(loss, want[0])
    for answer in got:
        assert_equal(answer, want)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_compiled_equals_eager(name, mode, dtype):
    torch._dynamo.reset()
    step = Step(name, dtype)
    want = step.run()
    compiled = torch.compile(step.loss, fullgraph=True, mode=mode)
    for _ in range(4):  # a graph of mode="reduce-overhead" runs once plainly, then is captured, then replayed
        torch.compiler.cudagraph_mark_step_begin()
        step.pred.grad = step.logits.grad = None
        loss = compiled()
        (3 * loss).backward()
        got = loss.detach().clone(), step.pred.grad.clone(), step.logits.grad.clone()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-2 if a.dtype == BF16 else 1e-3 if a.dtype == F16 else 1e-6, atol=1e-7
            )


@pytest.mark.parametrize("dtype", [F32, F16], ids=["kept", "recomputed"])
def test_the_registered_operators_pass_opcheck(name, dtype):
    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    def uniform(*shape):
        return torch.rand(*shape, device="cuda")

    pred = normal(2, 4, 8, 8).to(dtype).transpose(-1, -2).requires_grad_()
    arguments = (
        [normal(2, 4, 8, 8), normal(2, 4, 8, 8)], uniform(2, 16, 16), None, uniform(2),
        [None, uniform(2), None, uniform(2), None], [1.0, 1.0, -1.0, 0.1, 0.0], [2.0, 1.0, 1.0, 0.5, 0.25, 1.0],
        [1.0, 0.0, 0.5, 0.0, 0.0, 0.0], "area", "sample", "mean", [], name,
    )  # fmt: skip
    want_grad, want_sums = dtype != F16, True
    torch.library.opcheck(torch.ops.diffdoctor.weighted_loss.default, (pred, *arguments, want_grad, want_sums))
    torch.library.opcheck(
        torch.ops.diffdoctor.weighted_loss_grad.default, (torch.tensor(2.0, device="cuda"), pred.detach(), *arguments)
    )
    logits = normal(2, 1, 8, 6).requires_grad_()
    torch.library.opcheck(
        torch.ops.diffdoctor.artifact_loss.default, (logits, 16, 12, 0.1, "threshold", "mean", name, True)
    )


# ---- streams, threads, devices


def test_streams_do_not_share_a_workspace(name):
    steps = [Step(name) for _ in range(4)]
    want = steps[0].run()
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                got.append(step.run())
    torch.cuda.synchronize()
    for answer in got:
        assert_equal(answer, want)


def test_threads_on_one_stream(name):
    steps = [Step(name) for _ in range(4)]
    want = steps[0].run()
    torch.cuda.synchronize()
    got, failures = [], []

    def work(step):
        try:
            for _ in range(10):
                got.append(step.run())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failures
    for answer in got:
        assert_equal(answer, want)


@pytest.mark.parametrize("shape", [(1, 16, 512, 512), (64, 4, 64, 64)], ids=["few-samples", "many-samples"])
def test_the_last_program_sees_what_the_others_left(glue, shape):
    """Thousands of programs, many times over: a missing fence shows as another sum."""
    g = torch.Generator("cuda").manual_seed(5)
    inputs = {
        "model_pred": torch.randn(shape, generator=g, device="cuda").to(BF16),
        "target": torch.randn(shape, generator=g, device="cuda").to(BF16),
        "confidence": torch.rand(shape[0], 1, *shape[2:], generator=g, device="cuda"),
        "reduction": "mean",
    }
    problem = cases.lower(inputs, WRITE_LOSS)
    glue.weighted_loss(problem)
    first = problem.loss.clone()
    losses = torch.empty(1000, device="cuda")
    for k in range(1000):
        problem.loss = losses[k]
        glue.weighted_loss(problem)
    assert (losses == first).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensor_decides_the_device(name):
    want = Step(name, device="cuda:0").run()
    assert torch.cuda.current_device() == 0
    got = Step(name, device="cuda:1").run()
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())
