"""The study of what a label is worth: its figures from known points, and a small one that is stopped and resumed."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.studies.label_efficiency import __main__ as study
from benchmarks.studies.label_efficiency import digits, signs, tables
from benchmarks.studies.label_efficiency.design import DIGITS, SIGNS
from diffdoctor.annotate.select import STRATEGIES


def points(*rows):
    return [dict(zip(("labels", "seconds", "map50"), row, strict=True), damaged=0) for row in rows]


def test_minutes_are_between_points_and_not_beyond_them():
    line = points((0, 0, 0.2), (20, 300, 0.4), (40, 900, 0.6))
    assert tables.at_minutes(line, 5) == pytest.approx(0.4) and tables.at_minutes(line, 10) == pytest.approx(0.5)
    assert tables.at_minutes(line, 15) == pytest.approx(0.6) and tables.at_minutes(line, 16) is None


def test_the_table_has_means_with_their_errors():
    arms = {
        f"noisy-{name}-{seed}": {
            "rater": "noisy", "strategy": name, "seed": seed,
            "points": points((0, 0, 0.2), (160, 1200 + 600 * seed, 0.6 + 0.1 * seed)),
        }
        for name in ("random", "paper") for seed in (0, 1)
    }  # fmt: skip
    lines = tables.table(arms, DIGITS).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| noisy | paper | – | – | – | 0.65 ± 0.05 | – |")
    # after 20 minutes one seed has 0.6 and the other two thirds of the way to 0.7; after 30 there is one alone
    assert "| 0.57 ± 0.03 | – | 0 | 25 |" in lines[2]
    for seed in (0, 1):
        arms[f"noisy-paper-{seed}"]["points"][1]["map50"] += 0.1
    assert tables.against_random(arms, DIGITS).splitlines()[2:] == [
        "| noisy | paper | +0.02 ± 0.00 | +0.04 ± 0.01 | +0.08 ± 0.02 | – |"
    ]


def test_a_small_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    for name, value in {"KNOWN_CLEAN": 20, "POOL": 40, "TEST": 20}.items():
        monkeypatch.setattr(digits, name, value)
    small = dataclasses.replace(DIGITS, budgets=dict.fromkeys(STRATEGIES, (4, 8)))
    monkeypatch.setitem(study.DESIGNS, "digits", small)
    words = ["--output", str(tmp_path / "out"), "--seeds", "0", "--raters", "noisy"]
    words += ["--settings", '{"first_steps": 2, "steps": 2, "batch_size": 4}']
    assert study.main([*words, "--strategies", "mixed"]) == 0
    first = (tmp_path / "out" / "arms" / "noisy-mixed-0.json").read_bytes()
    assert study.main([*words, "--strategies", "mixed", "paper"]) == 0
    assert (tmp_path / "out" / "arms" / "noisy-mixed-0.json").read_bytes() == first
    arm = json.loads((tmp_path / "out" / "arms" / "noisy-paper-0.json").read_text())["points"]
    assert [each["labels"] for each in arm] == [0, 4, 8] and np.all(np.diff([each["seconds"] for each in arm]) >= 16)
    assert (tmp_path / "out" / "labels.png").stat().st_size > 0 and "| noisy | mixed |" in capsys.readouterr().out
    assert study.main([*words[:-1], '{"first_steps": 3}']) == 2
    assert "another batch_size" in capsys.readouterr().err


def test_signs_are_labelled_and_their_pipeline_is_treated(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(signs, "POOL", 20)
    monkeypatch.setitem(study.DESIGNS, "signs", dataclasses.replace(SIGNS, budgets=dict.fromkeys(STRATEGIES, (4, 8))))
    base = {"signs": 24, "autoencoder_steps": 2, "sd_legs": [[2, 1e-3]], "most_further": 0}
    treat = {"steps": 2, "batch_size": 4, "evaluate_pictures": 4}
    options = {"pictures": 12, "held_out": 12, "clean_signs": 12, "base": base, "treat": treat}
    words = ["--world", "signs", "--output", str(tmp_path / "out"), "--signs", str(tmp_path / "signs"), "--seeds", "0"]
    words += ["--raters", "noisy", "--strategies", "random", "--treat", "8"]
    words += ["--settings", '{"first_steps": 2, "steps": 2, "batch_size": 4}', "--signs_settings", json.dumps(options)]
    assert study.main(words) == 0
    points = json.loads((tmp_path / "out" / "arms" / "noisy-random-0.json").read_text())["points"]
    assert [point["labels"] for point in points] == [0, 4, 8]
    # two steps of training leave no letter sound, from which broken ones could be told
    assert [point["letters_auroc"] for point in points] == [None] * 3
    assert [0 <= point.get("treated_rate", -1) <= 1 for point in points] == [False, False, True]
    # the treatment was steered by the detector of these labels
    (treated,) = (tmp_path / "signs" / "parts").glob("sd-treated-*")
    (detector,) = (tmp_path / "signs" / "parts").glob("labels-detector-*")
    assert json.loads((treated / "part.json").read_text())["settings"]["detector"] == detector.name
    assert "after a treatment with the detector:" in capsys.readouterr().out
