"""Treatments of tiny pipelines that take a second, and detectors for them."""

import numpy as np
import torch

from diffdoctor.detector import ConvDetector
from diffdoctor.treat import TreatConfig, treat
from support.tiny_pipelines import PROMPTS, tiny_pipeline

SMALL = {
    "steps": 2,
    "batch_size": 3,
    "sampling_steps": 3,
    "height": 16,
    "width": 16,
    "num_frames": 1,
    "max_sequence_length": 32,
    "rank": 2,
    "replay_area": 0.0,
    "evaluate_every": 0,
    "evaluate_pictures": 3,
    "lora_targets": ("attention", "convolution", "feed_forward"),
}


def small(**options):
    return TreatConfig(**{**SMALL, **options})


def random_detector():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return ConvDetector((8, 8)).eval()


class BrightDetector(torch.nn.Module):
    """What is bright is broken: something that a treatment of a random pipeline can cure."""

    def forward(self, pictures):
        return 8 * (torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 2) - 0.5)

    def confidence(self, pictures):
        return torch.nn.functional.interpolate(self(pictures), scale_factor=2.0).sigmoid()


def pairs(count=6):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), [PROMPTS[i % 3] for i in range(count)]


def run(pipeline=None, detector=None, offline=None, **options):
    output_dir, quality = options.pop("output_dir", None), options.pop("quality", None)
    return treat(
        pipeline or tiny_pipeline("sd", prediction_type="v_prediction"),
        detector or random_detector(),
        PROMPTS,
        small(**options),
        offline=offline or pairs(),
        output_dir=output_dir,
        quality=quality,
        progress=False,
    )


def gradient_norms(**options):
    return [row["grad_norm"] for row in run(steps=2, **options).history]
