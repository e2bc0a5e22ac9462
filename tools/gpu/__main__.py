"""All GPU work in one command: `python -m tools.gpu --output DIR`, what `make gpu` runs.

Builds the CUDA backend for this GPU, runs the GPU tests, compute-sanitizer, the benchmarks, treatments of a real size,
ncu, the static report and the tests of the stages (`tools.gpu.parts`). Needs Python, torch, triton, nvcc and this
checkout. Each part is made of processes with a time limit: one that fails or is missing says so, and the others go on.
What needs the processor more than the GPU runs side by side, before anything is timed; what is timed has the machine to
itself. gpu.json and gpu.txt in DIR are rewritten after every part.
"""

import argparse
import contextlib
import json
import pathlib
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from benchmarks.ops import acceptance, history, step, table
from diffdoctor.runs.files import atomic_write_text
from tools.gpu import static_report
from tools.gpu.context import Context, PartError
from tools.gpu.parts import PARTS, STAGES, Part

DEFAULT_MINUTES = 8.75


def outcomes(found: dict) -> str:
    """A line for each part: how long it took and what came of it."""
    lines = [("part", "seconds", "outcome")]
    for name, part in found.items():
        good = {key: value for key, value in part.items() if key not in ("seconds_taken", "rows", "missing", "reason")}
        words = part.get("reason", json.dumps(good, ensure_ascii=False))[:600]
        lines.append((name, f"{part['seconds_taken']:.0f}", ("FAILED: " if "reason" in part else "") + words))
    return "\n".join(f"{name:<17}{seconds:>8}  {words}" for name, seconds, words in lines)


def report(found: dict, rows: list[dict]) -> str:
    """gpu.txt: every part with its outcome, then the tables."""
    parts = [outcomes(found)]
    if rows:
        parts += [table.text(rows), table.text(rows, every_side=True)]
        steps = [row for row in rows if row["op"] == table.STEP]
        if steps:
            parts.append(step.text(steps))
        parts.append(acceptance.text([row for row in rows if row["op"] != table.STEP]))
    static = found.get("static", {})
    if "rows" in static:
        parts.append(static_report.text(static["rows"], static["missing"]))
    return "\n\n".join(parts) + "\n"


def run(context: Context, stages: tuple[dict[str, Part], ...]) -> dict:
    """Run the stages; {part: its result, with `reason` where it failed}, each with `seconds_taken`."""
    keeping = threading.Lock()

    def one(name, part):
        began = time.monotonic()
        try:
            found = part(context)
        except PartError as error:
            found = error.found | {"reason": str(error)}
        except Exception as error:
            found = {"reason": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - began, 1)
        with keeping:
            context.found[name] = {**found, "seconds_taken": seconds}
            keep(context)
        words = f"FAILED: {found['reason']}" if "reason" in found else "done"
        print(f"{name}: {words} ({seconds:.0f} s)", flush=True)

    for stage in stages:
        with ThreadPoolExecutor(len(stage)) as pool:
            for future in as_completed([pool.submit(one, name, part) for name, part in stage.items()]):
                future.result()
    return context.found


def keep(context: Context) -> None:
    """Write gpu.json and gpu.txt."""
    rows = context.output / "gpu.jsonl"
    measured = history.read(rows) if rows.exists() else []
    atomic_write_text(
        context.output / "gpu.json", json.dumps({"parts": context.found, "rows": measured}, indent=1) + "\n"
    )
    atomic_write_text(context.output / "gpu.txt", report(context.found, measured))


@contextlib.contextmanager
def _stopped_with_all(context: Context):
    """Inside, Ctrl-C and SIGTERM end the commands too, which stand in process groups of their own."""

    def stop(number, frame):
        context.deadline = 0.0
        context.end()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 where every part has a result, else 1."""
    command = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.splitlines()[0])
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/gpu"), help="folder for the results")
    command.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="all parts together (default: 8.75)")
    command.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}")
    command.add_argument("--commit", help="what to write into the rows where the checkout has no .git")
    options = command.parse_args(arguments)
    chosen = set(options.parts.split(","))
    if chosen - set(PARTS):
        print(
            f"--parts must be among {', '.join(PARTS)}, got {', '.join(sorted(chosen - set(PARTS)))}", file=sys.stderr
        )
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.jsonl").unlink(missing_ok=True)
    (output / "gpu.log").unlink(missing_ok=True)
    context = Context(output, time.monotonic() + 60 * options.minutes, options.commit)
    stages = [{name: part for name, part in stage.items() if name in chosen} for stage in STAGES]
    with _stopped_with_all(context):
        found = run(context, tuple(stage for stage in stages if stage))
    print((output / "gpu.txt").read_text())
    print(outcomes(found))
    return int(any("reason" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
