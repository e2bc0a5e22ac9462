"""The library of registered operators behind torch.compile: their schemas, and what all of them need.

An eager call never comes here. A traced one is checked while it is traced, then becomes one operator whose arguments
are tensors, numbers and strings; its implementation lowers and runs the call as the eager road does. Backward works
out of place. Each op's implementation, fake and backward stand in _library_<op>.py.
"""

from __future__ import annotations

import torch

from diffdoctor.ops.layout import Packed

# Per-sample values are a list of [pred_scale, coef_0, coef_1, huber_c, normalizer]: a tensor where there is one, and a
# number beside it. `scalars` are the six of weighted_loss; `layout` is [] or [height, width, patch_size, order].
_ARGUMENTS = (
    "Tensor model_pred, Tensor[] terms, Tensor? confidence, Tensor? mask, Tensor? weighting, Tensor?[] per_sample, "
    "float[] numbers, float[] scalars, float[] strength, str interpolation, str normalize, str reduction, "
    "int[] layout, str backend"
)
_ORDERS = ("c ph pw", "ph pw c")

library = torch.library.Library("diffdoctor", "DEF")
library.define(f"weighted_loss({_ARGUMENTS}, bool want_grad, bool want_sums) -> (Tensor, Tensor, Tensor)")
library.define(f"weighted_loss_grad(Tensor g, {_ARGUMENTS}) -> Tensor")
library.define(
    "modulate_gradient(Tensor x, Tensor confidence, float[] scalars, str interpolation, int[] layout) -> Tensor"
)
library.define(
    "modulate_gradient_grad(Tensor grad, Tensor confidence, float[] scalars, str interpolation, int[] layout) -> Tensor"
)
# A map that is set later is found through its modulator's key when backward runs; a captured CUDA graph would keep the
# address of the first one.
_LATER = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
library.define("modulate_gradient_later(Tensor x, SymInt key) -> Tensor")
library.define("modulate_gradient_later_grad(Tensor grad, SymInt key) -> Tensor", tags=_LATER)
library.define(
    "artifact_loss(Tensor logits, int height, int width, float threshold, str method, str reduction, str backend, "
    "bool want_grad) -> (Tensor, Tensor, Tensor)"
)
library.define("artifact_loss_grad(Tensor kept, Tensor factor, Tensor g, Tensor logits, str backend) -> Tensor")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_layout(layout: Packed | None) -> list[int]:
    if layout is None:
        return []
    return [layout.height, layout.width, layout.patch_size, _ORDERS.index(layout.order)]


def unpack_layout(layout: list[int]) -> Packed | None:
    return Packed(*layout[:3], _ORDERS[layout[3]]) if layout else None
