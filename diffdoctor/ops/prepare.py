"""From checked arguments to a plan: the part of a call that depends on shapes, strides, dtypes and options only."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdoctor.lowering.plan import Grid, MapMeta, Options, Plan, make_plan
from diffdoctor.ops import checks


@dataclass(slots=True)
class Prepared:
    """A cached plan and what the call does with its tensors."""

    plan: Plan | None  # None for an empty model_pred
    weighting_per_sample: bool
    grad_runs: tuple[int, int] | None  # (batch, count): the gradient's memory is `batch` dense runs; None: it is not
    short: object = None  # `_cpu.ShortCall` where the call can take the short way


CACHE_LIMIT = 1024


def remember(cache: dict, key, prepared: Prepared) -> Prepared:
    """Put a plan into a cache that starts anew when it is full."""
    if len(cache) >= CACHE_LIMIT:
        cache.clear()
    cache[key] = prepared
    return prepared


def round_to_fp32(value: float) -> float:
    if torch.compiler.is_compiling():  # Dynamo cannot trace ctypes; the operator rounds when it runs
        return value
    return ctypes.c_float(value).value


def make_grid(model_pred: Tensor, layout) -> Grid:
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


def prepare(
    model_pred: Tensor,
    terms: tuple[Tensor, ...],
    confidence: Tensor | None,
    mask: Tensor | None,
    weighting: Tensor | None,
    interpolation: str,
    layout,
    options: Options,
) -> Prepared:
    """The plan of checked arguments."""
    rank = model_pred.ndim if layout is None else 4
    per_sample = is_per_sample(weighting, rank)
    if model_pred.numel() == 0:
        return Prepared(None, per_sample, None)
    grid = make_grid(model_pred, layout)
    grad = torch.empty_like(model_pred, device="meta")
    weights = None
    if weighting is not None and not per_sample:
        strides = tensor_strides(broadcast_stride(weighting, rank), rank, grid, None)
        weights = (weighting.dtype, strides)
    plan = make_plan(
        grid,
        model_pred.dtype,
        tensor_strides(model_pred.stride(), model_pred.ndim, grid, layout),
        tensor_strides(grad.stride(), grad.ndim, grid, layout),
        [(term.dtype, tensor_strides(term.stride(), term.ndim, grid, layout)) for term in terms],
        weights,
        None if confidence is None else map_meta(confidence, grid),
        None if mask is None else map_meta(mask, grid),
        interpolation,
        options,
    )
    # empty_like is dense as a whole, so a batch stride of `count` means that each sample is one run of memory.
    runs = (plan.batch, plan.count) if plan.batch == 1 or plan.grad_strides[0] == plan.count else None
    return Prepared(plan, per_sample, runs)


def make_options(
    artifact_weight, clean_weight, artifact_grad, clean_grad, threshold, gamma, loss_type, reduction
) -> Options:
    """The scalars, checked."""
    number = checks.check_number
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    return Options(
        artifact_weight=number("artifact_weight", artifact_weight),
        clean_weight=number("clean_weight", clean_weight),
        artifact_grad=number("artifact_grad", artifact_grad),
        clean_grad=number("clean_grad", clean_grad),
        threshold=round_to_fp32(number("threshold", threshold, 0.0, 1.0)),
        gamma=number("gamma", gamma, 0.0, open_low=True),
        strength=checks.check_loss_type(loss_type),
        reduction=reduction,
    )
