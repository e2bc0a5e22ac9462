"""Signs that a small pipeline draws and breaks, and a rule that says which; see `benchmarks.studies.signs`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.label_efficiency.design import Settings
from benchmarks.studies.signs.measures import letters_auroc
from benchmarks.studies.signs.oracle import read_signs
from benchmarks.studies.signs.parts import record_of
from benchmarks.studies.signs.pipelines import prompts_of
from benchmarks.studies.signs.recipes import Recipe
from benchmarks.studies.signs.study import Settings as StudySettings
from benchmarks.studies.signs.study import Study
from diffdoctor.detector import ConvDetector, DetectorTrainingConfig, load_detector, train_detector
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.predict import diagnose_data
from diffdoctor.detector.samples import ArrayData
from diffdoctor.measures.components import mean_average_precision
from diffdoctor.measures.pixels import flagged_share, is_flagged
from diffdoctor.runs.files import atomic_dir
from diffdoctor.runs.strict_json import nan_to_none
from diffdoctor.viz.draw import as_hwc

KIND = "sd"
POOL = 1500
TREATMENT = "nft"
RECIPES = {
    "before": Recipe(),
    TREATMENT: Recipe({"method": "nft", "steps": 60, "learning_rate": 1e-3, "ema_decay": 0.9}),
}


class Signs:
    """What the untreated U-Net draws, and a detector that knows injected damage alone.

    Args:
        seed: of the choices, the rater and the detectors; the pipeline and its pictures are the same for all.
        settings: of the trainings.
        output: a folder of the study of signs, which may hold the pipeline already.
        treated: (rater, strategy, labels) with whose detector the pipeline is treated.
        options: other fields of the study's settings.
    """

    def __init__(
        self,
        seed: int,
        settings: Settings,
        output: Path,
        treated: frozenset[tuple[str, str, int]] = frozenset(),
        options: dict | None = None,
    ):
        self.seed, self.settings, self.treated = seed, settings, treated
        study = StudySettings(**{"pictures": 600, "split": "test", **(options or {})})
        self.study = Study(output, study, RECIPES)
        self.pool = as_hwc(self.study.pool(KIND, POOL))
        self.truth = read_signs(self.pool).marked().astype(np.float32)
        self.categories = [prompt.split()[0] for prompt in prompts_of(len(self.pool))]
        clean = self.study.base_settings.clean().pictures[: study.clean_signs]
        self.known = ArrayData(clean)
        held_out = as_hwc(self.study.held_out(KIND))
        self.reading = read_signs(held_out)
        self.test = ArrayData(held_out, self.reading.marked().astype(np.float32))
        self.folder = output / "label-efficiency" / f"injected-{seed}-{settings.first_steps}"
        if not self.folder.is_dir():
            torch.manual_seed(seed)
            detector = self.train(ConvDetector((16, 32, 64)), self.known, settings.first_steps)
            with atomic_dir(self.folder) as temporary:
                detector.save_pretrained(temporary)

    def first(self):
        """A fresh copy of the detector that knows injected damage alone."""
        return load_detector(self.folder)

    def train(self, detector, data, steps: int):
        """The detector, trained with all kinds of damage injected into clean signs."""
        config = DetectorTrainingConfig(
            steps=steps, batch_size=self.settings.batch_size, bce=1.0, mse=0.0, seed=self.seed, augment=AugmentConfig()
        )
        return train_detector(config, data, detector=detector, progress=False).detector

    def maps(self, detector) -> np.ndarray:
        """The detector's maps (POOL, 16, 40) of the pool."""
        return diagnose_data(detector, ArrayData(self.pool), batch_size=250).confidence

    def measures(self, detector) -> dict[str, float]:
        """mAP@0.5, the AUROC of letters, and the shares of broken and of sound pictures flagged, on held-out signs."""
        confidence = diagnose_data(detector, self.test, batch_size=250).confidence
        flags, broken = is_flagged(flagged_share(confidence)), self.reading.broken()
        shares = [float(flags[chosen].mean()) if chosen.any() else math.nan for chosen in (broken, ~broken)]
        found = {"map50": mean_average_precision(confidence, self.test.masks)}
        found |= {"letters_auroc": letters_auroc(confidence, self.reading)}
        return nan_to_none(found | dict(zip(("hit_rate", "false_positive_rate"), shares, strict=True)))

    def outcome(self, detector, rater: str, strategy: str, labels: int) -> dict[str, float]:
        """The rule's rate of broken pictures before and after `nft` with the detector, where that is asked for."""
        if (rater, strategy, labels) not in self.treated:
            return {}

        def make(folder):
            detector.save_pretrained(folder / "detector")

        # without labels, all begin with one detector
        needs = {"rater": rater, "strategy": strategy} if labels else {}
        needs |= {"labels": labels, "seed": self.seed}
        needs |= {"steps": [self.settings.first_steps, self.settings.steps], "pool": POOL}
        steering = self.study.parts.made("labels-detector", needs, make)
        steered = SteeredBy(self.study, steering)
        found = {f"{name}_rate": steered.reading(KIND, name).rate() for name in ("before", TREATMENT)}
        seconds = record_of(steered.treated(KIND, TREATMENT))["cpu_seconds"]
        return {
            "untreated_rate": found["before_rate"],
            "treated_rate": found[f"{TREATMENT}_rate"],
            "cpu_seconds": seconds,
        }


class SteeredBy(Study):
    """A study whose treatments are steered by a given detector, and whose other parts are those of another study.

    Args:
        study: the other one.
        detector: the folder of a part with the detector in `detector`.
    """

    def __init__(self, study: Study, detector: Path):
        super().__init__(study.output, study.settings, study.recipes)
        self._steering = detector

    def detector(self, kind: str, after: str | None = None, *, observer: bool = False) -> Path:
        """The given detector; the observer's is the study's own."""
        return super().detector(kind, after, observer=True) if observer else self._steering
