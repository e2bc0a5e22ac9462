"""The definition of `diffdoctor.weighted_loss`; docs/ops.md derives it."""

from typing import Any

import torch
from torch import Tensor

from diffdoctor.reference.grid import accumulation_dtype, artifact_level, map_to_grid, to_grid, unit_interval
from diffdoctor.reference.losses import element_loss
from diffdoctor.reference.modulate_gradient import scale_gradient


def weighted_loss(
    model_pred: Tensor,
    target,
    confidence: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weighting: Tensor | None = None,
    artifact_weight: float | None = None,
    clean_weight: float = 1.0,
    artifact_grad: float = 1.0,
    clean_grad: float = 1.0,
    threshold: float = 0.0,
    gamma: float = 1.0,
    interpolation: str = "area",
    loss_type="l2",
    huber_c=0.1,
    normalize: str | None = None,
    normalizer=None,
    reduction: str = "mean",
    layout=None,
    return_sums: bool = False,
) -> Any:
    """The loss, or with `return_sums` (loss, sums): the (B, 10) sums behind `LossStats` in the accumulation type.

    Arguments are those of the public function and are not checked again. A target that is not a tensor has `terms`,
    `coefs`, `artifact_coefs` and `pred_scale`. The columns of the sums: numerator, weight, artifact loss, artifact
    weight, clean loss, clean weight, artifact level over all elements, count of non-finite losses, count of elements at
    which a map is NaN, and at which one is outside [0, 1].

    Raises:
        TypeError: a confidence without an artifact_weight.
    """
    artifact_weight = weight_beside(confidence, artifact_weight, target)
    dtype = accumulation_dtype(model_pred.dtype)
    pred = to_grid(model_pred, layout).to(dtype)
    shape, size = pred.shape, tuple(pred.shape[2:])

    def per_sample(value) -> Tensor:
        if not isinstance(value, Tensor):
            return pred.new_full((1, 1, 1, 1, 1), value)
        return value.to(dtype).reshape(-1, 1, 1, 1, 1)

    one = pred.new_ones(())
    c = one * 0 if confidence is None else map_to_grid(confidence, size, interpolation, dtype)
    k = one if mask is None else map_to_grid(mask, size, interpolation, dtype)
    u = artifact_level(c, threshold, gamma) if confidence is not None else c
    omega = unit_interval(k) * (clean_weight + (artifact_weight - clean_weight) * u)
    m = clean_grad + (artifact_grad - clean_grad) * u
    v = one if weighting is None else weighting_to_grid(weighting, model_pred, layout).to(dtype)

    pred = scale_gradient(pred, m)
    if isinstance(target, Tensor):
        d = pred - to_grid(target, layout).to(dtype)
    else:
        d = per_sample(target.pred_scale) * pred
        artifact_coefs = target.coefs if target.artifact_coefs is None else target.artifact_coefs
        for clean, artifact, term in zip(target.coefs, artifact_coefs, target.terms, strict=True):
            coef = per_sample(clean)
            if target.artifact_coefs is not None:
                coef = coef + (per_sample(artifact) - coef) * u
            d = d - coef * to_grid(term, layout).to(dtype)

    # One number for all channels of a position: adding it up over them too would only lose digits.
    spatial = omega.expand(shape[0], 1, *size)
    if normalizer is not None:
        z = per_sample(normalizer)
    elif normalize == "sample":
        z = spatial.mean((1, 2, 3, 4), keepdim=True)
    elif normalize == "batch":
        z = spatial.mean()
    else:
        z = one

    # Left out by selection, not by multiplication with 0, which would let a NaN through.
    selected = ((omega != 0) & (v != 0)).expand(shape)
    counted = selected & (z != 0)
    zero = torch.zeros_like(d)
    loss = element_loss(loss_type, torch.where(counted, d, zero), per_sample(huber_c))
    share = torch.where(counted, v * omega * loss / z, zero).sum((1, 2, 3, 4))
    if reduction != "sum":
        share = share / pred[0].numel()
    result = {"mean": share.mean, "sum": share.sum, "sample": lambda: share}[reduction]()
    if not return_sums:
        return result
    with torch.no_grad():
        loss = element_loss(loss_type, torch.where(selected, d, zero), per_sample(huber_c))
        nan = (torch.isnan(c) | torch.isnan(k)).expand(shape)
        outside = ((c < 0) | (c > 1) | (k < 0) | (k > 1)).expand(shape)
        return result, _sums(selected, v * omega * loss, omega.expand(shape), u.expand(shape), loss, nan, outside)


def weight_beside(confidence: Tensor | None, artifact_weight: float | None, target) -> float:
    """The loss weight where confidence is 1. Beside a confidence there is no default: maps mean opposite things.

    It is 1 beside a target whose coefficients depend on the map, through which the map acts.

    Raises:
        TypeError: there is a confidence and no weight.
    """
    if artifact_weight is not None:
        return artifact_weight
    if confidence is None or getattr(target, "artifact_coefs", None) is not None:
        return 1.0
    raise TypeError(
        "artifact_weight: expected a number beside confidence (0.0 where the map marks what is broken in training "
        "pictures, which is then not learnt; above 1.0 where it marks what a model gets wrong and the target is clean; "
        "1.0 where artifact_grad alone is to act), got None"
    )


def _sums(
    selected: Tensor, weighted: Tensor, omega: Tensor, u: Tensor, loss: Tensor, nan: Tensor, outside: Tensor
) -> Tensor:
    """The columns of LossStats; every argument has the grid's shape."""
    zero = torch.zeros_like(loss)
    columns = [
        torch.where(selected, weighted, zero),
        omega,
        torch.where(selected & (u != 0), u * loss, zero),
        torch.where(selected, u, zero),
        torch.where(selected & (u != 1), (1 - u) * loss, zero),
        torch.where(selected, 1 - u, zero),
        u,
        selected & ~torch.isfinite(weighted),
        nan,
        outside,
    ]
    return torch.stack([column.sum((1, 2, 3, 4), dtype=loss.dtype) for column in columns], dim=1)


def weighting_to_grid(weighting: Tensor, model_pred: Tensor, layout=None) -> Tensor:
    """A (B,) or (1,) weighting per sample, any other broadcast from the right to model_pred's (unpacked) shape."""
    if weighting.ndim == 1:
        return weighting.reshape(-1, 1, 1, 1, 1)
    tokens = model_pred.ndim == 3 and layout is None
    rank = model_pred.ndim if model_pred.ndim != 3 or tokens else 4
    weighting = weighting.reshape((1,) * (rank - weighting.ndim) + tuple(weighting.shape))
    if tokens:
        return weighting.transpose(1, 2)[:, :, None, None]
    return weighting[:, :, None] if rank == 4 else weighting
