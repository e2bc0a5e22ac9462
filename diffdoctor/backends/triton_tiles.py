"""How the Triton kernels go over a plan: tiles, strides by group, and the arguments that launches of one plan share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd, prod

import torch
import triton.language as tl

from diffdoctor.kernels.element_loss import STRENGTHS
from diffdoctor.lowering.plan import LOSS_KINDS, MAP_MODES, MAX_DIMS, MAX_TERMS, REDUCTIONS, MapPlan, OperandPlan, Plan

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
FEW_PROGRAMS, MANY_PROGRAMS = 1024, 8192  # to occupy a GPU, and to keep it busy until the last ones end
# Fusion is set explicitly because Triton 3.10 changes the default; where a rounding must not depend on it there is fma.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
_ABSENT, _SAME, _RESAMPLED = 0, 1, 2  # kernels/resample.py


@dataclass(frozen=True, slots=True)
class Box:
    """How a plan's elements are cut into tiles: see kernels/weighted_loss.py."""

    groups: tuple[tuple[int, ...], ...]  # which of the plan's six dims are outer, free, inner
    count: tuple[int, int, int]  # elements of each group
    block: tuple[int, int, int]
    inner_blocks: int
    tiles: int  # of outer × inner positions
    splits: int  # programs that share one tile's free positions ...
    steps: int  # ... and the blocks of them that each visits
    turns: int = 1  # tiles that a program visits one after another

    @property
    def programs(self) -> int:
        return -(-self.tiles // self.turns) * self.splits


def make_box(plan: Plan, sums: bool = False) -> Box:
    """Free are the plan's free dims; without maps all dims but the last of several.

    Args:
        sums: whether LossStats are asked for. They, mixtures, resampled maps and weighting need the registers that a
            second tile would take.
    """
    dims = range(MAX_DIMS - plan.ndim, MAX_DIMS)
    maps = plan.confidence is not None or plan.mask is not None
    begin, end = plan.free_dims
    if not maps and len(dims) > 1:
        end -= 1
    groups = (tuple(range(dims[0], begin)), tuple(range(begin, end)), tuple(range(max(end, dims[0]), MAX_DIMS)))
    count = tuple(prod(plan.size[d] for d in group) for group in groups)
    n_outer, n_free, n_inner = count
    elements = 256 if plan.batch * plan.count <= 1 << 18 else 1024
    inner = _block(n_inner, elements)
    free = _block(n_free, elements // inner)
    outer = _block(n_outer, elements // (inner * free))
    inner_blocks = -(-n_inner // inner)
    tiles = -(-n_outer // outer) * inner_blocks
    free_blocks = -(-n_free // free)
    every = tiles * plan.batch
    splits = MANY_PROGRAMS // every
    if maps:  # Each split works out the tile's weights anew. That pays from 8 blocks on, or to have enough programs.
        splits = max(min(splits, free_blocks // 8), FEW_PROGRAMS // every)
    splits = max(1, min(splits, free_blocks))
    steps = -(-free_blocks // splits)
    turns = 1
    resampled = _RESAMPLED in (_kind(plan.confidence), _kind(plan.mask))
    if _is_plain(plan) and plan.weighting is None and not resampled and not sums:
        turns = max(1, min(every // MANY_PROGRAMS, 8))
    return Box(groups, count, (outer, free, inner), inner_blocks, tiles, -(-free_blocks // steps), steps, turns)


def _is_plain(plan: Plan) -> bool:
    """Whether the loss is l2 alone."""
    return not any(plan.options.strength[1:])


def _block(n: int, limit: int) -> int:
    """A power of two ≤ `limit`: n rounded up where it is small, else the largest that pads it by at most a quarter."""
    size = 1
    while size < min(n, limit):
        size *= 2
    while size > 64 and -(-n // size) * size > 1.25 * n:
        size //= 2
    return size


def _grouped(plan: Plan, box: Box, strides) -> tuple[tuple[int, ...], ...]:
    """Strides of the plan's six dims by group; one stride where the group's dims advance evenly."""
    grouped = []
    for group in box.groups:
        steps = tuple(strides[d] for d in group) or (0,)
        if all(strides[a] == strides[b] * plan.size[b] for a, b in pairwise(group)):
            steps = steps[-1:]
        grouped.append(steps)
    return tuple(grouped)


def _in_units(groups: tuple[tuple[int, ...], ...] | None):
    """(groups divided by their units, the units): per group the power of two up to 16 that divides all of it."""
    if groups is None:
        return None, (1, 1, 1)
    units = tuple(gcd(16, *group) for group in groups)
    return tuple(tuple(n // unit for n in group) for group, unit in zip(groups, units, strict=True)), units


def index_type(plan: Plan):
    """int32 where every offset within a sample, and every product of the resampling, stays far from 2³¹."""
    operands = [x.strides for x in (plan.pred, plan.grad, *plan.terms, plan.weighting) if x is not None]
    reach = [plan.count]
    for map_plan in (plan.confidence, plan.mask):
        if map_plan is None:
            continue
        if map_plan.mode == "same":
            operands.append(map_plan.strides)
            continue
        reach.append(sum((n - 1) * s for n, s in zip(map_plan.in_size, map_plan.in_stride, strict=True)))
        reach += [(n + 1) * (out + 1) for n, out in zip(map_plan.in_size, plan.grid, strict=True)]
    reach += [sum((n - 1) * abs(s) for n, s in zip(plan.size, strides[1:], strict=True)) for strides in operands]
    return tl.int64 if max(reach) >= 1 << 30 else tl.int32


def _axes(plan: Plan, map_plan: MapPlan | None) -> tuple[int, ...] | None:
    if map_plan is None or map_plan.mode == "same":
        return None
    windows = (n // out + (2 if n % out else 0) for n, out in zip(map_plan.in_size, plan.grid, strict=True))
    return (*map_plan.in_size, *map_plan.in_stride, *windows)


def _kind(map_plan: MapPlan | None) -> int:
    if map_plan is None:
        return _ABSENT
    return _SAME if map_plan.mode == "same" else _RESAMPLED


def _strides(plan: Plan, box: Box, operand: OperandPlan | MapPlan | None) -> tuple[tuple[int, ...], ...] | None:
    """An operand's strides by group; None for one that is not there."""
    return None if operand is None else _grouped(plan, box, operand.strides[1:])


def _operands(plan: Plan) -> tuple[OperandPlan | None, ...]:
    """model_pred, its gradient and the terms, None for a term that is not there."""
    return (plan.pred, plan.grad, *plan.terms, *(None,) * (MAX_TERMS - len(plan.terms)))


def map_arguments(plan: Plan, box: Box) -> dict:
    """What both weighted-loss kernels are told about the maps."""
    options = plan.options
    maps = (plan.confidence, plan.mask)
    resampled = [map_plan.mode for map_plan in maps if _kind(map_plan) == _RESAMPLED]
    operands = (*_operands(plan), plan.weighting, *maps)
    arguments = {
        "sizes": tuple(tuple(plan.size[d] for d in group) or (1,) for group in box.groups),
        "coords": tuple(_grouped(plan, box, axis) for axis in plan.coord) if resampled else None,
        "batch_strides": tuple(0 if operand is None else operand.strides[0] for operand in operands),
        "map_grid": plan.grid if resampled else None,
        "mode": MAP_MODES[resampled[0]] if resampled else 0,
        "clean_weight": options.clean_weight,
        "artifact_weight": options.artifact_weight,
        "threshold": options.threshold,
        "gamma": options.gamma,
        "batch": plan.batch,
        "BLOCK_PARTIAL": 256 if max(box.programs, plan.batch) <= 256 else 1024,
        "ACC": ACC[plan.acc_dtype],
        "IDX": index_type(plan),
        **LAUNCH,
    }
    for name, map_plan in (("confidence", plan.confidence), ("mask", plan.mask)):
        kind = arguments[name.upper()] = _kind(map_plan)
        arguments[f"{name}_strides"] = _strides(plan, box, map_plan) if kind == _SAME else None
        arguments[f"{name}_axes"] = _axes(plan, map_plan)
    return arguments


def loss_arguments(plan: Plan, box: Box) -> dict:
    """What launches of weighted_loss_kernel on one plan share."""
    options = plan.options
    plain = _is_plain(plan)
    strengths = (*options.strength, *(0.0 for _ in range(STRENGTHS - len(LOSS_KINDS))))
    counts, count_units = _in_units(tuple((n,) for n in box.count))
    arguments = {
        **map_arguments(plan, box),
        **{f"strength{k}": value for k, value in enumerate(strengths)},
        "weighting_strides": _strides(plan, box, plan.weighting),
        "outer_count": counts[0][0],
        "free_count": counts[1][0],
        "inner_count": counts[2][0],
        "COUNT_UNITS": count_units,
        "programs": box.programs,
        "splits": box.splits,
        "steps": box.steps,
        "turns": None if box.turns == 1 else box.turns,
        "inner_blocks": box.inner_blocks,
        "reduction": REDUCTIONS[options.reduction],
        "clean_grad": options.clean_grad,
        "artifact_grad": options.artifact_grad,
        "PLAIN": plain,
        "MODULATED": (options.clean_grad, options.artifact_grad) != (1.0, 1.0),
        "SPATIAL": plan.spatial_coefs,
        "num_warps": 4 if plain else 8,  # a mixture's branches need registers: with 4 warps a few are spilled
        "BLOCK_OUTER": box.block[0],
        "BLOCK_FREE": box.block[1],
        "BLOCK_INNER": box.block[2],
    }
    for name, operand in zip(("pred", "grad", "term0", "term1", "term2"), _operands(plan), strict=True):
        arguments[f"{name}_strides"], arguments[f"{name.upper()}_UNITS"] = _in_units(_strides(plan, box, operand))
    return arguments


def mean_arguments(plan: Plan, box: Box) -> dict:
    """What launches of weight_mean_kernel on one plan share; its tiles have no free positions."""
    inner = _block(box.count[2], 1024)
    outer = _block(box.count[0], 1024 // inner)
    inner_blocks = -(-box.count[2] // inner)
    return {
        **map_arguments(plan, box),
        "n_outer": box.count[0],
        "n_inner": box.count[2],
        "programs": -(-box.count[0] // outer) * inner_blocks,
        "inner_blocks": inner_blocks,
        "BLOCK_OUTER": outer,
        "BLOCK_INNER": inner,
    }


def make_channel_box(plan: Plan) -> Box:
    """The box of policy_loss: free are the channels, of which a program visits all."""
    begin, end = plan.free_dims_weighted
    dims = range(MAX_DIMS - plan.ndim, MAX_DIMS)
    groups = (tuple(d for d in dims if d < begin), tuple(range(begin, end)), tuple(d for d in dims if d >= end))
    count = tuple(prod(plan.size[d] for d in group) for group in groups)
    n_outer, n_free, n_inner = count
    elements = 512 if plan.batch * plan.count <= 1 << 18 else 2048
    free = min(32, 1 << (n_free - 1).bit_length())  # in registers between the two passes
    inner = _block(n_inner, elements // free)
    outer = _block(n_outer, elements // (inner * free))
    inner_blocks = -(-n_inner // inner)
    tiles = -(-n_outer // outer) * inner_blocks
    return Box(groups, count, (outer, free, inner), inner_blocks, tiles, 1, -(-n_free // free))


def _channel_warps(plan: Plan, box: Box) -> int:
    """So that a thread has 16 elements, or 32 where they stay in registers: all threads that share a pixel work out its
    ratio."""
    each = 32 if plan.dtype.itemsize == 2 and box.steps == 1 else 16
    return max(1, min(LAUNCH["num_warps"], prod(box.block) // (32 * each)))


_OPTIONS = ("clean_weight", "artifact_weight", "threshold", "gamma")


def policy_arguments(plan: Plan, box: Box) -> dict:
    """What launches of policy_loss_kernel on one plan share; the advantage is the plan's confidence."""
    counts, count_units = _in_units(tuple((n,) for n in box.count))
    arguments = {
        name.replace("confidence", "advantage").replace("CONFIDENCE", "ADVANTAGE"): value
        for name, value in map_arguments(plan, box).items()
        if name not in _OPTIONS
    }
    arguments |= {
        "log_prob_strides": _strides(plan, box, plan.weighting),
        "outer_count": counts[0][0],
        "free_count": counts[1][0],
        "inner_count": counts[2][0],
        "COUNT_UNITS": count_units,
        "programs": box.programs,
        "steps": box.steps,
        "inner_blocks": box.inner_blocks,
        "HELD": box.steps == 1,
        "num_warps": _channel_warps(plan, box),
        "BLOCK_OUTER": box.block[0],
        "BLOCK_FREE": box.block[1],
        "BLOCK_INNER": box.block[2],
    }
    for name, operand in zip(("pred", "grad", "latents", "next", "ref"), _operands(plan), strict=True):
        arguments[f"{name}_strides"], arguments[f"{name.upper()}_UNITS"] = _in_units(_strides(plan, box, operand))
    return arguments
