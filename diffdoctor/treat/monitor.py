"""Is the treatment working, and is the model still whole? Measured on fixed pictures during the treatment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from diffdoctor.measures.pixels import FLAG_CONFIDENCE, flagged_share, is_flagged
from diffdoctor.treat.config import TreatConfig

TIE = 0.1
CHANCE = 2.0
"""Standard errors within which two models' scores on the same pictures count as equal."""


@dataclass
class Measurement:
    """The fixed pictures at one step.

    Attributes:
        step: optimisation steps done.
        flagged_area: mean share of a picture's pixels at a confidence of 0.5 or more.
        mean_confidence: over all pixels.
        flagged_rate: share of the pictures with at least 2 % of their pixels at 0.5 or more.
        sharpness: mean absolute Laplacian of the grey pictures.
        diversity: mean deviation of a pixel over the pictures of one prompt.
        monitor_area: flagged area by the second detector, None where there is none.
        quality: mean of what the `quality` function of `treat` says of the pictures, None where there is none.
    """

    step: int
    flagged_area: float
    mean_confidence: float
    flagged_rate: float
    sharpness: float
    diversity: float
    monitor_area: float | None = None
    quality: float | None = None

    @property
    def score(self) -> float:
        """What is minimised where no quality is measured: flagged area plus mean confidence."""
        return self.flagged_area + self.mean_confidence


def measure(
    pictures: torch.Tensor,
    confidence: torch.Tensor,
    groups: Sequence[int],
    step: int,
    monitor_confidence: torch.Tensor | None = None,
    quality: float | None = None,
) -> Measurement:
    """Measure pictures.

    Args:
        pictures: (B, 3, H, W) in [0, 1], or videos (B, 3, T, H, W).
        confidence: (B, 1, H, W), the detector's maps, or (B, 1, T, H, W).
        groups: (B,) numbers; equal ones share a prompt.
        step: optimisation steps done.
        monitor_confidence: (B, 1, H, W), the second detector's maps, or None.
        quality: see `Measurement`.
    """
    area, monitor_area = flagged_share(confidence), None
    if monitor_confidence is not None:
        monitor_area = float((monitor_confidence >= FLAG_CONFIDENCE).float().mean())
    grey = pictures.float().mean(1, keepdim=True)
    frames = grey if grey.ndim == 4 else grey.transpose(1, 2).flatten(0, 1)
    kernel = grey.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return Measurement(
        step=step,
        flagged_area=float(area.mean()),
        mean_confidence=float(confidence.float().mean()),
        flagged_rate=float(is_flagged(area).float().mean()),
        sharpness=float(F.conv2d(frames, kernel).abs().mean()),
        diversity=_diversity(grey, groups),
        monitor_area=monitor_area,
        quality=quality,
    )


def _diversity(grey: torch.Tensor, groups: Sequence[int]) -> float:
    by_group: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        by_group.setdefault(int(group), []).append(row)
    shared = [rows for rows in by_group.values() if len(rows) > 1] or [list(range(len(grey)))]
    return float(torch.stack([grey[rows].std(0).mean() for rows in shared]).mean())


def scores_of(confidence: torch.Tensor) -> torch.Tensor:
    """Each picture's part of `Measurement.score`, lower for better ones.

    Args:
        confidence: (B, 1, H, W) in [0, 1], the detector's maps, or (B, 1, T, H, W).

    Returns:
        (B,) fp32.
    """
    return flagged_share(confidence) + confidence.float().flatten(1).mean(1)


def doubts(measurements: Sequence[Measurement], history: Sequence[dict], config: TreatConfig) -> list[str]:
    """What says that a treatment treated nothing, a sentence each.

    Args:
        measurements: of the fixed pictures, the first of the untreated model.
        history: a dict per step, with `replayed`.
        config: of the treatment.
    """
    if not measurements:
        return []
    first, asks = measurements[0], config.replay_area > 0
    if first.flagged_rate > 0 or (asks and any(row["replayed"] for row in history)):
        return []
    if not asks and first.flagged_area > 0:
        return []
    return [
        f"nothing was flagged: the detector found no artifact in any of the {config.evaluate_pictures} fixed pictures "
        f"before the treatment{', and no step replayed a picture' if asks else ''}; it may be blind to what this "
        "pipeline draws"
    ]


