"""The roofline counts what eager PyTorch moves, by hand on the plainest case."""

import pytest
import torch

from benchmarks.ops.registry import cases
from tools.gpu.roofline import Floor


@pytest.mark.parametrize(
    ("dtype", "each"),
    [
        # mse_loss reads two; its backward reads two and writes one
        (torch.float32, 4 * (2 + 3)),
        # and around them, each cast to fp32 and the gradient's back
        (torch.bfloat16, 4 * (2 + 3) + 2 * (2 + 4) + (4 + 2)),
    ],
    ids=["fp32", "bf16"],
)
def test_the_plain_formula_moves_what_its_operators_read_and_write(dtype, each):
    (case,) = (case for case in cases("cuda") if case.name == "pixel-2048" and case.dtype == dtype)
    floor = Floor.of(case)
    elements = torch.Size(case.shape).numel()
    assert floor.least == floor.ours == 3 * elements * dtype.itemsize
    assert floor.eager == pytest.approx(each * elements, rel=1e-6)


@pytest.mark.parametrize("name", ["kohya", "detector-512"])
def test_a_host_that_asks_for_a_value_is_answered(name):
    (case,) = (case for case in cases("cuda") if case.name == name)
    assert Floor.of(case).operators > 15
