"""`modulate_gradient` and `GradientModulator` under torch.compile; see _library."""

from __future__ import annotations

import torch

from diffdoctor.ops.library.schemas import library, pack_layout, unpack_layout
from diffdoctor.ops.prepare import make_options


def modulate_gradient(x, confidence, modulator):
    """The public function on traced tensors."""
    options = modulator._options
    scalars = [options.artifact_grad, options.clean_grad, options.threshold, options.gamma]
    return torch.ops.diffdoctor.modulate_gradient(
        x, confidence, scalars, modulator.interpolation, pack_layout(modulator.layout)
    )


@torch.library.impl(library, "modulate_gradient", "CompositeExplicitAutograd")
def _modulate_impl(x, confidence, scalars, interpolation, layout):
    return x.clone()  # an operator's output may not alias its input


@torch.library.register_fake("diffdoctor::modulate_gradient", lib=library)
def _modulate_fake(x, confidence, scalars, interpolation, layout):
    return x.clone()


@torch.library.impl(library, "modulate_gradient_grad", "CompositeExplicitAutograd")
def _modulate_grad_impl(grad, confidence, scalars, interpolation, layout):
    from diffdoctor.ops.modulate_gradient import scaled

    options = make_options(1.0, 1.0, *scalars, {"l2": 0.5}, "sum")
    out = scaled(grad.detach(), confidence, options, interpolation, unpack_layout(layout))
    return out.clone() if out.data_ptr() == grad.data_ptr() else torch.empty_like(grad).copy_(out)


@torch.library.register_fake("diffdoctor::modulate_gradient_grad", lib=library)
def _modulate_grad_fake(grad, confidence, scalars, interpolation, layout):
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
    from diffdoctor.ops.modulate_gradient import modulator_of

    out = modulator_of(key).scaled(grad.detach())
    return out.clone() if out.data_ptr() == grad.data_ptr() else torch.empty_like(grad).copy_(out)


@torch.library.register_fake("diffdoctor::modulate_gradient_later_grad", lib=library)
def _later_grad_fake(grad, key):
    return torch.empty_like(grad)


def _later_setup(ctx, inputs, output):
    ctx.key = inputs[1]


def _later_backward(ctx, grad):
    return torch.ops.diffdoctor.modulate_gradient_later_grad(grad, ctx.key), None


torch.library.register_autograd(
    "diffdoctor::modulate_gradient_later", _later_backward, setup_context=_later_setup, lib=library
)
