"""What a log says of the progress."""

import io

import pytest

from diffdoctor.runs import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_says_the_time_that_is_left(clock):
    log = io.StringIO()
    bar = progress._PlainProgress(100, "treatment", "step", file=log)
    for clock[0], count in ((20, 10), (40, 10), (200, 60), (300, 20)):
        bar.update(count)
    bar.close()
    assert log.getvalue().splitlines() == [
        "treatment: 10/100 step in 20 s, about 3 min left",
        "treatment: 20/100 step in 40 s, about 3 min left",
        "treatment: 80/100 step in 3 min, about 50 s left",
        "treatment: 100/100 step in 5 min",
    ]


def test_what_an_earlier_attempt_did_says_nothing_of_the_speed(clock):
    log = io.StringIO()
    with progress._PlainProgress(1000, "pictures", "picture", file=log) as bar:
        clock[0] = 0.5
        bar.update(900)  # found on the disk
        clock[0] = 100
        bar.update(1)
    assert log.getvalue() == "pictures: 901/1000 picture in 100 s, about 2 h 45 min left\n"


def test_without_a_total_nothing_is_left(clock):
    log = io.StringIO()
    bar = progress._PlainProgress(None, "pictures", "picture", file=log)
    clock[0] = 7300
    bar.update(3)
    assert log.getvalue() == "pictures: 3 picture in 2 h 2 min\n"
