"""The local loop on pytest-benchmark: `pytest benchmarks/ops/test_speed.py --benchmark-enable -k 'latents'`.

One case at a time, quick to repeat while changing a kernel, with pytest-benchmark's statistics and its own comparison.
`benchmarks.ops.run` is what is kept and quoted: it interleaves the sides, which one test per side cannot.
"""

import pytest
import torch

from benchmarks.ops import gate, machine
from benchmarks.ops.registry import cases, least_bytes
from benchmarks.ops.sides import Call, sides_of

DEVICE = torch.device("cpu")
CASES = [case for case in cases("cpu") if "sweep" not in case.tags]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(machine.cores())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["cpu", "eager", "compile"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_forward_and_backward(benchmark, case, name):
    torch._dynamo.reset()
    side = next((side for side in sides_of(case, DEVICE) if side.name == name), None)
    if side is None:
        pytest.skip(f"{case.key} has no side {name}")
    tensors = case.inputs(case, DEVICE)
    checked = gate.check(case, gate.run(case, tensors, side.function), gate.expected(case, tensors), side.ours)
    assert checked["reason"] is None
    call = Call(case, tensors, side)
    benchmark.group = case.key
    benchmark.extra_info["least_bytes"] = least_bytes(case, tensors)
    benchmark.pedantic(call, rounds=15, warmup_rounds=3)
