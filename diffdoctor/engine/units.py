"""What is to be done, in units, and what does it: a plan that is written down, and a worker that is built anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from diffdoctor.data.columns import ParquetColumns, pyarrow_modules, write_parquet
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError

if TYPE_CHECKING:
    from diffdoctor.engine.attempt import Attempt


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work that is done as a whole: a shard, or up to a thousand pictures; never a single one.

    Attributes:
        id: its name, which file names contain: six digits, in the order of the plan.
        inputs: the files that are read.
        first: number of its first picture or row among those of the plan, where that is known.
        count: of its pictures, where that is known.
        stamp: what changes when an input is replaced, see `Source.stamp`.
        details: whatever else its worker must know, as JSON values.
    """

    id: str
    inputs: tuple[str, ...] = ()
    first: int = 0
    count: int = 0
    stamp: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class Plan:
    """All units of a run, in order.

    Args:
        units: with ids of their own.
    """

    def __init__(self, units: Sequence[Unit]):
        self.units = list(units)

    @classmethod
    def of_ranges(cls, total: int, size: int) -> Plan:
        """Rows 0 ... total - 1 in units of `size`, the last of which may be smaller."""
        starts = enumerate(range(0, total, size))
        return cls([Unit(unit_name(number), (), first, min(size, total - first)) for number, first in starts])

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def digest(self) -> str:
        """A hash of all units, which is part of a run's identity."""
        digest = hashlib.sha256()
        for unit in self.units:
            digest.update(strict_json.dumps(dataclasses.astuple(unit), sort_keys=True).encode())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write a Parquet file of one row for each unit."""
        pa, _ = pyarrow_modules()
        rows = [dataclasses.asdict(unit) for unit in self.units]
        # As JSON, in ASCII: names of files need not be Unicode.
        columns = {name: [row[name] for row in rows] for name in ("id", "first", "count", "stamp")}
        columns |= {name: [strict_json.dumps(row[name]) for row in rows] for name in ("inputs", "details")}
        write_parquet(path, pa.table(columns))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `write` wrote.

        Raises:
            UserError: the file cannot be read.
        """
        with ParquetColumns(path) as table:
            ids, inputs, stamps, details = (
                table.texts(name, longest=2**30) for name in ("id", "inputs", "stamp", "details")
            )
            numbers = table.numbers("first"), table.numbers("count")
        rows = zip(ids, inputs, *numbers, stamps, details, strict=True)
        return cls([Unit(i, tuple(json.loads(p)), int(f), int(n), s, json.loads(d)) for i, p, f, n, s, d in rows])


def unit_name(number: int) -> str:
    """The id of a plan's unit, by its index."""
    return f"{number:06d}"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of several workers one is.

    Attributes:
        number: from 0.
        count: of all; a replaced one has its predecessor's number.
    """

    number: int = 0
    count: int = 1


# Does a unit: writes files at `attempt.path(name)` and returns `records`, how many pictures came of it, `skipped`, of a
# `SkipCounts`, and whatever else is to stand in the commit, as JSON values.
Worker: TypeAlias = "Callable[[Unit, Attempt], dict[str, Any]]"


def check_unchanged(what: str, now: str, begun: str) -> None:
    """In `WorkerSpec.build`: refuse inputs that are not those of the process that planned the work.

    Args:
        what: the beginning of the error, such as "detector NAME: other weights".
        now: digest of what was loaded.
        begun: that of what the run began with.

    Raises:
        UserError: they differ.
    """
    if now != begun:
        raise UserError(f"{what} than those with which this run began")


class WorkerSpec(Protocol):
    """How a worker is made: a dataclass that can be sent to another process or machine, and is small.

    Attributes:
        uses_accelerator: whether its workers compute on a GPU where there is one.
    """

    uses_accelerator: ClassVar[bool]

    def build(self, place: Place) -> Worker:
        """Load what the work needs, once in each process.

        Raises:
            UserError: something is not there, or not what the run began with.
        """
        ...
