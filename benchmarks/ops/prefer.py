"""Writes the table of which backend is asked first from rows of the history: `python -m benchmarks.ops.prefer RUN`.

RUN is a file, a commit or a run id, as `benchmarks.ops.compare` takes it; only its rows of a GPU's two backends count.
Of two backends that stand side by side in a case, the one is asked first from a size on where its calls, forward and
backward, take less time than the other's by more than MARGIN, by the geometric mean over the cases of that size.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

from benchmarks.ops import history
from benchmarks.ops.machine import ROOT
from diffdoctor.ops import OPS
from diffdoctor.runs.files import atomic_write_text

TARGET = ROOT / "diffdoctor" / "backends" / "preferences.py"
BACKENDS = ("cuda", "triton")  # the first is taken where nothing says otherwise
MARGIN = 1.05

Table = dict[tuple[str, str], tuple[tuple[int, str], ...]]


def table(rows: list[dict]) -> Table:
    """What rows of BACKENDS on a GPU say; an op of which none says anything keeps the first of BACKENDS."""
    timed: dict[str, dict[tuple, dict[str, float]]] = {}
    for row in history.latest(rows).values():
        if OPS.get(row["op"]) == row["op"]:
            case = timed.setdefault(row["op"], {}).setdefault((row["case"], row["dtype"], tuple(row["shape"])), {})
            case[row["backend"]] = row["p20_us"]
    return {("cuda", op): _steps(timed.get(op, {})) for op in sorted(set(OPS.values()))}


def _steps(cases: dict[tuple, dict[str, float]]) -> tuple[tuple[int, str], ...]:
    """(from how many elements on, backend) of one op."""
    default, other = BACKENDS
    ratios: dict[int, list[float]] = {}  # the default's time over the other's, as logarithms
    for (_, _, shape), times in cases.items():
        if len(times) == len(BACKENDS):
            ratios.setdefault(math.prod(shape), []).append(math.log(times[default] / times[other]))
    steps = [(0, default)]
    for number, elements in enumerate(sorted(ratios)):
        mean = sum(ratios[elements]) / len(ratios[elements])
        if abs(mean) <= math.log(MARGIN):
            continue
        faster = other if mean > 0 else default
        if faster != steps[-1][1]:
            steps.append((0 if number == 0 else elements, faster))
    return tuple(steps[1:] if len(steps) > 1 and steps[1][0] == 0 else steps)


def text(found: Table, source: str) -> str:
    """The module that holds a table."""
    lines = "".join(f"    ({_quoted(*key)}): ({_steps_text(steps)},),\n" for key, steps in found.items())
    return (
        '"""Which backend of a device is asked first, by op and size; `python -m benchmarks.ops.prefer` writes it."""'
        "\n\n"
        "#: Where the table comes from.\n"
        f'SOURCE = "{source}"\n\n'
        "#: By type of device and the file of a backend that serves the op: (elements of the differentiated tensor\n"
        "#: from which on it is asked first, the backend), beginning at 0.\n"
        f"FIRST: dict[tuple[str, str], tuple[tuple[int, str], ...]] = {{\n{lines}}}\n"
    )


def _quoted(*words: str) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _steps_text(steps: tuple[tuple[int, str], ...]) -> str:
    return ", ".join(f'({elements}, "{backend}")' for elements, backend in steps)


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.ops.prefer", description=__doc__)
    command.add_argument("run", help="file of rows, commit or run id")
    command.add_argument("--output", type=pathlib.Path, default=TARGET, help="file to write (default: the package's)")
    options = command.parse_args(arguments)
    try:
        rows = history.select(options.run)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [row for row in rows if row.get("device") == "cuda" and row["backend"] in BACKENDS]
    if not rows:
        print(f"{options.run} has no rows of {' or '.join(BACKENDS)} on a GPU", file=sys.stderr)
        return 1
    gpus = sorted({str((row.get("machine") or {}).get("gpu", "a GPU")) for row in rows})
    commits = sorted({(row.get("commit") or "none")[:10] for row in rows})
    atomic_write_text(options.output, text(table(rows), f"measured on {', '.join(gpus)}, commit {', '.join(commits)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
