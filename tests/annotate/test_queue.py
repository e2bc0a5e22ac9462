"""Leases, drafts, answers, gold, review and the record, by the functions that the server calls."""

import errno
import sqlite3
import threading

import numpy as np
import pytest

from diffdoctor.annotate import gold, review
from diffdoctor.annotate import store as store_module
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.queue import Queue, Refused, Submission
from diffdoctor.annotate.status import status_of
from diffdoctor.annotate.store import Store
from diffdoctor.runs.errors import UserError
from support.annotation import make_project, spot


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def people(project, *names):
    for name in names:
        project.store.add_person(name, "annotator")
    return [project.store.one("SELECT * FROM annotator WHERE name = ?", name) for name in names]


def damaged(task, seed=0, **fields):
    return Submission(task["version"], "damaged", task["fence"], spot(seed), **fields)


def clean(task, **fields):
    return Submission(task["version"], "clean", task["fence"], **fields)


def state_of(project, task):
    return tuple(project.store.one("SELECT state, done FROM task WHERE id = ?", task))


def test_a_task_is_one_raters_until_the_lease_ends(tmp_path):
    project = make_project(tmp_path, 2)
    (ann, ben, eva), clock = people(project, "ann", "ben", "eva"), Clock()
    queue = Queue(project, clock)
    first = queue.take(ann)
    assert first["task"] == 1 and first["until"] == 1600
    assert queue.take(ann)["fence"] == first["fence"]
    assert queue.take(ben)["task"] == 2
    assert queue.take(eva) == {"task": None, "reason": "elsewhere"}
    clock.now = 1500
    saved = queue.save_draft(1, ann["id"], 0, first["fence"], b"draft")
    assert saved == {"version": 1, "lease": True, "until": 2100, "now": 1500}
    clock.now = 1700  # ben's lease is over, ann's is not
    assert queue.take(eva)["task"] == 2
    saved = queue.save_draft(
        2, ben["id"], 0, queue.store.one("SELECT fence FROM lease WHERE annotator = 2")[0], b"late"
    )
    assert not saved["lease"]
    # ben is not asked about a task of which somebody else has the lease, and gets it back with the draft when that ends
    assert queue.take(ben) == {"task": None, "reason": "elsewhere"}
    clock.now = 2400
    again = queue.take(ben)
    assert again["task"] == 2 and again["draft_version"] == 1 and queue.draft(2, ben["id"]) == (1, b"late")


def test_two_tabs_do_not_overwrite_each_others_draft(tmp_path):
    project = make_project(tmp_path, 1)
    (ann,) = people(project, "ann")
    queue = Queue(project)
    task = queue.take(ann)
    queue.save_draft(1, ann["id"], 0, task["fence"], b"one")
    with pytest.raises(Refused) as error:
        queue.save_draft(1, ann["id"], 0, task["fence"], b"two")
    assert error.value.status == 409 and error.value.fields == {"version": 1}
    assert queue.draft(1, ann["id"]) == (1, b"one")


def test_a_late_answer_is_kept_and_counts_for_agreement(tmp_path):
    project = make_project(tmp_path, 1)
    (ann, ben), clock = people(project, "ann", "ben"), Clock()
    queue = Queue(project, clock)
    slow = queue.take(ann)
    clock.now += 700
    quick = queue.take(ben)
    assert queue.submit(1, ben["id"], damaged(quick))["late"] is False
    answer = queue.submit(1, ann["id"], damaged(slow))
    assert answer["late"] is True and state_of(project, 1) == ("done", 2)
    assert queue.take(ann) == {"task": None, "reason": "empty"}
    # one that differs makes a conflict, late or not
    other = make_project(tmp_path, 1)
    task = other.store.one("SELECT max(id) FROM task")[0]
    queue = Queue(other, clock)
    slow = queue.take(ann)
    clock.now += 700
    queue.submit(task, ben["id"], damaged(queue.take(ben)))
    queue.submit(task, ann["id"], clean(slow))
    assert state_of(other, task) == ("conflict", 2)


