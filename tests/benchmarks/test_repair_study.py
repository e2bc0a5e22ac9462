"""The study of repairs on the demo's digits: what falls short is said, and the whole of it, which trains the demo."""

import pytest

from benchmarks.studies.repair import main, misses
from diffdoctor import cli


def test_what_falls_short_is_said():
    judge = {"before": 1.0, "after": 0.1}
    good = {"way": "resume", "set": "damaged", "judge": judge, "changed_outside": 0, "seam": 1.0, "kept": 9}
    assert misses([good, good | {"way": "lie", "kept": 0, "seam": None}]) == []
    bad = [
        good | {"changed_outside": 1},
        good | {"judge": {"before": 1.0, "after": 0.3}},
        good | {"seam": 1.2},
        good | {"way": "lie", "kept": 1},
    ]
    assert [len(misses([row])) for row in bad] == [1, 1, 1, 1]


@pytest.mark.study
def test_most_damaged_digits_are_mended(tmp_path):
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 0
    assert main(["--demo", str(tmp_path / "demo"), "--output", str(tmp_path / "study")]) == 0
