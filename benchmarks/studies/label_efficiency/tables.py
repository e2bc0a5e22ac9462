"""The results as tables and as a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.studies.label_efficiency.design import RATERS, Design
from diffdoctor.annotate.select import STRATEGIES

COLOURS = {"paper": "#d55e00", "uncertainty": "#0072b2", "random": "#555555", "mixed": "#009e73"}


def at_minutes(points: list[dict], minutes: float) -> float | None:
    """The mAP that so many minutes of a rater's work buy, linear between points; None beyond the last."""
    seconds = [point["seconds"] for point in points]
    if 60 * minutes > seconds[-1]:
        return None
    return float(np.interp(60 * minutes, seconds, [point["map50"] for point in points]))


def arms_of(results: dict[str, dict], rater: str, strategy: str) -> dict[int, list[dict]]:
    """{seed: points} of one strategy with one rater."""
    found = [each for each in results.values() if (each["rater"], each["strategy"]) == (rater, strategy)]
    return {each["seed"]: each["points"] for each in found}


def table(results: dict[str, dict], design: Design) -> str:
    """The results in Markdown: mAP by labels and by minutes, the mean over seeds with its standard error."""
    counts, full = counts_of(design), design.full
    header = ["rater", "strategy", *(f"{n} labels" for n in counts), *(f"{m} min" for m in design.minutes)]
    lines = [[*header, f"damaged of {full} labels", f"minutes for {full}"], ["---"] * (len(header) + 2)]
    for rater in RATERS:
        for strategy in STRATEGIES:
            arms = list(arms_of(results, rater, strategy).values())
            if not arms:
                continue
            by_labels = [[p["map50"] for a in arms for p in a if p["labels"] == count] for count in counts]
            by_minutes = [[value for a in arms if (value := at_minutes(a, m)) is not None] for m in design.minutes]
            # of fewer seeds, those that were slower, it would be another mean
            by_minutes = [values if len(values) == len(arms) else [] for values in by_minutes]
            effort = [(p["damaged"], p["seconds"] / 60) for a in arms for p in a if p["labels"] == full]
            cells = [rater, strategy, *map(_mean, by_labels), *map(_mean, by_minutes)]
            lines.append(cells + [f"{value:.0f}" for value in np.mean(effort or [(0, 0)], axis=0)])
    return _markdown(lines)


def against_random(results: dict[str, dict], design: Design) -> str:
    """By how much mAP lies above that of random pictures of the same seed, after as many minutes, in Markdown."""
    lines = [["rater", "strategy", *(f"{m} min" for m in design.minutes)], ["---"] * (len(design.minutes) + 2)]
    for rater in RATERS:
        base = arms_of(results, rater, "random")
        for strategy in [name for name in STRATEGIES if name != "random"]:
            arms = arms_of(results, rater, strategy)
            seeds = sorted({*arms} & {*base})
            cells = []
            for minutes in design.minutes:
                pairs = [(at_minutes(arms[seed], minutes), at_minutes(base[seed], minutes)) for seed in seeds]
                known = [new - old for new, old in pairs if new is not None and old is not None]
                cells.append(_mean(known if len(known) == len(seeds) else [], "+.2f"))
            if seeds:
                lines.append([rater, strategy, *cells])
    return _markdown(lines)


def counts_of(design: Design) -> list[int]:
    """The numbers of labels at which any strategy is measured."""
    return sorted({budget for budgets in design.budgets.values() for budget in budgets})


def of_measure(results: dict[str, dict], design: Design, name: str, form: str) -> str:
    """A further measure by labels, none among them, in Markdown; "": nowhere measured."""
    counts, lines = [0, *counts_of(design)], []
    for rater in RATERS:
        for strategy in STRATEGIES:
            arms = arms_of(results, rater, strategy).values()
            found = [[p[name] for a in arms for p in a if p["labels"] == n and p.get(name) is not None] for n in counts]
            if any(found):
                lines.append([rater, strategy, *(_mean(values, form) for values in found)])
    header = ["rater", "strategy", *(f"{n} labels" for n in counts)]
    return _markdown([header, ["---"] * len(header), *lines]) if lines else ""


FURTHER = {
    "letters_auroc": ("AUROC of letters, broken or sound", ".3f"),
    "treated_rate": ("Broken pictures, by the rule, after a treatment with the detector", ".1%"),
}


def text(results: dict[str, dict], design: Design) -> str:
    """All tables."""
    parts = [table(results, design), "The same less what random pictures gave, seed by seed:"]
    parts.append(against_random(results, design))
    for name, (title, form) in FURTHER.items():
        if found := of_measure(results, design, name, form):
            parts += [f"{title}:", found]
    return "\n\n".join(parts)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: list[float], form: str = ".2f") -> str:
    if not values:
        return "–"
    plain = form.lstrip("+")
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):{plain}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{error}"


def plot(results: dict[str, dict], path: Path) -> None:
    """mAP against labels and against minutes, a row for each rater."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    grid = figure.subplots(len(RATERS), 2, squeeze=False, sharey=True)
    for row, rater in zip(grid, RATERS, strict=True):
        for axes, key, scale in zip(row, ("labels", "seconds"), (1, 60), strict=True):
            for strategy, colour in COLOURS.items():
                arms = list(arms_of(results, rater, strategy).values())
                if arms:
                    x, y = (np.array([[p[name] for p in a] for a in arms]) for name in (key, "map50"))
                    axes.plot(x.mean(0) / scale, y.mean(0), marker="o", color=colour, label=strategy)
                    axes.plot(x.T / scale, y.T, color=colour, alpha=0.2, linewidth=1)
            axes.set(
                xlabel="labels" if scale == 1 else "minutes of the rater", ylabel="mAP@0.5", title=f"{rater} rater"
            )
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines and axes is row[0]:
                axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
