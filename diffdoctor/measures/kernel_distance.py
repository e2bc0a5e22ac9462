"""Kernel distances of two sets of features: unbiased, so that a few hundred pictures already say something."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from diffdoctor.measures.features import FeatureRows, blocks
from diffdoctor.runs.errors import expected

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Rows of features that are compared with all others at a time.
_ROWS = 1024
# Of the Gaussian kernel, as in CMMD.
_BANDWIDTH, _SCALE = 10.0, 1000.0


def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x · y / D + 1)³, the kernel of KID.

    Source: M. Bińkowski et al., Demystifying MMD GANs, arXiv 1801.01401.

    Args:
        x: (N, D).
        y: (M, D).

    Returns:
        (N, M).
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1000 exp(-‖x/‖x‖ - y/‖y‖‖² / 200), the kernel of CMMD.

    Source: S. Jayasumana et al., Rethinking FID, arXiv 2401.09603.

    Args:
        x: (N, D).
        y: (M, D).

    Returns:
        (N, M).
    """
    x, y = (torch.nn.functional.normalize(value, dim=1) for value in (x, y))
    return _SCALE * torch.exp((x @ y.T - 1) / _BANDWIDTH**2)


@dataclass(frozen=True)
class _Sums:
    """Sums of a kernel over two sets: of each row with the others of its own set, and with all of the other set."""

    real: torch.Tensor
    generated: torch.Tensor
    real_across: torch.Tensor
    generated_across: torch.Tensor

    def squared(self) -> float:
        """The unbiased estimate of the squared distance."""
        n, m = len(self.generated), len(self.real)
        inside = self.generated.sum() / (n * (n - 1)) + self.real.sum() / (m * (m - 1))
        return float(inside - 2 * self.generated_across.sum() / (n * m))

    def without_each(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimate without each generated picture (N,), and without each real one (M,)."""
        n, m = len(self.generated), len(self.real)
        generated, real, across = self.generated.sum(), self.real.sum(), self.generated_across.sum()
        one = (generated - 2 * self.generated) / ((n - 1) * (n - 2)) + real / (m * (m - 1))
        one = one - 2 * (across - self.generated_across) / ((n - 1) * m)
        other = generated / (n * (n - 1)) + (real - 2 * self.real) / ((m - 1) * (m - 2))
        return one, other - 2 * (across - self.real_across) / (n * (m - 1))


def kernel_distance(
    real: FeatureRows, generated: FeatureRows, kernel: Kernel = cubic, *, level: float = 0.95
) -> tuple[float, list[float]]:
    """The squared maximum mean discrepancy of two sets of features: KID with `cubic`, CMMD with `gaussian`.

    The estimate is unbiased: it does not depend on the sets' sizes, and is about 0, above or below, for two sets of the
    same distribution. All pairs enter, none twice.

    Args:
        real: (M, D), M at least 3.
        generated: (N, D), N at least 3.
        kernel: of rows (N, D) and (M, D), giving (N, M).
        level: coverage of the interval, in (0, 1).

    Returns:
        The distance, and its interval by the jackknife over both sets, which is too wide where they do not differ.

    Raises:
        ValueError: fewer rows.
    """
    _check(real=real, generated=generated)
    reference = _all(real)
    sums = _sums(reference, _all(generated), kernel, _within(reference, kernel))
    value = sums.squared()
    return value, _interval(value, sums.without_each(), level)


def kernel_distances(
    real: FeatureRows,
    before: FeatureRows,
    after: FeatureRows,
    kernel: Kernel = cubic,
    *,
    damaged: FeatureRows | None = None,
    level: float = 0.95,
) -> dict[str, float | list[float]]:
    """`kernel_distance` of the pictures before and after a treatment from the same real ones, and what changed.

    Args:
        real: (M, D), M at least 3.
        before: (N, D), N at least 3.
        after: (N, D) of the same prompts and seeds, in the same order.
        kernel: as in `kernel_distance`.
        damaged: (K, D), the real pictures with damage, K at least 3; None: none.
        level: coverage of the intervals, in (0, 1).

    Returns:
        `before`, `after`, `difference` (after less before, over pairs of pictures) and their `_interval`s, and
        `ceiling`, the distance of the damaged ones, where there are such.

    Raises:
        ValueError: fewer rows, or not as many after as before.
    """
    _check(real=real, before=before, **({} if damaged is None else {"damaged": damaged}))
    if len(after) != len(before):
        raise ValueError(expected("after", f"as many rows as before, {len(before)}", len(after)))
    reference = _all(real)
    within = _within(reference, kernel)
    found, without = {}, {}
    for name, features in (("before", before), ("after", after)):
        sums = _sums(reference, _all(features), kernel, within)
        found[name], without[name] = sums.squared(), sums.without_each()
    result = {}
    changed = tuple(one - other for one, other in zip(without["after"], without["before"], strict=True))
    difference = found["after"] - found["before"]
    for name, value, parts in (
        *((name, found[name], without[name]) for name in found),
        ("difference", difference, changed),
    ):
        result[name], result[f"{name}_interval"] = value, _interval(value, parts, level)
    if damaged is not None:
        result["ceiling"] = _sums(reference, _all(damaged), kernel, within).squared()
    return result


def _check(**sets: FeatureRows) -> None:
    for name, features in sets.items():
        if len(features) < 3:
            raise ValueError(expected(name, "at least 3 rows", len(features)))


def _all(features: FeatureRows) -> torch.Tensor:
    return torch.cat(list(blocks(features)))


def _sums(real: torch.Tensor, generated: torch.Tensor, kernel: Kernel, within_real: torch.Tensor) -> _Sums:
    across, back = _row_sums(generated, real, kernel)
    return _Sums(within_real, _within(generated, kernel), back, across)


def _within(x: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    own = torch.cat([kernel(part, part).diagonal() for part in x.split(_ROWS)])
    return _row_sums(x, x, kernel)[0] - own


def _row_sums(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = [], torch.zeros(len(y), dtype=y.dtype, device=y.device)
    for part in x.split(_ROWS):
        values = kernel(part, y)
        rows.append(values.sum(1))
        columns += values.sum(0)
    return torch.cat(rows), columns


def _interval(value: float, without: tuple[torch.Tensor, torch.Tensor], level: float) -> list[float]:
    """By the jackknife's variance over two independent sets."""
    variance = sum((len(part) - 1) / len(part) * float((part - part.mean()).square().sum()) for part in without)
    reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    return [value - reach, value + reach]
