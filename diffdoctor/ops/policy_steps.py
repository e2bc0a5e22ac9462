"""What a trainer of a policy computes beside `policy_loss`: how a step was drawn, and the advantages of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.ops.checks import FLOATS, check_choice, check_dtype, check_number, kind_error, value_error
from diffdoctor.ops.observed import is_observed, is_plain
from diffdoctor.ops.schedules import gather, result_dtype
from diffdoctor.ops.target import widest
from diffdoctor.runs.errors import expected

__all__ = ["ddim_coefs", "flow_sde_coefs", "group_advantages"]

_FORMS = ("flow_grpo", "dance_grpo")
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_BASELINES = ("mean", "leave_one_out")
_SCALES = ("std", None)


def flow_sde_coefs(
    sigmas: Tensor, step: int | Tensor, eta: float = 0.7, form: str = "flow_grpo", *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, sigma) of a flow model's stochastic step: it draws from N(a * latents + b * model_pred, sigma^2).

    With t = sigmas[step], dt = sigmas[step + 1] - t (negative) and s the noise's rate,
    a = 1 + s^2 dt / (2 t), b = (1 + s^2 (1 - t) / (2 t)) dt and sigma = s sqrt(-dt). "flow_grpo" (arXiv 2505.05470) has
    s = eta sqrt(t / (1 - t)), in which 1 - t is 1 - sigmas[1] where t is 1; "dance_grpo" (2505.07818) has s = eta.
    model_pred is the velocity, noise - latents.

    Args:
        sigmas: (steps + 1,), the scheduler's table, from the noisy end to the clean one.
        step: index of the step, an int, or integers (B,).
        eta: how much noise a step adds; at least 0. 0 is the deterministic step.
        form: flow_grpo | dance_grpo.
        dtype: of the result, which is computed in fp64: torch.float64 for an fp64 prediction; None takes fp32, or fp64
            where the table is fp64.

    Returns:
        Three tensors, () for an int, (B,) for a tensor of steps, on the step's device (for an int: the table's).

    Raises:
        TypeError: a table that is not a floating-point tensor, a step that is no integer, an eta that is no number.
        ValueError: a table that is not 1-D of two values or more, or of other values than noise levels in [0, 1] that
            do not rise (seen on the CPU alone), a step outside of it, a negative eta, another form or dtype.
    """
    if not isinstance(sigmas, Tensor):
        raise kind_error("sigmas", "a tensor", sigmas)
    check_dtype("sigmas", sigmas, FLOATS)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise value_error("sigmas", "shape (steps + 1,) with at least one step", tuple(sigmas.shape))
    _check_sigmas(sigmas)
    check_number("eta", eta, 0.0)
    check_choice("form", form, _FORMS)
    if isinstance(step, int) and not isinstance(step, bool):
        if not 0 <= step < len(sigmas) - 1:
            raise value_error("step", f"an index in [0, {len(sigmas) - 2}]", step)
        index = torch.full((), step, device=sigmas.device)
    elif isinstance(step, Tensor):
        index = step.long() if not step.is_floating_point() else step
    else:
        raise kind_error("step", "an int or a tensor of integers", step)
    names = ("sigmas", "step")
    t, after = gather(sigmas, index, names), gather(sigmas, index + 1, names)
    dt = after - t
    rate = torch.full_like(t, eta)
    if form == "flow_grpo":
        clean = 1 - torch.where(t == 1, gather(sigmas, torch.ones_like(index), names), t)
        rate = eta * (t / clean).sqrt()
    variance = rate.square()
    a = 1 + variance / (2 * t) * dt
    b = (1 + variance * (1 - t) / (2 * t)) * dt
    result = result_dtype(dtype, sigmas)
    return a.to(result), b.to(result), (rate * (-dt).sqrt()).to(result)


def _check_sigmas(sigmas: Tensor) -> None:
    """Refuse another table, such as the scheduler's timesteps; one on a device is not looked at, which would wait."""
    if sigmas.device.type != "cpu" or is_observed() or not is_plain(sigmas):
        return
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()) or bool((sigmas.diff() > 0).any()):
        what = "noise levels in [0, 1] that do not rise (a scheduler's sigmas, not its timesteps)"
        raise value_error("sigmas", what, f"{float(sigmas[0]):g} to {float(sigmas[-1]):g}")


