"""Targets that are built inside the kernel from what a trainer already has, so that they never exist in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.lowering.plan import MAX_TERMS
from diffdoctor.ops.words import WORDS
from diffdoctor.runs.errors import expected, in_our_words

__all__ = ["Target"]


class _Constructors(type):
    """Says which of Target's constructors another program's word for a target means."""

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        own = [constructor for constructor, value in vars(cls).items() if isinstance(value, classmethod)]
        raise AttributeError(expected("Target", f"one of {', '.join(own)}", in_our_words(name, WORDS["Target"])))


class Target(metaclass=_Constructors):
    """The residual d = pred_scale * model_pred - sum_i coefs[i] * terms[i], built in the kernel.

    Use the named constructors; this one is for schemes they do not cover.

    Args:
        terms: one or two tensors of model_pred's shape, each fp32, bf16, fp16 or fp64 (its own dtype is fine).
        coefs: as many factors, each a float or a (B,) tensor.
        pred_scale: factor of model_pred, a float or a (B,) tensor.

    Raises:
        TypeError: terms that are not tensors, factors that are neither a number nor a tensor.
        ValueError: no terms, more than two, another number of coefs, a factor tensor that is not 1-D.
    """

    __slots__ = ("coefs", "pred_scale", "terms")

    def __init__(self, terms, coefs, pred_scale=1.0):
        self.terms, self.coefs, self.pred_scale = tuple(terms), tuple(coefs), pred_scale
        for term in self.terms:
            if not isinstance(term, Tensor):
                raise TypeError(expected("terms", "tensors", type(term).__name__))
        if not 1 <= len(self.terms) <= MAX_TERMS or len(self.coefs) != len(self.terms):
            got = f"{len(self.terms)} and {len(self.coefs)}"
            raise ValueError(expected("terms and coefs", f"1 to {MAX_TERMS} terms and as many coefs", got))
        for name, value in (*(("coefs", coef) for coef in self.coefs), ("pred_scale", pred_scale)):
            _check_factor(name, value)

    def __repr__(self):
        return f"Target({len(self.terms)} terms of shape {tuple(self.terms[0].shape)})"

    @classmethod
    def epsilon(cls, noise: Tensor) -> Target:
        """The noise that was added."""
        return cls((noise,), (1.0,))

    @classmethod
    def sample(cls, latents: Tensor) -> Target:
        """The clean latents (x0)."""
        return cls((latents,), (1.0,))

    @classmethod
    def velocity(cls, latents: Tensor, noise: Tensor, alphas_cumprod) -> Target:
        """v = sqrt(a) * noise - sqrt(1 - a) * latents (Salimans & Ho, 2022).

        Args:
            latents: the clean latents.
            noise: the noise that was added.
            alphas_cumprod: a, gathered at the timesteps: a (B,) tensor on latents' device, or a float.
        """
        _check_factor("alphas_cumprod", alphas_cumprod)
        if isinstance(alphas_cumprod, Tensor):
            a = widest(alphas_cumprod)
            return cls((noise, latents), (a.sqrt(), -(1 - a).sqrt()))
        return cls((noise, latents), (alphas_cumprod**0.5, -((1 - alphas_cumprod) ** 0.5)))

    @classmethod
    def flow(cls, latents: Tensor, noise: Tensor, reversed: bool = False) -> Target:
        """Rectified flow: noise - latents, or latents - noise where `reversed` (Lumina 2, Z-Image, HiDream)."""
        sign = -1.0 if reversed else 1.0
        return cls((noise, latents), (sign, -sign))

    @classmethod
    def preconditioned(cls, latents: Tensor, noisy_latents: Tensor, scale, skip) -> Target:
        """d = scale * model_pred + skip * noisy_latents - latents: the x0 loss of a preconditioned model.

        SD3 and flow models: scale = -sigma, skip = 1. EDM with an epsilon model: the same; with a v model:
        scale = -sigma / sqrt(sigma^2 + 1), skip = 1 / (sigma^2 + 1). Each a float or a (B,) tensor.
        """
        _check_factor("scale", scale)
        _check_factor("skip", skip)
        return cls((noisy_latents, latents), (-skip, 1.0), scale)


def widest(value: Tensor) -> Tensor:
    """A per-sample number as arithmetic on it is done: in fp64, so that the prediction's dtype need not be known; in
    fp32 on a device that has no fp64."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _check_factor(name: str, value) -> None:
    if isinstance(value, Tensor):
        if value.ndim > 1:
            raise ValueError(expected(name, "a number or a tensor of shape (B,)", f"shape {tuple(value.shape)}"))
        if not value.is_floating_point():
            raise TypeError(expected(name, "a floating-point tensor", value.dtype))
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(expected(name, "a number or a tensor of shape (B,)", type(value).__name__))
