"""Draw results: `python -m benchmarks.ops.plot [FILE|COMMIT|RUN]`: speed and memory against size, speed-ups, as PNG."""

import argparse
import pathlib
import sys

from benchmarks.ops import history
from benchmarks.ops.table import STEP, grouped, ratio

COLOURS = {
    "cpu": "#0072b2", "cuda": "#0072b2", "triton": "#009e73", "eager": "#d55e00", "compile": "#e69f00",
    "copy": "#555555",
}  # fmt: skip
LABELS = {
    "cpu": "diffdoctor (C++)",
    "cuda": "diffdoctor (CUDA)",
    "triton": "diffdoctor (Triton)",
    "eager": "PyTorch, eager",
    "compile": "PyTorch, torch.compile",
    "copy": "limit: a copy of as many bytes",
}
DRAWN = tuple(LABELS)


def draw(rows: list[dict], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write what the rows can show and return the paths; nothing, with a line on stderr, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.get("p20_us") is not None and row["op"] != STEP]
    written = []
    for device in sorted({row["device"] for row in timed}):
        mine = [row for row in timed if row["device"] == device]
        for dtype in sorted({row["dtype"] for row in mine if "sweep" in row["tags"]}):
            sweep = [row for row in mine if "sweep" in row["tags"] and row["dtype"] == dtype]
            written.append(_against_size(sweep, folder / f"{device}-{dtype}-size.png"))
        speed_ups = _speed_ups(mine, folder / f"{device}-speedup.png")
        if speed_ups is not None:
            written.append(speed_ups)
    return written


def _elements(row):
    total = 1
    for size in row["shape"]:
        total *= size
    return total


def _where(row):
    machine = row.get("machine") or {}
    where = machine.get("gpu") or f"{machine.get('cpu', 'this machine')}, threads: {machine.get('threads', '?')}"
    commit = (row.get("commit") or "no commit")[:10]
    return f"{where} · torch {(row.get('versions') or {}).get('torch', '?')} · {commit}"


def _axes(rows, title, columns=1, height=4.2):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(6.4 * columns, height), layout="constrained", squeeze=False)
    figure.suptitle(f"{title}\n{_where(rows[0])}", fontsize=10)
    for axis in axes[0]:
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path):
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _against_size(rows, path):
    figure, (speed, memory) = _axes(
        rows, f"weighted_loss with a map, {rows[0]['dtype']}, forward + backward", columns=2
    )
    for impl in DRAWN:
        mine = sorted((row for row in rows if row["backend"] == impl), key=_elements)
        if not mine:
            continue
        # Ours is drawn first and widest: where two implementations use the same memory both can be seen.
        ours = any(row["ours"] for row in mine)
        style = {"color": COLOURS[impl], "label": LABELS[impl], "linewidth": 3.5 if ours else 1.5}
        dashed = {"linestyle": "--"} if impl == "copy" else {"marker": "o", "markersize": 7 if ours else 3.5}
        sizes = [_elements(row) for row in mine]
        speed.plot(sizes, [row["gb_per_s"] for row in mine], **style, **dashed)
        held = [row for row in mine if row.get("peak_bytes")]
        if held and impl != "copy":
            memory.plot(
                [_elements(row) for row in held], [row["peak_bytes"] / 2**20 for row in held], **style, **dashed
            )
    gradients = sorted({(_elements(row), row["gradient_bytes"] / 2**20) for row in rows})
    memory.plot(*zip(*gradients, strict=True), color=COLOURS["copy"], linestyle="--", label="one gradient")
    speed.set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s of the least bytes (more is better)")
    memory.set(xscale="log", yscale="log", xlabel="elements", ylabel="peak memory, MiB (less is better)")
    for axis in (speed, memory):
        axis.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _speed_ups(rows, path):
    groups = {key: group for key, group in grouped(rows).items() if "sweep" not in next(iter(group.values()))["tags"]}
    ours = next(
        (impl for impl in ("cuda", "cpu", "triton") if any(impl in group for group in groups.values())),
        None,
    )
    against = (
        {impl: [ratio(group, ours, impl) for group in groups.values()] for impl in ("eager", "compile")} if ours else {}
    )
    kept = [i for i, _ in enumerate(groups) if any(values[i] is not None for values in against.values())]
    if not kept:
        return None
    figure, (axis,) = _axes(rows, f"Times faster: {LABELS[ours]}, forward + backward", height=1.2 + 0.34 * len(kept))
    names = list(groups)
    for shift, (impl, values) in zip((-0.19, 0.19), against.items(), strict=True):
        at = [place + shift for place, i in enumerate(kept) if values[i] is not None]
        drawn = [values[i] for i in kept if values[i] is not None]
        axis.barh(
            at,
            [v - 1 for v in drawn],
            left=1,
            height=0.36,
            color=COLOURS[impl],
            label=f"than {LABELS[impl]}",
        )
        for y, value in zip(at, drawn, strict=True):
            beside = {"xytext": (3, 0)} if value >= 1 else {"xytext": (-3, 0), "ha": "right"}
            axis.annotate(f"{value:.1f}×", (value, y), textcoords="offset points", va="center", fontsize=7, **beside)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(kept)), [f"{names[i][1]} {names[i][2]}" for i in kept], fontsize=8)
    axis.set(xscale="log", xlabel="ratio of the 20th percentiles, log scale; left of 1 diffdoctor is slower")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return _save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 where there is nothing to draw."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.ops.plot", description=__doc__)
    command.add_argument("results", nargs="?", help="a JSON-lines file, a commit or a run id (default: all results)")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/bench"), help="folder for the PNGs")
    options = command.parse_args(arguments)
    try:
        rows = history.select(options.results) if options.results else history.everything()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    written = draw(list(history.latest(rows).values()), options.output)
    for path in written:
        print(f"wrote {path}")
    return 0 if written else 2


if __name__ == "__main__":
    sys.exit(main())
