"""How well raters agree: over pixels, over pictures, and where anything is marked at all.

Of two usual shortcuts neither is here: the agreement of marked areas does not see a wrong place at all, and an IoU of 1
for two empty masks flatters raters who mark little.
"""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffdoctor.annotate.alpha import Tallies, tally
from diffdoctor.annotate.answers import marks_of, newest_answers
from diffdoctor.annotate.overlap import component_f1, iou, tolerant_iou
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.schema import KNOWN_KINDS

Pair = tuple[int, int]
_PAIRWISE: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "iou_where_marked": iou,
    "tolerant_iou": tolerant_iou,
    "component_f1": component_f1,
}
MEASURES = ("pixel_alpha", "picture_alpha", *_PAIRWISE)


@dataclass
class Compared:
    """The answers of several raters to one picture, as counts.

    Attributes:
        category: of the picture.
        pixels: see `alpha.tally`.
        pictures: the same of the one unit "is it damaged".
        pairs: {raters: {measure: value}}, NaN where neither marks anything.
        pair_tallies: {raters: (pixels, pictures)} of each pair alone.
    """

    category: str
    pixels: dict[Pair, int]
    pictures: dict[Pair, int]
    pairs: dict[Pair, dict[str, float]] = field(default_factory=dict)
    pair_tallies: dict[Pair, tuple[dict, dict]] = field(default_factory=dict)


def compare(
    raters: Sequence[int],
    masks: Sequence[np.ndarray],
    ignored: Sequence[np.ndarray | None] | None = None,
    category: str = "",
    verdicts: Sequence[bool] | None = None,
) -> Compared:
    """Compare the masks of one picture.

    Args:
        raters: their ids, in rising order.
        masks: (H, W) bool of each.
        ignored: of each, (H, W) bool where the rater does not decide, which counts as not answered; None: nowhere.
        category: of the picture.
        verdicts: of each, whether the picture is damaged; None: where the mask marks anything.
    """
    ignored = [None] * len(masks) if ignored is None else ignored
    answered = [np.ones_like(mask) if none is None else ~none for mask, none in zip(masks, ignored, strict=True)]
    damaged = [np.array([verdict]) for verdict in (map(np.any, masks) if verdicts is None else verdicts)]
    found = Compared(category, tally(masks, answered), tally(damaged))
    for first, second in itertools.combinations(range(len(masks)), 2):
        both = masks[first], masks[second]
        pair = raters[first], raters[second]
        found.pairs[pair] = {name: measure(*both) for name, measure in _PAIRWISE.items()}
        given = answered[first], answered[second]
        found.pair_tallies[pair] = tally(both, given), tally([damaged[first], damaged[second]])
    return found


