"""The simulated rater: what each parameter does, and that it is found again from a project's answers."""

import math

import numpy as np
import pytest

from diffdoctor.annotate.fit import fit
from diffdoctor.annotate.queue import Queue, Submission
from diffdoctor.annotate.simulated import Annotator, signed_distance
from diffdoctor.runs.errors import UserError
from support.annotation import make_project

CERTAIN = Annotator(jitter_px=0, missed=0, false_rate=0, anchor=0)


def disc(y, x, radius, side=64):
    rows, columns = np.mgrid[:side, :side]
    return (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < radius**2


def test_a_certain_rater_marks_the_truth_and_takes_the_time():
    truth, false = disc(20, 20, 9) | disc(50, 50, 6), disc(12, 50, 5)
    found = CERTAIN.marks(truth)
    assert (found.mask == truth).all() and (found.drawn, found.seconds, found.verdict) == (2, 44, "damaged")
    found = CERTAIN.marks(truth, truth | false)
    assert (found.mask == truth).all() and (found.accepted, found.refused, found.drawn) == (0, 3, 2)
    trusting = Annotator(jitter_px=0, missed=0, false_rate=0, anchor=1)
    found = trusting.marks(truth, truth | false)
    # a false proposal is kept, and a true one saves the drawing
    assert (found.mask == truth | false).all() and (found.accepted, found.drawn, found.seconds) == (3, 0, 13)
    assert CERTAIN.marks(truth & False).verdict == "clean"


def test_the_outline_lies_off_by_as_much_as_is_said():
    truth = disc(64, 64, 30, 128)
    rater = Annotator(jitter_px=2.0, missed=0, false_rate=0)
    distance = signed_distance(truth)
    squares = []
    for seed in range(30):
        mask = rater.marks(truth, seed=seed).mask
        rim = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
        squares += np.square(distance[rim]).tolist()
    assert math.sqrt(np.mean(squares)) == pytest.approx(2.0, rel=0.15)
    assert (rater.marks(truth, seed=3).mask == rater.marks(truth, seed=3).mask).all()


def test_small_faint_things_are_overlooked_more_often():
    rater = Annotator(missed=0.2, missed_per_log_area=1.0, missed_per_contrast=4.0)
    usual = disc(32, 32, math.sqrt(0.02 * 64 * 64 / math.pi))
    assert rater.missing(usual) == pytest.approx(0.2, abs=0.01)
    assert rater.missing(disc(32, 32, 2)) > 0.5 > 0.02 > rater.missing(disc(32, 32, 28))
    picture = np.zeros((64, 64, 3), np.uint8)
    faint, clear = picture.copy(), picture.copy()
    faint[usual], clear[usual] = 20, 255
    assert rater.missing(usual, clear) < 0.01 < 0.1 < rater.missing(usual, faint) < rater.missing(usual)
    counts = [
        Annotator(missed=0.2, missed_per_log_area=0, false_rate=0).marks(usual, seed=s).mask.any() for s in range(400)
    ]
    assert 1 - np.mean(counts) == pytest.approx(0.2, abs=0.06)


def test_marks_are_invented_at_a_rate():
    rater = Annotator(false_rate=0.5)
    drawn = [rater.marks(np.zeros((64, 64), bool), seed=seed).drawn for seed in range(400)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.11)


@pytest.mark.parametrize("values", [{"missed": 1.5}, {"anchor": -0.1}, {"jitter_px": -1}, {"false_rate": math.inf}])
def test_what_no_rater_is_is_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Annotator(**values)


def truth_of(seed):
    """Up to three discs; every fourth picture is clean."""
    rng = np.random.default_rng([9, seed])
    mask = np.zeros((64, 64), bool)
    for y in (12, 32, 52)[: seed % 4]:
        mask |= disc(y, rng.uniform(14, 50), rng.uniform(3, 8))
    return mask


def test_a_rater_is_found_again_from_the_answers(tmp_path):
    rater = Annotator(
        jitter_px=1.0, missed=0.1, missed_per_log_area=1.0, false_rate=0.2, anchor=0.6,
        seconds_per_picture=3, seconds_per_proposed=2, seconds_per_drawn=12,
    )  # fmt: skip
    tasks = 160
    project = make_project(
        tmp_path,
        tasks,
        height=64,
        width=64,
        kind="gold",
        truth=lambda seed: truth_of(seed) * np.uint8(255),
        proposal=lambda seed: truth_of(seed) * np.uint8(200),
        blind=lambda seed: seed % 3 == 0,
        settings={"gold_share": 0.0, "gold_marked": 10**6},
    )
    queue = Queue(project)
    project.store.add_person("sim", "annotator")
    for seed in range(tasks):
        proposed = None if seed % 3 == 0 else truth_of(seed)
        found = rater.marks(truth_of(seed), proposed, seed=[1, seed])
        counts = {name: getattr(found, name) for name in ("accepted", "refused", "drawn")}
        times = dict.fromkeys(("active_ms", "wall_ms"), int(1000 * found.seconds))
        mask = found.mask * np.uint8(255)
        queue.take_answer(seed + 1, 1, Submission(1, found.verdict, mask=mask, **counts, **times))
    again = fit(project)
    assert again.seconds_per_picture == pytest.approx(3, abs=0.05)
    assert again.seconds_per_proposed == pytest.approx(2, abs=0.05)
    assert again.seconds_per_drawn == pytest.approx(12, abs=0.05)
    assert again.jitter_px == pytest.approx(1.0, abs=0.25)
    assert again.missed == pytest.approx(0.1, abs=0.05)
    assert 0.3 < again.missed_per_log_area < 2
    assert again.false_rate == pytest.approx(0.2, abs=0.08)
    assert again.anchor == pytest.approx(0.6, abs=0.12)


def test_without_known_truth_there_is_nothing_to_fit(tmp_path):
    with pytest.raises(UserError, match="answers to tasks of known truth"):
        fit(make_project(tmp_path, 1))
