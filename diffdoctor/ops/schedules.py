"""Per-sample weights and thresholds that trainers compute from timesteps; all on the device, without a sync."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from diffdoctor.ops.checks import check_choice, kind_error, value_error
from diffdoctor.ops.target import widest
from diffdoctor.runs.errors import expected

__all__ = ["huber_schedule", "prior_preservation_weights", "snr_weights"]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_SCHEDULES = ("constant", "exponential", "snr")


def _check_positive(name: str, value, finite: bool) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise kind_error(name, "a number", value)
    if not value > 0 or (finite and value == math.inf):
        raise value_error(name, f"a positive{' and finite' if finite else ''} number", value)


def gather(table: Tensor, index: Tensor, names: tuple[str, str] = ("alphas_cumprod", "timesteps")) -> Tensor:
    """The values of a table (steps,) at an index, in its shape, as arithmetic on them is done.

    Raises:
        TypeError: one of the two is no tensor, or the index is not of integers; the error calls both by `names`.
        ValueError: a table of another shape.
    """
    for name, value in reversed(list(zip(names, (table, index), strict=True))):
        if not isinstance(value, Tensor):
            raise kind_error(name, "a tensor", value)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(expected(names[1], f"integers that index {names[0]}", index.dtype))
    if table.ndim != 1:
        raise value_error(names[0], "shape (steps,)", tuple(table.shape))
    # Moving the table is one small copy; schedulers keep it on the CPU. An index of uint8 is a mask, of int16 refused.
    table = table.float() if index.device.type == "mps" else table
    return widest(table.to(index.device, non_blocking=True)[index.long()])


def result_dtype(dtype: torch.dtype | None, *given: Tensor) -> torch.dtype:
    """What a helper returns: the dtype that was asked for, else the accumulation dtype of what it is made of."""
    if dtype is None:
        return torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise value_error("dtype", "None, torch.float32 or torch.float64", dtype)
    return dtype


def snr_weights(
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    gamma: float = 5.0,
    prediction_type: str = "epsilon",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Min-SNR loss weights (Hang et al., 2023), (B,): finite at SNR 0 and at SNR infinity.

    With snr = a / (1 - a): "epsilon" min(snr, gamma) / snr, "v_prediction" min(snr, gamma) / (snr + 1),
    "sample" min(snr, gamma). At a = 0 the epsilon weight is its limit 1; at a = 1 epsilon and v_prediction are 0 (their
    limit) and sample is gamma.

    Args:
        timesteps: (B,) integers.
        alphas_cumprod: (steps,), the scheduler's table.
        gamma: the SNR above which a step counts less; positive, `inf` for none.
        prediction_type: what the model predicts: epsilon | sample | v_prediction.
        dtype: of the result, which is computed in fp64: torch.float64 for an fp64 prediction; None takes fp32, or fp64
            where the table is fp64.

    Raises:
        TypeError: timesteps that are not integers, arguments that are not tensors, a gamma that is not a number.
        ValueError: an unknown prediction_type, a gamma that is not positive, a table that is not 1-D, another dtype.
    """
    check_choice("prediction_type", prediction_type, _PREDICTION_TYPES)
    _check_positive("gamma", gamma, finite=False)
    a = gather(alphas_cumprod, timesteps)
    result = result_dtype(dtype, alphas_cumprod)
    # Infinite quotients are right here, and a minimum takes them away; 0 / 0 and 0 * infinity do not occur.
    if prediction_type == "v_prediction":
        weights = a if math.isinf(gamma) else torch.minimum(a, gamma * (1 - a))
    elif prediction_type == "epsilon":
        weights = torch.ones_like(a) if math.isinf(gamma) else ((1 - a) * gamma / a).clamp(max=1.0)
    else:
        weights = (a / (1 - a)).clamp(max=min(gamma, torch.finfo(torch.float32).max))
    return weights.to(result)


def prior_preservation_weights(
    batch_size: int, prior_loss_weight: float = 1.0, device=None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Weights (2, ..., 2, 2 l, ..., 2 l) that make one mean of a batch equal instance loss + l * prior loss.

    The first half of the batch are the instance pictures, the second half the class pictures, as the DreamBooth
    scripts stack them. Pass it as `weighting`, multiplied by any other per-sample weights.

    Args:
        batch_size: of the stacked batch; even.
        prior_loss_weight: l.
        device: where the (batch_size,) tensor is made.
        dtype: of the tensor: torch.float64 for an fp64 prediction; None takes fp32.

    Raises:
        TypeError: a batch_size that is not an int.
        ValueError: a batch_size that is odd or negative, another dtype.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise kind_error("batch_size", "an int", batch_size)
    if batch_size < 0 or batch_size % 2:
        raise value_error("batch_size", "an even number (instance and class halves)", batch_size)
    weights = torch.full((batch_size,), 2.0, dtype=result_dtype(dtype), device=device)
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Huber threshold of each sample's timestep, (B,), to be passed as `huber_c`.

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
        dtype: of the result, which is computed in fp64: torch.float64 for an fp64 prediction; None takes fp32, or fp64
            where the timesteps or the table are fp64.

    Raises:
        TypeError: arguments that are not tensors, timesteps that are not integers for "snr", a huber_c
            that is not a number.
        ValueError: an unknown schedule, a huber_c that is not positive and finite, "snr" without alphas_cumprod,
            another dtype.
    """
    check_choice("schedule", schedule, _SCHEDULES)
    _check_positive("huber_c", huber_c, finite=True)
    if not isinstance(timesteps, Tensor):
        raise kind_error("timesteps", "a tensor", timesteps)
    result = result_dtype(dtype, timesteps)
    if schedule == "constant":
        return torch.full(timesteps.shape, huber_c * huber_scale, dtype=result, device=timesteps.device)
    if schedule == "exponential":
        return (torch.exp(widest(timesteps) * (math.log(huber_c) / num_train_timesteps)) * huber_scale).to(result)
    if alphas_cumprod is None:
        raise value_error("alphas_cumprod", 'a tensor for schedule "snr"', None)
    a = gather(alphas_cumprod, timesteps)
    result = result_dtype(dtype, alphas_cumprod)
    # 1 / (1 + s) = sqrt(a) / (sqrt(a) + sqrt(1 - a)), which is 0 at a = 0.
    signal = a.sqrt()
    return ((1 - huber_c) * (signal / (signal + (1 - a).sqrt())).square() + huber_c).to(result)
