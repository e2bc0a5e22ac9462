"""`diffdoctor annotate add`: the tasks of a round, drawn from a pool."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from diffdoctor.annotate.config import AnnotateAddConfig
from diffdoctor.annotate.intake import NewTask, add_task
from diffdoctor.annotate.masks import MAX_SIDE
from diffdoctor.annotate.pool import Diagnosis, Measures, find_candidates, place_of, place_text
from diffdoctor.annotate.project import Project, read_place
from diffdoctor.annotate.select import STRATEGIES, Candidate, Caps, composition, new_generators, ranked
from diffdoctor.data.codec import UnreadablePicture
from diffdoctor.data.identity import picture_hash
from diffdoctor.data.store_path import absolute
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.progress import progress
from diffdoctor.runs.summary import print_summary

# Tasks that are written in one transaction.
_TOGETHER = 32
# A number for each part's draws; the first ones are those of `Adder._rng` elsewhere.
_DRAWS = (*range(10), "audit", "new generator", *STRATEGIES)
_REVIEWED = (
    "SELECT task.id AS task, place, height, width, category, generator, prompt, review.verdict, review.mask FROM task "
    "JOIN picture ON picture.id = picture JOIN review ON review.task = task.id WHERE round < ? AND state = 'reviewed' "
    "AND review.verdict IN ('damaged', 'clean') AND review.id = (SELECT max(id) FROM review WHERE task = task.id) "
    "ORDER BY task.id"
)


@dataclasses.dataclass(frozen=True)
class Known:
    """A picture of known truth.

    Attributes:
        name: for messages.
        place: see `project.read_place`.
        truth: (H, W) uint8 of 0 and 255.
        meta: category, generator, prompt.
        map_name: under which the diagnosis has it; "": not at all.
    """

    name: str
    place: dict[str, Any]
    truth: np.ndarray
    meta: dict[str, str]
    map_name: str = ""


def run_annotate_add(config: AnnotateAddConfig) -> int:
    """Run `diffdoctor annotate add`.

    Started again with the same options it goes on where it was stopped: draws depend on the seed alone, and a round has
    one task of a picture.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    project, counts = Project(config.project, create=True), SkipCounts()
    diagnosis = None if config.diagnosis is None else Diagnosis(config.diagnosis)
    candidates = find_candidates(config.pool, diagnosis, counts)
    if not candidates:
        raise UserError(expected("pool", "pictures", f"none ({counts.sentence()})" if counts.total else "none"))
    added = Adder(project, config, diagnosis, counts).add(candidates)
    words = ", ".join(f"{added[name]} {name}" for name in ("selected", "audit", "gold", "new", "training"))
    line = f"{sum(added.values())} tasks of round {config.round} in {project.folder}: {words}"
    print_summary(line, counts.reasons, counts.examples)
    return 0