class EarlyStopping:
    """Keeps the best weights and says when to stop.

    Attributes:
        measurements: so far, the first of the untreated model.
        best: of a model that is whole, the last measurement that is no worse than the best one: within 10 % of the
            lowest score, or within two standard errors of the difference, picture by picture, to it or to the highest
            quality. Some dozens of pictures cannot tell such models apart, and the later one has settled. For the
            controls the last one.
        best_state: its weights; None stands for the untreated model.
        lowest: (B,) the fixed pictures' scores at the best measurement so far, lower for better ones.
    """

    def __init__(self, config: TreatConfig):
        self.config = config
        self.measurements: list[Measurement] = []
        self.best: Measurement | None = None
        self.best_state: dict[str, torch.Tensor] | None = None
        self.lowest: torch.Tensor | None = None

    def add(self, measurement: Measurement, scores: torch.Tensor, state) -> str | None:
        """Record a measurement.

        Args:
            measurement: of the fixed pictures, after the last one recorded.
            scores: (B,) of each of them, lower for better ones: `scores_of`, or its quality's negative.
            state: called without arguments for the present weights.

        Returns:
            Why to stop, or None.
        """
        self.measurements.append(measurement)
        before = self.measurements[0]
        fault = self._collapse(before, measurement) or self._hacking(before, measurement)
        if fault:
            return fault
        # a control must not be chosen by the diagnosis that it is there to do without
        is_control = self.config.map_source != "detector"
        if self._is_best(measurement, scores) or is_control:
            self.best, self.best_state = measurement, state()
        if self.config.good_enough and measurement.flagged_area <= self.config.good_enough * before.flagged_area:
            return f"flagged area at {measurement.flagged_area:.4f}, good enough"
        later = [m for m in self.measurements if m.step > self.best.step]
        if self.config.patience and len(later) >= self.config.patience:
            return f"no better measurement since step {self.best.step}"
        return None

    def _is_best(self, now: Measurement, scores: torch.Tensor) -> bool:
        scores = scores.double()
        if self.lowest is None or scores.mean() <= self.lowest.mean():
            self.lowest = scores
            return True
        worse = scores - self.lowest
        chance = CHANCE * float(worse.std()) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
        tie = TIE * float(self.lowest.mean()) if now.quality is None else 0.0
        return float(worse.mean()) <= max(chance, tie)

    def _collapse(self, before: Measurement, now: Measurement) -> str | None:
        for name, share in (("sharpness", self.config.min_sharpness), ("diversity", self.config.min_diversity)):
            was, value = getattr(before, name), getattr(now, name)
            if not value >= share * was:
                return f"collapse: {name} fell from {was:.4g} to {value:.4g}"
        return None

    def _hacking(self, before: Measurement, now: Measurement) -> str | None:
        if now.monitor_area is None:
            return None
        # one part in a thousand of the pixels is noise in a few dozen pictures
        if now.flagged_area < before.flagged_area and now.monitor_area > 1.25 * before.monitor_area + 1e-3:
            return (
                f"reward hacking: flagged area fell from {before.flagged_area:.4f} to {now.flagged_area:.4f}, but by "
                f"the monitor it rose from {before.monitor_area:.4f} to {now.monitor_area:.4f}"
            )
        return None

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {
            "measurements": [asdict(m) for m in self.measurements],
            "best": None if self.best is None else asdict(self.best),
            "best_state": self.best_state,
            "lowest": self.lowest,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` gave."""
        self.measurements = [Measurement(**m) for m in state["measurements"]]
        self.best = None if state["best"] is None else Measurement(**state["best"])
        self.best_state, self.lowest = state["best_state"], state.get("lowest")
