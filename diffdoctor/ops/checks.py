"""Checks of the public functions' arguments: each raises a TypeError for an argument of the wrong kind and a ValueError
for one that cannot be, and names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from diffdoctor.lowering.plan import LOSS_KINDS
from diffdoctor.ops.layout import Packed
from diffdoctor.ops.target import Target
from diffdoctor.ops.words import WORDS
from diffdoctor.runs.errors import expected, in_our_words

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAPS = (*FLOATS, torch.uint8, torch.bool)
INTERPOLATIONS = ("area", "bilinear", "nearest", "nearest-exact")
REDUCTIONS = ("mean", "sample", "sum")
NORMALIZE = (None, "sample", "batch")


def kind_error(name: str, what: str, value) -> TypeError:
    """The error for an argument of the wrong kind."""
    return TypeError(expected(name, what, type(value).__name__))


def value_error(name: str, what: str, got) -> ValueError:
    """The error for an argument of the right kind that cannot be."""
    return ValueError(expected(name, what, got))


def names(dtypes) -> str:
    """Dtypes as errors show them."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_dtype(name: str, value: Tensor, allowed) -> None:
    """A tensor of one of the allowed dtypes."""
    if value.dtype not in allowed:
        raise TypeError(expected(name, f"a tensor of dtype {names(allowed)}", value.dtype))


def check_number(name: str, value, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> float:
    """The value as a finite float in [low, high], or in (low, high]."""
    if type(value) is not float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise kind_error(name, "a number", value)
        value = float(value)
    # Comparisons, not math.isfinite: Dynamo traces them on symbolic floats too.
    if not -math.inf < value < math.inf or not low <= value <= high or (open_low and value == low):
        what = "a finite number"
        if high < math.inf:
            what = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
        elif low > -math.inf:
            what += f" {'>' if open_low else '>='} {low:g}"
        raise value_error(name, what, f"{value:g}")
    return value


def check_bool(name: str, value) -> None:
    """A bool, and nothing that is only true or false."""
    if type(value) is not bool:
        raise kind_error(name, "a bool", value)


def check_layout(value) -> None:
    """None or a Packed."""
    if value is not None and not isinstance(value, Packed):
        raise kind_error("layout", "None or a diffdoctor.Packed", value)


def check_choice(name: str, value, allowed) -> None:
    """One of the allowed names; None where it is among them."""
    named = value is None or isinstance(value, str)
    if named and value in allowed:
        return
    what = f"one of {', '.join(repr(choice) for choice in allowed)}"
    if not isinstance(value, str):
        raise value_error(name, what, value) if named else kind_error(name, what, value)
    own = {choice.replace("-", "_").replace(" ", "_"): choice for choice in allowed if choice}
    raise value_error(name, what, in_our_words(value, {**WORDS.get(name, {}), **own}))


def check_input(name: str, value: Tensor, model_pred: Tensor) -> None:
    """A target, map or weight: dense, on model_pred's device, and not asking for a gradient."""
    check_memory(name, value)
    if value.device != model_pred.device:
        raise value_error(name, f"a tensor on model_pred's device {model_pred.device}", f"one on {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        what = "a tensor that requires no gradient (only model_pred gets one)"
        raise value_error(name, what, f"one that requires it: pass {name}.detach()")


def check_dense(name: str, value: Tensor) -> None:
    """A tensor that is not sparse."""
    if value.layout != torch.strided:
        raise TypeError(expected(name, "a dense (strided) tensor", value.layout))


def check_memory(name: str, value: Tensor) -> None:
    """A tensor whose memory holds its values."""
    check_dense(name, value)
    # A compiled graph hands its operators tensors that are resolved.
    if not torch.compiler.is_compiling() and value.is_neg():
        what = "a tensor that is not negated lazily"
        raise value_error(name, what, f"one that is, such as z.conj().imag: pass {name}.resolve_neg()")


def check_pred(name: str, model_pred, layout) -> None:
    """A prediction: a dense floating-point tensor of a shape that the layout allows."""
    if not isinstance(model_pred, Tensor):
        raise kind_error(name, "a tensor", model_pred)
    check_dtype(name, model_pred, FLOATS)
    check_dense(name, model_pred)
    if layout is None and model_pred.ndim not in (3, 4, 5):
        raise value_error(name, "shape (B, C, H, W), (B, C, T, H, W) or (B, N, D)", tuple(model_pred.shape))
    if layout is not None:
        square = layout.patch_size**2
        if model_pred.ndim != 3 or model_pred.shape[1] != layout.tokens or model_pred.shape[2] % square:
            what = f"shape (B, {layout.tokens}, D) with D a multiple of {square} under {layout}"
            raise value_error(name, what, tuple(model_pred.shape))


def grid_shape(model_pred: Tensor, layout) -> tuple[int, ...]:
    """model_pred's shape, unpacked under a layout."""
    if layout is None:
        return tuple(model_pred.shape)
    return (
        model_pred.shape[0],
        model_pred.shape[2] // layout.patch_size**2,
        layout.height,
        layout.width,
    )


def check_target(target, model_pred: Tensor, layout) -> None:
    """A tensor of model_pred's shape, under a layout also of its unpacked shape, or a Target of such terms."""
    if not isinstance(target, (Tensor, Target)):
        raise kind_error("target", "a tensor or a diffdoctor.Target", target)
    for term in (target,) if isinstance(target, Tensor) else target.terms:
        check_like("target", term, model_pred, layout)
    if isinstance(target, Target):
        for value in (*target.coefs, *(target.artifact_coefs or ()), target.pred_scale):
            if isinstance(value, Tensor):
                check_per_sample("target's factor", value, model_pred)
            else:
                check_number("target's factor", value)


def check_like(name: str, value, model_pred: Tensor, layout) -> None:
    """A tensor of model_pred's shape, under a layout also of its unpacked shape; its dtype is its own."""
    if not isinstance(value, Tensor):
        raise kind_error(name, "a tensor", value)
    check_dtype(name, value, FLOATS)
    allowed = [tuple(model_pred.shape)]
    if layout is not None:
        allowed.append(grid_shape(model_pred, layout))
    if tuple(value.shape) not in allowed:
        raise value_error(name, f"model_pred's shape {' or '.join(map(str, allowed))}", tuple(value.shape))
    check_input(name, value, model_pred)


def check_per_sample(name: str, value: Tensor, model_pred: Tensor) -> None:
    """A tensor with one number per sample: (), (1,) or (B,)."""
    check_dtype(name, value, FLOATS)
    batch = model_pred.shape[0]
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, batch)):
        raise value_error(name, f"shape ({batch},), (1,) or ()", tuple(value.shape))
    check_input(name, value, model_pred)