class Adder:
    """Draws the tasks of a round and puts them into a project.

    Args:
        project: the project.
        config: the options.
        diagnosis: of the pool, or None.
        counts: filled with what is left out.
    """

    def __init__(self, project: Project, config: AnnotateAddConfig, diagnosis: Diagnosis | None, counts: SkipCounts):
        self.project, self.config, self.diagnosis, self.counts = project, config, diagnosis, counts
        self.taken: set[str] = set()

    def _rng(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.config.round, draw])

    def add(self, candidates: list[Candidate]) -> dict[str, int]:
        """Add the tasks; returns how many there are of each part of the budget."""
        config, settings = self.config, self.project.settings
        known = self._known()
        wanted = composition(config.budget, config.audit_share, config.gold_share if known else 0.0, config.new_share)
        teaching = settings.training if known else 0
        parts = itertools.chain(
            self._audit(candidates, wanted["audit"]),
            self._new(candidates, wanted["new"]),
            # what the parts above and the gold tasks could not fill is selected too
            self._selected(candidates, config.budget - (wanted["gold"] if known else 0)),
            self._gold(known, wanted["gold"], teaching),
        )
        added: Counter[str] = Counter()
        with progress(config.budget + teaching, desc="annotate add", unit="task") as bar:
            while batch := list(itertools.islice(parts, _TOGETHER)):
                with self.project.store.writing():
                    for part, task in batch:
                        for tile in tiles_of(task):
                            add_task(self.project.store, tile, config.round)
                        added[part] += 1
                bar.update(len(batch))
        with self.project.store.writing():
            self.project.store.log("add", round=config.round, config=dataclasses.asdict(config), added=dict(added))
        return {name: added[name] for name in ("selected", "audit", "gold", "new", "training")}

    def _known(self) -> list[Known]:
        """As many pictures of known truth as are wanted: of the sets given, and what was reviewed in earlier rounds."""
        from diffdoctor.data.shards import ShardData

        sets = [ShardData(folder) for folder in self.config.gold or []]
        reviewed = self.project.store.all(_REVIEWED, self.config.round)
        found = [(data, index) for data in sets for index in range(len(data))] + [(None, row) for row in reviewed]
        order = self._rng(1).permutation(len(found))
        wanted = round(self.config.budget * self.config.gold_share) + self.project.settings.training
        return [self._known_of(*found[index]) for index in order[:wanted]]

    def _known_of(self, data, row) -> Known:
        if data is None:
            mask = None if row["mask"] is None else self.project.store.mask(row["mask"])
            truth = np.zeros((row["height"], row["width"]), np.uint8) if mask is None else mask
            meta = {name: row[name] for name in ("category", "generator", "prompt")}
            return Known(f"task {row['task']}", json.loads(row["place"]), truth, meta)
        sample, path, key = data[row], absolute(data.file(data.shards[row])), str(data.keys[row])
        names = () if self.diagnosis is None else self.diagnosis.names_in(path)
        map_name = next((name for name in names if name.endswith(f"/{key}")), "")
        meta = {name: str(sample.get(name) or "") for name in ("category", "generator", "prompt")}
        return Known(f"{path}:{key}", place_of(path, key), (sample["mask"] >= 0.5) * np.uint8(255), meta, map_name)

    def _audit(self, candidates: list[Candidate], count: int) -> Iterator[tuple[str, NewTask]]:
        """Evenly from the whole pool, without caps: what is measured on these holds for the pool."""
        order = self._rng(2).permutation(len(candidates))
        shuffled = (candidates[index] for index in order)
        yield from (("audit", task) for task in self._tasks(shuffled, count, "audit", "audit"))

    def _new(self, candidates: list[Candidate], count: int) -> Iterator[tuple[str, NewTask]]:
        rows = self.project.store.all(
            "SELECT DISTINCT generator FROM picture JOIN task ON picture = picture.id WHERE round < ?",
            self.config.round,
        )
        found = list(new_generators(candidates, {row[0] for row in rows}))
        shuffled = (found[index] for index in self._rng(3).permutation(len(found)))
        yield from (
            ("new", task) for task in self._tasks(shuffled, count, "normal", "new generator", self._caps(count))
        )

    def _selected(self, candidates: list[Candidate], total: int) -> Iterator[tuple[str, NewTask]]:
        count = total - len(self.taken)
        measure = None
        if self.diagnosis is not None:
            previous = None if self.config.previous is None else Diagnosis(self.config.previous)
            measure = Measures(self.diagnosis, previous)
        labelled = {
            row[0]
            for row in self.project.store.all(
                "SELECT place FROM picture JOIN task ON picture = picture.id WHERE round < ?", self.config.round
            )
        }
        left = [each for each in candidates if each.name not in self.taken and place_text(each) not in labelled]
        order = ranked(left, self.config.strategy, count, self._rng(4), measure)
        tasks = self._tasks(order, count, "normal", self.config.strategy, self._caps(count))
        yield from (("selected", task) for task in tasks)

    def _gold(self, known: list[Known], count: int, teaching: int) -> Iterator[tuple[str, NewTask]]:
        rng = self._rng(5)
        for index, each in enumerate(known[: count + teaching]):
            kind = "gold" if index < count else "training"
            try:
                task = self._task(each.name, each.place, each.meta, each.map_name, kind, "known truth", rng)
            except (UnreadablePicture, OSError) as error:
                self.counts.add("a picture of known truth that cannot be read", each.name, detail=str(error))
                continue
            yield kind, dataclasses.replace(task, truth=each.truth, needed=1, blind=task.blind or task.proposal is None)

    def _caps(self, count: int) -> Caps:
        config = self.config
        per_generator = max(1, round(config.generator_share * count))
        return Caps(config.per_prompt, per_generator, config.per_look, config.look_distance)

    def _tasks(
        self, order: Iterable[Candidate], count: int, kind: str, reason: str, caps: Caps | None = None
    ) -> Iterator[NewTask]:
        """Up to `count` tasks of the first pictures that can be read and have room under the caps."""
        rng = self._rng(_DRAWS.index(reason))
        left = count
        for candidate in order:
            if left <= 0:
                return
            if candidate.name in self.taken or (caps is not None and not caps.has_room(candidate)):
                continue
            try:
                place = place_of(candidate.path, candidate.key)
                meta = {name: getattr(candidate, name) for name in ("category", "generator", "prompt")}
                task = self._task(candidate.name, place, meta, candidate.name, kind, reason, rng)
            except (UnreadablePicture, OSError) as error:
                self.counts.add("a picture that cannot be read", candidate.name, detail=str(error))
                continue
            if caps is not None and not caps.take(candidate, picture_hash(task.picture)):
                continue
            self.taken.add(candidate.name)
            left -= 1
            yield task

    def _task(self, name, place, meta, map_name, kind, reason, rng: np.random.Generator) -> NewTask:
        picture = read_place(place)
        proposal = None if self.diagnosis is None or not map_name else self.diagnosis.map(map_name)
        if proposal is not None and proposal.shape != picture.shape[:2]:
            self.counts.add("a map of another size than its picture, not proposed", name)
            proposal = None
        double, blind, priority = rng.uniform(size=3)
        return NewTask(
            picture,
            place,
            kind,
            # in a drawn order, so that any part of the work has the whole budget's composition
            float(priority),
            reason,
            proposal,
            blind=bool(blind < self.config.blind_share),
            needed=2 if double < self.config.double_share else 1,
            weights="" if self.diagnosis is None else self.diagnosis.weights,
            meta=meta,
        )


def tiles_of(task: NewTask, side: int = MAX_SIDE) -> list[NewTask]:
    """A task, or where its picture has a longer side than the page takes, one of each tile.

    Args:
        task: of the whole picture.
        side: longest side of a tile in pixels.
    """
    height, width = task.picture.shape[:2]
    if max(height, width) <= side:
        return [task]
    rows, columns = (_edges(length, side) for length in (height, width))
    result = []
    for (y0, y1), (x0, x1) in itertools.product(rows, columns):
        part: dict[str, Any] = {"picture": np.ascontiguousarray(task.picture[y0:y1, x0:x1])}
        for name in ("proposal", "truth"):
            plane = getattr(task, name)
            part[name] = None if plane is None else np.ascontiguousarray(plane[y0:y1, x0:x1])
        result.append(dataclasses.replace(task, place={**task.place, "crop": [x0, y0, x1, y1]}, **part))
    return result


def _edges(length: int, side: int) -> list[tuple[int, int]]:
    """Begin and end of as few equal parts as are no longer than `side`."""
    edges = np.linspace(0, length, -(-length // side) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(edges))
