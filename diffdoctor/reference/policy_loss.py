"""The definition of `diffdoctor.policy_loss` and `diffdoctor.policy_log_prob`; docs/ops.md derives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffdoctor.reference.grid import accumulation_dtype, map_to_grid, to_grid, unit_interval


def policy_loss(
    model_pred: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    coefs: tuple,
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    advantage_clip: float | None = None,
    mask: Tensor | None = None,
    ref_pred: Tensor | None = None,
    kl_weight: float = 0.0,
    interpolation: str = "area",
    level: str = "pixel",
    reduction: str = "mean",
    layout=None,
    return_sums: bool = False,
) -> Any:
    """The loss, or with `return_sums` (loss, sums): the (B, 6) sums behind `PolicyStats` in the accumulation type.

    Arguments are those of the public function and are not checked again. The columns of the sums: counted pixels, their
    ratios, the largest of these that is a number (at least 0), the clipped pixels, the pixels' KL, the non-finite ones.
    """
    dtype = accumulation_dtype(model_pred.dtype)
    pred = to_grid(model_pred, layout).to(dtype)
    size = tuple(pred.shape[2:])
    sigma = per_sample(coefs[2], pred)
    k = pred.new_ones(()) if mask is None else unit_interval(map_to_grid(mask, size, interpolation, dtype))
    if advantage.ndim == 1:
        given = advantage.to(dtype).reshape(-1, 1, 1, 1, 1)
    else:
        given = map_to_grid(advantage, size, interpolation, dtype)
    a = torch.where(torch.isnan(given), torch.zeros_like(given), given)
    a = a if advantage_clip is None else a.clamp(-advantage_clip, advantage_clip)
    old = None
    if old_log_prob is not None:
        old = old_log_prob.to(dtype).reshape(-1, 1, *(size if old_log_prob.ndim > 1 else (1, 1, 1)))

    pixels = (pred.shape[0], 1, *size)
    selected = ((k != 0) & (sigma != 0)).expand(pixels)
    acts = (a != 0).expand(pixels)
    zero = pred.new_zeros(pixels)
    k = k.expand(pixels)
    # Left out by selection, not by multiplication with 0, which would let a NaN through.
    steers = selected if level == "sample" else selected & acts
    change = _change(_residual(pred, latents, next_latents, coefs, layout), old, k, steers, level).expand(pixels)
    low, high = clip_range
    with torch.no_grad():
        ratio = torch.exp(change)
        clipped = -a * ratio.clamp(1 - low, 1 + high)
        cut = acts & (-a * ratio < clipped)
    # A ratio that is not taken is not differentiated either: it may be infinite.
    plain = -a * torch.exp(torch.where(cut | ~acts, zero, change))
    policy = torch.where(selected & acts, torch.where(cut, clipped, plain), zero)
    kl = zero
    if ref_pred is not None:
        scale = torch.where(sigma == 0, torch.zeros_like(sigma), per_sample(coefs[1], pred) / sigma)
        difference = torch.where(selected, scale * (pred - to_grid(ref_pred, layout).to(dtype)), zero)
        kl = 0.5 * (difference * difference).mean(1, keepdim=True)
    term = policy + kl_weight * kl if kl_weight else policy
    loss = torch.where(selected, k * term, zero)
    share = loss.sum((1, 2, 3, 4)) + pred[:, :0].sum((1, 2, 3, 4))  # in the graph also where no pixel is counted
    if reduction != "sum":
        share = share / loss[0].numel()
    result = {"mean": share.mean, "sum": share.sum, "sample": lambda: share}[reduction]()
    if not return_sums:
        return result
    with torch.no_grad():
        if level == "pixel":
            residual = _residual(pred, latents, next_latents, coefs, layout)
            ratio = torch.exp(_change(residual, old, k, selected, level))
        nonfinite = ~torch.isfinite(term) | torch.isnan(given)
        largest = torch.where(selected & ~torch.isnan(ratio), ratio, zero).amax((1, 2, 3, 4))
        columns = [selected, torch.where(selected, ratio, zero), None, selected & cut, kl, selected & nonfinite]
        return result, torch.stack([largest if x is None else x.sum((1, 2, 3, 4), dtype=dtype) for x in columns], dim=1)


def policy_log_prob(model_pred: Tensor, latents: Tensor, next_latents: Tensor, *, coefs: tuple, layout=None) -> Tensor:
    """Each pixel's log-probability but for its constants, the mean over channels of -(next_latents - mu)^2 / (2 s^2).

    Arguments are those of the public function and are not checked again.

    Returns:
        (B, 1, H, W), (B, 1, T, H, W) or, for tokens without a layout, (B, N); 0 where s is 0.
    """
    pred = to_grid(model_pred, layout).to(accumulation_dtype(model_pred.dtype))
    residual = _residual(pred, latents, next_latents, coefs, layout)
    value = torch.where(per_sample(coefs[2], pred) == 0, 0.0, _log_prob(residual))
    if model_pred.ndim == 3 and layout is None:
        return value[:, 0, 0, 0]
    return value if model_pred.ndim == 5 else value[:, :, 0]


def per_sample(value, pred: Tensor) -> Tensor:
    """A number or a tensor of one per sample, as it broadcasts to the grid."""
    if not isinstance(value, Tensor):
        return pred.new_full((1, 1, 1, 1, 1), value)
    return value.to(pred.dtype).reshape(-1, 1, 1, 1, 1)


def _residual(pred: Tensor, latents: Tensor, next_latents: Tensor, coefs: tuple, layout) -> Tensor:
    """(next_latents - a latents - b model_pred) / sigma on the grid; not divided where sigma is 0."""
    a, b, sigma = (per_sample(value, pred) for value in coefs)
    latents, next_latents = (to_grid(x, layout).to(pred.dtype) for x in (latents, next_latents))
    return (next_latents - a * latents - b * pred) / torch.where(sigma == 0, torch.ones_like(sigma), sigma)


def _log_prob(residual: Tensor) -> Tensor:
    return -0.5 * (residual * residual).mean(1, keepdim=True)


def _change(residual: Tensor, old: Tensor | None, k: Tensor, selected: Tensor, level: str) -> Tensor:
    """lp - old of each pixel, or of each sample, whose lp is the mean of its pixels' weighted by k."""
    change = _log_prob(torch.where(selected, residual, torch.zeros_like(residual)))
    # Without an old one, the policy that is trained is the one that drew: the ratio is 1, its gradient is not 0.
    change = change - (change.detach() if old is None else old)
    if level == "sample":
        zero = torch.zeros_like(k)
        weights = torch.where(selected, k, zero)
        total = weights.sum((1, 2, 3, 4), keepdim=True)
        change = torch.where(selected, weights * change, zero).sum((1, 2, 3, 4), keepdim=True)
        change = change / torch.where(total == 0, torch.ones_like(total), total)
    return change
