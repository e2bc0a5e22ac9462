"""How the CUDA kernels cut samples into tiles, asked of the host build of tests/cuda_shim."""

import dataclasses

import pytest
import torch

from diffdoctor.backends.cuda import weighted_loss as cuda_weighted
from diffdoctor.backends.native_call import native_plan
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS, OperandPlan
from support import case_lists, cases

F32 = torch.float32


def describe(shim, case):
    problem = cases.lower(cases.build(case), WRITE_GRAD, weight_mean=cuda_weighted.weight_mean)
    plan = native_plan(problem.plan, shim)
    return problem.plan, plan, shim.tiling(plan)


@pytest.mark.parametrize("case", case_lists.all_cases() + case_lists.tiled_cases(), ids=lambda case: case.id)
def test_tiles_hold_every_element_once(cuda, shim, case):
    plan, native, tiling = describe(shim, case)
    tiles = [shim.tile(native, index) for index in range(tiling["tiles"])]
    assert sum(size for _, _, size in tiles) == plan.count
    assert min(first for first, _, _ in tiles) == 0
    assert max(last for _, last, _ in tiles) == plan.count - 1
    assert tiling["positions"] <= 16384


@pytest.mark.parametrize(
    "case_id",
    [
        "runs",
        "runs-bf16-resampled",
        "outers-channels-last",
        "outers-packed",
        "outers-packed-f64",
        "outers-tokens",
        "uniform-f64",
        "full-weighting",
    ],
)
def test_usual_layouts_move_sixteen_bytes(cuda, shim, case_id):
    case = next(case for case in case_lists.tiled_cases() if case.id == case_id)
    assert describe(shim, case)[2]["aligned"]


def test_offsets_beyond_two_to_the_thirty_one(cuda, shim):
    plan, _, _ = describe(shim, cases.Case("", shape=(1, 4, 8, 8), confidence=((1, 8, 8), F32)))
    pixels = 1 << 31
    operand = OperandPlan(F32, (4 * pixels, 0, 0, 0, 0, pixels, 1))
    huge = dataclasses.replace(
        plan, count=4 * pixels, size=(1, 1, 1, 1, 4, pixels), ndim=2, pred=operand, grad=operand, terms=(operand,),
        confidence=dataclasses.replace(plan.confidence, strides=(pixels, 0, 0, 0, 0, 0, 1)),
        cache={},
    )  # fmt: skip
    native = native_plan(huge, shim)
    tiling = shim.tiling(native)
    assert not tiling["narrow"]
    assert (tiling["outer"], tiling["free"], tiling["inner"]) == (1, 4, pixels)
    first, last, _ = shim.tile(native, tiling["tiles"] - 1)
    assert last == 4 * pixels - 1
    assert 0 < first < pixels
    assert shim.weighted_loss_cuda_workspace(native, WRITE_LOSS) > 4 * tiling["tiles"]
