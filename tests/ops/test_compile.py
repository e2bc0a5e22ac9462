"""torch.compile: whole graphs, the same numbers as eager, and well-formed operators."""

import copy
import dataclasses

import pytest
import torch
from torch.library import opcheck

import diffdoctor
from diffdoctor import Packed, Target
from support import cases

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f):
    # aot_eager traces, partitions and functionalises as inductor does, without its C++ compiler.
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def both(f, pred, g=None):
    out = []
    for run in (f, compiled(f)):
        leaf = pred.detach().clone().requires_grad_()
        loss = run(leaf)
        loss.backward(torch.ones_like(loss) if g is None else g)
        out.append((loss.detach(), leaf.grad))
    return out


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["f32", "bf16", "f16", "f64"])
def test_compiled_equals_eager(dtype):
    pred = torch.randn(2, 4, 8, 8).to(dtype)
    target, c, v, k = torch.randn(2, 4, 8, 8), torch.rand(2, 1, 32, 32), torch.rand(2), torch.rand(1, 8, 8)

    def f(x):
        return diffdoctor.weighted_loss(
            x * 2, target, c, mask=k, artifact_weight=2.0, weighting=v, threshold=0.3, artifact_grad=2.0,
            normalize="sample", loss_type={"l2": 1.0, "huber": 0.5}, reduction="sample",
        )  # fmt: skip

    (loss, grad), (loss_c, grad_c) = both(f, pred, torch.tensor([1.0, 3.0], dtype=F64 if dtype == F64 else F32))
    assert torch.equal(loss, loss_c)
    assert torch.equal(grad, grad_c)


def test_targets_layouts_statistics_and_per_sample_tensors():
    layout = Packed(4, 6)
    tokens, latents, noise = torch.randn(2, 6, 12), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    a, c, normalizer = torch.rand(2), torch.rand(2), torch.rand(2) + 0.5

    def f(x):
        loss, stats = diffdoctor.weighted_loss(
            x, Target.velocity(latents, noise, a), torch.ones(1, 4, 6), artifact_weight=2.0, huber_c=c,
            loss_type="pseudo_huber", normalizer=normalizer, layout=layout, return_stats=True,
        )  # fmt: skip
        return loss + 0.1 * stats.loss_artifact

    (loss, grad), (loss_c, grad_c) = both(f, tokens)
    torch.testing.assert_close(loss_c, loss)
    torch.testing.assert_close(grad_c, grad)


def policy_step():
    """A function of a prediction that asks for the old log-probability and for the policy loss."""
    latents, drawn, sigma = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5), torch.tensor([0.4, 0.6])

    def step(x):
        coefs = (0.9, -0.1, sigma)
        old = diffdoctor.policy_log_prob(x * 1.9, latents, drawn, coefs=coefs)
        loss, stats = diffdoctor.policy_loss(
            x * 2, latents, drawn, old, torch.ones(2, 1, 12, 10), coefs=coefs, level="sample", return_stats=True
        )
        return loss + 0 * stats.ratio

    return step


@pytest.mark.parametrize("dtype", [F32, F16], ids=["f32", "f16"])
def test_policy_loss(dtype):
    (loss, grad), (loss_c, grad_c) = both(policy_step(), torch.linspace(-1, 1, 240).reshape(2, 4, 6, 5).to(dtype))
    torch.testing.assert_close(loss_c, loss)
    torch.testing.assert_close(grad_c, grad)


def test_modulate_gradient_and_artifact_loss():
    x, c = torch.randn(2, 1, 8, 8), torch.rand(2, 16, 16)

    def f(y):
        y = diffdoctor.modulate_gradient(y, c, artifact_grad=1.0, clean_grad=0.1)
        return diffdoctor.artifact_loss(y * 2, size=(32, 32), reduction="sum")

    (loss, grad), (loss_c, grad_c) = both(f, x)
    assert torch.equal(loss, loss_c)
    assert torch.equal(grad, grad_c)


