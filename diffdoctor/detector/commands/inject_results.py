"""What `diffdoctor inject` says of the set that it has made, and what it must not touch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffdoctor.data.sources import Source
from diffdoctor.data.store_path import Location, StorePath
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.damage.stats import InjectStats
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.summary import print_summary


def source_inside(output: Path, sources: Sequence[Source]) -> Location | None:
    """A source that lies in a folder, or to which a link there leads; None: there is none."""
    folder = output.resolve()
    for source in sources:
        if isinstance(source.path, StorePath):
            continue  # lies in no folder of this machine
        # A link inside the output would be deleted too, wherever it leads.
        link = source.path.parent.resolve() / source.path.name
        if link.is_relative_to(folder) or source.path.resolve().is_relative_to(folder):
            return source.path
    return None


def refuse_empty(place: Location, stats: InjectStats) -> None:
    """Refuse to make a set of nothing.

    Raises:
        UserError: no picture is there; says what was left out.
    """
    if not sum(stats.kinds.values()):
        raise UserError(f"{place}: no pictures to write ({_left_out(stats).sentence()})")


def print_made(place: Location, stats: InjectStats, kinds: Sequence[str], given_up: str = "") -> None:
    """Say how many pictures were made, what was left out, and which kinds of damage are rare.

    Args:
        place: of the set.
        stats: of its pictures.
        kinds: of damage that were drawn from.
        given_up: what is added to the first line.
    """
    left_out = _left_out(stats)
    line = f"{sum(stats.kinds.values())} pictures: {place}{given_up}"
    print_summary(line, left_out.reasons, left_out.examples)
    rare, share = stats.rare_kinds(kinds)
    if rare:
        few = ", ".join(f"{kind} {count}" for kind, count in rare.items())
        print_summary(f"of each kind of damage {share:.0f} pictures are due, but there are of {few} (see --visible)")


def _left_out(stats: InjectStats) -> SkipCounts:
    found = SkipCounts(dict(stats.skipped.reasons), stats.skipped.examples)
    if stats.failed:
        found.reasons["damage that was not visible"] = stats.failed
    return found
