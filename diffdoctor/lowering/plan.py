"""What a compiled backend receives: one call of weighted_loss, checked, flattened to strides and scalars.

`Plan` holds everything that follows from shapes, strides, dtypes and options, so that it can be cached between calls;
`Problem` adds the tensors of one call. `csrc/common/weighted_loss_params.h` is the same thing as a C++ struct.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from diffdoctor.reference.grid import accumulation_dtype
from diffdoctor.reference.losses import ELEMENT_LOSSES

MAX_DIMS = 6
MAX_TERMS = 3

# Values shared with csrc/common/types.h.
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.bool: 5,
}
LOSS_KINDS = tuple(ELEMENT_LOSSES)  # as DD_ELEMENT_LOSSES in csrc/common/losses.h lists them
REDUCTIONS = {"mean": 0, "sample": 1, "sum": 2}
MAP_MODES = {"same": 1, "area": 2, "bilinear": 3, "nearest": 4, "nearest-exact": 5}
WRITE_LOSS, WRITE_GRAD, WRITE_SUMS = 1, 2, 4
SUMS = 10  # columns of Problem.sums; their meaning stands in csrc/common/weighted_loss_params.h

Strides = tuple[int, int, int, int, int, int, int]  # batch, then the six iteration dims


@dataclass(frozen=True, slots=True)
class OperandPlan:
    """How a tensor lies over the iteration space."""

    dtype: torch.dtype
    strides: Strides


@dataclass(frozen=True, slots=True)
class MapPlan:
    """How a confidence or mask reaches the grid."""

    dtype: torch.dtype
    mode: str  # a key of MAP_MODES; "same": read through `strides`, no resampling
    strides: Strides  # mode "same": over the iteration space
    in_size: tuple[int, int, int]  # else: the map's own (T', H', W') ...
    in_stride: tuple[int, int, int]  # ... and their strides; the batch stride is strides[0]


@dataclass(frozen=True, slots=True)
class Options:
    """The scalars of a call. `threshold` is already rounded to fp32."""

    artifact_weight: float = 1.0
    clean_weight: float = 1.0
    artifact_grad: float = 1.0
    clean_grad: float = 1.0
    threshold: float = 0.0
    gamma: float = 1.0
    strength: tuple[float, ...] = (1.0, *(0.0 for _ in LOSS_KINDS[1:]))  # in the order of LOSS_KINDS; l2 alone
    reduction: str = "mean"


@dataclass(frozen=True, slots=True)
class Plan:
    """The static half of a problem.

    A sample's elements are enumerated by `size`, six dims, outermost first, padded with leading ones; the last `ndim`
    are in use. They are model_pred's dims in the order of its memory, merged where every operand allows. Each tensor
    is read at `b * strides[0] + sum(i[d] * strides[1 + d])`. Where a map is resampled, an element's grid position is
    `(t, y, x) = sum(i[d] * coord[axis][d])` on the grid `(T, H, W)`.
    """

    batch: int
    count: int  # elements of a sample
    size: tuple[int, ...]
    ndim: int
    dtype: torch.dtype  # model_pred's, and its gradient's
    acc_dtype: torch.dtype  # float64 for float64, else float32
    contiguous: bool  # pred, grad and every term are dense within a sample, in the order of `size`
    pred: OperandPlan
    grad: OperandPlan
    terms: tuple[OperandPlan, ...]
    weighting: OperandPlan | None
    confidence: MapPlan | None
    mask: MapPlan | None
    coord: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    grid: tuple[int, int, int]
    map_varies: tuple[bool, ...]  # along which of the six dims confidence or mask changes
    # Dims [begin, end): the run with most elements along which neither changes; in the second, nor does `weighting`.
    # What lies outside is "outer", what lies inside "inner"; (0, 0) where there is no such run.
    free_dims: tuple[int, int]
    free_dims_weighted: tuple[int, int]
    spatial_coefs: bool  # coefficients go from Problem.coefs to artifact_coefs as u goes from 0 to 1
    options: Options
    cache: dict = field(default_factory=dict, compare=False, hash=False)  # a backend may keep its own form here


@dataclass(slots=True)
class PerSample:
    """One number per sample: `data` of acc_dtype on the problem's device, (B,) or (1,), else `value` for all."""

    value: float = 1.0
    data: Tensor | None = None

    @property
    def stride(self) -> int:
        """Elements from one sample's number to the next; 0 where one number serves all."""
        return 0 if self.data is None or self.data.shape[0] == 1 else self.data.stride(0)


