"""What a treatment did to a pipeline: the same prompts, seeds and latents before and after, under two detectors."""

from dataclasses import dataclass

import torch

from diffdoctor._progress import progress as show_progress
from diffdoctor.evaluate.features import extract_features, frechet_distance, within_class_variance
from diffdoctor.evaluate.pixel import flagged, flagged_share
from diffdoctor.evaluate.rates import paired_bootstrap, wilson_interval


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
        ValueError: if `prompts` and `seeds` do not have the same length.
    """
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds must have the same length, got {len(prompts)} and {len(seeds)}")
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    with torch.no_grad(), show_progress(len(prompts), desc=desc, unit="picture", enabled=progress) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
            images = pipeline(prompts[part], generator=generators, output_type="pt", **call_options).images
            pictures.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
            bar.update(len(images))
    return torch.cat(pictures)


def diagnose_pictures(detector, pictures, *, batch_size=250):
    """The confidence maps of uint8 pictures (N, 3, H, W): float32 (N, 1, H, W) in [0, 1] on the CPU."""
    with torch.no_grad():
        return torch.cat([detector.confidence(part.float() / 255).float().cpu() for part in pictures.split(batch_size)])


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


def artifact_rates(before, after) -> dict:
    """Shares of flagged pictures before and after, with Wilson intervals and the paired change.

    Args:
        before, after: (N,) bool tensors of the same pictures.
    """
    result = {}
    for name, flags in (("before", before), ("after", after)):
        count = int(flags.sum())
        result[name] = count / len(flags)
        result[f"{name}_interval"] = list(wilson_interval(count, len(flags)))
    return {**result, **paired_bootstrap(before.numpy(), after.numpy())}


def _accuracy(classify, pictures, labels, batch_size=256):
    with torch.no_grad():
        guesses = torch.cat([classify(part.float() / 255).argmax(dim=1).cpu() for part in pictures.split(batch_size)])
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
    judge_before, judge_after = diagnose_pictures(judge, before), diagnose_pictures(judge, after)
    flags_before, flags_after = flagged(judge_before), flagged(judge_after)
    by_detector = [flagged(diagnose_pictures(detector, pictures)) for pictures in (before, after)]
    metrics = {
        "artifact_rate": {
            "judge": artifact_rates(flags_before, flags_after),
            "detector": artifact_rates(*by_detector),
        },
        "pictures": len(before),
    }
    of_real = extract_features(features, real)
    of_before, of_after = extract_features(features, before), extract_features(features, after)
    order = torch.randperm(len(of_real), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    metrics["fid"] = {
        "before": frechet_distance(of_real, of_before),
        "after": frechet_distance(of_real, of_after),
        "floor": frechet_distance(of_real[order[:half]], of_real[order[half:]]),
    }
    if damaged is not None:
        metrics["fid"]["ceiling"] = frechet_distance(of_real, extract_features(features, damaged))
    metrics["variance"] = {
        "before": within_class_variance(of_before, labels),
        "after": within_class_variance(of_after, labels),
    }
    if classify is not None:
        right_before, right_after = _accuracy(classify, before, labels), _accuracy(classify, after, labels)
        metrics["accuracy"] = {
            "before": float(right_before.float().mean()),
            "before_interval": list(wilson_interval(int(right_before.sum()), len(labels))),
            "after": float(right_after.float().mean()),
            "after_interval": list(wilson_interval(int(right_after.sum()), len(labels))),
        }
        clean = ~flags_before
        if clean.any():
            metrics["accuracy"]["clean_before"] = float(right_before[clean].float().mean())
            metrics["accuracy"]["clean_after"] = float(right_after[clean].float().mean())
    return Comparison(metrics, judge_before, judge_after)
