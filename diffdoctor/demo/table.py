"""`python -m diffdoctor.demo.table FOLDER…`: finished demos side by side, as a Markdown table."""

import json
import sys
from pathlib import Path

from diffdoctor.demo.acceptance import acceptance_checks


def table(folders) -> str:
    """The figures of several demos as a Markdown table, one row a folder.

    Args:
        folders: output folders of `diffdoctor demo` that hold a metrics.json.
    """
    header = [
        "run", "judge before", "judge after", "ratio", "detector before → after", "accuracy before → after",
        "FID before → after (floor, ceiling)", "variance ratio", "mAP@0.5", "control, uniform map", "shuffled maps",
        "seconds", "acceptance",
    ]  # fmt: skip
    rows = [header, ["---"] * len(header)]
    rows += [_row(Path(folder).name, json.loads((Path(folder) / "metrics.json").read_text())) for folder in folders]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(name, metrics):
    judge, detector = metrics["artifact_rate"]["judge"], metrics["artifact_rate"]["detector"]
    accuracy, fid, variance = metrics["digit_accuracy"], metrics["fid"], metrics["variance"]
    low, high = judge["after_interval"]
    missed = [check.name for check in acceptance_checks(metrics) if not check.holds]
    return [
        name,
        _percent(judge["before"]),
        f"{_percent(judge['after'])} ({_percent(low)} to {_percent(high)})",
        f"{judge['ratio']:.3f}",
        f"{_percent(detector['before'])} → {_percent(detector['after'])}",
        f"{_percent(accuracy['before'])} → {_percent(accuracy['after'])}",
        f"{fid['before']:.1f} → {fid['after']:.1f} ({fid['floor']:.1f}, {fid['ceiling']:.1f})",
        f"{variance['after'] / variance['before']:.2f}",
        f"{metrics['detector']['map50']:.2f}",
        *(_control(metrics["control"].get(name)) for name in ("uniform_map", "shuffled_maps")),
        f"{metrics['seconds']:.0f}",
        "holds" if not missed else "missed: " + ", ".join(missed),
    ]


def _control(control):
    return "–" if control is None else f"{_percent(control['before'])} → {_percent(control['after'])}"


def _percent(share):
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    print(table(sys.argv[1:]))
