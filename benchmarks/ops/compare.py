"""Compare two runs: `python -m benchmarks.ops.compare A B --threshold 5`, each a results file, a commit or a run id."""

import argparse
import sys

from benchmarks.ops import history
from benchmarks.ops.table import aligned

MARKS = {"slower": "SLOWER", "faster": "faster", "noise": "within the spread", "same": ""}


def verdict(old: dict, new: dict, statistic: str, threshold: float) -> tuple[float, str]:
    """(change in percent, "slower" | "faster" | "noise" | "same") of a row against an older one.

    A change beyond the threshold whose p20 to p80 ranges still overlap is "noise": look again, on a quieter machine.
    """
    before, after = old[f"{statistic}_us"], new[f"{statistic}_us"]
    change = (after / before - 1.0) * 100.0
    if abs(change) <= threshold:
        return change, "same"
    overlap = old["p20_us"] <= new["p80_us"] and new["p20_us"] <= old["p80_us"]
    if overlap:
        return change, "noise"
    return change, "slower" if change > 0 else "faster"


def compare(old: list[dict], new: list[dict], statistic: str = "p20", threshold: float = 5.0):
    """[(key, old row, new row, change in percent, verdict)] for what both have timed."""
    before, after = history.latest(old), history.latest(new)
    pairs = [(key, before[key], row) for key, row in after.items() if key in before]
    return [(key, a, b, *verdict(a, b, statistic, threshold)) for key, a, b in pairs]


def _label(key):
    named = dict(zip(history.KEY, key, strict=True))
    shape = "×".join(map(str, named["shape"]))
    return named["case"], named["dtype"], shape, named["backend"]


def text(found, statistic: str) -> str:
    lines = [("case", "dtype", "shape", "implementation", f"A {statistic} µs", f"B {statistic} µs", "change", "")]
    for key, a, b, change, word in found:
        numbers = (f"{row[f'{statistic}_us']:,.1f}" for row in (a, b))
        lines.append((*_label(key), *numbers, f"{change:+.1f} %", MARKS[word]))
    return aligned(lines, left=4)


def machines(rows: list[dict]) -> set[str]:
    return {str(sorted((row.get("machine") or {}).items())) for row in rows}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where an implementation of ours became slower by more than the threshold, 2 for bad arguments."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.ops.compare", description=__doc__)
    command.add_argument("a", help="the older results: a JSON-lines file, a commit (4 or more digits), or a run id")
    command.add_argument("b", help="the newer results")
    command.add_argument("--threshold", type=float, default=5.0, help="percent that count as a change (default: 5)")
    command.add_argument(
        "--statistic", choices=("p20", "p50", "p80"), default="p20", help="what to compare (default: p20)"
    )
    options = command.parse_args(arguments)
    try:
        old, new = history.select(options.a), history.select(options.b)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = compare(old, new, options.statistic, options.threshold)
    if not found:
        print("the two have no timed case in common", file=sys.stderr)
        return 2
    print(text(found, options.statistic))
    if machines(old) != machines(new):
        print("\nNot measured on the same machine with the same settings: the change is not the code's alone.")
    slower = [key for key, _, row, _, word in found if word == "slower" and row.get("ours")]
    if slower:
        print(f"\n{len(slower)} of diffdoctor's implementations became slower by more than {options.threshold:g} %.")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
