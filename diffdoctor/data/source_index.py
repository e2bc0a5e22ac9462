"""Which pictures of a run's sources are done already, by its journal, and what all its processes left out."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from diffdoctor.data.sources import Source
from diffdoctor.data.store_path import absolute
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.journal import Journal, Records


class SourceIndex:
    """The sources by name, with the state of their files at the start of this attempt.

    Args:
        sources: of this run.
    """

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.stamps = {source.name: source.stamp() for source in sources}
        self._named = {source.name: source for source in sources}

    def source(self, name: str) -> Source | None:
        """The picture file of this name, or the shard of the picture of this name."""
        found = self._named.get(name)
        if found is not None and not found.is_shard:
            return found
        # SHARD/KEY, both perhaps with slashes; no other source's name begins with a shard's and a slash.
        end = name.find("/")
        while end >= 0:
            found = self._named.get(name[:end])
            if found is not None and found.is_shard:
                return found
            end = name.find("/", end + 1)
        return None

    def current_records(self, records: Records) -> Iterator[dict]:
        """The records of pictures that are among the sources and whose files have not changed, by name.

        Raises:
            UserError: a record is of another picture of the same name.
        """
        for record in records:
            source, stamp = self.source(record["name"]), record.pop("stamp", None)
            if source is None or stamp is None:
                continue
            if record["path"] != absolute_path(source):
                what = f"a map {record['name']} of {record['path']}, not of {absolute_path(source)}"
                raise UserError(f"{records.folder.parent}: holds {what}; choose another output folder")
            if stamp == self.stamps[source.name]:
                yield record

    def mark(self, shard: str, pictures: int) -> str:
        """The text that marks a shard, in its present state, as completed with this many pictures."""
        return f"{shard} {self.stamps[shard]} {pictures}"


class Completed:
    """The names of the pictures and shards that earlier attempts completed."""

    def __init__(self, index: SourceIndex, journal: Journal):
        records = journal.read()
        self.names = {record["name"] for record in index.current_records(records)}
        counts = collections.Counter(index.source(name).name for name in self.names)
        shards = [source.name for source in index.sources if source.is_shard]
        self.shards = {shard for shard in shards if index.mark(shard, counts[shard]) in records.shards}


def absolute_path(source: Source) -> str:
    """The absolute path, or the URL, of the source's file."""
    return absolute(source.path)


def gather_counts(counts: SkipCounts, state) -> SkipCounts:
    """What all processes left out together; `state` is Accelerate's."""
    parts = [(counts.reasons, counts.examples)]
    if state.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    total = SkipCounts()
    for reasons, examples in parts:
        total.join(SkipCounts(reasons, examples))
    return total
