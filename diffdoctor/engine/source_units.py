"""Units whose inputs are pictures: up to so many picture files, or one shard of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffdoctor.data.sources import Source
from diffdoctor.data.store_path import absolute, at
from diffdoctor.engine.units import Plan, Unit, unit_name


def plan_of_sources(
    sources: Sequence[Source], size: int, details: Callable[[list[Source]], dict[str, Any]] = lambda group: {}
) -> Plan:
    """All picture files in units of up to `size`, then each shard as a unit.

    Args:
        sources: files and shards, no videos.
        size: files in a unit.
        details: what else the worker must know of a unit's sources.
    """
    files = [source for source in sources if not source.is_shard]
    groups = [files[first : first + size] for first in range(0, len(files), size)]
    groups += [[source] for source in sources if source.is_shard]
    units, first = [], 0
    for number, group in enumerate(groups):
        known = {
            "names": [source.name for source in group],
            "categories": [source.category for source in group],
            "captions": [source.caption for source in group],
        }
        count = 0 if group[0].is_shard else len(group)
        paths = tuple(absolute(source.path) for source in group)
        stamp = " ".join(source.stamp() for source in group)
        units.append(Unit(unit_name(number), paths, first, count, stamp, known | details(group)))
        first += count
    return Plan(units)


def sources_of(unit: Unit) -> list[Source]:
    """The sources of a unit of such a plan."""
    columns = (unit.details[name] for name in ("names", "categories", "captions"))
    return [Source(at(path), *values) for path, *values in zip(unit.inputs, *columns, strict=True)]