def test_the_same_answer_again_changes_nothing(tmp_path):
    project = make_project(tmp_path, 1)
    (ann,) = people(project, "ann")
    queue = Queue(project)
    task = queue.take(ann)
    first = queue.submit(1, ann["id"], damaged(task, tags=["hand"], active_ms=10**9, wall_ms=10**9))
    again = queue.submit(1, ann["id"], damaged(task, tags=["hand"]))
    assert again == {**first, "repeated": True}
    with pytest.raises(Refused, match="another answer") as error:
        queue.submit(1, ann["id"], clean(task))
    assert error.value.status == 409
    row = project.store.one("SELECT * FROM annotation")
    assert row["active_ms"] <= row["wall_ms"] < 60_000  # no longer than the server's own clock has it
    # a correction is a further version, and the newest counts
    correction = Submission(2, "clean")
    assert queue.submit(1, ann["id"], correction)["version"] == 2
    with pytest.raises(Refused, match="version: expected 3, got 5"):
        queue.submit(1, ann["id"], Submission(5, "clean"))
    assert project.store.one("SELECT count(*) FROM annotation")[0] == 2 and state_of(project, 1) == ("done", 1)


def test_only_whoever_had_the_task_answers_it(tmp_path):
    project = make_project(tmp_path, 1)
    ann, ben = people(project, "ann", "ben")
    queue = Queue(project)
    task = queue.take(ann)
    for fence in (task["fence"], "", "é"):
        with pytest.raises(Refused) as error:
            queue.submit(1, ben["id"], Submission(1, "clean", fence))
        assert error.value.status == 403
    with pytest.raises(Refused):
        queue.release(1, ann["id"], "other", "no idea")
    queue.release(1, ann["id"], task["fence"], "no idea")
    assert queue.take(ann) == {"task": None, "reason": "empty"}
    assert queue.take(ben)["task"] == 1 and state_of(project, 1) == ("open", 0)


def test_verdict_and_marks_must_fit():
    for verdict, mask in (("damaged", None), ("damaged", spot() * 0), ("clean", spot()), ("unusable", spot())):
        with pytest.raises(UserError, match="mask: expected marks"):
            Submission(1, verdict, mask=mask)
    # what has no pixels, as a missing arm
    assert Submission(1, "damaged", mask=spot() * 0, tags=["missing-part"]).mask is None
    with pytest.raises(UserError, match="verdict"):
        Submission(1, "skipped")


def test_two_raters_agree_differ_and_a_reviewer_settles_it(tmp_path):
    project = make_project(tmp_path, 3, needed=2)
    ann, ben, rev = people(project, "ann", "ben", "rev")
    queue = Queue(project)
    answers = {
        1: (spot(0), np.roll(spot(0), 1, axis=0)),
        2: (spot(1), None),
        3: (spot(2), np.roll(spot(2), 30, axis=1)),
    }
    for task, masks in answers.items():
        for who, mask in zip((ann, ben), masks, strict=True):
            asked = queue.take(who)
            assert asked["task"] == task
            verdict = "clean" if mask is None else "damaged"
            queue.submit(task, who["id"], Submission(1, verdict, asked["fence"], mask))
    assert [state_of(project, task) for task in answers] == [("done", 2), ("conflict", 2), ("conflict", 2)]
    found = review.next_review(project, rev["id"])
    assert (found["task"], found["reason"]) == (2, "verdicts differ")
    assert review.next_review(project, ann["id"]) == {"task": None}  # nobody reviews an answer of one's own
    shown = review.answers_of(project, 3, (48, 64))
    assert [each["rater"] for each in shown["answers"]] == ["A", "B"] and shown["pairs"][0]["tolerant_iou"] < 0.5
    review.decide(project, 2, rev["id"], "accept", annotation=shown_id(project, 2, ben))
    assert state_of(project, 2)[0] == "reviewed" and review.newest_review(project, 2)["verdict"] == "clean"
    assert review.next_review(project, rev["id"])["reason"] == "masks differ"
    # nobody was right: one more rater is asked, who cannot be one of these
    assert review.decide(project, 3, rev["id"], "reject")["state"] == "open"
    assert queue.take(ann)["task"] is None and queue.take(rev)["task"] == 3
    review.decide(project, 3, rev["id"], "edit", verdict="damaged", mask=spot(2), comment="the first")
    assert (project.store.mask(review.newest_review(project, 3)["mask"]) == spot(2)).all()
    with pytest.raises(Refused):
        review.decide(project, 2, rev["id"], "accept", annotation=shown_id(project, 3, ann))
    with pytest.raises(UserError, match="mask: expected marks"):
        review.decide(project, 2, rev["id"], "edit", verdict="clean", mask=spot(2))
    assert project.store.verify() == []


