"""The implementations that a case is timed with, and the parts of a call: forward and backward through autograd."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.ops.correctness import cotangent
from benchmarks.ops.registry import Case, Tensors
from diffdoctor.ops import OPS

#: Our backends by device, the first one that can be used here first in the plots.
OWN = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Implementation:
    """One implementation: `function` takes the case's tensors by name."""

    name: str
    function: Callable
    ours: bool


def own_backends(op: str, device: torch.device) -> tuple[str, ...]:
    """The backends to time. modulate_gradient takes no `backend`: the one that serves it stands for all."""
    names = OWN[device.type]
    if op != "modulate_gradient":
        return names
    from diffdoctor.backends.select import why_not

    return next(((name,) for name in names if why_not(name) is None), ("reference",))


def implementations_of(
    case: Case, device: torch.device, backends: tuple[str, ...] | None = None, compiled: bool = True
):
    """Our backends for the device, the formula, and the formula under torch.compile."""

    def own(backend):
        return Implementation(backend, lambda **tensors: case.fused(tensors, backend), True)

    found = [own(backend) for backend in (own_backends(case.op, device) if backends is None else backends)]
    found.append(Implementation("eager", case.formula, False))
    if compiled and case.compiled:
        found.append(Implementation("compile", torch.compile(case.formula, dynamic=False), False))
    return found


class Call:
    """An implementation on fixed inputs: `forward()`, `backward(result)`, and both when called."""

    def __init__(self, case: Case, tensors: Tensors, impl: Implementation):
        self.x = tensors[case.grad_of].detach().requires_grad_()
        self.tensors = tensors | {case.grad_of: self.x}
        self.implementation = impl
        self.start = None
        result = self.forward()
        if result.ndim:
            self.start = cotangent(result)
        elif case.scale != 1 or result.is_cuda:  # a GPU's backward would fill it in a launch of its own each time
            self.start = torch.full_like(result, case.scale)

    def forward(self):
        return self.implementation.function(**self.tensors)

    def backward(self, result):
        return torch.autograd.grad(result, self.x, self.start)

    def __call__(self):
        return self.backward(self.forward())


def backend_module(name: str, op: str = "weighted_loss"):
    """diffdoctor.backends.<name>.<op>: what stands between the checks and the kernels of an op."""
    return importlib.import_module(f"diffdoctor.backends.{name}.{OPS[op]}")


def kernel_of(call: Call) -> Callable[[], None]:
    """The kernel of a weighted_loss forward alone: no checks, no allocation, no autograd.

    On a CPU the one native call, again into the same outputs; on a GPU replays of the forward as a CUDA graph. Raises
    ValueError where a CPU's forward made no such call or more than one.
    """
    if call.x.is_cuda:
        return captured(call.forward)
    module = backend_module(call.implementation.name)
    launch, made = module.launch, []

    def recorded(*arguments):
        made.append(arguments)
        launch(*arguments)

    module.launch = recorded
    try:
        result = call.forward()
    finally:
        module.launch = launch
    if len(made) != 1:
        raise ValueError(f"one kernel call was expected in a forward, got {len(made)}")

    def kernel(kept=result):
        launch(*made[0])

    return kernel


def captured(call: Callable) -> Callable[[], None]:
    """Replays of the call as a CUDA graph. Raises what capturing raises where a formula waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay(kept=outputs):
        graph.replay()

    return replay
