"""How far the rounds are, on the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffdoctor.rounds.stages import PROMPTS, progress_of
from diffdoctor.rounds.state import BEGUN, DONE, STAGES, STATUS, Round, Rounds
from diffdoctor.viz.report import Report, new_figure

HEADER = ("round", "stage", "state", "seconds", "outcome")


def status_rows(rounds: Rounds) -> list[tuple[str, str, str, str, str]]:
    """A row of `HEADER` for every stage of every round that was begun."""
    entries = {(e["round"], e["stage"], e["state"]): e for e in rounds.ledger.entries()}
    rows = []
    for number in sorted({key[0] for key in entries}):
        for stage in STAGES:
            done = entries.get((number, stage, DONE))
            if done is not None:
                rows.append((str(number), stage, "done", f"{done['seconds']:,.1f}", done["outputs"]["line"]))
                continue
            begun = (number, stage, BEGUN) in entries
            rows.append((str(number), stage, "begun" if begun else "", "", _so_far(rounds, number, stage, begun)))
    return rows


def _so_far(rounds: Rounds, number: int, stage: str, begun: bool) -> str:
    if stage != "annotate" or not begun:
        return ""
    wanted, done, _, conflicts = progress_of(Round(rounds, number))
    waiting = f", {conflicts:,} conflicts wait for a reviewer" if conflicts else ""
    return f"{done:,} of {wanted:,} labels are there{waiting}"


def status_text(rounds: Rounds) -> str:
    """The rows as a table of plain text."""
    rows = [HEADER, *status_rows(rounds)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def summary(rounds: Rounds) -> str:
    """The most important on a line."""
    decided = rounds.decisions()
    adopted = [number for number, each in enumerate(decided, start=1) if each["adopted"]]
    if not decided:
        return "no round is finished"
    best = f"the detector of round {adopted[-1]} is the best" if adopted else "no detector was better than the first"
    return f"{len(decided)} round{'s' if len(decided) > 1 else ''} finished, {best}"


def write_status(rounds: Rounds) -> Path:
    """Write status.html into the rounds' folder; returns its path."""
    report = Report("Rounds")
    report.lead(f"{summary(rounds)}.")
    report.text(f"The detector to use: {rounds.detector(len(rounds.decisions()) + 1)}")
    measured = [(n, rounds.outputs(n, "evaluate")) for n in range(1, len(rounds.decisions()) + 2)]
    measured = [(number, found) for number, found in measured if found]
    if measured:
        report.heading("Detectors")
        _measures(report, rounds, measured)
    report.heading("Stages")
    rows = [(n, stage, state, (seconds, "number"), text) for n, stage, state, seconds, text in status_rows(rounds)]
    report.table(HEADER, rows)
    _categories(report, rounds)
    path = rounds.output / STATUS
    report.write(path)
    return path


def _measures(report: Report, rounds: Rounds, measured: list[tuple[int, dict[str, Any]]]) -> None:
    rows = []
    for number, found in measured:
        for name in ("test", "audit"):
            if name in found:
                # text, which is wrapped where a page is narrow
                values = [_change(found[name][each]) for each in ("map50", "hit_rate", "false_positive_rate")]
                rows.append((number, name, (found[name]["pictures"], "number"), *values))
    report.table(("round", "set", "pictures", "mAP@0.5", "damaged flagged", "clean flagged"), rows)
    report.text("Before → after, and the difference with its interval of 95 % from resampling the pictures.")
    figure, (axes,) = new_figure(1)
    for name in ("test", "audit"):
        points = [(number, found[name]["map50"]) for number, found in measured if name in found]
        points = [(number, value) for number, value in points if value["after"] is not None]
        if points:
            axes.plot([n for n, _ in points], [value["before"] for _, value in points], "o--", label=f"{name}, before")
            axes.plot([n for n, _ in points], [value["after"] for _, value in points], "o-", label=f"{name}, after")
    axes.set(xlabel="round", ylabel="mAP@0.5", ylim=(0, 1), xticks=[number for number, _ in measured])
    axes.legend(fontsize=8)
    report.figure(figure, "mAP@0.5 of the detector with which a round began, and of the one that it trained.")


def _change(value: dict[str, Any]) -> str:
    if value["difference"] is None:
        return "–"
    low, high = value["difference_interval"]
    change = f"{value['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{value['before']:.3f} → {value['after']:.3f}, {change}"


def _categories(report: Report, rounds: Rounds) -> None:
    number = max((entry["round"] for entry in rounds.ledger.entries()), default=0)
    selected, accepted = (rounds.outputs(number, stage) for stage in ("select", "accept"))
    if selected.get("categories"):
        report.heading("Categories that need new pictures")
        where = Round(rounds, number).path(PROMPTS)
        report.text(f"Their {selected['prompts_wanted']:,} prompts, for `diffdoctor sample --prompts`: {where}.")
        rows = [
            (e["category"] or "(none)", (e["pictures"], "number"), (f"{e['z']:+.1f}", "number"), (e["verdict"], "bad"))
            for e in selected["categories"]
        ]
        report.table(("category", "pictures", "z of its mean confidence", ""), rows)
    if accepted.get("categories"):
        report.heading("How often the detector's own maps are right")
        report.text("By audit tasks; bounds are the lower ends of Wilson's intervals of 95 %.")
        rows = [
            (
                e["category"] or "(none)",
                (f"{e['right']} of {e['components']}", "number"),
                (f"{e['damaged_bound']:.2f}", "number"),
                (f"{e['rightly_clean']} of {e['clean']}", "number"),
                (f"{e['clean_bound']:.2f}", "number"),
            )
            for e in accepted["categories"]
        ]
        report.table(("category", "found: right", "bound", "called clean: right", "bound"), rows)
