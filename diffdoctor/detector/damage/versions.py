"""The labelled versions of a clean picture: itself, benign changes of it, and damaged ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffdoctor.detector.damage.benign import benign
from diffdoctor.detector.damage.injection import NoVisibleDamage, inject
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class VersionOptions:
    """Which versions are made of each picture; see `commands.inject.InjectConfig`.

    Attributes:
        damaged: number of damaged versions.
        benign: number of benign changes.
        clean: whether the picture itself is a version.
        kinds: names of the kinds of damage to draw from.
        strength: range in (0, 1], see `injection.inject`.
        area: range of the region's size, as a share of the picture.
        visible: smallest mean change of the changed pixels, in [0, 1].
        seed: of all draws.
    """

    damaged: int
    benign: int
    clean: bool
    kinds: tuple[str, ...]
    strength: tuple[float, float]
    area: tuple[float, float]
    visible: float
    seed: int


def labelled_versions(options: VersionOptions, index: int, sample: dict) -> tuple[list[dict], int]:
    """Make the labelled versions of one picture.

    Args:
        options: which versions.
        index: of the picture in its set; every draw is a function of the seed and this index.
        sample: `picture` (H, W, 3) uint8, `name`, and optionally prompt, category, generator and round.

    Returns:
        (samples for `write_shards`, each with the `original` picture; number of damaged versions that were left out
        since their damage was not visible).

    Raises:
        UserError: a kind is not registered in this process.
    """
    _check_known(options.kinds)
    picture, empty = sample["picture"], np.zeros(sample["picture"].shape[:2], np.float32)
    known = {name: sample[name] for name in ("prompt", "category", "generator", "round") if name in sample}
    common = {**known, "source": sample["name"], "original": picture}
    result, failed = [], 0
    if options.clean:
        entry = {"key": f"{index:08d}-clean", "picture": picture, "mask": empty, "label": "real", "kind": ""}
        result.append(common | entry)
    for number in range(options.benign):
        changed = benign(picture, np.random.default_rng([options.seed, 2, index, number]))
        entry = {"key": f"{index:08d}-benign-{number}", "label": "real", "kind": changed.kind}
        result.append(common | entry | {"picture": changed.picture, "mask": changed.mask})
    for number in range(options.damaged):
        rng = np.random.default_rng([options.seed, 1, index, number])
        try:
            damaged = inject(picture, rng, options.kinds, options.strength, options.area, visible=options.visible)
        except NoVisibleDamage:
            failed += 1
            continue
        entry = {"key": f"{index:08d}-damaged-{number}", "label": "injected", "kind": damaged.kind}
        result.append(common | entry | {"picture": damaged.picture, "mask": damaged.mask})
    return result, failed


def _check_known(kinds: Sequence[str]) -> None:
    if unknown := sorted(set(kinds) - set(damage_kinds())):
        raise UserError(
            f"kinds: {', '.join(unknown)}: not registered in the worker processes; register it in a Python file that "
            "is given as plugins, or use workers 1"
        )
