"""Calls that are recorded or replaced, and tensors whose type is not torch's own: an operator, never an address."""

import contextlib
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffdoctor
from diffdoctor import Target
from support.backends import needs_cpu

pytestmark = pytest.mark.usefixtures("default_backend")

generator = torch.Generator().manual_seed(0)
PRED, TARGET = torch.randn(2, 2, 3, 6, 8, generator=generator)
MAP, HALF = torch.rand(2, 2, 1, 12, 16, generator=generator)
FACTOR = torch.tensor([0.25, 0.75])

OPS = {
    "weighted_loss": lambda x, t, c: diffdoctor.weighted_loss(
        x, t, c, artifact_weight=3.0, weighting=c.amax((1, 2, 3)), huber_c=c.amax((1, 2, 3)), loss_type="huber"
    ),
    "weighted_loss-fp16": lambda x, t, c: diffdoctor.weighted_loss(x.half(), t, c, artifact_weight=3.0),
    "weighted_loss-stats": lambda x, t, c: diffdoctor.weighted_loss(
        x, t, c, artifact_weight=3.0, return_stats=True, normalize="sample"
    )[0],
    "weighted_loss-target": lambda x, t, c: diffdoctor.weighted_loss(x, Target.velocity(t, 2 * t, c.amax((1, 2, 3)))),
    "artifact_loss": lambda x, t, c: diffdoctor.artifact_loss(x[:, :1] + t[:, :1], size=(12, 16), method="mean"),
    "modulate_gradient": lambda x, t, c: (diffdoctor.modulate_gradient(x, c, artifact_grad=2.0) * t).sum(),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def with_gradient(op):
    """(loss, gradient of the first argument) as a function of what op takes."""

    def both(x, t, c):
        x = x.detach().requires_grad_()
        loss = op(x, t, c)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    return both


def assert_both(got, want):
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_the_call_and_its_gradient(op, mode):
    function = with_gradient(op)
    graph = make_fx(function, tracing_mode=mode)(PRED, TARGET, MAP)
    assert_both(graph(2 * PRED, -TARGET, HALF), function(2 * PRED, -TARGET, HALF))


def test_jit_trace_records_the_call(op):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        graph = torch.jit.trace(op, (PRED, TARGET, MAP))
    assert_both(with_gradient(graph)(2 * PRED, -TARGET, HALF), with_gradient(op)(2 * PRED, -TARGET, HALF))


def test_a_backward_alone_is_recorded(op):
    x = PRED.clone().requires_grad_()
    loss = op(x, TARGET, MAP)
    graph = make_fx(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True)[0])(torch.tensor(1.0))
    g = torch.tensor(-3.0)
    got = graph(g)
    (want,) = torch.autograd.grad(loss, x, g)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)


class Recorded(TorchDispatchMode):
    """Writes down every operator that is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Named(TorchFunctionMode):
    """Writes down every function that is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Recorded, Named])
def test_a_mode_sees_an_operator(op, mode):
    want = with_gradient(op)(PRED, TARGET, MAP)
    with mode() as recorded:
        got = with_gradient(op)(PRED, TARGET, MAP)
    assert_both(got, want)
    assert any("diffdoctor" in name for name in recorded.seen)


