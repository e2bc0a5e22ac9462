"""A simulated rater: outlines that wobble, things overlooked and invented, trust in the proposal, and time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from diffdoctor.runs.errors import UserError, expected

# Area, as a share of the picture, at which `missed` holds.
USUAL_AREA = 0.02


@dataclasses.dataclass(frozen=True)
class Marked:
    """What a simulated rater answers.

    Attributes:
        mask: (H, W) bool.
        seconds: of work.
        accepted: components of the proposal that were taken.
        refused: components of the proposal that were not.
        drawn: regions that were drawn.
    """

    mask: np.ndarray
    seconds: float
    accepted: int = 0
    refused: int = 0
    drawn: int = 0

    @property
    def verdict(self) -> str:
        """damaged or clean."""
        return "damaged" if self.mask.any() else "clean"


@dataclasses.dataclass(frozen=True)
class Annotator:
    """How a person marks.

    Attributes:
        jitter_px: standard deviation in pixels by which an outline lies off.
        jitter_scale_px: length in pixels along which it lies off alike.
        missed: probability of overlooking a component of 2 % of the picture.
        missed_per_log_area: what the logit of that falls by where the area is e times as large.
        missed_per_contrast: what the logit falls by where the component's edge has a contrast of 1 (white in black).
        false_rate: expected number of invented marks a picture.
        anchor: probability that a proposed component is left as it is: a true one (IoU >= 0.5) without an outline of
            one's own, a false one as if it were true.
        seconds_per_picture: what looking takes.
        seconds_per_proposed: what accepting or refusing a component takes.
        seconds_per_drawn: what drawing a region takes.

    Raises:
        UserError: a value is out of range.
    """

    jitter_px: float = 1.0
    jitter_scale_px: float = 4.0
    missed: float = 0.1
    missed_per_log_area: float = 0.5
    missed_per_contrast: float = 0.0
    false_rate: float = 0.05
    anchor: float = 0.5
    seconds_per_picture: float = 4.0
    seconds_per_proposed: float = 3.0
    seconds_per_drawn: float = 20.0

    def __post_init__(self):
        for name in ("missed", "anchor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(expected(name, "a probability in [0, 1]", getattr(self, name)))
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise UserError(expected(field.name, "a finite number >= 0", getattr(self, field.name)))

    def marks(
        self,
        truth: np.ndarray,
        proposal: np.ndarray | None = None,
        picture: np.ndarray | None = None,
        *,
        seed: int | Sequence[int] = 0,
    ) -> Marked:
        """What the rater answers to a picture.

        Args:
            truth: (H, W) bool, what is broken.
            proposal: (H, W) bool, what the rater is shown as marked; None: nothing.
            picture: (H, W, 3) uint8, for the contrast; None: it does not matter.
            seed: of the rater and the picture; the answer is a function of all arguments.
        """
        rng = np.random.default_rng(seed)
        found = [part for part in parts_of(truth) if rng.uniform() >= self.missing(part, picture)]
        proposed = [] if proposal is None else parts_of(proposal)
        kept, replaced = self._taken(proposed, found, rng)
        drawn = [part for index, part in enumerate(found) if index not in replaced]
        mask = self._wobbled(drawn, truth.shape, rng)
        for part in kept:
            mask |= part
        invented = [_blob(truth.shape, rng) for _ in range(rng.poisson(self.false_rate))]
        for blob in invented:
            mask |= blob
        seconds = self.seconds_per_picture + self.seconds_per_proposed * len(proposed)
        seconds += self.seconds_per_drawn * (len(drawn) + len(invented))
        return Marked(mask, seconds, len(kept), len(proposed) - len(kept), len(drawn) + len(invented))

    def missing(self, part: np.ndarray, picture: np.ndarray | None = None) -> float:
        """The probability of overlooking a component (H, W) bool: logistic in the log of its area, and contrast."""
        if not 0 < self.missed < 1:
            return self.missed
        logit = math.log(self.missed / (1 - self.missed))
        logit -= self.missed_per_log_area * math.log(part.mean() / USUAL_AREA)
        if picture is not None and self.missed_per_contrast:
            logit -= self.missed_per_contrast * contrast_of(part, picture)
        return 1 / (1 + math.exp(-logit))

    def _taken(self, proposed, found, rng) -> tuple[list[np.ndarray], set[int]]:
        """The proposed components that are left as they are, and the indices of the found ones that they stand for."""
        from diffdoctor.annotate.overlap import iou

        kept, replaced = [], set()
        for part in proposed:
            overlaps = [iou(part, other) for other in found]
            best = int(np.argmax(overlaps)) if overlaps else -1
            if rng.uniform() < self.anchor:
                kept.append(part)
                if best >= 0 and overlaps[best] >= 0.5:
                    replaced.add(best)
        return kept, replaced

    def _wobbled(self, drawn: list[np.ndarray], shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        mask = np.zeros(shape, bool)
        for part in drawn:
            mask |= part
        if not self.jitter_px or not drawn:
            return mask
        return signed_distance(mask) + self.jitter_px * _smooth_noise(shape, self.jitter_scale_px, rng) > 0


def parts_of(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected components of a mask (H, W) bool, each (H, W) bool."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3), bool))
    return [labels == index for index in range(1, count + 1)]


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Distance in pixels from a mask's outline, which runs between pixels: positive inside, (H, W) float64."""
    from scipy.ndimage import distance_transform_edt

    inside = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] if mask.all() else distance_transform_edt(mask)
    outside = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
    return np.where(mask, inside - 0.5, 0.5 - outside)


def contrast_of(part: np.ndarray, picture: np.ndarray) -> float:
    """How far a component stands out: |mean grey inside - mean grey of the ring around it|, in [0, 1]."""
    from scipy.ndimage import binary_dilation

    ring = binary_dilation(part, iterations=3) & ~part
    grey = picture.mean(axis=2) / 255
    return float(abs(grey[part].mean() - grey[ring].mean())) if ring.any() else 0.0


def _smooth_noise(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.standard_normal(shape), scale, mode="wrap")
    return noise / max(float(noise.std()), 1e-12)


def _blob(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    diagonal = math.hypot(*shape)
    y, x = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
    tall, wide = rng.uniform(0.03, 0.08, 2) * diagonal
    return ((rows + 0.5 - y) / tall) ** 2 + ((columns + 0.5 - x) / wide) ** 2 < 1
