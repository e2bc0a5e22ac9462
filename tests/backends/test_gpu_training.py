"""Both GPU backends in a training loop on a GPU: autograd, graphs, streams, threads, devices, memory, no waiting."""

import threading

import pytest
import torch

import diffdoctor
from diffdoctor import Target
from diffdoctor.lowering.plan import WRITE_LOSS
from support import cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Step:
    """A training loop's loss on latents, with everything that could tempt a backend into a synchronisation."""

    def __init__(self, backend, dtype=BF16, device="cuda", method="threshold", **options):
        g = torch.Generator(device).manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=g, device=device)

        self.backend, self.method = backend, method
        self.pred = normal(2, 16, 64, 64).to(dtype).requires_grad_()
        self.latents, self.noise = normal(2, 16, 64, 64), normal(2, 16, 64, 64)
        self.levels, self.weighting = normal(2).sigmoid(), normal(2).exp()
        self.confidence, self.logits = normal(2, 1, 512, 512).sigmoid(), normal(2, 1, 32, 32).requires_grad_()
        self.options = {
            "artifact_weight": 2.0, "normalize": "sample", "loss_type": "pseudo_huber", "weighting": self.weighting,
        } | options  # fmt: skip

    def loss(self):
        target = Target.velocity(self.latents, self.noise, self.levels)
        loss = diffdoctor.weighted_loss(self.pred, target, self.confidence, backend=self.backend, **self.options)
        if self.options.get("return_stats"):
            loss, self.stats = loss
        size = {"size": (128, 128), "method": self.method}
        return loss.sum() + diffdoctor.artifact_loss(self.logits, **size, backend=self.backend)

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
def test_nothing_synchronises(gpu_backend, dtype, options, monkeypatch):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", gpu_backend)
    step = Step(gpu_backend, dtype, **{key: cases._move(value, "cuda") for key, value in options.items()})
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


def test_a_second_backward_gives_the_same(gpu_backend):
    step = Step(gpu_backend)
    loss = step.loss()
    first = torch.autograd.grad(3 * loss, (step.pred, step.logits), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (step.pred, step.logits))
    assert_equal(first, again)


def test_autocast_changes_nothing(gpu_backend):
    step = Step(gpu_backend, F32)
    want = step.run()
    with torch.autocast("cuda", dtype=BF16):
        assert_equal(step.run(), want)


def test_one_gradient_is_all_that_is_kept(gpu_backend):
    pred = torch.randn(4, 16, 256, 256, device="cuda").to(BF16).requires_grad_()
    target, confidence = torch.randn_like(pred), torch.rand(4, 1, 1024, 1024, device="cuda")
    diffdoctor.weighted_loss(pred, target, confidence, artifact_weight=2.0, backend=gpu_backend).backward()
    pred.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = diffdoctor.weighted_loss(pred, target, confidence, artifact_weight=2.0, backend=gpu_backend)
    size = pred.numel() * pred.element_size()
    assert torch.cuda.memory_allocated() - before <= size + (1 << 20)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= size + (1 << 20)


# ---- graphs


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_a_captured_graph_replays_on_new_values(gpu_backend, dtype):
    step = Step(gpu_backend, dtype)
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


def test_a_replay_and_an_eager_call_may_overlap(gpu_backend):
    """A graph owns its workspace, whichever stream it was captured on."""
    step, other = Step(gpu_backend), Step(gpu_backend)
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
def test_compiled_equals_eager(gpu_backend, mode, dtype):
    torch._dynamo.reset()
    step = Step(gpu_backend, dtype)
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
def test_the_registered_operators_pass_opcheck(gpu_backend, dtype):
    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    def uniform(*shape):
        return torch.rand(*shape, device="cuda")

    pred = normal(2, 4, 8, 8).to(dtype).transpose(-1, -2).requires_grad_()
    artifact_coefs = [0.5, -0.5] if dtype == F16 else []
    arguments = (
        [normal(2, 4, 8, 8), normal(2, 4, 8, 8)], uniform(2, 16, 16), None, uniform(2),
        [uniform(2), uniform(2)], [1, 4], [1.0, 1.0, -1.0, 1.0, 0.1, 0.0, *artifact_coefs],
        [2.0, 1.0, 1.0, 0.5, 0.25, 1.0], [1.0, 0.0, 0.5, 0.0, 0.0, 0.0], "area", "sample", "mean", [], gpu_backend,
    )  # fmt: skip
    g, want_grad, want_sums = torch.tensor(2.0, device="cuda"), dtype != F16, True
    torch.library.opcheck(torch.ops.diffdoctor.weighted_loss.default, (pred, *arguments, want_grad, want_sums))
    torch.library.opcheck(torch.ops.diffdoctor.weighted_loss_grad.default, (g, pred.detach(), *arguments))
    logits = normal(2, 1, 8, 6).requires_grad_()
    torch.library.opcheck(
        torch.ops.diffdoctor.artifact_loss.default, (logits, 16, 12, 0.1, "threshold", "mean", gpu_backend, True)
    )
    step = normal(2, 4, 8, 8)
    drawn = (pred, step, step.flip(0), [uniform(2) + 0.5], [2], [1.0, -0.5, 0.0], [], gpu_backend)
    options = (None, normal(2, 16, 16), None, step, [0.1, 0.2, float("inf"), 0.5], "area", "pixel", "mean")
    torch.library.opcheck(torch.ops.diffdoctor.policy_loss.default, (*drawn, *options, want_grad, want_sums))
    drawn = (pred.detach(), *drawn[1:])
    torch.library.opcheck(torch.ops.diffdoctor.policy_log_prob.default, drawn)
    torch.library.opcheck(torch.ops.diffdoctor.policy_loss_grad.default, (g, *drawn, *options))


# ---- streams, threads, devices


def test_streams_do_not_share_a_workspace(gpu_backend):
    steps = [Step(gpu_backend) for _ in range(4)]
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


@pytest.mark.parametrize("method", ["threshold", "max"])
def test_threads_on_one_stream(gpu_backend, method):
    steps = [Step(gpu_backend, method=method) for _ in range(4)]
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
        "artifact_weight": 2.0,
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
def test_the_tensor_decides_the_device(gpu_backend):
    want = Step(gpu_backend, device="cuda:0").run()
    assert torch.cuda.current_device() == 0
    got = Step(gpu_backend, device="cuda:1").run()
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())
