"""Which training pictures a model finds hard, and which a detector finds broken: running means over a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdoctor.data.columns import ParquetColumns, pyarrow_modules, write_parquet
from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.text import is_unicode, readable
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.viz.draw import enlarge, jpeg_bytes, png_bytes
from diffdoctor.viz.report import Report

# A loss depends on the noise level more than on the picture: it is compared with the mean of its level's bin.
BINS = 20
# What is kept of each picture; of a picture without shares the last two are 0.
_SUMS = ("visits", "loss_sum", "relative_sum", "share_visits", "share_sum")
_LEVELS = "noise level "
# Keys that are no Unicode, as in some file names, by their rows; in the column they are made readable.
_KEYS = "keys"
# Updates after which losses are read from their device.
_PENDING = 50
_SMALL, _LARGE = 96, 192


class PictureRanking:
    """Running means of each training picture's loss and artifact share, over the visits of a training.

    In a trainer: `update` at each step, `save` with each checkpoint, `load` where it resumes. Of several processes each
    has its own, and `merge` adds them up. Losses stay on their device until some dozens of updates are there, so an
    update does not wait for it.

    Example:
        >>> ranking = PictureRanking()
        >>> ranking.update(["cat.png", "dog.png"], torch.tensor([0.1, 0.3]), torch.tensor([0.0, 0.2]))
        >>> [row["key"] for row in ranking.rows()]
        ['dog.png', 'cat.png']
    """

    def __init__(self):
        self._index: dict[str, int] = {}
        self._sums = np.zeros((0, len(_SUMS)))
        self._levels = np.zeros((BINS, 2))  # of the losses in each bin: how many, and their sum
        self._pending: list[tuple] = []

    def __len__(self) -> int:
        self._flush()
        return len(self._index)

    def update(
        self,
        keys: Sequence[str],
        losses: torch.Tensor | Sequence[float],
        shares: torch.Tensor | Sequence[float] | None = None,
        levels: torch.Tensor | Sequence[float] | None = None,
    ) -> None:
        """Add a visit of each of B pictures.

        Args:
            keys: names of the pictures, B; one may stand there twice.
            losses: (B,) each picture's own loss. One that is not finite is no visit.
            shares: (B,) share of each picture that the detector flags, in [0, 1]; None: not known.
            levels: (B,) noise level of each loss, in [0, 1], such as timestep / 1000 or sigma. None: all losses are
                compared with one another.

        Raises:
            ValueError: the lengths differ.
        """
        values = [None if value is None else torch.as_tensor(value).detach() for value in (losses, shares, levels)]
        for name, value in zip(("losses", "shares", "levels"), values, strict=True):
            if value is not None and value.shape != (len(keys),):
                raise ValueError(expected(name, f"shape ({len(keys)},), one for each key", tuple(value.shape)))
        # Copies: a trainer may write the next step's losses where these stand.
        self._pending.append((list(map(str, keys)), *(None if value is None else value.clone() for value in values)))
        if len(self._pending) >= _PENDING:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for keys, *values in pending:
            losses, shares, levels = (_numbers(value, len(keys)) for value in values)
            bins = np.clip(np.nan_to_num(levels) * BINS, 0, BINS - 1).astype(int)
            finite = np.flatnonzero(np.isfinite(losses))
            # all of an update first: what a loss is compared with must not depend on its place in a batch
            np.add.at(self._levels, bins[finite], np.stack([np.ones(len(finite)), losses[finite]], axis=1))
            for number in finite:
                row = self._row(keys[number])
                count, total = self._levels[bins[number]]
                relative = losses[number] * count / total if total else 1.0
                has_share = np.isfinite(shares[number])
                row += 1, losses[number], relative, has_share, shares[number] if has_share else 0.0

    def _row(self, key: str) -> np.ndarray:
        number = self._index.setdefault(key, len(self._index))
        if number >= len(self._sums):
            self._sums = np.concatenate([self._sums, np.zeros((max(1024, len(self._sums)), len(_SUMS)))])
        return self._sums[number]

    def merge(self, other: PictureRanking) -> PictureRanking:
        """Add another process's visits; returns this ranking."""
        self._flush()
        other._flush()
        self._levels = self._levels + other._levels
        for key, number in other._index.items():
            row = self._row(key)
            row += other._sums[number]
        return self

    @classmethod
    def merged(cls, states: Iterable[dict[str, Any]]) -> PictureRanking:
        """The visits of several processes, from their `state_dict`s."""
        found = cls()
        for state in states:
            other = cls()
            other.load_state_dict(state)
            found.merge(other)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: keys, and two tensors."""
        self._flush()
        sums = torch.from_numpy(self._sums[: len(self._index)].copy())
        return {"keys": list(self._index), "sums": sums, "levels": torch.from_numpy(self._levels.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, in place of what is here."""
        self._index, self._pending = {key: number for number, key in enumerate(state["keys"])}, []
        self._sums, self._levels = state["sums"].numpy().copy(), state["levels"].numpy().copy()

    def rows(self) -> list[dict[str, Any]]:
        """The pictures, the hardest first.

        Returns:
            Dicts of `key`, `visits`, `loss` (mean over the visits), `relative_loss` (mean of each loss over the mean of
            all losses at about its noise level so far, those of its own update included; 1 for the average picture) and
            `artifact_share` (mean; None where no share was given), sorted by `relative_loss`.
        """
        self._flush()
        found = []
        for key, number in self._index.items():
            visits, loss, relative, share_visits, share = self._sums[number].tolist()
            found.append({"key": key, "visits": int(visits), "loss": loss / visits, "relative_loss": relative / visits})
            found[-1]["artifact_share"] = share / share_visits if share_visits else None
        return sorted(found, key=lambda row: (-row["relative_loss"], row["key"]))

    def save(self, path: str | Path) -> None:
        """Write a Parquet file: the columns of `rows`, and the sums from which `load` goes on; whole or not at all."""
        pa, _ = pyarrow_modules()
        rows = self.rows()
        types = {"key": pa.string(), "visits": pa.int64(), "loss": pa.float64(), "relative_loss": pa.float64()}
        types["artifact_share"] = pa.float64()
        shown = [{**row, "key": readable(row["key"])} for row in rows]
        columns = {name: pa.array([row[name] for row in shown], kind) for name, kind in types.items()}
        order = [self._index[row["key"]] for row in rows]
        for column, name in enumerate(_SUMS[1:], start=1):
            columns[name] = self._sums[order, column]
        metadata = {_LEVELS + str(number): repr(row.tolist()) for number, row in enumerate(self._levels)}
        metadata[_KEYS] = strict_json.dumps({i: row["key"] for i, row in enumerate(rows) if not is_unicode(row["key"])})
        write_parquet(path, pa.table(columns).replace_schema_metadata(metadata))

    @classmethod
    def load(cls, path: str | Path) -> PictureRanking:
        """The ranking of a file that `save` wrote.

        Raises:
            UserError: it cannot be read, or is another file.
        """
        import ast

        with ParquetColumns(path) as table:
            if missing := [name for name in ("key", *_SUMS) if name not in table.names]:
                raise UserError(expected(path, f"the columns {', '.join(missing)}", "a file without them"))
            keys = table.texts("key", longest=2**15).tolist()
            sums = np.stack([table.numbers(name).astype(np.float64) for name in _SUMS], axis=1)
            metadata = table.metadata
        try:
            for row, key in json.loads(metadata.get(_KEYS.encode(), b"{}")).items():
                keys[int(row)] = str(key)
            levels = [ast.literal_eval(metadata[(_LEVELS + str(i)).encode()].decode()) for i in range(BINS)]
            levels = np.array(levels, np.float64).reshape(BINS, 2)
        except (AttributeError, LookupError, ValueError, SyntaxError) as error:
            raise UserError(expected(path, "a ranking as PictureRanking.save writes it", error)) from None
        found = cls()
        state = {"keys": keys, "sums": torch.from_numpy(sums), "levels": torch.from_numpy(levels)}
        found.load_state_dict(state)
        return found


