"""Checks a set's maps: with maps that are all zero, all one or inverted, training is wrong without an error."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from diffdoctor.maps.files import MapLike, read_map
from diffdoctor.runs.errors import expected

_HALF_STEP = 0.5 / 255  # of an 8-bit map; smaller values are zero there


class MapWarning(UserWarning):
    """A training set's maps are probably not what they should be."""


@dataclass
class MapReport:
    """What `check_maps` found.

    Attributes:
        count: number of maps.
        missing: number of pictures without a map.
        zero: number of maps that are 0 everywhere.
        one: number of maps that are 1 everywhere.
        constant: number of maps with another single value.
        mean: mean confidence over all maps, in [0, 1].
        broken_share: share of all maps' area at confidence >= 0.5, in [0, 1].
        warnings: one sentence for each probable mistake.
    """

    count: int = 0
    missing: int = 0
    zero: int = 0
    one: int = 0
    constant: int = 0
    mean: float = 0.0
    broken_share: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def warn(self, stacklevel: int = 2) -> None:
        """Emit each sentence as a `MapWarning`.

        Args:
            stacklevel: see `warnings.warn`; 2 names the caller's line.
        """
        for sentence in self.warnings:
            warnings.warn(sentence, MapWarning, stacklevel=stacklevel + 1)

    def __str__(self) -> str:
        lines = [
            f"{self.count} maps ({self.missing} pictures without): mean confidence {self.mean:.3f}, "
            f"{self.broken_share:.1%} of the area at 0.5 or more; {self.zero} all zero, {self.one} all one, "
            f"{self.constant} constant"
        ]
        return "\n".join([*lines, *(f"warning: {sentence}" for sentence in self.warnings)])


def check_maps(maps: Iterable[MapLike | None] | torch.Tensor) -> MapReport:
    """Check a set's confidence maps for probable mistakes.

    The report warns when every map is all zero (the loss is then the plain one), when maps are all one or otherwise
    constant, when most of the area of most maps is broken (an inverted map: confidence is 1 where the picture is
    *broken*), when no value is above 1/255 (masks of 0 and 1 in files or uint8, in which 255 is broken), when many
    pictures have the same map, and when pictures have none.

    Args:
        maps: maps as `read_map` takes them (files, arrays), None for a picture without one, or a tensor (B, 1, H, W)
            or (B, H, W): uint8, bool or float in [0, 1].

    Returns:
        Counts, means and warnings; nothing is emitted.

    Raises:
        ValueError: a map with values outside [0, 1], naming it.
    """
    if isinstance(maps, torch.Tensor):
        maps = _rows(maps)
    report = MapReport()
    means, areas, shares, contents, largest = [], [], [], Counter(), 0.0
    for each in maps:
        if each is None:
            report.missing += 1
            continue
        values = read_map(each)
        low, high = float(values.min()), float(values.max())
        largest = max(largest, high)
        means.append(float(values.mean()))
        share = float((values >= 0.5).mean())
        areas.append(share)
        report.count += 1
        if high < _HALF_STEP:
            report.zero += 1
        elif low > 1 - _HALF_STEP:
            report.one += 1
        elif high - low < _HALF_STEP:
            report.constant += 1
        else:
            shares.append(share)
            contents[hashlib.sha1(np.ascontiguousarray(values).tobytes()).digest()] += 1
    if report.count:
        report.mean, report.broken_share = float(np.mean(means)), float(np.mean(areas))
    report.warnings = _sentences(report, shares, contents, largest)
    return report


def _rows(maps: torch.Tensor) -> list[np.ndarray]:
    if maps.ndim not in (3, 4) or (maps.ndim == 4 and maps.shape[1] != 1):
        raise ValueError(expected("maps", "(B, 1, H, W) or (B, H, W)", tuple(maps.shape)))
    maps = maps.detach().cpu()
    maps = maps.float() if maps.is_floating_point() else maps
    return list(maps.reshape(len(maps), *maps.shape[-2:]).numpy())


def _sentences(report: MapReport, shares: list[float], contents: Counter, largest: float) -> list[str]:
    count, found = report.count, []
    if report.missing:
        found.append(f"{report.missing} of {report.missing + count} pictures have no map: they count as clean")
    if not count:
        return found
    if report.zero == count:
        found.append(f"all {count} maps are zero everywhere: the loss will be the one without maps")
    elif largest < 3 * _HALF_STEP:
        found.append(
            f"none of {count} maps has a value above 1/255: masks of 0 and 1? (255 is broken in files and in uint8)"
        )
    if report.one:
        found.append(f"{report.one} of {count} maps are one everywhere: the whole picture counts as broken")
    if report.constant:
        found.append(f"{report.constant} of {count} maps have the same value everywhere: they do not locate anything")
    # An artifact that fills more than half of most damaged pictures is rare.
    if shares and np.median(shares) > 0.5:
        found.append(
            f"half of the maps that are not constant are broken over {np.median(shares):.0%} of it or more: inverted? "
            "(confidence is 1 where the picture is broken, 0 where it is clean)"
        )
    most = max(contents.values(), default=0)
    if most > 1 and most > count / 2:
        found.append(f"{most} of {count} maps are the same: are they paired with their own pictures?")
    return found
