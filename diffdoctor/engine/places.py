"""Where a run's units are committed: a folder, or a place in a store."""

from __future__ import annotations

from diffdoctor.data.store_path import Location, StorePath
from diffdoctor.engine.commits import Commits


def commits_at(output: Location) -> Commits:
    """The state of a run's units."""
    if isinstance(output, StorePath):
        from diffdoctor.engine.store_commits import StoreCommits

        return StoreCommits(output)
    return Commits(output)
