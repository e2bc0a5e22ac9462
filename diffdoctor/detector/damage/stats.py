"""What `inject` counts of the samples that it makes, and how far it came; can be written down and taken up again."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.resumable import State
from diffdoctor.data.tar import SkipCounts
from diffdoctor.viz.draw import SHEET_TILE

# Of each kind, on the contact sheet.
EXAMPLES = 6
# Pictures due of each kind, below which their numbers say nothing.
_SHARE = 8


@dataclasses.dataclass
class Cursor:
    """How far the input was read: the picture, and what was skipped before it.

    Attributes:
        source: index of its source.
        sample: index among the samples of this source.
        index: index among the pictures that are used.
        reasons: of `SkipCounts`.
        examples: of `SkipCounts`.
    """

    source: int
    sample: int
    index: int
    reasons: dict[str, int]
    examples: dict[str, str]


class InjectStats:
    """Counts the samples, and keeps random examples of each kind for the contact sheet.

    Args:
        state: what `record` gave, to resume from.
        examples: of each kind, at most.
    """

    def __init__(self, state: State | None = None, examples: int = EXAMPLES):
        account, arrays = state or ({}, {})
        self._examples = examples
        self.kinds, self.failed = Counter(account.get("kinds")), account.get("failed", 0)
        self.skipped, self.areas = SkipCounts(), array.array("d", arrays.get("areas", ()))
        # {kind: [(rank, (clean, damaged, mask))]}: of a random rank, so that every sample is equally likely to be kept.
        self.sheet: dict[str, list[tuple]] = {}
        for kind, rank, tiles in _shown(account, arrays):
            self.sheet.setdefault(kind, []).append((rank, tiles))
        # The picture to resume with, and how many of its versions are written.
        self.cursor = Cursor(**account["cursor"]) if account else None
        self.versions = account.get("versions", 0)

    def count(self, samples: Iterator[tuple[Cursor, int, int, dict]]) -> Iterator[dict]:
        """Count the samples and pass them on.

        Args:
            samples: (cursor, number of the picture's versions up to this one, number of failed versions before the
                picture, sample).
        """
        for self.cursor, self.versions, self.failed_before, sample in samples:
            self.add(sample)
            yield sample

    def add(self, sample: dict) -> float:
        """Count a sample, and take its `original` away; returns the share of its pixels that are broken."""
        clean, area = sample.pop("original"), 0.0
        self.kinds[sample["kind"] or "clean"] += 1
        if sample["mask"].any():
            area = float((sample["mask"] >= 0.5).mean())
            self.areas.append(area)
        if sample["kind"]:
            self._show(clean, sample)
        return area

    def _show(self, clean: np.ndarray, sample: dict) -> None:
        rank = hashlib.blake2b(sample["key"].encode(), digest_size=8).hexdigest()
        shown = self.sheet.setdefault(sample["kind"], [])
        if len(shown) < self._examples or (shown and rank < shown[-1][0]):
            mask = np.rint(sample["mask"] * 255).astype(np.uint8)
            self._keep(sample["kind"], rank, [shrink_to(tile, SHEET_TILE) for tile in (clean, sample["picture"], mask)])

    def _keep(self, kind: str, rank: str, tiles: Sequence[np.ndarray]) -> None:
        shown = self.sheet.setdefault(kind, [])
        shown.append((rank, tuple(tiles)))
        shown.sort(key=lambda entry: entry[0])
        del shown[self._examples :]

    def join(self, state: State) -> None:
        """Add what `counts` gave of other samples."""
        account, arrays = state
        self.kinds.update(account["kinds"])
        self.failed += account["failed"]
        self.areas.extend(arrays["areas"].tolist())
        for kind, rank, tiles in _shown(account, arrays):
            self._keep(kind, rank, tiles)

    def record(self) -> State:
        """The state after the sample that was counted last, for `ResumableSet`."""
        account, arrays = self.counts()
        where = {"cursor": dataclasses.asdict(self.cursor), "versions": self.versions}
        return account | {"failed": self.failed_before} | where, arrays

    def counts(self) -> State:
        """The counts and examples of all samples, without where to resume."""
        shown = [(kind, *entry) for kind, entries in self.sheet.items() for entry in entries]
        account = {
            "kinds": dict(self.kinds),
            "failed": self.failed,
            "sheet": [(kind, rank) for kind, rank, _ in shown],
        }
        arrays = {"areas": np.array(self.areas)}
        for number, (_, _, tiles) in enumerate(shown):
            arrays |= {f"tile-{number}-{part}": tile for part, tile in enumerate(tiles)}
        return account, arrays

    def examples(self) -> dict[str, list[tuple]]:
        """The examples of each kind, for `contact_sheet`."""
        return {kind: [tiles for _, tiles in shown] for kind, shown in self.sheet.items()}

    def rare_kinds(self, kinds: Sequence[str]) -> tuple[dict[str, int], float]:
        """The kinds of damage that are below half of their share, with their counts, and the share.

        Args:
            kinds: that were drawn from.
        """
        counts = {kind: self.kinds.get(kind, 0) for kind in kinds}
        share = (sum(counts.values()) + self.failed) / len(kinds)
        return {kind: count for kind, count in counts.items() if share >= _SHARE and 2 * count < share}, share

    def metrics(self, kinds: Sequence[str]) -> dict:
        """The counts for metrics.json, of damage of these kinds."""
        return {
            "pictures": sum(self.kinds.values()),
            "kinds": dict(sorted(self.kinds.items())),
            "mask_area": {
                name: float(np.quantile(self.areas, q)) if len(self.areas) else 0.0
                for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95))
            },
            "rare_kinds": self.rare_kinds(kinds)[0],
            "without_visible_damage": self.failed,
            "skipped": self.skipped.reasons,
            "skipped_examples": self.skipped.examples,
        }


def _shown(account: dict, arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, str, tuple]]:
    """(kind, rank, tiles) of the examples in a state."""
    for number, (kind, rank) in enumerate(account.get("sheet", ())):
        yield kind, rank, tuple(arrays[f"tile-{number}-{part}"] for part in range(3))
