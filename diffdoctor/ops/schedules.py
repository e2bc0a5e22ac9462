"""Per-sample weights and thresholds that trainers compute from timesteps; all on the device, without a sync."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from diffdoctor.ops.checks import kind_error, value_error
from diffdoctor.runs.errors import expected

__all__ = ["huber_schedule", "prior_preservation_weights", "snr_weights"]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_SCHEDULES = ("constant", "exponential", "snr")


def _check_positive(name: str, value, finite: bool) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise kind_error(name, "a number", value)
    if not value > 0 or (finite and value == math.inf):
        raise value_error(name, f"a positive{' and finite' if finite else ''} number", value)


def _gather(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    for name, value in (("timesteps", timesteps), ("alphas_cumprod", alphas_cumprod)):
        if not isinstance(value, Tensor):
            raise kind_error(name, "a tensor", value)
    if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(expected("timesteps", "integers that index alphas_cumprod", timesteps.dtype))
    if alphas_cumprod.ndim != 1:
        raise value_error("alphas_cumprod", "shape (steps,)", tuple(alphas_cumprod.shape))
    # Moving the table is one small copy; schedulers keep it on the CPU. An index of uint8 is a mask, of int16 refused.
    return alphas_cumprod.to(timesteps.device, torch.float32, non_blocking=True)[timesteps.long()]


def snr_weights(
    timesteps: Tensor, alphas_cumprod: Tensor, gamma: float = 5.0, prediction_type: str = "epsilon"
) -> Tensor:
    """Min-SNR loss weights (Hang et al., 2023), (B,) fp32: finite at SNR 0 and at SNR infinity.

    With snr = a / (1 - a): "epsilon" min(snr, gamma) / snr, "v_prediction" min(snr, gamma) / (snr + 1),
    "sample" min(snr, gamma). At a = 0 the epsilon weight is its limit 1; at a = 1 epsilon and v_prediction are 0 (their
    limit) and sample is gamma.

    Args:
        timesteps: (B,) integers.
        alphas_cumprod: (steps,), the scheduler's table.
        gamma: the SNR above which a step counts less; positive, `inf` for none.
        prediction_type: what the model predicts: epsilon | sample | v_prediction.

    Raises:
        TypeError: timesteps that are not integers, arguments that are not tensors, a gamma that is not a number.
        ValueError: an unknown prediction_type, a gamma that is not positive, a table that is not 1-D.
    """
    if prediction_type not in _PREDICTION_TYPES:
        raise value_error("prediction_type", f"one of {_PREDICTION_TYPES}", repr(prediction_type))
    _check_positive("gamma", gamma, finite=False)
    a = _gather(alphas_cumprod, timesteps)
    # Infinite quotients are right here, and a minimum takes them away; 0 / 0 and 0 * infinity do not occur.
    if prediction_type == "v_prediction":
        return a if math.isinf(gamma) else torch.minimum(a, gamma * (1 - a))
    if prediction_type == "epsilon":
        return torch.ones_like(a) if math.isinf(gamma) else ((1 - a) * gamma / a).clamp(max=1.0)
    return (a / (1 - a)).clamp(max=min(gamma, torch.finfo(torch.float32).max))


def prior_preservation_weights(batch_size: int, prior_loss_weight: float = 1.0, device=None) -> Tensor:
    """Weights (2, ..., 2, 2 l, ..., 2 l) that make one mean of a batch equal instance loss + l * prior loss.

    The first half of the batch are the instance pictures, the second half the class pictures, as the DreamBooth
    scripts stack them. Pass it as `weighting`, multiplied by any other per-sample weights.

    Args:
        batch_size: of the stacked batch; even.
        prior_loss_weight: l.
        device: where the (batch_size,) fp32 tensor is made.

    Raises:
        TypeError: a batch_size that is not an int.
        ValueError: a batch_size that is odd or negative.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise kind_error("batch_size", "an int", batch_size)
    if batch_size < 0 or batch_size % 2:
        raise value_error("batch_size", "an even number (instance and class halves)", batch_size)
    weights = torch.full((batch_size,), 2.0, dtype=torch.float32, device=device)
    weights[batch_size // 2 :] = 2.0 * prior_loss_weight
    return weights


def huber_schedule(
    timesteps: Tensor,
    huber_c: float = 0.1,
    schedule: str = "snr",
    *,
    alphas_cumprod: Tensor | None = None,
    num_train_timesteps: int = 1000,
    huber_scale: float = 1.0,
) -> Tensor:
    """The Huber threshold of each sample's timestep, (B,) fp32, to be passed as `huber_c`.

    "constant": huber_c * huber_scale. "exponential": huber_c ** (t / num_train_timesteps) * huber_scale, from 1 at the
    clean end to huber_c. "snr": (1 - huber_c) / (1 + s)^2 + huber_c with s = sqrt((1 - a) / a); finite at a = 0, where
    it is huber_c. huber_scale does not act on "snr" (Everaert et al.'s scheduled Huber as kohya's trainer has it).

    Args:
        timesteps: (B,); integers for "snr", any numbers else.
        huber_c: the threshold at the noisy end; positive, finite.
        schedule: constant | exponential | snr.
        alphas_cumprod: (steps,), the scheduler's table; "snr" needs it.
        num_train_timesteps: of the scheduler.
        huber_scale: factor of constant and exponential.

    Raises:
        TypeError: arguments that are not tensors, timesteps that are not integers for "snr", a huber_c
            that is not a number.
        ValueError: an unknown schedule, a huber_c that is not positive and finite, "snr" without alphas_cumprod.
    """
    if schedule not in _SCHEDULES:
        raise value_error("schedule", f"one of {_SCHEDULES}", repr(schedule))
    _check_positive("huber_c", huber_c, finite=True)
    if not isinstance(timesteps, Tensor):
        raise kind_error("timesteps", "a tensor", timesteps)
    if schedule == "constant":
        return torch.full(timesteps.shape, huber_c * huber_scale, dtype=torch.float32, device=timesteps.device)
    if schedule == "exponential":
        return torch.exp(timesteps.float() * (math.log(huber_c) / num_train_timesteps)) * huber_scale
    if alphas_cumprod is None:
        raise value_error("alphas_cumprod", 'a tensor for schedule "snr"', None)
    a = _gather(alphas_cumprod, timesteps)
    # 1 / (1 + s) = sqrt(a) / (sqrt(a) + sqrt(1 - a)), which is 0 at a = 0.
    signal = a.sqrt()
    return (1 - huber_c) * (signal / (signal + (1 - a).sqrt())).square() + huber_c
