"""Drawing and comparing pictures in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffdoctor.data.pictures import to_images
from diffdoctor.evaluate.model.summary import PictureMeasures, summarise
from diffdoctor.measures.features import extract_features
from diffdoctor.measures.pixels import flagged_share
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.progress import progress as show_progress


def draw_pictures(pipeline, prompts, seeds, *, batch_size=100, **call_options) -> Iterator[torch.Tensor]:
    """Draw one picture per prompt, each from its own seed, and yield them batch by batch.

    Args and errors as `sample_pictures`; yields uint8 (B, 3, H, W) on the CPU.

    Raises:
        UserError: if a picture is not finite.
    """
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds must have the same length, got {len(prompts)} and {len(seeds)}")
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        # Not around the whole loop: between batches the caller's grad mode would be changed.
        with torch.no_grad():
            images = pipeline(prompts[part], generator=generators, output_type="pt", **call_options).images.float()
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            seed = seeds[start + int((~finite).nonzero()[0])]
            raise UserError(
                f"the pipeline draws values that are not finite (seed {seed}): a VAE that overflows in fp16 needs "
                "to be loaded in fp32 or bf16"
            )
        yield (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def sample_pictures(pipeline, prompts, seeds, *, batch_size=100, progress=True, desc="sampling", **call_options):
    """Draw one picture per prompt, each from its own seed, so that a picture does not depend on its batch.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        prompts: N prompts.
        seeds: N integers; picture i starts from the latents of a generator on the CPU seeded with `seeds[i]`.
        batch_size: pictures at a time.
        progress: show a bar, or plain lines where there is no terminal.
        call_options: handed to the pipeline: `num_inference_steps`, `guidance_scale`, …

    Returns:
        uint8 (N, 3, H, W) on the CPU.

    Raises:
        ValueError: if `prompts` and `seeds` do not have the same length, or (`UserError`) a picture is not finite.
    """
    prompts, pictures = list(prompts), []
    with show_progress(len(prompts), desc=desc, unit="picture", enabled=progress) as bar:
        for batch in draw_pictures(pipeline, prompts, seeds, batch_size=batch_size, **call_options):
            pictures.append(batch)
            bar.update(len(batch))
    return torch.cat(pictures)


def diagnose_pictures(detector, pictures, *, batch_size=250):
    """The confidence maps of uint8 pictures (N, 3, H, W): float32 (N, 1, H, W) in [0, 1] on the CPU."""
    device = next((value.device for value in detector.parameters()), torch.device("cpu"))
    with torch.no_grad():
        return torch.cat(
            [detector.confidence(to_images(part, device)).float().cpu() for part in pictures.split(batch_size)]
        )


@dataclass
class Comparison:
    """The measures of a treatment and what a report shows of it.

    Attributes:
        metrics: nested numbers under the names of docs/demo.md.
        judge_before, judge_after: (N, 1, H, W) confidence maps of the judge.
        severity_before, severity_after: (N,) share of the pixels at confidence 0.5 or more, by the judge.
    """

    metrics: dict
    judge_before: torch.Tensor
    judge_after: torch.Tensor

    @property
    def severity_before(self):
        return flagged_share(self.judge_before)

    @property
    def severity_after(self):
        return flagged_share(self.judge_after)


def _correct(classify, pictures, labels, batch_size=256):
    with torch.no_grad():
        guesses = torch.cat([classify(to_images(part)).argmax(dim=1).cpu() for part in pictures.split(batch_size)])
    return guesses == labels


def compare_pictures(before, after, labels, *, detector, judge, features, real, damaged=None, classify=None, seed=0):
    """Measure a treatment on pictures of the same prompts, seeds and latents.

    Args:
        before, after: uint8 (N, 3, H, W).
        labels: (N,) integers, what each prompt asked for.
        detector: the detector that steered the treatment.
        judge: a detector that had no part in it.
        features: callable from float pictures (B, 3, H, W) in [0, 1] to features (B, D), for FID and variance.
        real: uint8 (M, 3, H, W), real clean pictures: FID's reference; its floor is the distance of two random halves.
        damaged: uint8 (M, 3, H, W), the real pictures with damage: FID's ceiling; left out when None.
        classify: callable from float pictures to logits over the labels; the accuracy is left out when None.
        seed: of the split of `real` into halves.

    Returns:
        A `Comparison`.
    """
    maps, sides = [], []
    for pictures in (before, after):
        maps.append(diagnose_pictures(judge, pictures))
        sides.append(
            PictureMeasures(
                judge=flagged_share(maps[-1]),
                detector=flagged_share(diagnose_pictures(detector, pictures)),
                features=extract_features(features, pictures),
                right=None if classify is None else _correct(classify, pictures, labels),
            )
        )
    reference = PictureMeasures(features=extract_features(features, real))
    spoilt = None if damaged is None else PictureMeasures(features=extract_features(features, damaged))
    return Comparison(summarise(*sides, labels, real=reference, damaged=spoilt, seed=seed), *maps)
