"""The local loop on pytest-benchmark: `pytest benchmarks/ops/test_speed.py --benchmark-enable -k 'latents'`.

One case at a time, quick to repeat while changing a kernel, with pytest-benchmark's statistics and its own comparison.
`benchmarks.ops.run` is what is kept and quoted: it interleaves the implementations, which separate tests cannot.
"""

import pytest
import torch

from benchmarks.ops import correctness, machine
from benchmarks.ops.implementations import Call, implementations_of
from benchmarks.ops.registry import cases, least_bytes

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
    impl = next((impl for impl in implementations_of(case, DEVICE) if impl.name == name), None)
    if impl is None:
        pytest.skip(f"{case.key} has no implementation {name}")
    tensors = case.inputs(case, DEVICE)
    checked = correctness.check(
        case,
        correctness.run(case, tensors, impl.function),
        correctness.expected(case, tensors),
        impl.ours,
    )
    assert checked["reason"] is None
    call = Call(case, tensors, impl)
    benchmark.group = case.key
    benchmark.extra_info["least_bytes"] = least_bytes(case, tensors)
    benchmark.pedantic(call, rounds=15, warmup_rounds=3)
