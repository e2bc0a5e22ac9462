"""The demo at toy lengths: every stage runs, is stored, and is not made twice; `make demo` is the real test."""

import json
import re

import pytest

from diffdoctor import cli
from diffdoctor.cli import failures
from diffdoctor.demo import run
from diffdoctor.demo.acceptance import Check, acceptance_checks, judge_is_calibrated
from diffdoctor.demo.table import table
from support.demo import metrics_of

LENGTHS = {
    "classifier_steps": 20,
    "detector_steps": 3,
    "judge_steps": 3,
    "autoencoder_steps": 5,
    "base_steps": 5,
    "treat_steps": 2,
    "pictures": 40,
}
NAMES = (
    "artifact_rate.judge.before", "artifact_rate.judge.after", "artifact_rate.detector.before",
    "artifact_rate.detector.after", "fid.before", "fid.after", "fid.floor", "fid.ceiling", "digit_accuracy.before",
    "digit_accuracy.after", "variance.before", "variance.after", "detector.map50", "detector.iou",
    "judge.false_positive_rate", "judge.hit_rate", "control.uniform_map.before", "control.uniform_map.after", "seconds",
)  # fmt: skip


def demo(output, *more):
    options = [f"--{name}={value}" for name, value in LENGTHS.items()]
    return cli.main(["demo", "--output", str(output), *options, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished toy demo that was interrupted once, and how often each stage was made."""
    output = tmp_path_factory.mktemp("demo") / "run"
    made = []
    stages_run = run.Stages.run

    def counted(self, name, make):
        def make_and_count(folder):
            made.append(name)
            make(folder)
            if name == "pipeline" and made.count(name) == 1:
                raise KeyboardInterrupt

        return stages_run(self, name, make_and_count)

    with pytest.MonkeyPatch.context() as patch:
        # A judge of three steps knows nothing; what is tested here is the road, not where it leads.
        patch.setattr(run, "judge_is_calibrated", lambda metrics: [])
        patch.setattr(run.Stages, "run", counted)
        patch.setattr(run, "FIXED_PICTURES", 20)
        assert demo(output, "--shuffled_control=true") == failures.INTERRUPTED
        assert demo(output, "--shuffled_control=true") == 0
    return output, made


def test_metrics_have_every_name(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    for name in NAMES:
        value = metrics
        for part in name.split("."):
            value = value[part]
        assert isinstance(value, (int, float)), name
    low, high = metrics["artifact_rate"]["judge"]["before_interval"]
    assert 0 <= low <= metrics["artifact_rate"]["judge"]["before"] <= high <= 1
    assert {"uniform_map", "shuffled_maps"} == set(metrics["control"])
    assert metrics["seconds"] == pytest.approx(sum(metrics["stage_seconds"].values()))


def test_an_interrupted_stage_is_made_again_and_no_other(finished):
    made = finished[1]
    assert made.count("pipeline") == 2
    assert {name for name in made if made.count(name) > 1} == {"pipeline"}


def test_the_report_is_one_file(finished):
    page = (finished[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for words in ("artifact rate, judge", "control, uniform map", "digit accuracy", "treat_learning_rate"):
        assert words in page
    assert (finished[0] / "pictures" / "before_after.png").read_bytes().startswith(b"\x89PNG")


def test_other_options_in_the_same_folder_are_refused(finished, capsys):
    assert demo(finished[0], "--seed=5") == 2
    assert "holds stages of a run with another seed (expected 0, got 5)" in capsys.readouterr().err


def test_a_judge_that_is_not_calibrated_ends_the_demo(finished, capsys):
    (finished[0] / "metrics.json").unlink()
    # The very stages of the toy demo, whose judge has learnt nothing, without the patch.
    assert demo(finished[0]) == 1
    assert "The judge cannot be trusted" in capsys.readouterr().err
    assert not (finished[0] / "metrics.json").exists()


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"judge__false_positive_rate": 0.03}, ["judge flags clean held-out digits"]),
        ({"artifact_rate__judge__after": 0.04}, ["artifact rate after / before, by the judge"]),
        ({"digit_accuracy__after": 0.93}, ["digit accuracy, change"]),
        ({"fid__after": 1.9}, ["FID after / before"]),
        ({"variance__after": 30.0}, ["within-class variance after / before"]),
        ({"control__uniform_map__after": 0.31}, ["control: judge's rate with a uniform map, change"]),
    ],
    ids=lambda value: next(iter(value), "holds") if isinstance(value, dict) else "",
)
def test_checks_fail_where_they_should(change, missed):
    assert [check.name for check in acceptance_checks(metrics_of(**change)) if not check.holds] == missed


def test_calibration_is_part_of_the_checks():
    assert all(isinstance(check, Check) and check.holds for check in judge_is_calibrated(metrics_of()))


def test_the_table_has_a_row_for_each_run(tmp_path):
    for name, after in (("one", 0.02), ("two", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics_of(artifact_rate__judge__after=after)))
    lines = table([tmp_path / "one", tmp_path / "two"]).split("\n")
    assert len(lines) == 4
    assert lines[2].endswith("| holds |")
    assert "missed: artifact rate after / before" in lines[3]
