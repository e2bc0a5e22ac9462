"""The labelled versions of a clean picture: itself, benign changes of it, and damaged ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffdoctor.detector.damage.benign import benign
from diffdoctor.detector.damage.injection import NoVisibleDamage, inject
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class VersionOptions:
    """Which versions are made of each picture; see `commands.inject_config.InjectConfig`.

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


class Origin(NamedTuple):
    """Which picture it is of which versions are made.

    Attributes:
        key: which the keys of its versions begin with.
        draws: whole numbers from 0; every draw is a function of the seed and these.
    """

    key: str
    draws: tuple[int, ...]

    @classmethod
    def of_index(cls, index: int) -> Origin:
        """By the picture's index among those of the input that are used."""
        return cls(f"{index:08d}", (index,))

    @classmethod
    def of_name(cls, key: str, name: str) -> Origin:
        """By the picture's name, whatever else is in the input."""
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest()
        return cls(key, tuple(np.frombuffer(digest, "<u4").tolist()))


def labelled_versions(options: VersionOptions, origin: Origin, sample: dict) -> tuple[list[dict], int]:
    """Make the labelled versions of one picture.

    Args:
        options: which versions.
        origin: of the picture.
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
        entry = {"key": f"{origin.key}-clean", "picture": picture, "mask": empty, "label": "real", "kind": ""}
        result.append(common | entry)
    for number in range(options.benign):
        changed = benign(picture, np.random.default_rng([options.seed, 2, *origin.draws, number]))
        entry = {"key": f"{origin.key}-benign-{number}", "label": "real", "kind": changed.kind}
        result.append(common | entry | {"picture": changed.picture, "mask": changed.mask})
    for number in range(options.damaged):
        rng = np.random.default_rng([options.seed, 1, *origin.draws, number])
        try:
            damaged = inject(picture, rng, options.kinds, options.strength, options.area, visible=options.visible)
        except NoVisibleDamage:
            failed += 1
            continue
        entry = {"key": f"{origin.key}-damaged-{number}", "label": "injected", "kind": damaged.kind}
        result.append(common | entry | {"picture": damaged.picture, "mask": damaged.mask})
    return result, failed


def _check_known(kinds: Sequence[str]) -> None:
    if unknown := sorted(set(kinds) - set(damage_kinds())):
        raise UserError(
            f"kinds: {', '.join(unknown)}: not registered in the worker processes; register it in a Python file that "
            "is given as plugins, or use workers 1"
        )