def test_a_modulator_whose_map_is_set_after_the_forward():
    x = torch.randn(2, 3, 8, 8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def f(y, modulator):
        return (modulator(modulator(y) * 3) ** 2).sum()

    def gradient(run, modulator, confidence):
        leaf = x.clone().requires_grad_()
        loss = run(leaf, modulator)
        modulator.set(confidence)
        loss.backward()
        return leaf.grad

    for run in (compiled(f), torch.compile(f, fullgraph=True, backend=backend)):
        for _ in range(4):  # a new modulator each time, as one has for each batch
            modulator = diffdoctor.GradientModulator(artifact_grad=1.0, clean_grad=0.25)
            for confidence in (torch.rand(2, 16, 16), torch.rand(2, 8, 8)):
                torch.testing.assert_close(
                    gradient(run, modulator, confidence), gradient(f, modulator, confidence), rtol=1e-6, atol=0
                )
    assert len(graphs) <= 2  # one for the first modulator's key, one for every other
    with pytest.raises(RuntimeError, match="no map"):
        gradient(compiled(f), modulator, None)


def test_a_modulator_cannot_be_made_inside_a_compiled_function():
    def f(y):
        return diffdoctor.GradientModulator(artifact_grad=1.0)(y).sum()

    with pytest.raises(Exception, match="outside the compiled function"):
        compiled(f)(torch.randn(2, 3, 8, 8, requires_grad=True))


def test_a_copied_modulator_has_a_map_of_its_own():
    first = diffdoctor.GradientModulator(artifact_grad=1.0)
    second = copy.deepcopy(first)
    first.set(torch.ones(2, 8, 8))
    second.set(torch.zeros(2, 8, 8))
    for modulator, want in ((first, 1.0), (second, 0.5)):
        modulator._options = dataclasses.replace(modulator._options, clean_grad=0.5)
        leaf = torch.randn(2, 3, 8, 8, requires_grad=True)
        compiled(lambda y, m=modulator: m(y).sum())(leaf).backward()
        assert torch.equal(leaf.grad, torch.full_like(leaf, want))


def test_dynamic_shapes_and_no_recompilation_for_values():
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph

    f = torch.compile(lambda x, t: diffdoctor.weighted_loss(x, t), fullgraph=True, backend=backend, dynamic=True)
    for side in (4, 6, 8, 10):
        pred, target = torch.randn(2, 3, side, side), torch.randn(2, 3, side, side)
        torch.testing.assert_close(f(pred, target), diffdoctor.weighted_loss(pred, target))
    assert count == 1


def test_bad_arguments_raise_while_tracing():
    f = compiled(lambda x: diffdoctor.weighted_loss(x, x, loss_type="mse"))
    with pytest.raises(Exception, match="loss_type: expected one of"):
        f(torch.randn(1, 1, 2, 2))


def test_no_gradient_is_written_without_grad_mode():
    f = compiled(lambda x: diffdoctor.weighted_loss(x, torch.zeros(2, 3, 4, 4)))
    with torch.no_grad():
        assert not f(torch.randn(2, 3, 4, 4, requires_grad=True)).requires_grad


@pytest.mark.slow
def test_inductor(tmp_path, monkeypatch):
    # Inductor's cache on the disk does not tell instruction sets apart: what another machine, or another
    # ATEN_CPU_CAPABILITY, left there writes beyond its buffers.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    pred, target, c, policy = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5), torch.rand(2, 6, 5), policy_step()

    def f(x):
        return diffdoctor.weighted_loss(x.sin(), target, c, artifact_weight=0.0) + policy(x)

    leaf, eager = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    loss, want = torch.compile(f, fullgraph=True)(leaf), f(eager)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(leaf.grad, eager.grad)
    assert list(tmp_path.rglob("*.so"))


def arguments(dtype, view, want_grad, layout=()):
    """Of a call whose target's coefficients depend on the map, where model_pred is fp16."""
    artifact_coefs = [0.5, -0.5] if dtype == F16 else []
    pred = cases.lay_out(torch.randn(2, 4, 8, 8).to(dtype), view).requires_grad_()
    return (
        pred, [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)], torch.rand(2, 16, 16), None, torch.rand(2),
        [torch.rand(2), torch.rand(2)], [1, 4], [1.0, 1.0, -1.0, 1.0, 0.1, 0.0, *artifact_coefs],
        [2.0, 1.0, 1.0, 0.5, 0.25, 1.0], [1.0, 0.0, 0.5, 0.0, 0.0, 0.0], "area", "sample", "mean", list(layout), "",
        want_grad, True,
    )  # fmt: skip


@pytest.mark.parametrize("view", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["kept", "recomputed"])
def test_opcheck_weighted_loss(dtype, view):
    opcheck(torch.ops.diffdoctor.weighted_loss.default, arguments(dtype, view, dtype != F16))


@pytest.mark.parametrize("view", ["contiguous", "transposed"])
def test_opcheck_the_others(view):
    x = cases.lay_out(torch.randn(2, 4, 8, 8), view).requires_grad_()
    opcheck(
        torch.ops.diffdoctor.modulate_gradient.default,
        (x, torch.rand(2, 16, 16), [1.0, 0.2, 0.0, 1.0], "area", []),
    )
    modulator = diffdoctor.GradientModulator(artifact_grad=1.0, clean_grad=0.2)
    modulator.set(torch.rand(2, 16, 16))
    opcheck(torch.ops.diffdoctor.modulate_gradient_later.default, (x, modulator._key))
    logits = cases.lay_out(torch.randn(2, 1, 8, 6), view).requires_grad_()
    opcheck(torch.ops.diffdoctor.artifact_loss.default, (logits, 16, 12, 0.1, "threshold", "mean", "", True))
    pred, step = logits.detach().repeat(1, 4, 1, 1).requires_grad_(), torch.randn(2, 4, 8, 6)
    drawn = (pred, step, step.flip(0), [torch.rand(2) + 0.5], [2], [1.0, -0.5, 0.0], [], "")
    others = (None, torch.randn(2, 16, 12), None, step, [0.1, 0.2, float("inf"), 0.5], "area", "pixel", "mean")
    opcheck(torch.ops.diffdoctor.policy_loss.default, (*drawn, *others, True, True))
    opcheck(torch.ops.diffdoctor.policy_loss.default, (*drawn, *others, False, True))
    drawn = (pred.detach(), *drawn[1:])
    opcheck(torch.ops.diffdoctor.policy_log_prob.default, drawn)
    opcheck(torch.ops.diffdoctor.policy_loss_grad.default, (torch.tensor(2.0), *drawn, *others))
    *first, _, _ = arguments(F16, view, False)
    first[0] = first[0].detach()
    opcheck(torch.ops.diffdoctor.weighted_loss_grad.default, (torch.tensor(2.0), *first))
