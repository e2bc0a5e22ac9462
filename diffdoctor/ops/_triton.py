"""The Triton backend: from a lowered problem to kernel launches. kernels/*.py holds the kernels."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdoctor.kernels import artifact_loss as artifact
from diffdoctor.kernels import weighted_loss as weighted
from diffdoctor.kernels.common import interprets
from diffdoctor.ops._lowering import (
    ARTIFACT_METHODS,
    LOSS_KINDS,
    MAP_MODES,
    MAX_DIMS,
    REDUCTIONS,
    WRITE_GRAD,
    WRITE_LOSS,
    WRITE_SUMS,
    ArtifactProblem,
    MapPlan,
    PerSample,
    Plan,
    Problem,
)

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
_INTERPRETS = interprets(weighted.weighted_loss_kernel)
_ABSENT, _SAME, _RESAMPLED = 0, 1, 2  # kernels/resample.py
_PLAIN_L2 = (0.0,) * 5
_BLOCK_PARTIAL = 512
# Said aloud because Triton 3.10 changes the default; where a rounding must not depend on it the kernels use fma.
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
_SCALE_BLOCK = 2048


@cache
def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 4):
        return f"triton {triton.__version__} is too old, 3.4 or newer is needed"
    if _INTERPRETS:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (7, 5):
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return None


def unsupported(op: str, problem) -> str | None:
    """Why this problem cannot be served, or None."""
    device = (problem.logits if op == "artifact_loss" else problem.pred).device
    return None if device.type == "cuda" else f"serves CUDA tensors, got a tensor on {device.type}"


@dataclass(frozen=True, slots=True)
class Box:
    """How a plan's elements are cut into tiles: see kernels/weighted_loss.py."""

    groups: tuple[tuple[int, ...], ...]  # which of the plan's six dims are outer, free, inner
    count: tuple[int, int, int]  # elements of each group
    block: tuple[int, int, int]
    inner_blocks: int
    spots: int  # tiles of outer × inner positions
    walks: int  # programs that share one spot's free positions ...
    steps: int  # ... and the blocks of them that each visits

    @property
    def programs(self) -> int:
        return self.spots * self.walks