@pytest.mark.parametrize("mode", [Recorded, Named])
def test_a_modulator_that_nobody_keeps_lives_until_backward_under_a_mode(mode):
    def modulated(x):
        modulator = diffdoctor.GradientModulator(artifact_grad=3.0, clean_grad=0.5)
        modulator.set(MAP)
        return modulator(x)

    gradients = []
    for context in (contextlib.nullcontext, mode):
        x = PRED.clone().requires_grad_()
        with context():
            modulated(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert not torch.equal(gradients[0], torch.ones_like(PRED))


class Elsewhere(torch.Tensor):
    """A tensor without memory of its own, whose values another one holds: as AsyncCollectiveTensor and DTensor are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


ARGUMENTS = {
    "target": lambda x: {"target": x},
    "term": lambda x: {"target": Target.flow(TARGET, x)},
    "confidence": lambda x: {"confidence": x[:, :1], "artifact_weight": 3.0},
    "mask": lambda x: {"mask": x[:, :1]},
    "weighting": lambda x: {"weighting": x},
    "weighting (B,)": lambda x: {"weighting": x[:, 0, 0, 0]},
    "coefficient": lambda x: {"target": Target((TARGET,), (x[:, 0, 0, 0],))},
    "pred_scale": lambda x: {"target": Target((TARGET,), (1.0,), x[:, 0, 0, 0])},
    "huber_c": lambda x: {"huber_c": x[:, 0, 0, 0], "loss_type": "huber"},
    "normalizer": lambda x: {"normalizer": x[:, 0, 0, 0]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_without_memory_is_read_by_its_own_rules_or_refused(argument, dtype):
    pred, value = PRED.to(dtype), TARGET.abs() + 0.1
    made = ARGUMENTS[argument]

    def call(wrap):
        def wrapped(slices):
            return lambda key: wrap(slices(key))

        held = type("Sliced", (), {"__getitem__": lambda _, key: wrap(value[key])})()
        arguments = made(wrap(value) if argument in ("target", "term", "weighting") else held)
        return with_gradient(lambda x, t, c: diffdoctor.weighted_loss(x, arguments.pop("target", t), **arguments))(
            pred, TARGET, None
        )

    want = call(lambda x: x)
    for _ in range(2):  # also after an equal call whose plan is there already
        assert_both(call(Elsewhere), want)
        with pytest.raises(Exception, match="Fake"):
            call(fake)


def test_maps_without_memory_modulate_by_their_own_rules():
    want = with_gradient(OPS["modulate_gradient"])(PRED, TARGET, MAP)
    got = with_gradient(lambda x, t, c: OPS["modulate_gradient"](x, t, Elsewhere(c)))(PRED, TARGET, MAP)
    assert_both(got, want)
    modulator = diffdoctor.GradientModulator(artifact_grad=2.0)
    x = PRED.clone().requires_grad_()
    loss = (modulator(x) * TARGET).sum()
    modulator.set(Elsewhere(MAP))
    assert_both(torch.autograd.grad(loss, x), want[1:])


def test_a_gradient_and_saved_tensors_without_memory(op):
    x = PRED.clone().requires_grad_()
    (want,) = torch.autograd.grad(op(x, TARGET, MAP), x, torch.tensor(2.0))
    (got,) = torch.autograd.grad(op(x, TARGET, MAP), x, Elsewhere(torch.tensor(2.0)))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: Elsewhere(x.clone())):
        loss = op(x, TARGET, MAP)
    (got,) = torch.autograd.grad(loss, x, torch.tensor(2.0))
    got = got.inner if isinstance(got, Elsewhere) else got
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


NO_ADDRESS = {
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "functional tensor": torch._to_functional_tensor,
    "freed": freed,
}


@needs_cpu
@pytest.mark.parametrize("argument", ["target", "confidence", "mask", "weighting", "huber_c", "normalizer", "logits"])
@pytest.mark.parametrize("make", NO_ADDRESS)
def test_a_plain_tensor_without_an_address_is_refused(make, argument):
    template = {"target": TARGET, "weighting": TARGET, "huber_c": FACTOR, "normalizer": FACTOR}.get(argument, MAP)
    refused = 0
    value = NO_ADDRESS[make](template)
    for _ in range(2):  # not by pytest.raises, whose report would read the tensor
        try:
            if argument == "logits":
                diffdoctor.artifact_loss(value, backend="cpu")
            else:
                options = {"target": TARGET, "artifact_weight": 2.0, "loss_type": "huber", "backend": "cpu"}
                diffdoctor.weighted_loss(PRED, **options | {argument: value})
        except (ValueError, RuntimeError) as error:
            refused += any(
                words in str(error) for words in ("whose memory holds its values, got address 0", "setStorage")
            )
    del value, template
    assert refused == 2
