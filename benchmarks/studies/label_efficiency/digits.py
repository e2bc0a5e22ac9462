"""Digits, a quarter of them damaged in ways that the detector does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.label_efficiency.design import Settings
from diffdoctor.demo.data import AREA, STRENGTH, VISIBLE, WORDS, clean_digits
from diffdoctor.detector import ConvDetector, DetectorTrainingConfig, load_detector, train_detector
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.damage.injection import inject
from diffdoctor.detector.predict import diagnose_data
from diffdoctor.detector.samples import ArrayData
from diffdoctor.measures.components import mean_average_precision
from diffdoctor.measures.pixels import flagged_share, is_flagged
from diffdoctor.runs.files import atomic_dir

# Of the kinds that can be told at 16 pixels, two that say little of the five others.
KNOWN, UNKNOWN = ("texture_noise", "tint"), ("duplicate", "warp", "smear", "seam", "fuse")
KNOWN_CLEAN, POOL, TEST = 400, 1000, 360
DAMAGED = 0.25


class Digits:
    """The pictures of one seed, and the detector that knows two kinds of damage.

    Args:
        seed: of everything.
        settings: of the trainings.
        folder: for the detector.
    """

    def __init__(self, seed: int, settings: Settings, folder: Path):
        self.seed, self.settings = seed, settings
        pictures, digits = clean_digits()
        rng = np.random.default_rng([seed, 40])
        parts = np.split(rng.permutation(len(pictures))[: KNOWN_CLEAN + POOL + TEST], [KNOWN_CLEAN, KNOWN_CLEAN + POOL])
        known, pool, test = parts
        self.known = ArrayData(pictures[known], category=[WORDS[d] for d in digits[known]])
        self.categories = [WORDS[digit] for digit in digits[pool]]
        self.pool, self.truth = _damaged(pictures[pool], DAMAGED, rng)
        self.test = ArrayData(*_damaged(pictures[test], 0.5, rng))
        if not folder.is_dir():
            torch.manual_seed(seed)
            detector = self.train(ConvDetector((16, 32)), self.known, settings.first_steps)
            with atomic_dir(folder) as temporary:
                detector.save_pretrained(temporary)
        self.folder = folder

    def first(self):
        """A fresh copy of the detector that knows two kinds."""
        return load_detector(self.folder)

    def train(self, detector, data, steps: int):
        """The detector, trained with the two kinds it knows injected into what nobody labelled."""
        augment = AugmentConfig(
            kinds=KNOWN, strength=STRENGTH, area=AREA, visible=VISIBLE, shrink_share=0.0, shift=0.07, noise=0.02
        )
        config = DetectorTrainingConfig(
            steps=steps, batch_size=self.settings.batch_size, bce=1.0, mse=0.0, seed=self.seed, augment=augment
        )
        return train_detector(config, data, detector=detector, progress=False).detector

    def outcome(self, detector, rater: str, strategy: str, labels: int) -> dict[str, float]:
        """Nothing: no digit's generator is treated."""
        return {}

    def maps(self, detector) -> np.ndarray:
        """The detector's maps (POOL, 16, 16) of the pool."""
        return diagnose_data(detector, ArrayData(self.pool), batch_size=250).confidence

    def measures(self, detector) -> dict[str, float]:
        """mAP@0.5, and the shares of damaged and of clean pictures that are flagged, on held-out digits."""
        found = diagnose_data(detector, self.test, batch_size=180)
        flags, damaged = is_flagged(flagged_share(found.confidence)), (found.masks >= 0.5).any(axis=(1, 2))
        return {
            "map50": mean_average_precision(found.confidence, found.masks),
            "hit_rate": float(flags[damaged].mean()),
            "false_positive_rate": float(flags[~damaged].mean()),
        }


def _damaged(pictures: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and masks (N, 16, 16) float32, the first share of them damaged."""
    pictures, masks = pictures.copy(), np.zeros(pictures.shape[:3], np.float32)
    for index in range(round(share * len(pictures))):
        # All kinds are tried, since a digit may have nothing of what one of them changes.
        damaged = inject(pictures[index], rng, UNKNOWN, STRENGTH, AREA, visible=VISIBLE, attempts=64)
        pictures[index], masks[index] = damaged.picture, damaged.mask
    return pictures, masks
