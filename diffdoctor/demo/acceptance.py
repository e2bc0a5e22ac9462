"""What the figures of the demo must reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One figure of the demo and what it must be.

    Attributes:
        name: of the figure, in words.
        value: of the figure, in words.
        limit: what it must be, in words.
        holds: whether it is.
    """

    name: str
    value: str
    limit: str
    holds: bool


def judge_is_calibrated(metrics: dict) -> list[Check]:
    """The checks of the judge itself: without them, no other figure of the demo means anything."""
    judge = metrics["judge"]
    return [
        Check("judge flags clean held-out digits", _percent(judge["false_positive_rate"]), "≤ 2 %",
              judge["false_positive_rate"] <= 0.02),
        Check("judge flags damaged held-out digits", _percent(judge["hit_rate"]), "≥ 95 %", judge["hit_rate"] >= 0.95),
    ]  # fmt: skip


def acceptance_checks(metrics: dict) -> list[Check]:
    """Every check of the demo's metrics.json, the judge's own calibration first."""
    rate = metrics["artifact_rate"]["judge"]
    ratio = rate["after"] / rate["before"] if rate["before"] else 1.0
    accuracy = metrics["digit_accuracy"]["after"] - metrics["digit_accuracy"]["before"]
    fid = metrics["fid"]["after"] / metrics["fid"]["before"]
    variance = metrics["variance"]["after"] / metrics["variance"]["before"]
    control = metrics["control"]["uniform_map"]
    moved = control["after"] - control["before"]
    return [
        *judge_is_calibrated(metrics),
        Check("artifact rate before, by the judge", _percent(rate["before"]), "≥ 25 %", rate["before"] >= 0.25),
        Check("artifact rate after / before, by the judge", f"{ratio:.3f}", "≤ 0.1", ratio <= 0.1),
        Check("digit accuracy, change", _points(accuracy), "≥ −1 point", accuracy >= -0.01),
        Check("FID after / before", f"{fid:.3f}", "≤ 0.9", fid <= 0.9),
        Check("within-class variance after / before", f"{variance:.3f}", "≥ 0.8", variance >= 0.8),
        Check("detector's mAP@0.5, held-out", f"{metrics['detector']['map50']:.3f}", "≥ 0.70",
              metrics["detector"]["map50"] >= 0.70),
        Check("control: judge's rate with a uniform map, change", _points(moved), "within ± 3 points",
              abs(moved) < 0.03),
    ]  # fmt: skip


def _percent(share):
    return f"{100 * share:.2f} %"


def _points(difference):
    return f"{100 * difference:+.2f} points"
