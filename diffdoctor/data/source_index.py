"""Which pictures of a run's sources are done already, by its journal, and what all its processes left out."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from diffdoctor.data.sources import Source
from diffdoctor.data.store_path import absolute
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import ignores_case, without_case
from diffdoctor.runs.journal import Journal, Records

# Why a picture is left out, see `ResultNames`.
CASE_ALONE = "a name that differs from another picture's in letter case alone"


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

    def refuse_one_file(self, folder) -> None:
        """Refuse sources whose results would be one file in `folder`, which need not exist.

        Raises:
            UserError: its file system takes no notice of letter case, and two names differ in nothing else.
        """
        taken = ResultNames(folder)
        for source in self.sources:
            if (other := taken.take(source.name)) is not None:
                same = f"differs from {self._named[other].path} in letter case alone, which {folder} takes no notice of"
                raise UserError(f"{source.path}: {same}; rename one, or choose an output folder on another disk")

    def mark(self, shard: str, pictures: int) -> str:
        """The text that marks a shard, in its present state, as completed with this many pictures."""
        return f"{shard} {self.stamps[shard]} {pictures}"


class ResultNames:
    """The names of results in a folder, told apart as its file system does.

    Args:
        folder: of the results; need not exist.
        names: of results that are there or will be.
    """

    def __init__(self, folder, names: Iterable[str] = ()):
        self._owners = {without_case(name): name for name in names} if ignores_case(folder) else None

    def take(self, name: str) -> str | None:
        """Take a name; returns the other name whose files this one's would replace, if there is one."""
        if self._owners is None:
            return None
        owner = self._owners.setdefault(without_case(name), name)
        return None if owner == name else owner


class Completed:
    """The names of the pictures and shards that earlier attempts completed.

    Attributes:
        names: of the pictures.
        shards: names of the shards.
    """

    def __init__(self, index: SourceIndex, journal: Journal):
        records = journal.read()
        self.names = {record["name"] for record in index.current_records(records)}
        counts = collections.Counter(index.source(name).name for name in self.names)
        shards = [source.name for source in index.sources if source.is_shard]
        self.shards = {shard for shard in shards if index.mark(shard, counts[shard]) in records.shards}
        self._files = [source.name for source in index.sources if not source.is_shard]

    def result_names(self, folder) -> ResultNames:
        """The names that are known before a shard is read, as those of files in `folder`."""
        return ResultNames(folder, [*self.names, *self._files])


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
