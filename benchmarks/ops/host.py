"""What a call costs the host on a GPU's backends, without a GPU: `python -m benchmarks.ops.host`.

Tensors lie on the CPU and drivers are stubs: Triton's launcher and the functions of the native module do nothing. What
is timed is all Python of a call, checks and autograd included, and Triton's own way to its launcher; a real launch, the
reading of arguments in C++ and the device guard come on top. Thread CPU time, 20th percentile; on a machine with other
work all figures grow, so that F.mse_loss stands beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
import types
from unittest import mock

import torch

import diffdoctor
from benchmarks.ops.named_target import NamedTarget
from benchmarks.ops.timing import percentile
from diffdoctor.backends import native
from diffdoctor.ops import OPS, policy_call
from diffdoctor.ops.call import plans

#: Microseconds that forward and backward of one weighted_loss may take together on an idle machine ...
BUDGET = {"cuda": 45.0, "triton": 70.0}
#: ... and the functions of Python and C that they may call beyond autograd's own: the same on every machine, whatever
#: else it does. A test holds them.
CALLS = {
    "cuda": {
        "weighted_loss": 60,
        "weighted_loss, map": 62,
        "weighted_loss, normalize": 76,
        "weighted_loss, fp16": 150,
        "policy_loss": 99,
        "artifact_loss": 86,
    },
    "triton": {
        "weighted_loss": 90,
        "weighted_loss, map": 92,
        "weighted_loss, normalize": 123,
        "weighted_loss, fp16": 247,
        "policy_loss": 145,
        "artifact_loss": 139,
    },
}


def stub_triton(record=None) -> None:
    """From now on Triton compiles for compute capability 9.0 and its launches end in `record(grid, arguments)`.

    Holds for the whole process.
    """
    from triton.runtime import driver

    class Stub(NamedTarget):
        utils = types.SimpleNamespace(
            load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
        )

        def launcher_cls(self, src, metadata):
            return lambda x, y, z, stream, function, packed, metadata, enter, leave, *arguments: (
                None if record is None else record((x, y, z), arguments)
            )

    driver.set_active(Stub(90))


def stub_cuda() -> None:
    """From now on the CUDA backend's glue calls functions that do nothing. For the whole process."""
    from diffdoctor.backends.cuda import device

    def nothing(*arguments):
        return None

    names = ["weighted_loss_cuda", "weight_mean_cuda", "scale_gradient_cuda"]
    names += ["artifact_loss_cuda", "artifact_loss_backward_cuda", "policy_loss_cuda"]
    ops = ("weighted_loss", "weight_mean", "artifact_loss", "policy_loss")
    sizes = [f"{op}_cuda_workspace" for op in ops]
    device.native = types.SimpleNamespace(
        WeightedLossPlan=native.load().WeightedLossPlan,
        **dict.fromkeys(names, nothing),
        **{name: lambda *arguments: 4096 for name in sizes},
    )


class _Nothing(torch.autograd.Function):
    """What any op with a gradient of its own costs: an output, a kept gradient, and nothing done to them."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.empty_like(x))
        return torch.empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0]


FLOOR = "autograd alone"


def calls() -> dict:
    """{what: forward of it}; backward follows where the result has a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    pred, target = normal(2, 4, 16, 32).bfloat16().requires_grad_(), normal(2, 4, 16, 32).bfloat16()
    half = pred.detach().half().requires_grad_()
    old, advantage = normal(2, 1, 16, 32), normal(2, 1, 16, 32)
    confidence, logits = torch.rand(2, 16, 32, generator=generator), normal(2, 8, 8).requires_grad_()
    loss = diffdoctor.weighted_loss
    return {
        FLOOR: (pred, lambda: super(torch.autograd.Function, _Nothing).apply(pred)),
        "F.mse_loss": (pred, lambda: torch.nn.functional.mse_loss(pred, target)),
        "weighted_loss": (pred, lambda: loss(pred, target)),
        "weighted_loss, map": (pred, lambda: loss(pred, target, confidence, artifact_weight=2.0)),
        "weighted_loss, normalize": (
            pred,
            lambda: loss(pred, target, confidence, artifact_weight=2.0, normalize="sample"),
        ),
        "weighted_loss, fp16": (half, lambda: loss(half, target)),
        "policy_loss": (
            pred,
            lambda: diffdoctor.policy_loss(pred, target, target, old, advantage, coefs=(0.9, -0.2, 0.3)),
        ),
        "artifact_loss": (logits, lambda: diffdoctor.artifact_loss(logits, size=(32, 32))),
    }


def both(call, x):
    """Forward and backward of a call, as a function of nothing."""
    start = torch.ones((), dtype=call().dtype)
    return lambda: torch.autograd.grad(call(), x, start)


def times(call, x, rounds: int) -> tuple[float, float]:
    """(forward, forward and backward) in microseconds."""
    found = []
    for work in (call, both(call, x)):
        samples = []
        for _ in range(rounds):
            began = time.thread_time()
            for _ in range(20):
                work()
            samples.append((time.thread_time() - began) / 20 * 1e6)
        found.append(percentile(samples, 0.2))
    return tuple(found)


def functions_called(call, x) -> int:
    """Functions of Python and C that forward and backward call, once everything that is cached is there."""
    work, seen = both(call, x), []
    for _ in range(3):
        work()
    sys.setprofile(lambda frame, event, argument: seen.append(event) if event in ("call", "c_call") else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(seen) - 1  # without the last sys.setprofile


@contextlib.contextmanager
def served_by(backend: str):
    """CPU tensors are served by the backend, backward by this thread."""
    served = {
        op: importlib.import_module(f"diffdoctor.backends.{backend}.{OPS[op]}")
        for op in ("weighted_loss", "artifact_loss", "policy_loss")
    }
    with mock.patch.dict("diffdoctor.backends.select._chosen", {("cpu", op): module for op, module in served.items()}):
        forget_plans()
        with torch.autograd.set_multithreading_enabled(False):
            yield
        forget_plans()


def forget_plans() -> None:
    """A plan holds its backend's form: each backend makes its own."""
    for kept in (plans, policy_call.plans, policy_call.bound_calls):
        kept.clear()


def count() -> dict[str, int]:
    """{what: functions that it calls beyond autograd's own}, under `served_by` and a stub."""
    found = {name: functions_called(call, x) for name, (x, call) in calls().items()}
    return {name: number - found[FLOOR] for name, number in found.items()}


def measure(backend: str, rounds: int) -> dict[str, tuple[float, float, int]]:
    """{what: (forward, forward and backward, functions called)} with the backend's stub, for the whole process."""
    {"cuda": stub_cuda, "triton": stub_triton}[backend]()
    with served_by(backend):
        counted = count()
        return {name: (*times(call, x, rounds), counted[name]) for name, (x, call) in calls().items()}


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.ops.host", description=__doc__)
    command.add_argument("backend", choices=sorted(BUDGET))
    command.add_argument("--rounds", type=int, default=200)
    command.add_argument("--json", action="store_true")
    options = command.parse_args()
    found = measure(options.backend, options.rounds)
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{'':36}{'forward':>10}{'both':>10}{'calls':>8}")
        for name, (forward, both_us, counted) in found.items():
            print(f"{options.backend:<8}{name:<28}{forward:7.1f} us{both_us:7.1f} us{counted:8}")
    over = any(found[name][2] > most for name, most in CALLS[options.backend].items())
    return int(found["weighted_loss"][1] > BUDGET[options.backend] or over)


if __name__ == "__main__":
    sys.exit(main())
