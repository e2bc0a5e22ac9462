"""From checked arguments to a plan: the part of a call that depends on shapes, strides, dtypes and options only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdoctor.lowering.plan import Grid, MapMeta, Plan, make_plan
from diffdoctor.ops.arguments import Inputs, LossOptions, target_parts


@dataclass(slots=True)
class CachedPlan:
    """What calls that are alike but for their tensors' values share.

    Attributes:
        options: of the call.
        plan: of the call; None for an empty model_pred.
        weighting_per_sample: whether the weighting is one number per sample.
        grad_runs: (batch, count) where the gradient's memory is `batch` dense runs of `count` elements, else None.
        bound: the call as a backend's fast path runs it, see `autograd.BoundCall`; None where there is none.
        backend: that backend, the default for the tensors' device.
    """

    options: LossOptions
    plan: Plan | None
    weighting_per_sample: bool
    grad_runs: tuple[int, int] | None
    bound: Callable | None = None
    backend: str | None = None


def make_grid(model_pred: Tensor, layout) -> Grid:
    """The logical grid of a prediction."""
    shape = model_pred.shape
    if layout is not None:
        p = layout.patch_size
        return Grid(shape[0], shape[2] // (p * p), 1, layout.height, layout.width, p)
    if len(shape) == 3:
        return Grid(shape[0], shape[2], 1, 1, shape[1])
    if len(shape) == 4:
        return Grid(shape[0], shape[1], 1, shape[2], shape[3])
    return Grid(*shape)


def tensor_strides(stride, rank: int, grid: Grid, layout) -> list[int]:
    """Strides of a prediction-shaped tensor over (b, c, t, h, ph, w, pw)."""
    if rank == 3 and layout is not None:
        b, n, d = stride
        p = layout.patch_size
        if layout.order == "c ph pw":
            c, ph, pw = d * p * p, d * p, d
        else:
            c, ph, pw = d, d * p * grid.channels, d * grid.channels
        return [b, c, 0, n * (grid.width // p), ph, n, pw]
    if rank == 3:
        b, n, d = stride
        return grid.axis_strides(b, d, 0, 0, n)
    if rank == 4:
        b, c, y, x = stride
        return grid.axis_strides(b, c, 0, y, x)
    return grid.axis_strides(*stride)


def broadcast_stride(value: Tensor, rank: int) -> list[int]:
    """Strides over `rank` dims, 0 where the tensor has size 1 or no dim."""
    stride = [0 if n == 1 else s for n, s in zip(value.shape, value.stride(), strict=True)]
    return [0] * (rank - value.ndim) + stride


def map_meta(value: Tensor, grid: Grid) -> MapMeta:
    """A map's size and strides over (b, t, y, x). One without frames holds for every frame."""
    shape, stride = tuple(value.shape), value.stride()
    batch = 0 if shape[0] == 1 else stride[0]
    if len(shape) == 2:
        return MapMeta(value.dtype, (1, 1, shape[1]), (batch, 0, 0, stride[1]))
    frames, frame_stride = (shape[2], stride[2]) if len(shape) == 5 else (1, 0)
    height, width = shape[-2:]
    if frames == 1 and (height, width) == (grid.height, grid.width):
        frames, frame_stride = grid.frames, 0
    return MapMeta(value.dtype, (frames, height, width), (batch, frame_stride, stride[-2], stride[-1]))


def is_per_sample(weighting: Tensor | None, rank: int) -> bool:
    """One number per sample: (B,), (1,), (), or (B, 1, ..., 1) of model_pred's rank."""
    if weighting is None:
        return False
    if weighting.ndim < 2:
        return True
    if any(n != 1 for n in weighting.shape[1:]):
        return False
    return weighting.shape[0] == 1 or weighting.ndim == rank


def prepare(inputs: Inputs, options: LossOptions) -> CachedPlan:
    """The plan of checked arguments."""
    pred, weighting, layout = inputs.model_pred, inputs.weighting, options.layout
    rank = pred.ndim if layout is None else 4
    per_sample = is_per_sample(weighting, rank)
    if pred.numel() == 0:
        return CachedPlan(options, None, per_sample, None)
    grid = make_grid(pred, layout)
    grad = torch.empty_like(pred, device="meta")
    weights = None
    if weighting is not None and not per_sample:
        strides = tensor_strides(broadcast_stride(weighting, rank), rank, grid, None)
        weights = (weighting.dtype, strides)
    target = target_parts(inputs.target)
    plan = make_plan(
        grid,
        pred.dtype,
        tensor_strides(pred.stride(), pred.ndim, grid, layout),
        tensor_strides(grad.stride(), grad.ndim, grid, layout),
        [(term.dtype, tensor_strides(term.stride(), term.ndim, grid, layout)) for term in target.terms],
        weights,
        None if inputs.confidence is None else map_meta(inputs.confidence, grid),
        None if inputs.mask is None else map_meta(inputs.mask, grid),
        options.interpolation,
        options.for_plan(),
        bool(target.artifact_coefs),
    )
    # empty_like is dense as a whole, so a batch stride of `count` means that each sample is one run of memory.
    runs = (plan.batch, plan.count) if plan.batch == 1 or plan.grad.strides[0] == plan.count else None
    return CachedPlan(options, plan, per_sample, runs)
