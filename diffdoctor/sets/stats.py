"""`diffdoctor set stats`: what sets hold, from their commits alone where they were made in units."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffdoctor.detector.balance import statistics_of_sums
from diffdoctor.engine.sets import SetSums
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.record import METRICS, RunFolder, read_json, versions
from diffdoctor.sets.config import SetStatsConfig
from diffdoctor.sets.opened import OpenSet, open_sets
from diffdoctor.sets.report import PAGE, write_quality


def run_set_stats(config: SetStatsConfig) -> dict:
    """Run `diffdoctor set stats`.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: a set cannot be read.
    """
    sets = open_sets(config.sets)
    metrics = describe(sets, config.limit)
    if config.previous:
        metrics["drift"] = drift(metrics, describe(open_sets(config.previous), config.limit))
    if config.duplicates:
        metrics["duplicates"] = read_json(Path(config.duplicates) / METRICS)
    for line in _table(metrics):
        print(line)
    if config.output is not None:
        identity: dict[str, Any] = {"sets": config.sets, "previous": config.previous}
        with RunFolder(config.output, "set stats", identity, {PAGE: None}) as run:
            run.begin(config, overwrite=True)
            write_quality(run.path / PAGE, sets, metrics, config.samples)
            atomic_write_json(run.path / METRICS, metrics | {"versions": versions()})
        print(run.path / PAGE, file=sys.stderr)
    return metrics


def describe(sets: Iterable[OpenSet], limit: float) -> dict[str, Any]:
    """The figures of some sets together.

    Args:
        sets: the sets.
        limit: see `balance.statistics_of_sums`.

    Returns:
        `pictures`, `flagged`, `mean_confidence`; `labels`, `generators` and `sizes`, {name: pictures}; `areas`,
        pictures by share of broken pixels in 20 steps; `categories`, see `balance.CategoryStatistics`; `failed_units`.
    """
    sums, failed = SetSums(), {}
    for each in sets:
        sums.join(each.sums().entries())
        failed |= {f"{each.folder}: {unit}": reason for unit, reason in each.failed().items()}
    labels, generators, sizes = {}, {}, {}
    categories: dict[str, list] = {}
    areas = [0] * len(next(iter(sums.groups.values()), {"areas": []})["areas"])
    for (category, generator, label), group in sorted(sums.groups.items()):
        for counts, name in ((labels, label or "none"), (generators, generator or "unknown")):
            counts[name] = counts.get(name, 0) + group["pictures"]
        for size, count in group["sizes"].items():
            sizes[size] = sizes.get(size, 0) + count
        areas = [a + b for a, b in zip(areas, group["areas"], strict=True)]
        total = categories.setdefault(category, [0, 0.0, 0])
        for place, name in enumerate(("pictures", "mean_confidence", "flagged")):
            total[place] += group[name]
    pictures = int(sums.total("pictures"))
    return {
        "pictures": pictures,
        "flagged": int(sums.total("flagged")),
        "mean_confidence": sums.total("mean_confidence") / pictures if pictures else None,
        "labels": labels,
        "generators": generators,
        "sizes": dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
        "areas": areas,
        "categories": [
            dataclasses.asdict(each)
            for each in statistics_of_sums({name: tuple(total) for name, total in categories.items()}, limit=limit)
        ],
        "failed_units": failed,
    }


def drift(now: dict[str, Any], before: dict[str, Any]) -> list[dict[str, Any]]:
    """By category: pictures, share flagged and mean confidence, before and now; the largest change of share first."""
    sides = [{each["category"]: each for each in side["categories"]} for side in (before, now)]
    rows = []
    for category in sorted({*sides[0], *sides[1]}):
        found = [side.get(category) for side in sides]
        row: dict[str, Any] = {"category": category}
        for name in ("pictures", "flagged", "mean_confidence"):
            row[name] = [None if each is None else each[name] for each in found]
        rows.append(row)
    return sorted(rows, key=lambda row: -abs((row["flagged"][1] or 0.0) - (row["flagged"][0] or 0.0)))


def _table(metrics: dict[str, Any]) -> list[str]:
    pictures = metrics["pictures"]
    lines = [f"{pictures:,} pictures, {metrics['flagged']:,} flagged"]
    for title in ("labels", "generators", "sizes"):
        shown = list(metrics[title].items())[:8]
        more = f", {len(metrics[title]) - 8} more" if len(metrics[title]) > 8 else ""
        lines.append(f"{title}: {', '.join(f'{name} {count:,}' for name, count in shown)}{more}")
    for each in metrics["categories"]:
        if each["verdict"]:
            figures = f"{each['flagged']:.1%} of {each['pictures']:,}, z {each['z']:+.1f}"
            lines.append(f"{each['verdict']}: {each['category'] or 'no category'} ({figures})")
    return lines
