"""The answers: a line each in a file that is on the disk before the page hears of it, and who is asked what next."""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffdoctor.evaluate.compare.pairs import Pair, lot
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_json, sync_folder
from diffdoctor.runs.record import read_json
from diffdoctor.web.bodies import Refused
from diffdoctor.web.guard import token_hash

ANSWERS, PEOPLE = "compare.jsonl", "people.json"
CHOICES = ("a", "b", "neither")
# For which a pair that somebody looks at is not shown to others.
LEASE_SECONDS = 600.0


class Answers:
    """The answers of all raters, in the order in which they came; a correction is a further line.

    Args:
        path: of the file, which need not exist. A line that a kill cut short is removed: nobody was told of it.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        self._newest: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)  # by pair, then rater
        if path.is_file():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                self._keep(_checked(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                what = "an answer as this command writes it"
                raise UserError(expected(f"{self.path}: line {number}", what, error or repr(line[:60]))) from None

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._newest[row["pair"]][row["rater"]] = row

    def of_pair(self, pair: str) -> dict[str, dict[str, Any]]:
        """The newest answer of each rater to a pair."""
        return self._newest.get(pair, {})

    def add(self, row: dict[str, Any]) -> None:
        """Write an answer; it is on the disk when this returns."""
        is_new, line = not self.path.exists(), strict_json.dumps(row).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)  # else the next line would begin behind a part of this one
                raise
        if is_new:
            sync_folder(self.path.parent)
        self._keep(row)


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    kinds = {"pair": str, "rater": str, "version": int, "choice": str, "left": str, "ms": int, "at": float}
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name}: {row[name]!r}")
    if row["choice"] not in CHOICES or row["left"] not in ("a", "b"):
        raise ValueError(f"{row['choice']!r}, {row['left']!r}")
    return row


class Queue:
    """Who is shown which pair next, and on which side its pictures stand.

    Each rater has an order and sides by lot, which a reload does not change.

    Args:
        pairs: the pairs.
        answers: what has been answered.
        needed: people who are asked about each pair.
        overlap: share of the pairs that one more is asked about.
        seed: of the lots.
    """

    def __init__(self, pairs: Sequence[Pair], answers: Answers, *, needed: int, overlap: float, seed: int):
        self.pairs, self.answers, self.seed = list(pairs), answers, seed
        self.needed = [needed + (lot(seed, "overlap", pair.name) < overlap * 2**64) for pair in self.pairs]
        self._leases: dict[int, dict[str, tuple[str, float]]] = defaultdict(dict)  # by pair, then rater
        self._orders: dict[str, list[int]] = {}
        self._broken: set[int] = set()
        self._lock = threading.Lock()

    def left(self, rater: str, index: int) -> str:
        """Which of a and b stands on the left for a rater."""
        return "ab"[lot(self.seed, "side", rater, self.pairs[index].name) & 1]

    def take(self, rater: str, tab: str) -> int | None:
        """The pair that a tab shows next, the one it has if that is not answered yet; None: nothing is left."""
        with self._lock:
            now = time.monotonic()
            open_to = [index for index in self._order(rater) if self._is_open(index, rater)]
            held = [index for index in open_to if self._lease(index, rater, now) == tab]
            free = (index for index in open_to if self._lease(index, rater, now) is None)
            found = held[0] if held else next((i for i in free if self._others(i, rater, now) < self.needed[i]), None)
            if found is not None:
                self._leases[found][rater] = tab, now + LEASE_SECONDS
            return found

    def put(self, rater: str, index: int, choice: str, version: int, ms: int) -> dict[str, Any]:
        """Keep an answer, once however often it is sent.

        Args:
            rater: whose it is.
            index: of the pair.
            choice: left, right or neither.
            version: 1, or one more than that of the answer that it corrects.
            ms: for which the pair was looked at.

        Returns:
            The row.

        Raises:
            Refused: the pair has another answer of this version.
        """
        pair, left = self.pairs[index], self.left(rater, index)
        chosen = choice if choice == "neither" else left if choice == "left" else "ab"[left == "a"]
        with self._lock:
            before = self.answers.of_pair(pair.name).get(rater)
            newest = before["version"] if before else 0
            if before and version == newest and before["choice"] == chosen:
                return before
            if version != newest + 1:
                raise Refused(409, "this pair has been answered in another tab", version=newest)
            row = {"pair": pair.name, "rater": rater, "version": version, "choice": chosen, "left": left}
            row |= {"ms": ms, "at": time.time()}
            self.answers.add(row)
            self._leases[index].pop(rater, None)
            return row

    def leave_out(self, index: int) -> None:
        """Show a pair to nobody from now on: its pictures cannot be read."""
        self._broken.add(index)

    def counts(self, rater: str) -> dict[str, int]:
        """Pairs that a rater has answered, and that are open to this rater."""
        done = sum(rater in self.answers.of_pair(pair.name) for pair in self.pairs)
        return {"done": done, "left": sum(self._is_open(index, rater) for index in range(len(self.pairs)))}

    def _order(self, rater: str) -> list[int]:
        if rater not in self._orders:
            key = [lot(self.seed, "order", rater, pair.name) for pair in self.pairs]
            self._orders[rater] = sorted(range(len(self.pairs)), key=key.__getitem__)
        return self._orders[rater]

    def _is_open(self, index: int, rater: str) -> bool:
        given = self.answers.of_pair(self.pairs[index].name)
        return index not in self._broken and rater not in given and len(given) < self.needed[index]

    def _lease(self, index: int, rater: str, now: float) -> str | None:
        tab, until = self._leases[index].get(rater, (None, 0.0))
        return tab if until > now else None

    def _others(self, index: int, rater: str, now: float) -> int:
        """People who have answered a pair or look at it, without this one."""
        looking = {name for name, (_, until) in self._leases[index].items() if until > now}
        return len((looking | {*self.answers.of_pair(self.pairs[index].name)}) - {rater})


class People:
    """The raters' links. Of each token only the hash is kept; a new start adds tokens, and older links stay valid.

    Args:
        path: of the file, which need not exist.
        names: of those who are let in.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.names = path, list(names)
        self._hashes = read_json(path) if path.is_file() else {}

    def new_tokens(self) -> dict[str, str]:
        """A new token for each rater, by name."""
        tokens = {name: secrets.token_urlsafe(32) for name in self.names}
        self._hashes |= {token_hash(token): name for name, token in tokens.items()}
        atomic_write_json(self.path, self._hashes)
        return tokens

    def person_of(self, token: str) -> str | None:
        """The name of a token's rater; None: nobody's, or that of one who is not let in."""
        name = self._hashes.get(token_hash(token))
        return name if name in self.names else None
