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
    """The residual d = pred_scale * model_pred - sum_i coef_i * terms[i], built in the kernel.

    coef_i is coefs[i], or with `artifact_coefs` coefs[i] + (artifact_coefs[i] - coefs[i]) * u: what is asked of the
    model then depends on the confidence map of the call, through its artifact level u.

    Use the named constructors; this one is for schemes they do not cover.

    Args:
        terms: one to three tensors of model_pred's shape, each fp32, bf16, fp16 or fp64 (its own dtype is fine).
        coefs: as many factors, each a float or a (B,) tensor.
        pred_scale: factor of model_pred, a float or a (B,) tensor.
        artifact_coefs: as many factors, each a float or a (B,) tensor: the coefficients where u is 1. None: `coefs`
            everywhere.

    Raises:
        TypeError: terms that are not tensors, factors that are neither a number nor a tensor.
        ValueError: no terms, more than three, another number of coefs, a factor tensor that is not 1-D.
    """

    __slots__ = ("artifact_coefs", "coefs", "pred_scale", "terms")

    def __init__(self, terms, coefs, pred_scale=1.0, artifact_coefs=None):
        self.terms, self.coefs, self.pred_scale = tuple(terms), tuple(coefs), pred_scale
        self.artifact_coefs = None if artifact_coefs is None else tuple(artifact_coefs)
        for term in self.terms:
            if not isinstance(term, Tensor):
                raise TypeError(expected("terms", "tensors", type(term).__name__))
        if not 1 <= len(self.terms) <= MAX_TERMS or len(self.coefs) != len(self.terms):
            got = f"{len(self.terms)} and {len(self.coefs)}"
            raise ValueError(expected("terms and coefs", f"1 to {MAX_TERMS} terms and as many coefs", got))
        if self.artifact_coefs is not None and len(self.artifact_coefs) != len(self.terms):
            raise ValueError(expected("artifact_coefs", f"{len(self.terms)} factors", len(self.artifact_coefs)))
        for name, values in (("coefs", self.coefs), ("artifact_coefs", self.artifact_coefs or ())):
            for value in values:
                _check_factor(name, value)
        _check_factor("pred_scale", pred_scale)

    def __repr__(self):
        return f"Target({len(self.terms)} terms of shape {tuple(self.terms[0].shape)})"

    @classmethod
    def epsilon(cls, noise: Tensor) -> Target:
        """The noise that was added.

        Args:
            noise: of model_pred's shape; fp32, bf16, fp16 or fp64.
        """
        return cls((noise,), (1.0,))

    @classmethod
    def sample(cls, latents: Tensor) -> Target:
        """The clean latents (x0).

        Args:
            latents: of model_pred's shape; fp32, bf16, fp16 or fp64.
        """
        return cls((latents,), (1.0,))

    @classmethod
    def velocity(cls, latents: Tensor, noise: Tensor, alphas_cumprod) -> Target:
        """v = sqrt(a) * noise - sqrt(1 - a) * latents (Salimans & Ho, 2022).

        Args:
            latents: the clean latents, of model_pred's shape; fp32, bf16, fp16 or fp64.
            noise: the noise that was added, likewise.
            alphas_cumprod: a, gathered at the timesteps: a (B,) tensor on latents' device, or a float.

        Raises:
            TypeError: an alphas_cumprod that is neither a number nor a floating-point tensor.
            ValueError: an alphas_cumprod of more than one dim.
        """
        _check_factor("alphas_cumprod", alphas_cumprod)
        if isinstance(alphas_cumprod, Tensor):
            a = widest(alphas_cumprod)
            return cls((noise, latents), (a.sqrt(), -(1 - a).sqrt()))
        return cls((noise, latents), (alphas_cumprod**0.5, -((1 - alphas_cumprod) ** 0.5)))

    @classmethod
    def flow(cls, latents: Tensor, noise: Tensor, reversed: bool = False) -> Target:
        """Rectified flow: noise - latents, or latents - noise where `reversed`.

        Args:
            latents: the clean latents, of model_pred's shape; fp32, bf16, fp16 or fp64.
            noise: the noise that was added, likewise.
            reversed: as Lumina 2, Z-Image and HiDream have it.
        """
        sign = -1.0 if reversed else 1.0
        return cls((noise, latents), (sign, -sign))

    @classmethod
    def preconditioned(cls, latents: Tensor, noisy_latents: Tensor, scale, skip) -> Target:
        """d = scale * model_pred + skip * noisy_latents - latents: the x0 loss of a preconditioned model.

        SD3 and flow models: scale = -sigma, skip = 1. EDM with an epsilon model: the same; with a v model:
        scale = -sigma / sqrt(sigma^2 + 1), skip = 1 / (sigma^2 + 1).

        Args:
            latents: the clean latents, of model_pred's shape; fp32, bf16, fp16 or fp64.
            noisy_latents: what the model was given, likewise.
            scale: factor of model_pred, a float or a (B,) tensor.
            skip: factor of noisy_latents, likewise.

        Raises:
            TypeError: a factor that is neither a number nor a floating-point tensor.
            ValueError: a factor of more than one dim.
        """
        _check_factor("scale", scale)
        _check_factor("skip", skip)
        return cls((noisy_latents, latents), (-skip, 1.0), scale)

    @classmethod
    def contrastive(cls, target: Tensor | Target, old_pred: Tensor, clean=0.0, artifact=-1.0) -> Target:
        """old_pred + s(u) * (target - old_pred), with s(u) = clean + (artifact - clean) * u.

        With the l2 loss this trains a model on its own samples, pixel by pixel: s > 0 is towards what the sample asks
        for, s = 0 holds, s < 0 is away from it. It is the loss of DiffusionNFT (arXiv 2509.16117) with s = (2r - 1) /
        beta for a reward r in [0, 1]; docs/ops.md derives it. The defaults hold the sound pixels and lead away from
        the flagged ones.

        Args:
            target: what a sample asks for: a tensor of model_pred's shape, or a Target of one or two terms without
                pred_scale and artifact_coefs (such as `Target.flow(latents, noise)`).
            old_pred: the prediction of the policy that is moved away from, a tensor like model_pred; no gradient.
            clean: s where u is 0, a float or a (B,) tensor.
            artifact: s where u is 1, likewise.

        Raises:
            TypeError: `old_pred` is not a tensor, `target` neither a tensor nor a Target.
            ValueError: `target` has three terms, a pred_scale or artifact_coefs.
        """
        if not isinstance(old_pred, Tensor):
            raise TypeError(expected("old_pred", "a tensor like model_pred", type(old_pred).__name__))
        if isinstance(target, Tensor):
            target = cls((target,), (1.0,))
        if not isinstance(target, Target):
            raise TypeError(expected("target", "a tensor or a Target", type(target).__name__))
        if len(target.terms) >= MAX_TERMS:
            raise ValueError(expected("target", "one or two terms", f"{len(target.terms)} terms"))
        if target.artifact_coefs is not None:
            raise ValueError(expected("target", "a target without artifact_coefs", "a target with them"))
        if isinstance(target.pred_scale, Tensor) or target.pred_scale != 1:
            raise ValueError(expected("target", "a target without pred_scale", f"pred_scale={target.pred_scale}"))
        _check_factor("clean", clean)
        _check_factor("artifact", artifact)
        coefs, artifact_coefs = (
            (*(_exact(s) * _exact(coef) for coef in target.coefs), 1 - _exact(s)) for s in (clean, artifact)
        )
        return cls((*target.terms, old_pred), coefs, artifact_coefs=artifact_coefs)


def _exact(value):
    return widest(value) if isinstance(value, Tensor) else value


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
