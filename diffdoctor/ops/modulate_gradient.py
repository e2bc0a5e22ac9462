"""The public `modulate_gradient` and `GradientModulator`: identity forward, a map on the gradient backward."""

from __future__ import annotations

import itertools
from weakref import ref

import torch
from torch import Tensor

from diffdoctor.ops import checks
from diffdoctor.ops.autograd import forbid_second_derivative, refuse_functorch
from diffdoctor.ops.library import modulate_gradient as registered
from diffdoctor.ops.modulation import modulated, modulation_options
from diffdoctor.ops.observed import is_observed, is_plain, unrecorded

__all__ = ["GradientModulator", "modulate_gradient"]

_keys = itertools.count()


def modulate_gradient(
    x: Tensor,
    confidence: Tensor,
    *,
    artifact_grad: float,
    clean_grad: float = 1.0,
    threshold: float = 0.0,
    gamma: float = 1.0,
    interpolation: str = "area",
    layout=None,
) -> Tensor:
    """x unchanged; its gradient is multiplied where the picture is broken.

    The factor is clean_grad + (artifact_grad - clean_grad) * u with u as in `weighted_loss`, resampled to x's grid.
    Put on the latents between denoising steps it lets the gradient through where the map says so.

    Args:
        x: (B, C, H, W), (B, C, T, H, W) or tokens (B, N, D); fp32, bf16, fp16 or fp64.
        confidence: a map as `weighted_loss` takes it, of any size.
        artifact_grad: factor where confidence is 1.
        clean_grad: factor where confidence is 0.
        threshold: confidence below it counts as 0; in [0, 1].
        gamma: exponent of the confidence; positive.
        interpolation: area | bilinear | nearest | nearest-exact.
        layout: `Packed` where x holds packed tokens.

    Returns:
        A view of x.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device or number that cannot be; a map that requires a gradient.
        RuntimeError: in backward, for a second derivative.
    """
    modulator = GradientModulator(
        artifact_grad=artifact_grad,
        clean_grad=clean_grad,
        threshold=threshold,
        gamma=gamma,
        interpolation=interpolation,
        layout=layout,
    )
    unrecorded(checks.check_pred, "x", x, layout)
    unrecorded(checks.check_map, "confidence", confidence, x, layout)
    if is_observed() or not is_plain(x, confidence):
        return registered.modulate_gradient(x, confidence, modulator._options)
    modulator.set(confidence)
    return modulator(x)


class GradientModulator:
    """`modulate_gradient` for a map that is known only after the picture is finished.

    Call it on the latents between denoising steps, run the detector on the decoded picture, hand over the map with
    `set`, then call backward. One map serves every tensor it was called on; `set` may be called again before another
    backward. A function under torch.compile may call one that was made outside it.

    Args:
        artifact_grad: factor where confidence is 1.
        clean_grad: factor where confidence is 0.
        threshold: confidence below it counts as 0; in [0, 1].
        gamma: exponent of the confidence; positive.
        interpolation: area | bilinear | nearest | nearest-exact.
        layout: `Packed` where the tensors hold packed tokens.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: a name or a number that cannot be.
        RuntimeError: in backward, where no map was set.

    Example:
        >>> modulator = diffdoctor.GradientModulator(artifact_grad=1.0, clean_grad=0.2)
        >>> latents = modulator(latents)          # in the sampling loop
        >>> modulator.set(detector.confidence(decode(latents)).detach())
        >>> loss.backward()
    """

    def __init__(
        self,
        *,
        artifact_grad: float,
        clean_grad: float = 1.0,
        threshold: float = 0.0,
        gamma: float = 1.0,
        interpolation: str = "area",
        layout=None,
    ):
        self._options = modulation_options(
            artifact_grad=artifact_grad,
            clean_grad=clean_grad,
            threshold=threshold,
            gamma=gamma,
            interpolation=interpolation,
            layout=layout,
        )
        self.confidence: Tensor | None = None
        self._key = None
        if not torch.compiler.is_compiling():  # else it is one of modulate_gradient, whose map is known
            self._register()

    def _register(self) -> None:
        """A number that a compiled graph can hold in place of this object."""
        self._key = next(_keys)
        registered.modulators[self._key] = self

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_key"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._register()

    def set(self, confidence: Tensor | None) -> None:
        """The map that the next backward uses.

        Args:
            confidence: (B, H', W'), (B, 1, H', W') or (B, 1, T', H', W') of any size, (B, N) for tokens without a
                layout; floats in [0, 1], uint8 or bool. A gradient that it carries is cut off. None takes the map away,
                so that a forgotten `set` raises.

        Raises:
            TypeError: it is not a tensor, or of another dtype. Its shape is checked in backward.
        """
        if confidence is not None:
            if not isinstance(confidence, Tensor):
                raise checks.kind_error("confidence", "a tensor or None", confidence)
            checks.check_dtype("confidence", confidence, checks.MAPS)
            confidence = confidence.detach().resolve_neg()
        self.confidence = confidence

    def __call__(self, x: Tensor) -> Tensor:
        """x unchanged, its gradient modulated in backward."""
        unrecorded(checks.check_pred, "x", x, self._options.layout)
        if is_observed() or not is_plain(x):
            if self._key is None:
                raise RuntimeError("make the GradientModulator outside the compiled function, which only calls it")
            return registered.modulate_gradient_later(x, self._key)
        refuse_functorch("modulate_gradient")
        return _Modulate.apply(x, self)

    def scaled(self, grad: Tensor) -> Tensor:
        """grad times the modulation of the map that is set, as a new tensor.

        Raises:
            RuntimeError: no map is set.
        """
        if self.confidence is None:
            raise RuntimeError("GradientModulator has no map: call modulator.set(confidence) before backward")
        unrecorded(checks.check_map, "confidence", self.confidence, grad, self._options.layout)
        if is_observed() or not is_plain(grad, self.confidence):
            return registered.scaled(grad, self.confidence, self._options)
        return modulated(grad, self.confidence, self._options)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, modulator):
        ctx.modulator, ctx.x = modulator, ref(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_functorch("modulate_gradient", grad)
        if not torch.is_grad_enabled():
            return ctx.modulator.scaled(grad), None
        with torch.no_grad():
            result = ctx.modulator.scaled(grad)
        return forbid_second_derivative(result, ctx.x(), "modulate_gradient"), None