def agreement_of(compared: Sequence[Compared], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The measures over pictures, with intervals from resampling the pictures.

    Args:
        compared: the pictures.
        bootstrap: number of resamples; 0: no intervals.
        seed: of the resampling.

    Returns:
        `pictures`, the measures by name (None where it is not defined) and `NAME_interval`: [low, high] of 95 %.
    """
    tallies = {
        "pixel_alpha": Tallies([each.pixels for each in compared]),
        "picture_alpha": Tallies([each.pictures for each in compared]),
    }
    # Sums and counts a picture: a mean over pairs of any resampling follows from them.
    sums = {name: [_sum_of(each, name) for each in compared] for name in _PAIRWISE}
    arrays = {name: np.array(values, np.float64).reshape(-1, 2) for name, values in sums.items()}

    def measured(times: np.ndarray) -> dict[str, float]:
        found = {name: each.alpha(times) for name, each in tallies.items()}
        for name, each in arrays.items():
            total, count = times @ each
            found[name] = total / count if count else math.nan
        return found

    result: dict[str, Any] = {"pictures": len(compared)}
    result |= {name: _json(value) for name, value in measured(np.ones(len(compared))).items()}
    if bootstrap and len(compared) > 1:
        rng = np.random.default_rng(seed)
        draws = [measured(times) for times in rng.multinomial(len(compared), _even(len(compared)), bootstrap)]
        for name in MEASURES:
            values = np.array([draw[name] for draw in draws])
            values = values[~np.isnan(values)]
            bounds = np.quantile(values, [0.025, 0.975]).tolist() if len(values) else [None, None]
            result[f"{name}_interval"] = bounds
    return result


def _even(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


def _sum_of(each: Compared, name: str) -> tuple[float, int]:
    values = [pair[name] for pair in each.pairs.values() if not math.isnan(pair[name])]
    return sum(values), len(values)


def _json(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def measure_agreement(project: Project, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How well the raters of a project agree, over all tasks that two or more answered.

    Args:
        project: the project.
        bootstrap: number of resamples for the intervals.
        seed: of the resampling.

    Returns:
        `all`, `categories` and `pairs` (each with `name` or `raters`), as of `agreement_of`; `anchoring`, see
        `anchoring_of`; `conflicts`.
    """
    store = project.store
    names = {row["id"]: row["name"] for row in store.all("SELECT id, name FROM annotator")}
    compared = list(compared_tasks(project))
    by_category: dict[str, list[Compared]] = defaultdict(list)
    by_pair: dict[Pair, list[Compared]] = defaultdict(list)
    for each in compared:
        by_category[each.category].append(each)
        for pair, (pixels, pictures) in each.pair_tallies.items():
            by_pair[pair].append(Compared(each.category, pixels, pictures, {pair: each.pairs[pair]}))
    options = {"bootstrap": bootstrap, "seed": seed}
    return {
        "all": agreement_of(compared, **options),
        "categories": [{"name": name, **agreement_of(by_category[name], **options)} for name in sorted(by_category)],
        "pairs": [
            {"raters": [names[rater] for rater in pair], **agreement_of(each, **options)}
            for pair, each in sorted(by_pair.items())
        ],
        "anchoring": anchoring_of(project, **options),
        "conflicts": store.one("SELECT count(*) FROM task WHERE state = 'conflict'")[0],
    }


def compared_tasks(project: Project):
    """`Compared` of each task that two or more raters judged, one at a time."""
    store = project.store
    rows = store.all(
        "SELECT task.id, height, width, category FROM task JOIN picture ON picture.id = picture WHERE "
        "(SELECT count(DISTINCT annotator) FROM annotation WHERE task = task.id AND verdict != 'skipped') >= 2 "
        "ORDER BY task.id"
    )
    for row in rows:
        answers = [each for each in newest_answers(store, row["id"]) if each["verdict"] != "unusable"]
        if len(answers) < 2:
            continue
        shape = row["height"], row["width"]
        masks = [marks_of(store, each, shape) for each in answers]
        ignored = [None if each["ignore"] is None else store.mask(each["ignore"]) > 0 for each in answers]
        verdicts = [each["verdict"] == "damaged" for each in answers]
        yield compare([each["annotator"] for each in answers], masks, ignored, row["category"], verdicts)


def anchoring_of(project: Project, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What showing the detector's map does to raters, from the tasks where by lot it was hidden.

    A marked component is `unproposed` where less than half of it lies in the proposal. Raters who rely on the map mark
    fewer of those; the difference blind - assisted is what they overlook for it.

    Args:
        project: the project.
        bootstrap: number of resamples for the interval.
        seed: of the resampling.

    Returns:
        Of `blind` and `assisted` answers: their number and mean unproposed components; `difference` and its 95 %
        interval, None without answers of both kinds.
    """
    store = project.store
    counts: dict[str, list[int]] = {"blind": [], "assisted": []}
    rows = store.all(
        "SELECT annotation.*, blind, proposal, height, width FROM annotation JOIN task ON task.id = task "
        "JOIN picture ON picture.id = picture WHERE proposal IS NOT NULL AND verdict IN ('damaged', 'clean') "
        f"AND version = 1 AND kind NOT IN ({', '.join(repr(kind) for kind in KNOWN_KINDS)}) ORDER BY annotation.id"
    )
    for row in rows:
        counts["blind" if row["blind"] else "assisted"].append(_unproposed(project, row))
    values = {name: np.array(each, np.float64) for name, each in counts.items()}
    result: dict[str, Any] = {
        name: {"answers": len(each), "unproposed": float(each.mean()) if len(each) else None}
        for name, each in values.items()
    }
    if not all(map(len, values.values())):
        return {**result, "difference": None, "difference_interval": [None, None]}
    rng = np.random.default_rng(seed)
    draws = [
        rng.choice(values["blind"], len(values["blind"])).mean()
        - rng.choice(values["assisted"], len(values["assisted"])).mean()
        for _ in range(bootstrap)
    ]
    difference = float(values["blind"].mean() - values["assisted"].mean())
    interval = np.quantile(draws, [0.025, 0.975]).tolist() if draws else [None, None]
    return {**result, "difference": difference, "difference_interval": interval}


def _unproposed(project: Project, row: sqlite3.Row) -> int:
    from scipy import ndimage

    if row["mask"] is None:
        return 0
    marks = marks_of(project.store, row)
    proposed = project.store.mask(row["proposal"]) >= project.settings.threshold_byte
    labels, count = ndimage.label(marks, np.ones((3, 3), bool))
    inside = ndimage.mean(proposed, labels, np.arange(1, count + 1))
    return int(np.count_nonzero(np.asarray(inside) < 0.5))