def shown_id(project, task, who):
    return project.store.one("SELECT id FROM annotation WHERE task = ? AND annotator = ?", task, who["id"])[0]


def test_a_beginner_is_taught_first_and_told_how_it_went(tmp_path):
    make_project(tmp_path, 1)
    project = make_project(
        tmp_path, 3, kind="training", truth=lambda seed: spot(seed) * (seed != 2), settings={"training": 2}
    )
    ann, ben = people(project, "ann", "ben")
    queue = Queue(project)
    first = queue.take(ann)
    assert first["task"] == 2 and first["training"]
    told = queue.submit(2, ann["id"], damaged(first, seed=1))["training"]
    assert told == {"hit": True, "iou": 1.0, "verdict": "damaged"}
    second = queue.take(ann)
    told = queue.submit(second["task"], ann["id"], damaged(second, seed=5))["training"]
    assert told["hit"] is False and told["verdict"] == "clean"
    assert queue.take(ann)["task"] == 1 and not queue.take(ann)["training"]
    assert queue.take(ben)["task"] == 2  # every beginner gets the same ones
    assert gold.score(project, ann["id"]) is None  # lessons are no test


def test_who_fails_on_known_truth_is_paused_and_may_come_back(tmp_path):
    project = make_project(tmp_path, 14, kind="gold", truth=lambda seed: spot(seed) * (seed % 2))
    ann, ben, rev = people(project, "ann", "ben", "rev")
    queue = Queue(project)
    for seed in range(6):  # ben is right about each
        task = queue.take(ben)
        assert "kind" not in task and not task["training"]
        queue.submit(task["task"], ben["id"], damaged(task, seed) if seed % 2 else clean(task))
    assert gold.score(project, ben["id"]) == {"hits": 6, "of": 6} and queue.take(ben)["task"]
    for _ in range(5):  # ann misses every second one
        task = queue.take(ann)
        queue.submit(task["task"], ann["id"], clean(task))
    assert queue.take(ann) == {"task": None, "reason": "paused"}
    reason = project.store.one("SELECT paused FROM annotator WHERE id = ?", ann["id"])[0]
    assert reason == "3 of the last 5 pictures that were checked are right"
    gold.resume(project, ann["id"], rev["id"])
    marked = 0
    while marked < 2:  # right about what is damaged, wrong about what is clean
        task = queue.take(ann)
        seed = task["task"] - 1
        marked += seed % 2 == 0
        queue.submit(task["task"], ann["id"], damaged(task, seed))
    assert "marked 2 clean pictures" in project.store.one("SELECT paused FROM annotator WHERE id = ?", ann["id"])[0]


def test_the_record_shows_what_was_changed(tmp_path):
    project = make_project(tmp_path, 2)
    (ann,) = people(project, "ann")
    queue = Queue(project)
    for _ in range(2):
        task = queue.take(ann)
        queue.submit(task["task"], ann["id"], clean(task))
    store = project.store
    assert store.verify() == [] and status_of(project)["labels"] == {"wanted": 2, "done": 2}
    for statement in (
        "UPDATE annotation SET verdict = 'damaged'",
        "DELETE FROM event",
        "DELETE FROM mask",
        "UPDATE event SET at = 0",
    ):
        with store.writing(), pytest.raises(sqlite3.IntegrityError, match="nothing is overwritten"):
            store.connection.execute(statement)
    # somebody with the file in hand can, and is found out
    store.connection.execute("DROP TRIGGER annotation_update")
    store.connection.execute("UPDATE annotation SET active_ms = 99 WHERE id = 2")
    assert store.verify() == ["annotation 2 is not what was written"]
    store.connection.execute("DROP TRIGGER event_update")
    store.connection.execute("UPDATE event SET detail = '{}' WHERE id = 3")
    assert store.verify() == ["event 3 is not what was written"]
    copy = store.backup()
    assert sqlite3.connect(copy).execute("SELECT count(*) FROM annotation").fetchone() == (2,)


