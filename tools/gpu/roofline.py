"""How fast a loss can be: the bytes that any implementation moves, and those that eager PyTorch moves for the formula.

    python -m tools.gpu.roofline [--docs docs/roofline.md]

Shapes alone are used: nothing is computed, and no GPU is needed. What it says of a GPU is arithmetic with its copy
speed, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ops.registry import Case, cases, dtype_name, least_bytes, passes_bytes
from benchmarks.studies.treatment.table import put_into
from tools.gpu.cards import CARDS

START, END = "<!-- table of python -m tools.gpu.roofline -->", "<!-- end of the roofline's table -->"
#: Where there is work for them: on fewer elements a launch is the limit, whatever moves.
TAGS = {"large", "peer", "latent"}
SHOWN = ("RTX 4090", "H100", "H200", "B200")
LAUNCH = 3e-6
"""Seconds from the start of one small kernel to that of the next, on any of these cards, at best."""


class Traffic(TorchDispatchMode):
    """Counts operators that touch memory, and the bytes that each reads and writes.

    A tensor that an operator is given is read once, where it is expanded only what is there; what it returns is written
    once. Views are free.
    """

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # an index that the host asks for: which one does not matter here
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.namespace != "aten":
            return result
        given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        moved = sum(map(_bytes, [*given.values(), *made]))
        if moved:
            self.operators += 1
            self.bytes += moved
        return result


def _bytes(x: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


@dataclass(frozen=True)
class Floor:
    """One case.

    Attributes:
        case: of the registry.
        least: bytes that any implementation moves; see `registry.least_bytes`.
        ours: bytes that diffdoctor's passes move; more than `least` for fp16, which is read twice.
        eager: bytes that the formula and its backward move when each operator is a kernel.
        operators: how many those are.
    """

    case: Case
    least: int
    ours: int
    eager: int
    operators: int

    @classmethod
    def of(cls, case: Case) -> Floor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            with Traffic():  # not counted, but its answers are needed here too
                tensors = case.inputs(case, torch.device("cpu"))
            x = tensors[case.grad_of].detach().requires_grad_()
            with Traffic() as traffic:
                loss = case.formula(**tensors | {case.grad_of: x})
                loss.sum().backward()
            return cls(case, least_bytes(case, tensors), passes_bytes(case, tensors), traffic.bytes, traffic.operators)

    def row(self) -> str:
        """A line of the table."""
        case = self.case
        shape = " × ".join(map(str, case.shape))
        floors = " | ".join(_microseconds(self.ours / card.copy) for card in CARDS if card.name in SHOWN)
        return (
            f"| {case.name} | {shape} {dtype_name(case.dtype)} | {_size(self.least)} | {self.operators} | "
            f"{self.eager / self.least:.1f} × | {self.eager / self.ours:.1f} × | {floors} |"
        )


def _microseconds(seconds: float) -> str:
    text = f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:,.0f}"
    return f"({text})" if seconds < LAUNCH else text


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def table() -> str:
    """The Markdown of all cases that a GPU is timed with."""
    head = ["case", "shape", "least bytes", "operators of the formula", "their bytes, of the least"]
    head += ["eager's floor, of ours", *(f"{name}, µs" for name in SHOWN)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    lines += [Floor.of(case).row() for case in cases("cuda") if case.tags & TAGS]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0."""
    command = argparse.ArgumentParser(prog="python -m tools.gpu.roofline", description=__doc__)
    command.add_argument("--docs", help="page whose table is replaced as well, such as docs/roofline.md")
    options = command.parse_args(arguments)
    text = table()
    if options.docs:
        put_into(options.docs, text, START, END)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
