"""Whether a detector sees anything at all, in one plain sentence: its other figures mean nothing where it does not."""

from __future__ import annotations

import math


def blindness(
    name: str,
    *,
    hit_rate: float | None,
    false_positive_rate: float | None,
    damaged: str = "the damaged pictures",
    clean: str = "the clean ones",
) -> str | None:
    """The sentence for a detector that cannot tell broken pictures from sound ones; None for one that may.

    Args:
        name: what the detector is here, such as "the judge".
        hit_rate: share of the damaged pictures that it flags, in [0, 1]; None or NaN: there were none.
        false_positive_rate: the same for the clean ones.
        damaged: which pictures were damaged.
        clean: which were clean.
    """
    if _is(hit_rate, 0):
        return f"{name} is blind: it flags none of {damaged}"
    if _is(false_positive_rate, 1):
        return f"{name} is of no use: it flags all of {clean}"
    return None


def _is(rate: float | None, value: float) -> bool:
    return rate is not None and not math.isnan(rate) and rate == value