def write_ranking(
    folder: str | Path,
    ranking: PictureRanking,
    pictures: Callable[[set[str]], Iterable[tuple[str, np.ndarray]]] | None = None,
    *,
    shown: int = 24,
) -> None:
    """Write a ranking as `ranking.parquet`, and as a page with the pictures, `ranking.html`.

    Args:
        folder: where to.
        ranking: of one process, or merged.
        pictures: from the keys that are shown to pairs of key and picture (H, W, 3) uint8; others are passed over.
            None: the page has no pictures.
        shown: pictures of each kind on the page.
    """
    folder, rows = Path(folder), ranking.rows()
    ranking.save(folder / "ranking.parquet")
    shared = [row for row in rows if row["artifact_share"]]
    worst = sorted(shared, key=lambda row: (-row["artifact_share"], row["key"]))
    parts = {
        "The largest artifact share": worst[:shown],
        "The largest relative loss": rows[:shown],
        "The smallest relative loss": rows[::-1][:shown],
    }
    wanted = {row["key"] for part in parts.values() for row in part}
    found = {}
    for key, picture in pictures(wanted) if pictures is not None and wanted else ():
        if key in wanted:
            found[key] = _thumbnail(picture)
        if len(found) == len(wanted):
            break
    report = Report("Training pictures by loss and artifact share")
    flagged = f"{len(shared):,} of them have flagged parts" if shared else "no flagged part was seen"
    report.lead(f"{len(rows):,} pictures were visited {sum(row['visits'] for row in rows):,} times; {flagged}.")
    report.text(
        "The relative loss is a picture's loss over the mean of all losses at about its noise level, averaged over its "
        "visits: 1 for the average picture. One with a large one is unlike the others: broken, mislabelled, rare. "
        "The artifact share is what the detector flags of it. ranking.parquet has all pictures."
    )
    for title, part in parts.items():
        if part:
            report.heading(title)
            _show(report, part, found)
    report.write(folder / "ranking.html")


def _show(report: Report, rows: Sequence[dict[str, Any]], found: dict[str, tuple[bytes, bool]]) -> None:
    def words(row):
        share = "–" if row["artifact_share"] is None else f"{row['artifact_share']:.1%}"
        return f"{row['loss']:.4g}", f"{row['relative_loss']:.2f}", share, f"{row['visits']:,}"

    if not found:
        header = ["picture", "loss", "relative loss", "artifact share", "visits"]
        report.table(header, [[row["key"], *((text, "number") for text in words(row))] for row in rows])
        return
    with report.tiles(_LARGE):
        for row in rows:
            if row["key"] in found:
                loss, relative, share, visits = words(row)
                data, small = found[row["key"]]
                caption = f"{row['key']}: loss {loss}, relative {relative}, artifact share {share}, visits {visits}"
                report.image(data, caption, alt=row["key"], pixels=small)


def _thumbnail(picture: np.ndarray) -> tuple[bytes, bool]:
    longest = max(picture.shape[:2])
    if longest <= _SMALL:
        return png_bytes(enlarge(picture, max(1, _SMALL // longest))), True
    return jpeg_bytes(shrink_to(picture, _LARGE)), False


def _numbers(value: torch.Tensor | None, count: int) -> np.ndarray:
    return np.full(count, np.nan) if value is None else value.to("cpu", torch.float64).numpy()
