"""Guidance without tuning: a sampling run is diagnosed as it goes, and moved away from what the detector finds."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from diffdoctor.detector.confidence import check_confidence
from diffdoctor.detector.external import as_detector, has_gradient
from diffdoctor.measures.pixels import flagged_share
from diffdoctor.ops.modulate_gradient import GradientModulator
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.processes import seed_of
from diffdoctor.treat.families import family_of
from diffdoctor.treat.offline import resized_images
from diffdoctor.treat.picture_loss import StraightThroughClamp, loss_of_logits, resized
from diffdoctor.treat.prediction_replay import Predictor
from diffdoctor.treat.rollout import redraw_inside
from diffdoctor.treat.sampling import Sampling
from diffdoctor.treat.schedulers import Sampler

# Clean pictures that are diagnosed at a time.
_CHUNK = 50


@dataclass
class GuideLog:
    """What guided runs saw; a context that draws several times appends to the same lists.

    Attributes:
        flagged_area: per guided step, (B,) share of the estimated pictures' pixels at a confidence of 0.5 or more,
            before the step was moved.
        rewound: per rewind, how many of the pictures were broken and drawn again.
        final_area: per picture, the same share of the finished pictures; empty with rewinds=0.
        rewind_confidence: the option of that name, or what was measured in its place.
    """

    flagged_area: list[list[float]] = field(default_factory=list)
    rewound: list[int] = field(default_factory=list)
    final_area: list[float] = field(default_factory=list)
    rewind_confidence: float = 0.0


@dataclass
class _Options:
    """The options of `guide` under its own names."""

    strength: float
    iterations: int
    start: float
    stop: float
    decay: float
    rewinds: int
    rewind_to: float
    rewind_area: float
    rewind_confidence: float
    rewind_dilation: int
    artifact_grad: float
    clean_grad: float
    threshold: float
    seed: int


@contextmanager
def guide(
    pipeline,
    detector: torch.nn.Module,
    *,
    strength: float = 0.3,
    iterations: int = 3,
    start: float = 0.2,
    stop: float = 0.6,
    decay: float = 0.0,
    rewinds: int = 6,
    rewind_to: float = 0.3,
    rewind_area: float = 0.005,
    rewind_confidence: float = 0.05,
    rewind_dilation: int = 1,
    artifact_grad: float = 1.0,
    clean_grad: float = 0.0,
    threshold: float = 0.1,
    clean: Sequence[np.ndarray] | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    frames_per_call: int | None = None,
) -> Iterator[GuideLog]:
    """Inside this context the pipeline's own call draws with fewer artifacts; afterwards it is as it was.

    Two things happen, and each can be switched off. *Moves*: at each step the clean picture is estimated from the
    denoiser's prediction and diagnosed; the estimate is moved against the gradient of the artifact loss, modulated by
    the confidence map, and the prediction changed to match. No gradient passes through the denoiser. *Rewinds*: a
    finished picture that is still broken is taken back to an earlier noise level, with fresh noise where it is broken,
    and sampled again from there while the sound part is held; the sounder of the two versions stays.

        with diffdoctor.guide(pipeline, detector):
            pictures = pipeline("a handwritten seven").images

    Args:
        pipeline: a pipeline and scheduler that `treat` serves.
        detector: pictures (B, 3, H, W) in [0, 1] to logits (B, 1, h, w), with `.confidence`; or, with strength 0, any
            function from pictures to maps (B, 1, h, w) in [0, 1]. It is moved to the device where the pipeline draws.
        strength: largest move of a latent per iteration, in the latents' own units (their deviation is about 1); 0: no
            moves.
        iterations: moves per step, each diagnosed anew; 0: no moves.
        start: share of the steps before which nothing is moved, in [0, 1].
        stop: share of the steps from which on nothing is moved, in [0, 1]. What is moved late is not smoothed by later
            steps, and tends to fool the detector rather than to mend the picture.
        decay: strength falls with (1 - share of steps done) ** decay; 0: constant.
        rewinds: how often a broken picture is drawn again at most; 0: never.
        rewind_to: share of the steps that the first rewind goes back to, in [0, 1). What it cannot mend was decided
            earlier, so each further one goes further back, the last one to the first step.
        rewind_area: a picture is broken when at least this share of its pixels has a confidence of at least
            rewind_confidence; those pixels are drawn again.
        rewind_confidence: see rewind_area. It can be low where the detector is sure of what is sound. One that doubts
            everywhere has everything drawn again, and nothing held: give `clean`.
        rewind_dilation: latent pixels, and latent frames, by which the part drawn again grows.
        artifact_grad: the gradient's factor where the confidence is 1.
        clean_grad: the gradient's factor where the confidence is 0.
        threshold: confidences above it enter the loss, in [0, 1]; a picture with none is left alone.
        clean: uint8 (N, H, W, 3) pictures without artifacts, such as the pipeline was trained on; rewind_confidence is
            then measured, see `clean_confidence`. None: it is what the option says.
        height: of the pictures, in pixels; None: the pipeline's own. Needed for FLUX, whose latents do not say.
        width: as height.
        seed: of the fresh noise, which depends on it and on a picture's first latents alone: the same call gives the
            same pictures, in any batch.
        frames_per_call: frames of videos that the detector, which sees pictures, is given at a time; None: all.

    Yields:
        A `GuideLog`.

    Raises:
        UserError: a pipeline or scheduler that is not served; a detector that gives NaN.
        ValueError: an option out of its range.
    """
    options = _Options(
        strength, iterations, start, stop, decay, rewinds, rewind_to, rewind_area, rewind_confidence, rewind_dilation,
        artifact_grad, clean_grad, threshold, seed,
    )  # fmt: skip
    _check(options)
    detector = as_detector(detector)
    if strength > 0 and iterations > 0 and not has_gradient(detector):
        raise UserError(expected("strength", "0 with a detector that has no gradient: rewinds alone", strength))
    family = family_of(pipeline)
    scheduler = pipeline.scheduler
    sampler = Sampler.around(scheduler)
    size = family.picture_size(height, width)
    predictor = Predictor(family) if rewinds else None
    sampling = Sampling(family, sampler, detector=detector, frames_per_call=frames_per_call)
    if clean is not None:
        options.rewind_confidence = clean_confidence(sampling, clean, size, rewind_area)
    run = _Run(sampling, size, options, predictor)
    run.log.rewind_confidence = options.rewind_confidence
    original = scheduler.step

    @functools.wraps(original)
    def guided_step(model_output, timestep, sample, *args, **kwargs):
        step = _step_index(scheduler, timestep)
        model_output = run.before_step(step, model_output, sample)
        result = original(model_output, timestep, sample, *args, **kwargs)
        if predictor is None or step != len(sampler) - 1:
            return result
        final = run.after_last_step(result[0])
        if isinstance(result, tuple):
            return (final, *result[1:])
        result.prev_sample = final
        return result

    # an attribute of the instance hides the class's method until it is deleted
    scheduler.step = guided_step
    try:
        yield run.log
    finally:
        del scheduler.step
        if predictor is not None:
            predictor.close()


def clean_confidence(
    sampling: Sampling, pictures: Sequence[np.ndarray], size: tuple[int, int], area: float, *, share: float = 0.05
) -> float:
    """The confidence at which this share of clean pictures would be taken for broken, as `rewind_area` says.

    The pictures pass the autoencoder first: what it adds is in every generated picture too.

    Args:
        sampling: its family encodes and decodes, its detector diagnoses.
        pictures: uint8 (H, W, 3) without artifacts; those of another size are resized.
        size: height and width of the generated pictures, in pixels.
        area: share of a picture's pixels that makes it broken.
        share: of the pictures.

    Raises:
        ValueError: there are no pictures.
    """
    if not len(pictures):
        raise ValueError(expected("clean", "at least one picture", "none"))
    device, peaks = sampling.family.device, []
    sampling.detector.to(device)
    for start in range(0, len(pictures), _CHUNK):
        batch = resized_images(pictures[start : start + _CHUNK], *size).to(device)
        confidence = sampling.diagnose(sampling.family.encode(batch).float())[1].flatten(1)
        peaks.append(confidence.topk(max(1, math.ceil(area * confidence.shape[1]))).values[:, -1])
    return float(torch.cat(peaks).quantile(1 - share))


class _Run:
    """The moves and rewinds inside one `guide` context; predictor is None where nothing is rewound."""

    def __init__(self, sampling: Sampling, size: tuple[int, int], options: _Options, predictor: Predictor | None):
        self.sampling, self.family, self.sampler = sampling, sampling.family, sampling.sampler
        self.size, self.options, self.predictor = size, options, predictor
        self.log = GuideLog()
        self.seeds: list[int] = []

    def before_step(self, step: int, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The prediction that the scheduler is to receive in place of model_output."""
        if step == 0:
            self.sampling.detector.to(sample.device)
        if self.predictor is not None:
            if step == 0:
                self.predictor.forget()
                self.seeds = [seed_of(self.options.seed, _fingerprint(latents)) for latents in sample]
            self.predictor.keep(step, model_output)
        if not self._is_moved(step):
            return model_output
        prediction, latents = (self.family.from_pipeline(t, *self.size).float() for t in (model_output, sample))
        clean = self.sampler.denoised(prediction, step, latents)
        moved, area = self._move(clean, step)
        self.log.flagged_area.append(area)
        changed = self.sampler.prediction_for(moved, prediction, step, latents)
        return self.family.to_pipeline(changed.to(model_output.dtype))

    @torch.no_grad()
    def after_last_step(self, final: torch.Tensor) -> torch.Tensor:
        """The finished latents, their broken parts drawn again, as the pipeline's loop holds them."""
        options = self.options
        clean = self.family.from_pipeline(final, *self.size).to(torch.float32, copy=True)
        _, confidence = self.sampling.diagnose(clean)
        for count in range(options.rewinds):
            broken = self._broken(confidence)
            self.log.rewound.append(len(broken))
            if len(broken) == 0:
                break
            drawn = self._draw_again(clean[broken], self._region(confidence[broken], clean), broken, count)
            _, again = self.sampling.diagnose(drawn)
            sounder = again.flatten(1).mean(1) < confidence[broken].flatten(1).mean(1)
            clean[broken[sounder]], confidence[broken[sounder]] = drawn[sounder], again[sounder]
        self.log.final_area += flagged_share(confidence).tolist()
        return self.family.to_pipeline(clean.to(final.dtype))

    def _draw_again(self, clean, region, rows, count: int) -> torch.Tensor:
        """Latents (M, C, h, w) sampled again inside the region, and as they are outside of it.

        Args:
            clean: (M, C, h, w), the latents to change.
            region: (M, 1, h, w), 1 inside and 0 outside.
            rows: (M,) of the batch, where `clean` belongs.
            count: of the rewinds so far; each has fresh noise.
        """
        sampler, share = self.sampler, 1 - count / max(1, self.options.rewinds - 1)
        first = int(self.options.rewind_to * share * len(sampler))
        dtype = self.family.denoiser_dtype
        generators = [torch.Generator().manual_seed(seed_of(self.seeds[row], count)) for row in rows.tolist()]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)

        def predict(latents: torch.Tensor, step: int) -> torch.Tensor:
            model_input = self.family.to_pipeline(sampler.model_input(latents, step).to(dtype))
            prediction = self.predictor.predict(step, model_input, rows)
            return self.family.from_pipeline(prediction, *self.size).float()

        return redraw_inside(sampler, predict, clean, region, noise, first)

    def _broken(self, confidence: torch.Tensor) -> torch.Tensor:
        """Indices (M,) of the pictures whose maps (B, 1, H, W) ask for another drawing."""
        share = (confidence >= self.options.rewind_confidence).flatten(1).float().mean(1)
        return torch.nonzero((share > 0) & (share >= self.options.rewind_area)).flatten()

    def _region(self, confidence: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        flagged = self.family.maps_for_latents((confidence >= self.options.rewind_confidence).float())
        reach, pools = self.options.rewind_dilation, (F.adaptive_max_pool2d, F.max_pool2d)
        if flagged.ndim == 5:
            pools = (F.adaptive_max_pool3d, F.max_pool3d)
        region = pools[0](flagged, latents.shape[2:])
        return pools[1](region, 2 * reach + 1, 1, reach) if reach else region

    def _is_moved(self, step: int) -> bool:
        options = self.options
        inside = options.start <= step / max(1, len(self.sampler)) < options.stop
        return inside and options.strength > 0 and options.iterations > 0

    @torch.enable_grad()
    def _move(self, clean: torch.Tensor, step: int) -> tuple[torch.Tensor, list[float]]:
        """Moved estimates (B, C, h, w), and the flagged share of each before it was moved."""
        options = self.options
        reach = options.strength * (1 - step / max(1, len(self.sampler))) ** options.decay
        area: list[float] = []
        clean = clean.detach()
        for _ in range(options.iterations):
            modulator = GradientModulator(artifact_grad=options.artifact_grad, clean_grad=options.clean_grad)
            latents = clean.requires_grad_()
            pictures = self.family.decode(modulator(latents)).float()
            logits = self.sampling.logits(StraightThroughClamp.apply(pictures))
            size = tuple(pictures.shape[-2:])
            confidence = check_confidence(resized(logits.detach().float(), size).sigmoid(), pictures)
            area = area or flagged_share(confidence).tolist()
            modulator.set(self.family.maps_for_latents(confidence))
            loss = loss_of_logits(logits, size, threshold=options.threshold, reduction="sum")
            gradient = torch.autograd.grad(loss, latents)[0]
            largest = gradient.abs().amax(tuple(range(1, gradient.ndim)), keepdim=True)
            clean = latents.detach() - reach * torch.where(largest > 0, gradient / largest.clamp_min(1e-30), 0.0)
        return clean, area


def _fingerprint(latents: torch.Tensor) -> int:
    return zlib.crc32(latents.detach().float().cpu().contiguous().numpy().tobytes())


def _step_index(scheduler, timestep) -> int:
    index = getattr(scheduler, "_step_index", None)
    if index is not None:
        return int(index)
    return int((scheduler.timesteps == timestep).nonzero()[0])


def _check(options: _Options) -> None:
    shares = ("start", "stop", "threshold", "rewind_area", "rewind_confidence")
    for name, value in vars(options).items():
        high = 1 if name in shares else math.inf
        if name not in ("artifact_grad", "clean_grad") and not 0 <= value <= high:
            raise ValueError(expected(name, f"a number in [0, {high}]", repr(value)))
    if not options.rewind_to < 1:
        raise ValueError(expected("rewind_to", "a number in [0, 1)", repr(options.rewind_to)))