@dataclass(slots=True)
class Problem:
    """One call: the plan, the inputs and the outputs to fill. Nothing in it needs another check.

    `outputs` is a union of WRITE_LOSS (fill `loss`), WRITE_GRAD (fill `grad`) and WRITE_SUMS (fill `sums`). Outputs are
    allocated and uninitialised; `batch` and `count` are positive.
    """

    plan: Plan
    outputs: int
    pred: Tensor
    terms: tuple[Tensor, ...]
    confidence: Tensor | None
    mask: Tensor | None
    weighting: Tensor | None  # element-wise v; a per-sample v is in `weight`
    pred_scale: PerSample
    coefs: tuple[PerSample, ...]
    huber_c: PerSample
    weight: PerSample
    z: PerSample
    grad_output: PerSample
    loss: Tensor | None = None  # () for mean and sum, (B,) for sample; acc_dtype
    grad: Tensor | None = None  # like pred
    sums: Tensor | None = None  # (B, SUMS), acc_dtype
    z_is_mean: bool = False  # z.data is an output too: the mean spatial weight, filled by weight_mean before
    artifact_coefs: tuple[PerSample, ...] = ()  # as many as coefs where the plan has spatial_coefs
    keeps_workspace: bool = True  # False in a compiled graph, whose memory pool may hold nothing that outlives the call


