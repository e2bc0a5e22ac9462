"""Results as text: `python -m benchmarks.ops.table [FILE|COMMIT|RUN] --markdown`, a line for each of ours."""

import argparse
import sys

from benchmarks.ops import history

MIB = 2**20
STEP = "training_step"
HEAD = (
    "case", "dtype", "shape", "map", "eager µs", "compile µs", "diffdoctor µs", "by", "× eager", "× compile",
    "of copy", "peak MiB: eager", "compile", "diffdoctor",
)  # fmt: skip


def grouped(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """{(op, case, dtype): {implementation: row}} in the order of the rows."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["dtype"]), {})[row["backend"]] = row
    return groups


def ratio(group: dict[str, dict], impl: str, to: str) -> float | None:
    """How many times faster `implementation` is than `to`, by the 20th percentiles; None where one has no speed."""
    pair = [group.get(name, {}).get("p20_us") for name in (impl, to)]
    return None if None in pair else pair[1] / pair[0]


def own_implementations(group: dict[str, dict]) -> list[str]:
    """Diffdoctor's implementations as a trainer calls them: neither a bare kernel nor a graph."""
    return [name for name, row in group.items() if row["ours"] and not name.endswith(("-kernel", "+graph"))]


def _number(value, digits=1, unit=""):
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def _peak(row):
    peak = row.get("peak_bytes")
    return "–" if peak is None else f"{peak / MIB:,.2f}"


def lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """The table's cells, heading first: p20 times, ratios of p20, share of a copy's speed, peak memory."""
    found = [HEAD]
    for (_, case, dtype), group in grouped(rows).items():
        eager, compiled = group.get("eager", {}), group.get("compile", {})
        for impl in own_implementations(group):
            row = group[impl]
            found.append((
                case,
                dtype,
                "×".join(map(str, row["shape"])),
                row["map"],
                _number(eager.get("p20_us")),
                _number(compiled.get("p20_us")),
                _number(row.get("p20_us")),
                impl,
                _number(ratio(group, impl, "eager"), 2),
                _number(ratio(group, impl, "compile"), 2),
                "–" if row.get("copy_share") is None else f"{row['copy_share']:.0%}",
                _peak(eager),
                _peak(compiled),
                _peak(row),
            ))  # fmt: skip
    return found


def detailed_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """Every implementation of every case, the copy, the bare kernels and the graphs too."""
    found = [
        (
            "case",
            "dtype",
            "implementation",
            "p20 µs",
            "p50 µs",
            "p80 µs",
            "GB/s",
            "of copy",
            "rounds",
            "ops",
            "held MiB",
        )
    ]
    for row in rows:
        if row.get("p20_us") is None:
            continue
        held = row.get("held_bytes")
        found.append((
            row["case"],
            row["dtype"],
            row["backend"],
            *(_number(row[f"p{share}_us"]) for share in (20, 50, 80)),
            _number(row.get("gb_per_s"), 2),
            "–" if row.get("copy_share") is None else f"{row['copy_share']:.0%}",
            str(row["rounds"]),
            str(row.get("launches", row.get("ops", "–"))),
            "–" if held is None else f"{held / MIB:,.2f}",
        ))  # fmt: skip
    return found


def device_lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """What a GPU alone takes, by replays of CUDA graphs: the formula, `torch.compile` of it, both of our backends."""
    groups = {}
    for (_, case, dtype), group in grouped(rows).items():
        replayed = {name.removesuffix("+graph"): row for name, row in group.items() if name.endswith("+graph")}
        timed = {name: row for name, row in replayed.items() if row.get("p20_us") is not None}
        if any(row["ours"] for row in timed.values()):
            groups[f"{case} {dtype}"] = timed
    sides = [s for s in ("eager", "compile", "cuda", "triton") if any(s in timed for timed in groups.values())]
    found = [("case", "shape", *(f"{side} µs" for side in sides), "× eager", "of copy")]
    for case, timed in groups.items():
        best = min((row for row in timed.values() if row["ours"]), key=lambda row: row["p20_us"])
        times = {side: timed.get(side, {}).get("p20_us") for side in sides}
        found.append((
            case,
            "×".join(map(str, best["shape"])),
            *map(_number, times.values()),
            _number(times["eager"] / best["p20_us"] if times.get("eager") else None),
            f"{best.get('copy_share_of_passes', best['copy_share']):.0%}",
        ))  # fmt: skip
    return found


def refused(rows: list[dict]) -> list[str]:
    """One line for every implementation that has no speed, with the reason."""
    return [f"{row['case']} {row['dtype']} {row['backend']}: {row['reason']}" for row in rows if row.get("reason")]


def text(rows: list[dict], every_side: bool = False) -> str:
    rows = [row for row in rows if row["op"] != STEP]
    parts = [aligned(detailed_lines(rows), left=3) if every_side else aligned(lines(rows), left=4)]
    reasons = refused(rows)
    if reasons:
        parts.append("No speed for:\n  " + "\n  ".join(reasons))
    return "\n\n".join(parts)


def markdown(cells: list[tuple[str, ...]], left: int = 4) -> str:
    """A GitHub table, the first `left` columns flush left."""
    head, *body = cells
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def aligned(cells: list[tuple[str, ...]], left: int = 1) -> str:
    """Columns of equal width, the first `left` flush left; what a line has beyond a heading's columns runs on."""
    columns = max(len(line) for line in cells)
    full = [line for line in cells if len(line) == columns]
    widths = [max(len(line[i]) for line in full) for i in range(columns)]
    for line in cells:
        for i in range(min(left, len(line) - 1)):
            widths[i] = max(widths[i], len(line[i]))
    out = []
    for line in cells:
        last = len(line) - 1 if len(line) < columns else -1
        padded = [
            cell if i == last else cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
            for i, cell in enumerate(line)
        ]
        out.append("  ".join(padded).rstrip())
    return "\n".join(out)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 where there are no such results."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.ops.table", description=__doc__)
    command.add_argument("results", nargs="?", help="a JSON-lines file, a commit or a run id (default: all results)")
    command.add_argument("--markdown", action="store_true", help="as a GitHub table")
    command.add_argument("--graphs", action="store_true", help="what a GPU alone takes: replays of CUDA graphs")
    command.add_argument("--all", action="store_true", help="one line for every implementation, the copy included")
    options = command.parse_args(arguments)
    try:
        rows = history.select(options.results) if options.results else history.everything()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [row for row in history.latest(rows).values() if row["op"] != STEP]
    if options.graphs:
        found = device_lines(rows)
        print(markdown(found, 2) if options.markdown else aligned(found, left=2))
    elif options.markdown:
        print(markdown(detailed_lines(rows), 3) if options.all else markdown(lines(rows)))
    else:
        print(text(rows, options.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
