"""A simulated person who marks broken letters with boxes, not quite exactly, and overlooks some."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from benchmarks.studies.signs import world
from benchmarks.studies.signs.oracle import Reading


@dataclasses.dataclass(frozen=True)
class Rater:
    """How well the person marks.

    Args:
        wobble: each side of a box is moved by up to this many pixels either way.
        missed: share of the broken letters that are overlooked.
        invented: share of the pictures with a mark on a sound letter.
        seconds_per_picture: what looking at a picture takes a person, for the effort of labels; an assumption.
        seconds_per_mark: likewise, what drawing a box takes.
    """

    wobble: int = 1
    missed: float = 0.1
    invented: float = 0.05
    seconds_per_picture: float = 2.0
    seconds_per_mark: float = 3.0

    def marks(self, reading: Reading, seed: int) -> tuple[np.ndarray, float]:
        """The person's masks of signs that the oracle read.

        Args:
            reading: of N signs; the marks of sign i depend on it, the seed and i alone.
            seed: of the person.

        Returns:
            masks (N, 16, 40) float32 of 0 and 1, and the person's seconds.
        """
        broken = reading.broken_letters()
        masks = np.zeros(reading.residual.shape, np.float32)
        boxes = 0
        for index, row in enumerate(broken):
            rng = np.random.default_rng([seed, 7, index])
            seen = row & (rng.uniform(size=row.shape) >= self.missed)
            if not row.all() and rng.uniform() < self.invented:
                seen[rng.choice(np.flatnonzero(~row))] = True
            for letter in np.flatnonzero(seen):
                left, top, right, bottom = reading.boxes[index, letter] + rng.integers(-self.wobble, self.wobble + 1, 4)
                masks[index, max(0, top) : bottom, max(0, left) : right] = 1
                boxes += 1
        return masks, self.seconds_per_picture * len(masks) + self.seconds_per_mark * boxes


def samples(pictures: np.ndarray, masks: np.ndarray, prompts, *, key: str, round: int, **fields) -> Iterator[dict]:
    """Labelled pictures as `write_shards` takes them, labelled by a person.

    Args:
        pictures: (N, 16, 40, 3) uint8.
        masks: (N, 16, 40) in [0, 1].
        prompts: N strings, of which the colour becomes the category.
        key: what the pictures' names begin with.
        round: of labelling, from 0.
        **fields: further values of every picture, such as generator.
    """
    for index, (picture, mask, prompt) in enumerate(zip(pictures, masks, prompts, strict=True)):
        yield {
            "key": f"{key}{index:05d}",
            "picture": picture,
            "mask": mask,
            "prompt": prompt,
            "category": prompt.split()[0],
            "label": "human",
            "round": round,
            **fields,
        }


def clean_samples(signs: world.Signs) -> Iterator[dict]:
    """Clean signs as `write_shards` takes them."""
    for index, (picture, prompt) in enumerate(zip(signs.pictures, signs.prompts, strict=True)):
        yield {"key": f"clean{index:05d}", "picture": picture, "prompt": prompt, "category": prompt.split()[0]}