def test_what_is_no_project_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a project with annotate\.db"):
        Project(tmp_path)
    (tmp_path / "annotate.db").write_bytes(b"no database at all, but long enough to look like one" * 99)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(tmp_path)
    other = make_project(tmp_path / "other", 1) if (tmp_path / "other").mkdir() is None else None
    other.store.connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="a project of version 1, got 99"):
        Project(other.folder)
    (other.folder / "config.yaml").write_text("treshold: 0.5\n")
    other.store.connection.execute("PRAGMA user_version = 1")
    with pytest.raises(UserError, match="treshold"):
        Project(other.folder)


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    store = make_project(tmp_path, 1).store
    store.connection.execute("PRAGMA max_page_count = 1")  # as many as there are
    noise = np.random.default_rng(0).integers(0, 2, (500, 500), np.uint8) * np.uint8(255)
    with pytest.raises(OSError, match="disk is full") as error, store.writing():
        store.log("note")
        store.put_mask(noise)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(store.path))
    store.connection.execute("PRAGMA max_page_count = 1000000")
    with store.writing():
        name = store.put_mask(noise)
    assert np.array_equal(store.mask(name), noise)
    assert store.verify() == []
    assert store.one("SELECT 1 FROM event WHERE kind = 'note'") is None
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk is full"):
        patched.setattr(store_module, "SCHEMA", f"PRAGMA max_page_count = 2;{store_module.SCHEMA}")
        Store(tmp_path / "other", create=True)
    assert Store(tmp_path / "other", create=True).verify() == []


def test_a_disk_without_write_ahead_logs_is_refused(tmp_path, monkeypatch):
    make_project(tmp_path, 1)
    connect = sqlite3.connect
    # a database in memory cannot have one either
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(":memory:", **options))
    with pytest.raises(UserError, match="a local disk"):
        Store(tmp_path / "project")


def test_a_picture_that_was_replaced_is_not_shown(tmp_path):
    project = make_project(tmp_path, 1)
    assert project.picture(1).shape == (48, 64, 3)
    (tmp_path / "pictures" / "0000.png").write_bytes(b"")
    with pytest.raises(UserError, match="can no longer be read"):
        project.picture(1)
    make_project(tmp_path, 1)
    (tmp_path / "pictures" / "0001.png").rename(tmp_path / "pictures" / "0000.png")
    with pytest.raises(UserError, match="is not the picture that was added"):
        project.picture(1)


def race(tmp_path, tasks, clients):
    """So many threads label everything at once; every tenth task wants two."""
    project = make_project(tmp_path, tasks, height=8, width=8, needed=lambda seed: 1 + (seed % 10 == 0))
    raters = people(project, *(f"rater {index}" for index in range(clients)))
    faults = []

    def work(me):
        queue = Queue(Project(project.folder))
        try:
            while (task := queue.take(me))["task"] is not None or task["reason"] == "elsewhere":
                if task["task"] is not None:
                    queue.submit(task["task"], me["id"], Submission(task["version"], "clean", task["fence"]))
        except Exception as error:
            faults.append(error)
        queue.store.close()

    threads = [threading.Thread(target=work, args=(rater,)) for rater in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    counts = project.store.all("SELECT needed, done, state FROM task")
    assert all(row["done"] == row["needed"] and row["state"] == "done" for row in counts)
    assert project.store.one("SELECT count(*), count(DISTINCT task * 100 + annotator) FROM annotation")[:] == (
        *(2 * [tasks + tasks // 10]),
    )
    assert project.store.verify() == [] and project.store.one("SELECT count(*) FROM lease")[0] == 0


def test_raters_at_once_never_get_one_task_twice(tmp_path):
    race(tmp_path, 120, 8)


@pytest.mark.slow
@pytest.mark.study
def test_eight_raters_and_two_thousand_tasks(tmp_path):
    race(tmp_path, 2000, 8)
