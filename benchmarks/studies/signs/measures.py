"""What the oracle says of a row's pictures beside those of the untreated pipeline, the same prompts and seeds."""

from __future__ import annotations

import numpy as np

from benchmarks.studies.signs import world
from benchmarks.studies.signs.oracle import TAUS, Reading
from diffdoctor.measures.pixels import auroc_of
from diffdoctor.measures.rates import paired_bootstrap, wilson_interval


def measure(before: Reading, after: Reading, prompts: list[str]) -> dict:
    """A row's figures.

    Args:
        before: N signs of the untreated pipeline.
        after: the same prompts and seeds.
        prompts: N strings, of which the first word is the colour asked for.

    Returns:
        pictures; rates ({tau: {rate, interval, ratio, ratio_interval, difference, difference_interval}}, the last four
        against `before`); letters_broken; mended (of the letters broken before, those sound now), broke (of the sound
        ones, those broken now), kept (of those sound before and now, those that are the same letter); colour (share
        with the colour that was asked for) and colour_distance (the median, in the length of an RGB difference);
        entropy (of the sound letters, in bits); distinct_words (share of the pictures).
    """
    sound_before, sound_after = ~before.broken_letters(), ~after.broken_letters()
    both = sound_before & sound_after
    asked = np.array([prompt.split()[0] for prompt in prompts])
    return {
        "pictures": len(after),
        "rates": {f"{tau:.2f}": rate_of(before.broken(tau), after.broken(tau)) for tau in TAUS},
        "letters_broken": float((~sound_after).mean()),
        "mended": _share(sound_after[~sound_before]),
        "broke": _share(~sound_after[sound_before]),
        "kept": _share((before.letters() == after.letters())[both]),
        "colour": float((after.colours == asked).mean()),
        "colour_distance": float(np.median(after.colour_distance)),
        "entropy": entropy(after.letters()[sound_after]),
        "distinct_words": len(set(after.words.tolist())) / len(after),
    }


def rate_of(before: np.ndarray, after: np.ndarray) -> dict:
    """The share of flags (N,) bool with its interval, and how it changed against another's, picture by picture."""
    paired = paired_bootstrap(before, after)
    interval = list(wilson_interval(int(after.sum()), len(after)))
    return {"rate": float(after.mean()), "interval": interval, **paired}


def entropy(letters: np.ndarray) -> float:
    """Of the distribution of letters (n,), in bits; at most log2 6 = 2.585."""
    shares = np.array([(letters == letter).mean() for letter in world.LETTERS]) if len(letters) else np.zeros(1)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def letters_auroc(confidence: np.ndarray, reading: Reading) -> float:
    """How well the largest confidence in a letter's columns tells broken letters from sound ones.

    Args:
        confidence: (N, 16, 40) maps.
        reading: of the same N signs.
    """
    columns = [
        [each[:, first:end].max() for first, end in places]
        for each, places in zip(confidence, reading.columns, strict=True)
    ]
    return auroc_of(np.array(columns).ravel(), reading.broken_letters().ravel())


def repair_figures(done: list, before: list[np.ndarray]) -> dict:
    """What `repair` did.

    Args:
        done: its results.
        before: the pictures (H, W, 3) uint8 that it was given.

    Returns:
        regions, kept and tries; changed_outside (pixels outside the masks that are not what they were), changed_share
        (of all pixels, the masks) and seam (gradient energy along the masks' rims, over that before; None: no rims).
    """
    regions = [region for each in done for region in each.regions]
    outside = [
        int((each.pixels != picture).any(2)[~each.mask].sum()) for each, picture in zip(done, before, strict=True)
    ]
    seams = np.array([each.seam() for each in done if each.changed]).reshape(-1, 3)
    return {
        "regions": len(regions),
        "kept": sum(region.kept for region in regions),
        "tries": sum(len(region.tries) for region in regions),
        "changed_outside": sum(outside),
        "changed_share": float(np.mean([each.mask.mean() for each in done])),
        "seam": float(seams[:, 1] @ seams[:, 2] / (seams[:, 0] @ seams[:, 2])) if len(seams) else None,
    }


def hacking(oracle_before: float, oracle_after: float, own_before: float, own_after: float) -> float | None:
    """The share by which a detector's rate falls over the share by which the oracle's does; 1: it tells the truth.

    None where the oracle sees nothing fall.
    """
    truth = 1 - oracle_after / oracle_before if oracle_before else 0.0
    return (1 - own_after / own_before) / truth if truth > 0.02 and own_before else None


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