def merge_dims(size: list[int], columns: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dims along which every column of strides advances evenly; dims of size 1 are dropped."""
    keep = [d for d, n in enumerate(size) if n != 1]
    size = [size[d] for d in keep]
    columns = [[column[d] for d in keep] for column in columns]
    d = 0
    while d + 1 < len(size):
        inner = size[d + 1]
        if all(column[d] == column[d + 1] * inner for column in columns):
            size[d : d + 2] = [size[d] * inner]
            for column in columns:
                del column[d]
        else:
            d += 1
    return size, columns


def pad_dims(values: list[int], fill: int) -> tuple[int, ...]:
    """Six entries, `fill` in front."""
    return (fill,) * (MAX_DIMS - len(values)) + tuple(values)


def longest_run(varies: tuple[bool, ...], size: tuple[int, ...], first: int) -> tuple[int, int]:
    """Dims [begin, end) of the run without `varies` that has most elements, from `first` on; (0, 0) for none."""
    best, most, begin = (0, 0), 0, first
    for end in range(first, MAX_DIMS + 1):
        if end == MAX_DIMS or varies[end]:
            elements = prod(size[begin:end])
            if end > begin and elements > most:
                best, most = (begin, end), elements
            begin = end + 1
    return best


@dataclass(frozen=True, slots=True)
class Grid:
    """The logical grid (B, C, T, H, W) of a call and the patch size p: y = h p + ph, x = w p + pw."""

    batch: int
    channels: int
    frames: int
    height: int
    width: int
    patch: int = 1

    def sizes(self) -> list[int]:
        """(c, t, h, ph, w, pw)."""
        p = self.patch
        return [self.channels, self.frames, self.height // p, p, self.width // p, p]

    def axis_strides(self, b: int, c: int, t: int, y: int, x: int) -> list[int]:
        """Strides over (b, c, t, y, x) as strides over (b, c, t, h, ph, w, pw)."""
        p = self.patch
        return [b, c, t, y * p, y, x * p, x]


@dataclass(frozen=True, slots=True)
class MapMeta:
    """A map before planning: strides over (b, t, y, x), the batch stride 0 where one map serves all."""

    dtype: torch.dtype
    size: tuple[int, int, int]
    strides: tuple[int, int, int, int]


def map_columns(maps: list[MapPlan | None], coord) -> list[tuple[int, ...]]:
    """What the maps' reading advances by along the six dims: strides, or grid positions where one is resampled."""
    columns = []
    for plan in maps:
        if plan is not None:
            columns += [plan.strides[1:]] if plan.mode == "same" else coord
    return columns


def make_plan(
    grid: Grid,
    dtype: torch.dtype,
    pred: list[int],
    grad: list[int],
    terms: list[tuple[torch.dtype, list[int]]],
    weighting: tuple[torch.dtype, list[int]] | None,
    confidence: MapMeta | None,
    mask: MapMeta | None,
    interpolation: str,
    options: Options,
    spatial_coefs: bool = False,
) -> Plan:
    """Order the dims by model_pred's memory and merge what can be merged. Strides are over (b, c, t, h, ph, w, pw)."""
    sizes = grid.sizes()
    grid_size = (grid.frames, grid.height, grid.width)
    order = sorted(range(MAX_DIMS), key=lambda d: (-abs(pred[1 + d]), d))
    size = [sizes[d] for d in order]

    operands = [pred, grad, *(strides for _, strides in terms)]
    if weighting is not None:
        operands.append(weighting[1])
    maps = []
    resampled = False
    for meta in (confidence, mask):
        if meta is None:
            maps.append(None)
        elif meta.size == grid_size:
            b, t, y, x = meta.strides
            strides = grid.axis_strides(b, 0, t, y, x)
            operands.append(strides)
            maps.append((meta, "same", len(operands) - 1))
        else:
            resampled = True
            maps.append((meta, interpolation, -1))
    axes = [
        grid.axis_strides(0, 0, 1, 0, 0),
        grid.axis_strides(0, 0, 0, 1, 0),
        grid.axis_strides(0, 0, 0, 0, 1),
    ]
    columns = [[strides[1 + d] for d in order] for strides in (operands + axes if resampled else operands)]
    size, columns = merge_dims(size, columns)
    ndim = max(1, len(size))
    if not size:
        size, columns = [1], [[0] for _ in columns]

    padded = [pad_dims(column, 0) for column in columns]
    full = [(strides[0], *column) for strides, column in zip(operands, padded[: len(operands)], strict=True)]
    count = 1
    dense = [0] * len(size)
    for d in range(len(size) - 1, -1, -1):
        dense[d] = count
        count *= size[d]
    dense_operands = columns[: 2 + len(terms)]
    contiguous = count == 1 or all(column == dense for column in dense_operands)

    planned = []
    for entry in maps:
        if entry is None:
            planned.append(None)
            continue
        meta, mode, index = entry
        strides = full[index] if mode == "same" else (meta.strides[0], 0, 0, 0, 0, 0, 0)
        planned.append(MapPlan(meta.dtype, mode, strides, meta.size, meta.strides[1:]))
    no_coord = (0,) * MAX_DIMS
    coord = tuple(padded[-3:]) if resampled else (no_coord, no_coord, no_coord)
    varies = tuple(any(along) for along in zip(*map_columns(planned, coord), no_coord, strict=True))
    weighted = varies
    if weighting is not None:
        along = full[2 + len(terms)][1:]
        weighted = tuple(bool(changes or step) for changes, step in zip(varies, along, strict=True))
    size, first = pad_dims(size, 1), MAX_DIMS - ndim
    free = longest_run(varies, size, first)
    return Plan(
        batch=grid.batch,
        count=count,
        size=size,
        ndim=ndim,
        dtype=dtype,
        acc_dtype=accumulation_dtype(dtype),
        contiguous=contiguous,
        pred=OperandPlan(dtype, full[0]),
        grad=OperandPlan(dtype, full[1]),
        terms=tuple(OperandPlan(kind, strides) for (kind, _), strides in zip(terms, full[2:], strict=False)),
        weighting=None if weighting is None else OperandPlan(weighting[0], full[2 + len(terms)]),
        confidence=planned[0],
        mask=planned[1],
        coord=coord,
        grid=grid_size,
        map_varies=varies,
        free_dims=free,
        free_dims_weighted=free if weighted == varies else longest_run(weighted, size, first),
        spatial_coefs=spatial_coefs,
        options=options,
    )
