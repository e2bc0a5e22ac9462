"""Which of the detector's own maps become labels: those of categories in which audit tasks bear it out."""

import json

import numpy as np
import pytest

from diffdoctor.annotate.add import run_annotate_add
from diffdoctor.annotate.config import AnnotateAddConfig
from diffdoctor.annotate.pool import Diagnosis, find_candidates
from diffdoctor.annotate.project import Project, picture_uid
from diffdoctor.annotate.simulated import Annotator
from diffdoctor.annotate.simulated_people import answer_tasks
from diffdoctor.data.codec import encode_picture
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.predict import describe_map
from diffdoctor.rounds.accept import Precision, audit_labels, precisions, pseudo_labels
from diffdoctor.viz.draw import map_png

SIDE, PICTURES = 16, 72


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures of two categories, half of them damaged, with a detector that is right about boxes and not about discs;
    two thirds are audit tasks, which a rater without fault has answered."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    records, truths = [], {}
    for index in range(2 * PICTURES):
        category, name = ("boxes", "discs")[index % 2], f"{index:03d}"
        picture = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        truth = np.zeros((SIDE, SIDE), bool)
        truth[4:10, 4:10] = index % 4 < 2
        truths[picture_uid(picture)] = truth
        found = truth if category == "boxes" or index % 3 else np.roll(truth, 6, axis=0)
        confidence = np.where(found, 0.9, 0.05)
        confidence[0] = 0.5 - 1e-3  # nearly found, and so not decided
        path = folder / "pool" / category / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(picture, "png"))
        (folder / "diagnosis" / "maps" / category).mkdir(parents=True, exist_ok=True)
        (folder / "diagnosis" / "maps" / category / f"{name}.png").write_bytes(map_png(confidence, 8))
        known = {"path": str(path), "category": category}
        records.append(describe_map(f"{category}/{name}", confidence) | known)
    (folder / "diagnosis" / "diagnosis.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    options = {"audit_share": 1.0, "gold_share": 0.0, "new_share": 0.0, "double_share": 0.0}
    budget = 2 * PICTURES * 2 // 3
    pool, diagnosis = [str(folder / "pool")], str(folder / "diagnosis")
    run_annotate_add(AnnotateAddConfig(str(folder / "labels"), pool, diagnosis, budget=budget, **options))
    project = Project(folder / "labels")
    assert answer_tasks(project, truths.get, Annotator(0.0, missed=0.0, false_rate=0.0, anchor=0.0)) == budget
    diagnosis = Diagnosis(folder / "diagnosis")
    return project, diagnosis, find_candidates(pool, diagnosis, SkipCounts()), truths


def test_precision_is_counted_by_category(world):
    project, diagnosis, candidates, _ = world
    boxes, discs = precisions(project, diagnosis, candidates, "mean")
    assert (boxes.category, discs.category) == ("boxes", "discs")
    assert boxes.right == boxes.components > 20 and boxes.rightly_clean == boxes.clean > 20
    assert 0.5 * discs.components < discs.right < 0.8 * discs.components and discs.rightly_clean == discs.clean
    assert boxes.components + boxes.clean + discs.components + discs.clean == len(audit_labels(project, "mean"))
    # of so few pictures a perfect record does not reach 0.9
    assert 0.8 < boxes.damaged_bound < 0.9 and not boxes.accepts(True, 0.9) and boxes.accepts(True, 0.8)
    assert not discs.accepts(True, 0.8)
    assert Precision("", 35, 35).accepts(True, 0.9) and not Precision("", 34, 34).accepts(True, 0.9)
    assert Precision("").damaged_bound == 0 and boxes.as_json()["damaged_bound"] == round(boxes.damaged_bound, 4)


def test_accepted_maps_are_labels_of_pictures_nobody_was_asked_about(world):
    project, diagnosis, candidates, truths = world
    measured = precisions(project, diagnosis, candidates, "mean")
    options = {"least": 0.8, "round": 3, "seed": 0, "counts": SkipCounts()}
    samples = list(pseudo_labels(project, diagnosis, candidates, measured, most=1000, **options))
    asked = {row[0] for row in project.store.all("SELECT uid FROM picture")}
    uids = [picture_uid(each["picture"]) for each in samples]
    assert len({*uids}) == len(samples) > 20 and not asked & {*uids}
    damaged = {each["category"] for each in samples if each["mask"].any()}
    clean = {each["category"] for each in samples if not each["mask"].any()}
    assert damaged == {"boxes"} and clean == {"boxes", "discs"}
    for uid, sample in zip(uids, samples, strict=True):
        assert (
            ((sample["mask"] > 0) == truths[uid]).all() and sample["ignore"][0].all() and not sample["ignore"][1:].any()
        )
        assert (sample["label"], sample["round"], sample["key"]) == ("pseudo", 3, f"p03-{uid[:16]}")
    few = list(pseudo_labels(project, diagnosis, candidates, measured, most=5, **options))
    assert [each["key"] for each in few] == [each["key"] for each in samples[:5]]
    assert not list(pseudo_labels(project, diagnosis, candidates, measured, most=1000, **(options | {"least": 0.99})))
    # selected in another round, an audit picture is trained on, and no longer measures
    row = project.store.one("SELECT * FROM task WHERE state = 'done'")
    before = len(audit_labels(project, "mean"))
    project.store.connection.execute("UPDATE task SET kind = 'normal' WHERE id = ?", (row["id"],))
    assert len(audit_labels(project, "mean")) == before - 1
