"""Which pictures `diffdoctor inject` uses, and what it makes of one, whoever does it."""

from __future__ import annotations

import math

import numpy as np

from diffdoctor.data.codec import SizeCheck
from diffdoctor.detector.damage.injection import MIN_SIDE
from diffdoctor.detector.damage.versions import Origin, VersionOptions, labelled_versions

# Damaging a larger picture takes more than eight gigabytes.
_MAX_PIXELS = 2**26
NO_MEMORY = "a picture for which there is not enough memory"


def size_check(longest: int | None) -> SizeCheck:
    """What refuses pictures that are too large even when they are shrunk to this longest side."""

    def check(height: int, width: int) -> str | None:
        shrunk = min(1.0, (longest or math.inf) / max(height, width))
        if height * width * shrunk**2 <= _MAX_PIXELS:
            return None
        return f"a picture of more than {_MAX_PIXELS:,} pixels to damage (give longest)"

    return check


def why_unused(picture: np.ndarray, sample: dict) -> str | None:
    """Why a picture (H, W, 3) is left out, given the sample it is of; None: it is used."""
    if min(picture.shape[:2]) < MIN_SIDE:
        return f"a picture of less than {MIN_SIDE} pixels"
    if np.any(sample.get("mask", 0)):
        return "a picture that is damaged already"
    return "a picture of which a part is not decided" if np.any(sample.get("ignore", 0)) else None


def versions_of(job: tuple[VersionOptions, Origin, dict]) -> tuple[list[dict], int] | None:
    """See `labelled_versions`; None where there is not enough memory for the picture."""
    try:
        return labelled_versions(*job)
    except MemoryError:
        return None