def check_map(name: str, value, model_pred: Tensor, layout) -> None:
    """A confidence or mask of a shape that fits model_pred's."""
    if not isinstance(value, Tensor):
        raise kind_error(name, "a tensor or None", value)
    check_dtype(name, value, MAPS)
    shape, batch = tuple(value.shape), model_pred.shape[0]
    if model_pred.ndim == 3 and layout is None:
        tokens = model_pred.shape[1]
        if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] != tokens:
            what = f"shape ({batch}, {tokens}) for tokens without a layout"
            got = f"{shape} (give layout=diffdoctor.Packed(...) for a map on the picture's grid)"
            raise value_error(name, what, got)
    else:
        ranks = (3, 4, 5) if model_pred.ndim == 5 else (3, 4)
        if len(shape) not in ranks or shape[0] not in (1, batch) or (len(shape) > 3 and shape[1] != 1):
            forms = f"({batch}, H, W) or ({batch}, 1, H, W)" + (f" or ({batch}, 1, T, H, W)" if 5 in ranks else "")
            raise value_error(name, f"shape {forms}, with 1 or {batch} maps", shape)
        if value.numel() == 0 and model_pred.numel() != 0:
            raise value_error(name, "a map that is not empty", f"shape {shape}")
        check_aspect(name, shape[-2:], model_pred, layout)
    check_input(name, value, model_pred)


def check_aspect(name: str, size: tuple[int, int], model_pred: Tensor, layout) -> None:
    """A map's size whose aspect ratio is the grid's, to within a cell of the coarser of the two (with packed tokens, a
    token): else it is another crop, or turned, and would mark other places than those it was made for."""
    height, width = size
    rows, columns = grid_shape(model_pred, layout)[-2:]
    # Scaled to the other's height, or width, the one differs by at most one cell.
    cell = max(height, width, rows, columns) * (1 if layout is None else layout.patch_size)
    if abs(width * rows - columns * height) > cell:
        what = f"a map of the aspect ratio of the grid, {rows} x {columns}, to within a cell"
        raise value_error(name, what, f"{height} x {width}: crop, flip and pad the map as its picture was")


def check_weighting(value, model_pred: Tensor, layout) -> None:
    """Per sample, or broadcast to model_pred's unpacked shape."""
    if not isinstance(value, Tensor):
        raise kind_error("weighting", "a tensor or None", value)
    check_dtype("weighting", value, FLOATS)
    shape, full = tuple(value.shape), grid_shape(model_pred, layout)
    if len(shape) == 1:
        if shape[0] not in (1, full[0]):
            raise value_error("weighting", f"length {full[0]} or 1 of one dim, which is per sample", shape)
    elif len(shape) > len(full) or any(n not in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False)):
        raise value_error("weighting", f"shape (B,), or one that broadcasts to {full}", shape)
    check_input("weighting", value, model_pred)


def check_loss_type(loss_type) -> None:
    """The name of an element loss, or a dict of names with their weights."""
    if isinstance(loss_type, str):
        check_choice("loss_type", loss_type, LOSS_KINDS)
        return
    if not isinstance(loss_type, dict):
        raise kind_error("loss_type", f"one of {LOSS_KINDS} or a dict of their strengths", loss_type)
    if not loss_type:
        raise value_error("loss_type", "at least one loss", "an empty dict")
    for name, strength in loss_type.items():
        check_choice("loss_type", name, LOSS_KINDS)
        check_number(f"loss_type[{name!r}]", strength)
