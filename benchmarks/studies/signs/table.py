"""The rows of the study as figures, and as one Markdown table."""

from __future__ import annotations

import numpy as np

from benchmarks.studies.signs.measures import hacking, measure, rate_of
from benchmarks.studies.signs.oracle import TAU, TAUS
from benchmarks.studies.signs.pipelines import prompts_of

START, END = "<!-- table of python -m benchmarks.studies.signs: {} -->", "<!-- end of table -->"
# What the mean of several seeds is taken of.
_MEANS = (
    "letters_broken", "mended", "broke", "kept", "colour", "colour_distance", "entropy", "distinct_words",
    "cpu_seconds", "drawing",
)  # fmt: skip
NAMES = {"sd": "U-Net, v-prediction", "flux": "transformer, flow matching"}
HEADER = (
    "pipeline", "what was done", "broken pictures", "of before", "of trained on", "letters broken",
    "mended / broke / kept", "colour right", "entropy", "distinct words", "detector's rate",
    "its fall / the oracle's", "CPU s",
)  # fmt: skip


def row(study, kind: str, name: str) -> dict:
    """A row's figures: `measures.measure`, the detectors' rates and the CPU seconds."""
    base = study.recipes[name].before
    before, after = study.reading(kind, base), study.reading(kind, name)
    found = measure(before, after, prompts_of(len(after)))
    found |= {"kind": kind, "name": name, "seed": study.settings.seed, "split": study.settings.split}
    found["compared_with"] = base
    oracle = [before.rate(), after.rate()]
    for who in ("detector", "observer"):
        flags = [study.flags(kind, which, observer=who == "observer") for which in (base, name)]
        rates = [float(flag.mean()) for flag in flags]
        found[who] = {"before": rates[0], "after": rates[1], "hacking": hacking(*oracle, *rates)}
    control = next((other for other, recipe in study.recipes.items() if recipe.trained_on == name), None)
    if control is not None:
        found["against_control"] = {"name": control, **rate_of(study.reading(kind, control).broken(), after.broken())}
    if (repaired := study.repair(kind, name)) is not None:
        found["repair"] = repaired
    found["cpu_seconds"] = study.effort(kind, name)
    found["drawing"] = study.drawing_seconds(kind, name) / study.drawing_seconds(kind, "before")
    return found


def pooled(studies: list, kind: str, name: str, rows: list[dict]) -> dict:
    """What the same row of several seeds says together: in the form of one of `rows`, of which there is one a study.

    Rates and their intervals are those of all pictures of all seeds, each beside its own before, so that an interval
    says how few the pictures are, and nothing of how much pipelines of other seeds would differ; everything else is the
    mean of the seeds' figures. `seeds` holds each seed's rate and ratio.
    """
    if len(rows) == 1:
        return rows[0]
    base, first = rows[0]["compared_with"], rows[0]
    before, after = ([study.reading(kind, which) for study in studies] for which in (base, name))

    def flags(readings, tau):
        return np.concatenate([reading.broken(tau) for reading in readings])

    found = {key: first[key] for key in ("kind", "name", "split", "compared_with")}
    found |= {"pictures": sum(row["pictures"] for row in rows), "seed": [row["seed"] for row in rows]}
    found["rates"] = {f"{tau:.2f}": rate_of(flags(before, tau), flags(after, tau)) for tau in TAUS}
    for key in _MEANS:
        values = [row[key] for row in rows]
        found[key] = None if None in values else float(np.mean(values))
    oracle = [flags(readings, TAU).mean() for readings in (before, after)]
    for who in ("detector", "observer"):
        rates = [float(np.mean([row[who][when] for row in rows])) for when in ("before", "after")]
        found[who] = {"before": rates[0], "after": rates[1], "hacking": hacking(*oracle, *rates)}
    if all("against_control" in row for row in rows):
        control = first["against_control"]["name"]
        flagged = np.concatenate([study.reading(kind, control).broken() for study in studies])
        found["against_control"] = {"name": control, **rate_of(flagged, flags(after, TAU))}
    if all("repair" in row for row in rows):
        found["repair"] = _repairs_together([row["repair"] for row in rows])
    own = [row["rates"][f"{TAU:.2f}"] for row in rows]
    found["seeds"] = [
        {"seed": row["seed"], "rate": rate["rate"], "ratio": rate["ratio"]} for row, rate in zip(rows, own, strict=True)
    ]
    return found


def _repairs_together(repairs: list[dict]) -> dict:
    """`measures.repair_figures` of several seeds: counts are added, shares are the seeds' mean."""
    found = {key: sum(each[key] for each in repairs) for key in ("regions", "kept", "tries", "changed_outside")}
    for key in ("changed_share", "seam"):
        values = [each[key] for each in repairs if each[key] is not None]
        found[key] = float(np.mean(values)) if values else None
    return found


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table, and a line on each repair."""
    lines = [HEADER, ("---",) * len(HEADER), *(cells(row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *(repair_line(row) for row in rows if "repair" in row)])


def repair_line(row: dict) -> str:
    """What `repair` changed, as a sentence."""
    found = row["repair"]
    seam = "–" if found["seam"] is None else f"{found['seam']:.2f}"
    return (
        f"{NAMES[row['kind']]}, {row['name']}: {found['kept']:,} of {found['regions']:,} regions kept after "
        f"{found['tries']:,} tries; {found['changed_outside']:,} pixels changed outside the masks, which cover "
        f"{_percent(found['changed_share'])}; gradient energy along their rims over that before: {seam}."
    )


def cells(row: dict) -> tuple[str, ...]:
    """A row's cells, under `HEADER`."""
    rate, own = row["rates"][f"{TAU:.2f}"], row["detector"]
    low, high = rate["interval"]
    rates, ratios = ([seed[key] for seed in row.get("seeds", ())] for key in ("rate", "ratio"))
    is_base = row["name"] == row["compared_with"]
    ratio = "–" if is_base else _ratio(rate) + _each("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    moved = "–" if is_base else " / ".join(_percent(row[name]) for name in ("mended", "broke", "kept"))
    seconds = "–" if is_base else f"{row['cpu_seconds']:.0f}"
    if row["drawing"] > 1.5:
        seconds += f", drawing x {row['drawing']:.1f}"
    return (
        NAMES[row["kind"]],
        row["name"],
        f"{_percent(rate['rate'])} ({100 * low:.1f} to {100 * high:.1f})" + _each(f"{100 * one:.1f}" for one in rates),
        ratio,
        _ratio(row["against_control"]) if "against_control" in row else "–",
        _percent(row["letters_broken"]),
        moved,
        _percent(row["colour"]),
        f"{row['entropy']:.3f}",
        _percent(row["distinct_words"]),
        f"{_percent(own['before'])} → {_percent(own['after'])}",
        "–" if own["hacking"] is None or is_base else f"{own['hacking']:.2f}",
        seconds,
    )


def _percent(share):
    return "–" if share is None else f"{100 * share:.1f} %"


def _ratio(rate):
    if rate["ratio"] is None:
        return "–"
    low, high = rate["ratio_interval"]
    return f"{rate['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _each(values):
    """What the seeds say, behind what they say together."""
    text = ", ".join(values)
    return f": {text}" if text else ""
