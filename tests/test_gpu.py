"""Both GPU backends on a GPU: the shared cases, graphs, streams, memory, no synchronisation, the same bits twice."""

import importlib

import helpers_cases as cases
import helpers_search as search
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import diffdoctor
from diffdoctor import Target, backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    reason = backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def glue(name):
    return importlib.import_module(f"diffdoctor.ops._{name}")


def solve(glue, inputs):
    problem = cases.lower(inputs, weight_mean=glue.weight_mean, device="cuda")
    glue.weighted_loss(problem)
    return problem


@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.id)
def test_weighted_loss_equals_the_reference(glue, case):
    inputs = cases.build(case)
    first = solve(glue, inputs)
    cases.check(first, cases.expected(inputs))
    again = solve(glue, inputs)
    for output in ("loss", "grad", "sums"):
        got, want = getattr(first, output), getattr(again, output)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), f"{output} differs between two equal calls"


@settings(max_examples=100, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(case=search.cases(max_side=40))
def test_search(case):
    reason = backends()["cuda"]  # Triton would compile a kernel for most of the examples
    if reason is not None:
        pytest.skip(reason)
    inputs = cases.build(case)
    cases.check(solve(importlib.import_module("diffdoctor.ops._cuda"), inputs), cases.expected(inputs))


@pytest.mark.parametrize("case", cases.artifact_cases(), ids=lambda case: case.id)
def test_artifact_loss_equals_the_reference(glue, case):
    logits = cases.build_artifact(case)
    strided = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda").copy_(logits)
    problem = cases.lower_artifact(case, strided)
    glue.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = cases.expected_artifact(case, logits, g)
    rtol = 1e-12 if case.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(problem.loss.cpu(), want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype, device="cuda")
    glue.artifact_loss_backward(problem.kept, problem.factor, g.cuda(), grad)
    atol = cases._GRAD_TOLERANCE[case.dtype] * want_grad.abs().max().item() + 1e-30
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=0, atol=atol)


class Step:
    """A training loop's loss on latents, with everything that could tempt a backend into a synchronisation."""

    def __init__(self, name, dtype=BF16):
        g = torch.Generator("cuda").manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=g, device="cuda")

        self.name = name
        self.pred = normal(2, 16, 64, 64).to(dtype).requires_grad_()
        self.latents, self.noise = normal(2, 16, 64, 64), normal(2, 16, 64, 64)
        self.levels, self.weighting = normal(2).sigmoid(), normal(2).exp()
        self.confidence, self.logits = normal(2, 1, 512, 512).sigmoid(), normal(2, 1, 32, 32).requires_grad_()

    def loss(self):
        target = Target.velocity(self.latents, self.noise, self.levels)
        options = {"normalize": "sample", "loss_type": "pseudo_huber", "weighting": self.weighting}
        loss = diffdoctor.weighted_loss(self.pred, target, self.confidence, backend=self.name, **options)
        return loss + diffdoctor.artifact_loss(self.logits, size=(128, 128), backend=self.name)

    def run(self):
        self.pred.grad = self.logits.grad = None
        loss = self.loss()
        (3 * loss).backward()
        return loss.detach().clone(), self.pred.grad.clone(), self.logits.grad.clone()


def test_nothing_synchronises(name):
    step = Step(name)
    step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x).all() for x in got)


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
        want = step.run()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


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
        assert all(torch.equal(a, b) for a, b in zip(answer, want, strict=True))


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


def test_fp16_under_a_loss_scale(name):
    pred = torch.randn(1, 16, 21, 90, 160, device="cuda").half().requires_grad_()
    target = torch.randn(1, 16, 21, 90, 160, device="cuda").half()
    (diffdoctor.weighted_loss(pred, target, backend=name) * 65536).backward()
    exact = 65536 * 2 * (pred.detach().double() - target.double()) / pred.numel()
    assert (pred.grad.double() - exact).norm() / exact.norm() <= 5e-4


def test_more_than_two_to_the_thirty_one_elements(name):
    count = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 7 * count:
        pytest.skip("needs 15 GB of free GPU memory")
    pred = torch.zeros(1, 1, count // 4096, 4096, dtype=BF16, device="cuda")
    target = torch.zeros_like(pred)
    pred[0, 0, -1, -8:] = 1
    pred.requires_grad_()
    loss = diffdoctor.weighted_loss(pred, target, reduction="sum", backend=name)
    loss.backward()
    assert loss == 8
    assert pred.grad[0, 0, -1].sum() == 16
    assert pred.grad.count_nonzero() == 8


def test_compiled_equals_eager(name):
    step = Step(name)
    want = step.run()
    step.pred.grad = step.logits.grad = None
    loss = torch.compile(step.loss, fullgraph=True)()
    (3 * loss).backward()
    for a, b in zip((loss.detach(), step.pred.grad, step.logits.grad), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
