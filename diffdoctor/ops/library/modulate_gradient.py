"""`modulate_gradient` and `GradientModulator` behind torch.compile; see schemas.py."""

from __future__ import annotations

import weakref

import torch

from diffdoctor.ops.arguments import LossOptions, pack_layout, unpack_layout
from diffdoctor.ops.library.schemas import library
from diffdoctor.ops.modulation import NAMES, modulated, modulation_options

_ARGUMENTS = "Tensor confidence, float[] map_options, str interpolation, int[] layout"
library.define(f"modulate_gradient(Tensor x, {_ARGUMENTS}) -> Tensor")
library.define(f"modulate_gradient_grad(Tensor grad, {_ARGUMENTS}) -> Tensor")
# A map that is set later is found through its modulator's key when backward runs; a captured CUDA graph would keep the
# address of the first one.
_LATER = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
library.define("modulate_gradient_later(Tensor x, SymInt key) -> Tensor")
library.define("modulate_gradient_later_grad(Tensor grad, SymInt key) -> Tensor", tags=_LATER)

#: The living GradientModulators by the numbers that compiled graphs hold in their place.
modulators: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def modulate_gradient(x, confidence, options: LossOptions):
    """The public function on traced tensors, checked."""
    return torch.ops.diffdoctor.modulate_gradient(x, confidence, *_to_schema(options))


def scaled(grad, confidence, options: LossOptions):
    """The gradient's modulation on its own, as the backward of the public function runs it."""
    return torch.ops.diffdoctor.modulate_gradient_grad(grad, confidence, *_to_schema(options))


def _to_schema(options: LossOptions) -> tuple:
    """The operators' arguments behind the tensors."""
    *map_options, interpolation, layout = (getattr(options, name) for name in NAMES)
    return map_options, interpolation, pack_layout(layout)


@torch.library.impl(library, "modulate_gradient", "CompositeExplicitAutograd")
def _modulate_impl(x, confidence, map_options, interpolation, layout):
    return x.clone()  # an operator's output may not alias its input


@torch.library.register_fake("diffdoctor::modulate_gradient", lib=library)
def _modulate_fake(x, confidence, map_options, interpolation, layout):
    return x.clone()


@torch.library.impl(library, "modulate_gradient_grad", "CompositeExplicitAutograd")
def _modulate_grad_impl(grad, confidence, map_options, interpolation, layout):
    values = (*map_options, interpolation, unpack_layout(layout))
    options = modulation_options(**dict(zip(NAMES, values, strict=True)))
    out = modulated(grad.detach(), confidence, options)
    return out.clone() if out.data_ptr() == grad.data_ptr() else torch.empty_like(grad).copy_(out)


@torch.library.register_fake("diffdoctor::modulate_gradient_grad", lib=library)
def _modulate_grad_fake(grad, confidence, map_options, interpolation, layout):
    return torch.empty_like(grad)


def _modulate_setup(ctx, inputs, output):
    _, confidence, *ctx.plain = inputs
    ctx.save_for_backward(confidence)


def _modulate_backward(ctx, grad):
    result = torch.ops.diffdoctor.modulate_gradient_grad(grad, ctx.saved_tensors[0], *ctx.plain)
    return result, None, None, None, None


torch.library.register_autograd(
    "diffdoctor::modulate_gradient", _modulate_backward, setup_context=_modulate_setup, lib=library
)


def modulate_gradient_later(x, key: int):
    """`GradientModulator.__call__` on traced tensors."""
    return torch.ops.diffdoctor.modulate_gradient_later(x, key)


@torch.library.impl(library, "modulate_gradient_later", "CompositeExplicitAutograd")
def _later_impl(x, key):
    return x.clone()  # an operator's output may not alias its input


@torch.library.register_fake("diffdoctor::modulate_gradient_later", lib=library)
def _later_fake(x, key):
    return x.clone()


@torch.library.impl(library, "modulate_gradient_later_grad", "CompositeExplicitAutograd")
def _later_grad_impl(grad, key):
    modulator = modulators.get(key)
    if modulator is None:
        raise RuntimeError("the GradientModulator of a compiled graph is gone: keep it alive until backward has run")
    out = modulator.scaled(grad.detach())
    return out.clone() if out.data_ptr() == grad.data_ptr() else torch.empty_like(grad).copy_(out)


@torch.library.register_fake("diffdoctor::modulate_gradient_later_grad", lib=library)
def _later_grad_fake(grad, key):
    return torch.empty_like(grad)


def _later_setup(ctx, inputs, output):
    ctx.key = inputs[1]
    # Outside a compiled graph, under a mode that records operations, nobody else keeps the modulator until backward.
    ctx.modulator = modulators.get(ctx.key) if type(ctx.key) is int else None


def _later_backward(ctx, grad):
    return torch.ops.diffdoctor.modulate_gradient_later_grad(grad, ctx.key), None


torch.library.register_autograd(
    "diffdoctor::modulate_gradient_later", _later_backward, setup_context=_later_setup, lib=library
)
