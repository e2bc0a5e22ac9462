"""What both worlds have in common: their raters, how many labels are asked for, and what a world can do."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from diffdoctor.annotate.select import STRATEGIES
from diffdoctor.annotate.simulated import Annotator
from diffdoctor.detector.samples import ArrayData, DetectorData

# 16 pixels are few: of a picture of 512, 0.7 would be 22.
RATERS = {
    "careful": Annotator(jitter_px=0.2, missed=0.02, false_rate=0.01, anchor=0.0),
    "noisy": Annotator(jitter_px=0.7, missed=0.1, false_rate=0.05, anchor=0.5),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the results depend on.

    Attributes:
        first_steps: of the detector that knows the injected damage.
        steps: of each training with labels, which begins with that detector.
        batch_size: of all trainings.
    """

    first_steps: int = 300
    steps: int = 120
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Design:
    """What is asked in a world.

    Attributes:
        settings: of the trainings.
        budgets: by strategy, labels after each round.
        minutes: of the rater, at which strategies are compared.
        full: the labels whose cost and harvest the table tells.
    """

    settings: Settings
    budgets: dict[str, tuple[int, ...]]
    minutes: tuple[int, ...]
    full: int


# Random labels of digits cost fewer seconds, and so there are more.
DIGITS = Design(
    Settings(), dict.fromkeys(STRATEGIES, (20, 40, 80, 160)) | {"random": (20, 40, 80, 160, 320)}, (5, 10, 20, 40), 160
)
SIGNS = Design(
    Settings(first_steps=400, steps=200), dict.fromkeys(STRATEGIES, (50, 100, 200, 400, 800)), (20, 40, 80, 160), 400
)


class World(Protocol):
    """A pool of pictures, and a detector that knows injected damage alone.

    Attributes:
        seed: of every choice.
        settings: of the trainings.
        pool: (N, H, W, 3) uint8, the pictures that may be labelled.
        truth: (N, H, W), where they are damaged.
        categories: of the N pictures.
        known: what the detector knew before.
    """

    seed: int
    settings: Settings
    pool: np.ndarray
    truth: np.ndarray
    categories: list[str]
    known: DetectorData

    def first(self):
        """A fresh copy of the detector that knows injected damage alone."""

    def train(self, detector, data: DetectorData, steps: int):
        """The detector, trained with injected damage in what nobody labelled."""

    def maps(self, detector) -> np.ndarray:
        """The detector's maps (N, H, W) of the pool."""

    def measures(self, detector) -> dict[str, float]:
        """Of the detector on pictures that nobody labels, map50 among them."""

    def outcome(self, detector, rater: str, strategy: str, labels: int) -> dict[str, float]:
        """What comes of a treatment with the detector, where that is measured."""


def labelled(world: World, chosen: list[int], masks: list[np.ndarray]) -> ArrayData:
    """Pictures of a world's pool with a person's marks."""
    return ArrayData(world.pool[chosen], np.stack(masks) * 1.0, label=["human"] * len(chosen))