def ddim_coefs(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    eta: float = 1.0,
    *,
    num_inference_steps: int,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, sigma) of a DDIM step with noise: it draws from N(a * latents + b * model_pred, sigma^2), as DDPO's do.

    The step that diffusers' `DDIMScheduler.step(model_pred, t, latents, eta=eta)` takes with clip_sample and
    thresholding off: from t to t - steps / num_inference_steps, sigma = eta sqrt((1 - p) / (1 - c) (1 - c / p)) with c
    and p the alphas_cumprod of both (arXiv 2010.02502, equation 16).

    Args:
        alphas_cumprod: (steps,), the scheduler's table.
        timesteps: (B,) or () integers, where the step begins.
        eta: how much noise a step adds, in [0, 1]; 0 is the deterministic step, 1 DDPM's.
        num_inference_steps: as the scheduler's set_timesteps was given it.
        prediction_type: what the model predicts: epsilon | sample | v_prediction.
        final_alpha_cumprod: p of a step that ends before timestep 0: the scheduler's attribute of this name, 1.0 for
            set_alpha_to_one, alphas_cumprod[0] else.
        dtype: as `flow_sde_coefs`'s.

    Returns:
        Three tensors of the timesteps' shape, on their device.

    Raises:
        TypeError: timesteps that are not integers, arguments that are not tensors or numbers.
        ValueError: an unknown prediction_type, an eta outside [0, 1], num_inference_steps that is not positive, a table
            that is not 1-D, another dtype.
    """
    check_number("eta", eta, 0.0, 1.0)
    check_choice("prediction_type", prediction_type, _PREDICTION_TYPES)
    if not isinstance(num_inference_steps, int) or isinstance(num_inference_steps, bool):
        raise kind_error("num_inference_steps", "an int", num_inference_steps)
    if num_inference_steps < 1:
        raise value_error("num_inference_steps", "a positive int", num_inference_steps)
    current = gather(alphas_cumprod, timesteps)
    before = timesteps.long() - len(alphas_cumprod) // num_inference_steps
    final = torch.as_tensor(final_alpha_cumprod, dtype=current.dtype).to(current.device, non_blocking=True)
    after = torch.where(before >= 0, gather(alphas_cumprod, before.clamp(min=0)), final)
    a, b, sigma = ddim_step(current, after, eta, prediction_type)
    result = result_dtype(dtype, alphas_cumprod)
    return a.to(result), b.to(result), sigma.to(result)


def ddim_step(current: Tensor, after: Tensor, eta: float, prediction_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, sigma) of a DDIM step between two values of alphas_cumprod, which are not checked; see `ddim_coefs`."""
    variance = eta**2 * ((1 - after) / (1 - current) * (1 - current / after)).clamp(min=0)
    noise = (1 - after - variance).clamp(min=0).sqrt()  # how much of the predicted noise stays
    if prediction_type == "epsilon":
        a, b = (after / current).sqrt(), noise - (after * (1 - current) / current).sqrt()
    elif prediction_type == "sample":
        a, b = noise / (1 - current).sqrt(), after.sqrt() - noise * (current / (1 - current)).sqrt()
    else:
        a = (after * current).sqrt() + noise * (1 - current).sqrt()
        b = noise * current.sqrt() - (after * (1 - current)).sqrt()
    return a, b, variance.sqrt()


def group_advantages(
    rewards: Tensor, group: int | Tensor, *, scale: str | None = "std", eps: float = 1e-4, baseline: str = "mean"
) -> Tensor:
    """GRPO's advantages: each reward relative to those of its group, (reward - mean) / (std + eps); without a sync.

    For maps everything is taken pixel by pixel over the pictures of a group. The standard deviation is the
    population's, as Flow-GRPO takes it (arXiv 2402.03300, 2505.05470).

    Args:
        rewards: (B,), or maps (B, 1, H, W) or (B, 1, T, H, W); floating point.
        group: pictures of one prompt: their number, where they follow one another, or (B,) integers that are equal
            within a group.
        scale: "std" divides by the group's standard deviation + eps; None does not, as Dr. GRPO (arXiv 2503.20783) and
            SDG's per-pixel advantages do not.
        eps: added to the standard deviation; at least 0. Where both are 0 the advantage is 0.
        baseline: "mean" of the whole group, or "leave_one_out": of its other pictures (RLOO, arXiv 2402.14740); a group
            of one then has advantage 0.

    Returns:
        Like rewards, fp32 (fp64 for fp64).

    Raises:
        TypeError: rewards that are no floating-point tensor, a group that is neither an int nor integers.
        ValueError: rewards of another shape, a group that does not divide B or is not of shape (B,), a negative eps,
            another scale or baseline.
    """
    if not isinstance(rewards, Tensor):
        raise kind_error("rewards", "a tensor", rewards)
    check_dtype("rewards", rewards, FLOATS)
    if rewards.ndim not in (1, 4, 5) or (rewards.ndim > 1 and rewards.shape[1] != 1):
        raise value_error("rewards", "shape (B,), (B, 1, H, W) or (B, 1, T, H, W)", tuple(rewards.shape))
    check_choice("scale", scale, _SCALES)
    check_choice("baseline", baseline, _BASELINES)
    check_number("eps", eps, 0.0)
    values = widest(rewards.detach()).flatten(1) if rewards.ndim > 1 else widest(rewards.detach())[:, None]
    same = _same_group(group, len(rewards), rewards.device).to(values.dtype)
    count = same.sum(1, keepdim=True)
    centred = values - same @ values / count
    advantage = centred
    if baseline == "leave_one_out":
        advantage = centred * count / (count - 1).clamp(min=1)
    if scale == "std":
        spread = (same @ centred.square() / count).sqrt() + eps
        advantage = torch.where(spread == 0, 0.0, advantage / spread)
    return advantage.reshape(rewards.shape).to(result_dtype(None, rewards))


def _same_group(group: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """(B, B), true where two pictures are of one group."""
    if isinstance(group, Tensor):
        if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
            raise TypeError(expected("group", "an int or integers of shape (B,)", group.dtype))
        if tuple(group.shape) != (batch,):
            raise value_error("group", f"shape ({batch},)", tuple(group.shape))
        ids = group.to(device, non_blocking=True)
    elif isinstance(group, int) and not isinstance(group, bool):
        if group < 1 or batch % group:
            raise value_error("group", f"a positive divisor of the {batch} rewards", group)
        ids = torch.arange(batch, device=device) // group
    else:
        raise kind_error("group", "an int or integers of shape (B,)", group)
    return ids[:, None] == ids[None]
