"""A detector's own maps as labels, where people found them right often enough."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffdoctor.annotate.labels import Label, labels_of
from diffdoctor.annotate.pool import BAND, Diagnosis, place_of, place_text
from diffdoctor.annotate.project import Project, picture_uid, read_place
from diffdoctor.annotate.select import Candidate
from diffdoctor.data.codec import UnreadablePicture
from diffdoctor.data.tar import SkipCounts
from diffdoctor.measures.components import match_components
from diffdoctor.measures.pixels import FLAG_CONFIDENCE
from diffdoctor.measures.rates import wilson_interval
from diffdoctor.runs import strict_json


@dataclasses.dataclass
class Precision:
    """How often a detector is right about a category's pictures, by audit tasks.

    Attributes:
        category: its name.
        components: things that the detector found.
        right: of these, how many match one that people marked, at an IoU of at least 0.5.
        clean: pictures in which the detector found nothing.
        rightly_clean: of these, how many people marked nothing in.
    """

    category: str
    components: int = 0
    right: int = 0
    clean: int = 0
    rightly_clean: int = 0

    @property
    def damaged_bound(self) -> float:
        """Lower bound of the precision of what is found, by Wilson's interval of 95 %."""
        return wilson_interval(self.right, self.components)[0]

    @property
    def clean_bound(self) -> float:
        """The same of the share of pictures rightly called clean."""
        return wilson_interval(self.rightly_clean, self.clean)[0]

    def accepts(self, is_damaged: bool, least: float) -> bool:
        """Whether a map that shows something, or nothing, is a label."""
        return (self.damaged_bound if is_damaged else self.clean_bound) >= least

    def as_json(self) -> dict[str, Any]:
        """The fields and both bounds."""
        bounds = {name: round(getattr(self, name), 4) for name in ("damaged_bound", "clean_bound")}
        return dataclasses.asdict(self) | bounds


def audit_labels(project: Project, merge: str) -> list[Label]:
    """The labels of the audit tasks of all rounds that no training has seen, the newest of each picture.

    A picture that was also selected in some round is left out: its label is trained on.

    Args:
        project: the project.
        merge: see `labels.labels_of`.
    """
    selected = {row[0] for row in project.store.all("SELECT picture FROM task WHERE kind = 'normal'")}
    labels = (each for each in labels_of(project, merge=merge, kinds=("audit",)) if not isinstance(each, str))
    return list({label.picture: label for label in labels if label.picture not in selected}.values())


def precisions(project: Project, diagnosis: Diagnosis, candidates: list[Candidate], merge: str) -> list[Precision]:
    """How often a detector is right, by category, on the audit tasks of all rounds.

    Args:
        project: the project.
        diagnosis: by the detector, of the pool.
        candidates: of the pool.
        merge: see `labels.labels_of`.

    Returns:
        One of each category of the candidates, by name.
    """
    found = {name: Precision(name) for name in sorted({each.category for each in candidates})}
    by_place = {place_text(each): each for each in candidates}
    for label in audit_labels(project, merge):
        place = json.loads(project.store.one("SELECT place FROM picture WHERE id = ?", label.picture)["place"])
        crop = place.pop("crop", None)
        candidate = by_place.get(strict_json.dumps(place))
        confidence = None if candidate is None else diagnosis.map(candidate.name)
        if crop is not None and confidence is not None:
            x0, y0, x1, y1 = crop
            confidence = confidence[y0:y1, x0:x1]
        if confidence is None or confidence.shape != label.mask.shape:
            continue
        ignore = None if label.ignore is None else label.ignore[None]
        matches = match_components(confidence[None] / 255, label.mask[None], ignore)
        each = found[candidate.category]
        each.components, each.right = each.components + len(matches.scores), each.right + int(matches.hits.sum())
        if not len(matches.scores):
            each.clean, each.rightly_clean = each.clean + 1, each.rightly_clean + int(matches.truths[0] == 0)
    return list(found.values())


def pseudo_labels(
    project: Project,
    diagnosis: Diagnosis,
    candidates: list[Candidate],
    measured: list[Precision],
    *,
    least: float,
    most: int,
    round: int,
    seed: int,
    counts: SkipCounts,
) -> Iterator[dict[str, Any]]:
    """The detector's maps of pictures that nobody was asked about as samples of shards, where they are accepted.

    Pixels of a confidence between 0.2 and 0.8 are not decided.

    Args:
        project: the project.
        diagnosis: by the detector, of the pool.
        candidates: of the pool.
        measured: what `precisions` found.
        least: what the lower bound of a category's precision must reach.
        most: how many samples at most, drawn evenly.
        round: for the keys.
        seed: of the draw.
        counts: filled with what is left out.
    """
    rows = project.store.all("SELECT place, uid FROM picture JOIN task ON picture = picture.id")
    asked, seen = {_whole(row["place"]) for row in rows}, {row["uid"] for row in rows}
    by_name = {each.category: each for each in measured}
    order = np.random.default_rng([seed, round, 10]).permutation(len(candidates))
    left = most
    for candidate in (candidates[index] for index in order):
        if left <= 0:
            return
        is_damaged = bool(diagnosis.records[candidate.name]["components"])
        if not by_name[candidate.category].accepts(is_damaged, least) or place_text(candidate) in asked:
            continue
        confidence = diagnosis.map(candidate.name)
        try:
            picture = read_place(place_of(candidate.path, candidate.key))
        except (UnreadablePicture, OSError) as error:
            counts.add("a picture that cannot be read", candidate.name, detail=str(error))
            continue
        uid = picture_uid(picture)
        if confidence is None or confidence.shape != picture.shape[:2] or uid in seen:
            continue
        seen.add(uid)
        left -= 1
        share = confidence / 255
        yield {
            "key": f"p{round:02d}-{uid[:16]}",
            "picture": picture,
            "mask": (share >= FLAG_CONFIDENCE).astype(np.float32),
            "ignore": (share > BAND[0]) & (share < BAND[1]),
            "label": "pseudo",
            "round": round,
            **{name: getattr(candidate, name) for name in ("category", "generator", "prompt")},
        }


def _whole(place: str) -> str:
    """The place of the picture that a task's is a part of, as text."""
    return strict_json.dumps({name: value for name, value in json.loads(place).items() if name != "crop"})
