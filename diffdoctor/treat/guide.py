"""Guidance without tuning: every sampling step is diagnosed and moved away from what the detector finds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from diffdoctor.ops import artifact_loss, modulate_gradient
from diffdoctor.treat.families import Family, family_of
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import StraightThroughClamp


@dataclass
class GuideLog:
    """What a guided run saw.

    Attributes:
        flagged_area: per guided step, (B,) share of the estimated pictures' pixels at a confidence of 0.5 or more,
            before the step was moved.
    """

    flagged_area: list[list[float]] = field(default_factory=list)


@contextmanager
def guide(
    pipeline,
    detector: torch.nn.Module,
    *,
    strength: float = 0.3,
    iterations: int = 3,
    start: float = 0.2,
    stop: float = 1.0,
    decay: float = 0.0,
    artifact_grad: float = 1.0,
    clean_grad: float = 0.0,
    threshold: float = 0.1,
    height: int = 0,
    width: int = 0,
) -> Iterator[GuideLog]:
    """Inside this context the pipeline's own call draws with fewer artifacts; afterwards it is as it was.

    At each step the clean picture is estimated from the denoiser's prediction and diagnosed; the estimate is moved
    against the gradient of the artifact loss, modulated by the confidence map, and the prediction changed to match. No
    gradient passes through the denoiser.

        with diffdoctor.guide(pipeline, detector):
            pictures = pipeline("a handwritten seven").images

    Args:
        pipeline: a pipeline and scheduler that `treat` serves.
        detector: pictures (B, 3, H, W) in [0, 1] to logits (B, 1, h, w), with `.confidence`.
        strength: largest move of a latent per iteration, in the latents' own units (their deviation is about 1).
        iterations: moves per step, each diagnosed anew.
        start, stop: share of the steps before which, and from which on, nothing is moved; in [0, 1].
        decay: strength falls with (1 - share of steps done) ** decay; 0: constant.
        artifact_grad, clean_grad: factors of the gradient where the confidence is 1 and 0.
        threshold: confidences above it enter the loss, in [0, 1]; a picture with none is left alone.
        height, width: of the pictures, in pixels; 0: the pipeline's own. Needed for FLUX, whose latents do not say.

    Yields:
        A `GuideLog`.

    Raises:
        UserError: a pipeline or scheduler that is not served.
        ValueError: an option out of its range.
    """
    _check(strength=strength, iterations=iterations, start=start, stop=stop, decay=decay, threshold=threshold)
    family = family_of(pipeline)
    scheduler = pipeline.scheduler
    sampler = Sampler.around(scheduler)
    size = family.picture_size(height, width)
    log = GuideLog()
    original = scheduler.step

    @functools.wraps(original)
    def step(model_output, timestep, sample, *args, **kwargs):
        place = _place(scheduler, timestep)
        done = place / max(1, len(scheduler.timesteps))
        if start <= done < stop:
            prediction, latents = (family.from_pipeline(tensor, *size) for tensor in (model_output, sample))
            clean = sampler.denoised(prediction.float(), place, latents.float())
            options = {"artifact_grad": artifact_grad, "clean_grad": clean_grad}
            reach = strength * (1 - done) ** decay
            moved = _move(family, detector, clean, reach, iterations, threshold, options, log)
            changed = sampler.prediction_for(moved, prediction.float(), place, latents.float())
            model_output = family.to_pipeline(changed.to(model_output.dtype))
        return original(model_output, timestep, sample, *args, **kwargs)

    # an attribute of the instance hides the class's method until it is deleted
    scheduler.step = step
    try:
        yield log
    finally:
        del scheduler.step


@torch.enable_grad()
def _move(family: Family, detector, clean, reach, iterations, threshold, options, log) -> torch.Tensor:
    clean = clean.detach()
    for iteration in range(iterations):
        with torch.no_grad():
            confidence = detector.confidence(family.decode(clean).float().clamp(0, 1))
        if iteration == 0:
            log.flagged_area.append((confidence >= 0.5).flatten(1).float().mean(1).tolist())
        latents = clean.requires_grad_()
        pictures = family.decode(modulate_gradient(latents, confidence, **options)).float()
        logits = detector(StraightThroughClamp.apply(pictures))
        loss = artifact_loss(logits, size=tuple(pictures.shape[-2:]), threshold=threshold, reduction="sum")
        gradient = torch.autograd.grad(loss, latents)[0]
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        clean = latents.detach() - reach * torch.where(largest > 0, gradient / largest.clamp_min(1e-30), 0.0)
    return clean


def _place(scheduler, timestep) -> int:
    index = getattr(scheduler, "_step_index", None)
    if index is not None:
        return int(index)
    return int((scheduler.timesteps == timestep).nonzero()[0])


def _check(**values: float) -> None:
    for name, value in values.items():
        high = 1 if name in ("start", "stop", "threshold") else float("inf")
        if not 0 <= value <= high:
            raise ValueError(f"{name}: a number in [0, {high}] was expected, got {value!r}")
