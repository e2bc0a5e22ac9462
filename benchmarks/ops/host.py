"""What a call costs the host on a GPU's backends, without a GPU: `python -m benchmarks.ops.host`.

Tensors lie on the CPU and drivers are stubs: Triton's launcher and the functions of the native module do nothing. What
is timed is all Python of a call, checks and autograd included, and Triton's own way to its launcher; a real launch, the
reading of arguments in C++ and the device guard come on top. Thread CPU time, 20th percentile; on a machine with other
work all figures grow, so that F.mse_loss stands beside them.
"""

from __future__ import annotations

import argparse
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
from diffdoctor.ops import OPS
from diffdoctor.ops.call import plans

#: Microseconds that forward and backward of one weighted_loss may take together.
BUDGET = {"cuda": 45.0, "triton": 70.0}


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
    names += ["artifact_loss_cuda", "artifact_loss_backward_cuda"]
    sizes = ("weighted_loss_cuda_workspace", "weight_mean_cuda_workspace", "artifact_loss_cuda_workspace")
    device.native = types.SimpleNamespace(
        WeightedLossPlan=native.load().WeightedLossPlan,
        **dict.fromkeys(names, nothing),
        **{name: lambda *arguments: 4096 for name in sizes},
    )


def calls() -> dict:
    """{what: forward of it}; backward follows where the result has a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    pred, target = normal(2, 4, 16, 32).bfloat16().requires_grad_(), normal(2, 4, 16, 32).bfloat16()
    confidence, logits = torch.rand(2, 16, 32, generator=generator), normal(2, 8, 8).requires_grad_()
    loss = diffdoctor.weighted_loss
    return {
        "F.mse_loss": (pred, lambda: torch.nn.functional.mse_loss(pred, target)),
        "weighted_loss": (pred, lambda: loss(pred, target)),
        "weighted_loss, map": (pred, lambda: loss(pred, target, confidence, artifact_weight=2.0)),
        "weighted_loss, normalize": (
            pred,
            lambda: loss(pred, target, confidence, artifact_weight=2.0, normalize="sample"),
        ),
        "artifact_loss": (logits, lambda: diffdoctor.artifact_loss(logits, size=(32, 32))),
    }


def times(call, x, rounds: int) -> tuple[float, float]:
    """(forward, forward and backward) in microseconds."""
    start = torch.ones((), dtype=call().dtype)
    found = []
    for work in (call, lambda: torch.autograd.grad(call(), x, start)):
        samples = []
        for _ in range(rounds):
            began = time.thread_time()
            for _ in range(20):
                work()
            samples.append((time.thread_time() - began) / 20 * 1e6)
        found.append(percentile(samples, 0.2))
    return tuple(found)


def measure(backend: str, rounds: int) -> dict[str, tuple[float, float]]:
    """{what: (forward, forward and backward)} with the backend's stub, in a process that serves this alone."""
    {"cuda": stub_cuda, "triton": stub_triton}[backend]()
    served = {
        op: importlib.import_module(f"diffdoctor.backends.{backend}.{OPS[op]}")
        for op in ("weighted_loss", "artifact_loss")
    }
    with mock.patch.dict("diffdoctor.backends.select._chosen", {("cpu", op): module for op, module in served.items()}):
        plans.clear()
        with torch.autograd.set_multithreading_enabled(False):
            return {name: times(call, x, rounds) for name, (x, call) in calls().items()}


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
        for name, (forward, both) in found.items():
            print(f"{options.backend:<8}{name:<28}{forward:8.1f} us forward {both:8.1f} us forward and backward")
    return int(found["weighted_loss"][1] > BUDGET[options.backend])


if __name__ == "__main__":
    sys.exit(main())