def make_box(plan: Plan) -> Box:
    """The free dims are the longest run along which every map is constant; without maps all but the last of several."""
    dims = tuple(range(MAX_DIMS - plan.ndim, MAX_DIMS))
    maps = [map_plan for map_plan in (plan.confidence, plan.mask) if map_plan is not None]
    begin, end = _longest_run([all(_constant(plan, map_plan, d) for map_plan in maps) for d in dims], plan, dims)
    if not maps and len(dims) > 1:
        end -= 1
    groups = (dims[:begin], dims[begin:end], dims[end:])
    count = tuple(_product(plan.size[d] for d in group) for group in groups)
    n_outer, n_free, n_inner = count
    tile = 256 if plan.batch * plan.count <= 1 << 18 else 1024
    inner = _block(n_inner, tile)
    free = _block(n_free, tile // inner)
    outer = _block(n_outer, tile // (inner * free))
    inner_blocks = -(-n_inner // inner)
    spots = -(-n_outer // outer) * inner_blocks
    free_blocks = -(-n_free // free)
    walks = min(free_blocks, max(1, (1024 if maps else 4096) // (spots * plan.batch)))
    steps = -(-free_blocks // walks)
    return Box(groups, count, (outer, free, inner), inner_blocks, spots, -(-free_blocks // steps), steps)


def _constant(plan: Plan, map_plan: MapPlan, d: int) -> bool:
    if map_plan.mode == "same":
        return map_plan.strides[1 + d] == 0
    return all(axis[d] == 0 for axis in plan.coord)


def _longest_run(free: list[bool], plan: Plan, dims: tuple[int, ...]) -> tuple[int, int]:
    """[begin, end) of the run of True with most elements; (0, 0) where there is none."""
    best, most, begin = (0, 0), 0, 0
    for d in range(len(dims) + 1):
        if d == len(dims) or not free[d]:
            size = _product(plan.size[k] for k in dims[begin:d])
            if d > begin and size > most:
                best, most = (begin, d), size
            begin = d + 1
    return best


def _product(sizes) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def _block(n: int, limit: int) -> int:
    """A power of two up to `limit`: n rounded up where n is small, else the largest that pads n by at most a quarter."""
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
        if all(strides[a] == strides[b] * plan.size[b] for a, b in zip(group, group[1:], strict=False)):
            steps = steps[-1:]
        grouped.append(steps)
    return tuple(grouped)


def _in_units(groups: tuple[tuple[int, ...], ...] | None):
    """(groups divided by their units, the units): per group the power of two up to 16 that divides all of it."""
    if groups is None:
        return None, (1, 1, 1)
    units = tuple(gcd(16, *group) for group in groups)
    return tuple(tuple(n // unit for n in group) for group, unit in zip(groups, units, strict=True)), units


def _index_type(plan: Plan):
    """int32 where every offset within a sample, and every product of the resampling, stays far from 2³¹."""
    operands = [plan.pred_strides, plan.grad_strides, *plan.term_strides]
    if plan.weighting_strides is not None:
        operands.append(plan.weighting_strides)
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


class Prepared:
    """What launches of one plan have in common; kept in `plan.cache`."""

    def __init__(self, plan: Plan):
        box = self.box = make_box(plan)
        self.acc = plan.acc_dtype
        kinds = (_kind(plan.confidence), _kind(plan.mask))
        modes = [m.mode for m in (plan.confidence, plan.mask) if m is not None and m.mode != "same"]
        options = plan.options

        def map_strides(map_plan):
            return _grouped(plan, box, map_plan.strides[1:]) if _kind(map_plan) == _SAME else None

        terms = [*plan.term_strides, None, None][:2]
        operands = (plan.pred_strides, plan.grad_strides, *terms, plan.weighting_strides)
        maps = (plan.confidence, plan.mask)
        batch_strides = [0 if strides is None else strides[0] for strides in operands]
        batch_strides += [0 if map_plan is None else map_plan.strides[0] for map_plan in maps]
        sizes = tuple(tuple(plan.size[d] for d in group) or (1,) for group in box.groups)
        resamples = _RESAMPLED in kinds
        map_part = dict(
            sizes=sizes, confidence_strides=map_strides(plan.confidence), mask_strides=map_strides(plan.mask),
            coords=tuple(_grouped(plan, box, axis) for axis in plan.coord) if resamples else None, batch_strides=tuple(batch_strides),
            confidence_axes=_axes(plan, plan.confidence), mask_axes=_axes(plan, plan.mask),
            map_grid=plan.grid if resamples else None, mode=MAP_MODES[modes[0]] if modes else 0,
            clean_weight=options.clean_weight, artifact_weight=options.artifact_weight,
            threshold=options.threshold, gamma=options.gamma,
            CONFIDENCE=kinds[0], MASK=kinds[1],
            BLOCK_PARTIAL=_BLOCK_PARTIAL, ACC=_ACC[plan.acc_dtype], IDX=_index_type(plan), **_LAUNCH,
        )  # fmt: skip
        strength = dict(zip(LOSS_KINDS, options.strength, strict=True))
        data = {}
        for name, strides in zip(("pred", "grad", "term0", "term1"), operands, strict=False):
            grouped = None if strides is None else _grouped(plan, box, strides[1:])
            data[f"{name}_strides"], data[f"{name.upper()}_UNITS"] = _in_units(grouped)
        weighting = plan.weighting_strides
        counts, count_units = _in_units(tuple((n,) for n in box.count))
        self.loss_arguments = dict(
            map_part, **strength, **data,
            weighting_strides=None if weighting is None else _grouped(plan, box, weighting[1:]), batch=plan.batch,
            outer_count=counts[0][0], free_count=counts[1][0], inner_count=counts[2][0], COUNT_UNITS=count_units,
            programs=box.programs, walks=box.walks, steps=box.steps, inner_blocks=box.inner_blocks,
            reduction=REDUCTIONS[options.reduction],
            clean_grad=options.clean_grad, artifact_grad=options.artifact_grad,
            PLAIN=tuple(options.strength[1:]) == _PLAIN_L2,
            BLOCK_OUTER=box.block[0], BLOCK_FREE=box.block[1], BLOCK_INNER=box.block[2],
            ROUND_BF16=_INTERPRETS,
        )  # fmt: skip
        # The weights' mean walks no free positions, so its tiles may be as large as the maps allow.
        inner = _block(box.count[2], 1024)
        outer = _block(box.count[0], 1024 // inner)
        inner_blocks = -(-box.count[2] // inner)
        self.mean_arguments = dict(
            map_part, batch=plan.batch, n_outer=box.count[0], n_inner=box.count[2],
            programs=-(-box.count[0] // outer) * inner_blocks, inner_blocks=inner_blocks,
            BLOCK_OUTER=outer, BLOCK_INNER=inner,
        )  # fmt: skip


def prepared(plan: Plan) -> Prepared:
    kept = plan.cache.get("triton")
    if kept is None:
        kept = plan.cache["triton"] = Prepared(plan)
    return kept


def on_device(tensor: Tensor):
    """Launches go to the current device; make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


_counters: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros for the current stream of the current device.

    Kernels leave them at zero, so they are cleared once and kept. A graph under capture gets its own: it may be
    replayed on another stream than the one that captured it.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept


def _numbers(entries: tuple[PerSample | None, ...], stand_in: Tensor):
    """Pointers of the per-sample numbers, which of them are tensors, and which of those have one entry per sample."""
    given = strided = 0
    pointers = []
    for k, entry in enumerate(entries):
        data = stand_in if entry is None or entry.data is None else entry.data
        if data is not stand_in:
            given |= 1 << k
            if data.shape[0] > 1 and data.stride(0) != 0:
                strided |= 1 << k
                data = data.contiguous()
        pointers.append(data)
    return tuple(pointers), given, strided


def weighted_loss(problem: Problem) -> None:
    """Fill the outputs that `problem.work` names."""
    plan = problem.plan
    ready = prepared(plan)
    device = problem.pred.device
    columns = 8 if problem.work & WRITE_SUMS else 1
    reduces = problem.work & (WRITE_LOSS | WRITE_SUMS)
    with on_device(problem.pred):
        room = plan.batch * (ready.box.programs * columns + 1) if reduces else 1
        partial = torch.empty(room, dtype=ready.acc, device=device)
        coefs = (*problem.coefs, None, None)[:2]
        entries = (problem.pred_scale, *coefs, problem.huber_c, problem.weight, problem.z, problem.grad_output)
        pointers, given, strided = _numbers(entries, partial)
        values = [1.0 if entry is None else entry.value for entry in entries]
        terms = (*problem.terms, None, None)[:2]
        weighted.weighted_loss_kernel[(plan.batch * ready.box.programs,)](
            problem.pred, problem.grad, *terms, problem.weighting, problem.confidence, problem.mask,
            problem.loss if problem.work & WRITE_LOSS else None, problem.sums, partial,
            counters(device, plan.batch + 1) if reduces else None, pointers, given=given, strided=strided,
            pred_scale=values[0], coef0=values[1], coef1=values[2], huber_c=values[3], weight=values[4], z=values[5],
            grad_output=values[6], LOSS=bool(problem.work & WRITE_LOSS), GRAD=bool(problem.work & WRITE_GRAD),
            SUMS=bool(problem.work & WRITE_SUMS), **ready.loss_arguments,
        )  # fmt: skip


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean of ω into out: (B,) per sample, (1,) over the batch."""
    plan = problem.plan
    ready = prepared(plan)
    device = problem.pred.device
    with on_device(problem.pred):
        programs = ready.mean_arguments["programs"]
        partial = torch.empty(plan.batch * (programs + 1), dtype=ready.acc, device=device)
        weighted.weight_mean_kernel[(plan.batch * programs,)](
            problem.confidence, problem.mask, out, partial, counters(device, plan.batch + 1),
            PER_SAMPLE=out.shape[0] == plan.batch, **ready.mean_arguments,
        )  # fmt: skip


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    with on_device(grad):
        blocks = -(-count // _SCALE_BLOCK)
        steps = -(-blocks // max(1, 4096 // batch))
        programs = -(-blocks // steps)
        weighted.scale_gradient_kernel[(batch * programs,)](
            grad, out, grad_output, count, programs, steps, grad_output.stride(0) if grad_output.ndim else 0,
            IN_PLACE=out.data_ptr() == grad.data_ptr(), BLOCK=_SCALE_BLOCK, ROUND_BF16=_INTERPRETS, **_LAUNCH,
        )  # fmt: skip


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and kept and factor where they are wanted."""
    logits = problem.logits
    batch, h, w = logits.shape
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    gathers = problem.kept is not None
    n_tiles = -(-h * w // artifact.BLOCK)
    with on_device(logits):
        partial = torch.empty(batch * (2 * n_tiles + 1), dtype=acc, device=logits.device)
        artifact.artifact_loss_kernel[(batch * n_tiles,)](
            logits, problem.kept, problem.factor, problem.loss, partial, counters(logits.device, batch + 1),
            batch, n_tiles, **artifact_arguments(problem, gathers and problem.method != "max"),
            METHOD=ARTIFACT_METHODS[problem.method], REDUCTION=REDUCTIONS[problem.reduction],
        )  # fmt: skip
        if gathers and problem.method == "max":
            artifact.artifact_peak_kernel[(batch * n_tiles,)](
                logits, problem.kept, partial[2 * batch * n_tiles :], n_tiles, **artifact_arguments(problem, True)
            )


def artifact_arguments(problem: ArtifactProblem, gathers: bool) -> dict:
    """Shapes and windows of a visit of the up-sampled map, gathering the gradient or not."""
    _, h, w = problem.logits.shape
    out_h, out_w = problem.size
    acc = torch.float64 if problem.logits.dtype is torch.float64 else torch.float32
    window_y, window_x, slack = artifact.windows(h, w, out_h, out_w, gathers)
    stride_b, stride_y, stride_x = problem.logits.stride()
    return dict(
        h=h, w=w, out_h=out_h, out_w=out_w, stride_b=stride_b, stride_y=stride_y, stride_x=stride_x,
        scale_y=_ratio(h, out_h, acc), scale_x=_ratio(w, out_w, acc), tau=problem.threshold,
        window_y=window_y, window_x=window_x, slack=slack,
        GATHER=gathers, ACC=_ACC[acc], BLOCK=artifact.BLOCK, **_LAUNCH,
    )  # fmt: skip


def _ratio(size: int, out_size: int, acc: torch.dtype) -> float:
    """size / out_size as ATen rounds it."""
    return size / out_size if acc is torch.float64 else (torch.tensor(float(size)) / float(out_size)).item()


def artifact_loss_backward(kept: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = kept · factor_b · g_b, in the logits' dtype."""
    batch, h, w = kept.shape
    n_tiles = -(-h * w // _SCALE_BLOCK)
    with on_device(kept):
        artifact.artifact_scale_kernel[(batch * n_tiles,)](
            kept, factor, grad_output, out, h * w, n_tiles, grad_output.stride(0) if grad_output.ndim else 0,
            BLOCK=_SCALE_BLOCK, ROUND_BF16=_INTERPRETS, **_LAUNCH,
        )  # fmt: skip
