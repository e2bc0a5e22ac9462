"""Time the operations: `python -m benchmarks.ops.run` prints a table, appends to benchmarks/results/, draws plots."""

import argparse
import datetime
import logging
import os
import pathlib
import re
import sys
import time

import torch

from benchmarks.ops import acceptance, history, launches, machine, measure, plot, registry, step, table

DEFAULT_MINUTES = 9.0
#: Of a run's time, kept for the training step.
STEP_SHARE = 0.18


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.ops.run", description=__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    command.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name/dtype matches")
    command.add_argument(
        "--tags", default="", metavar="TAG,…", help=f"only cases with one of: {', '.join(registry.TAGS)}"
    )
    command.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="start nothing after this (default: 9)")
    command.add_argument(
        "--seconds", type=float, default=4.0, help="timing of one case, all implementations together (default: 4)"
    )
    command.add_argument("--threads", type=int, default=None, help="CPU threads (default: one per core)")
    command.add_argument(
        "--backends", default="", metavar="NAME,…", help="diffdoctor's backends (default: the device's)"
    )
    command.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes seconds a case"
    )
    command.add_argument("--no-step", action="store_true", help="leave out the whole training step")
    command.add_argument("--graphs", action="store_true", help="also replay every implementation as a CUDA graph")
    command.add_argument("--small", action="store_true", help="tiny shapes: a smoke run, whose figures mean nothing")
    command.add_argument("--all", action="store_true", help="print every implementation, with p50, p80 and the copy")
    command.add_argument("--output", type=pathlib.Path, help="JSON-lines file to append to (default: by machine)")
    command.add_argument("--launches", type=pathlib.Path, help="launches as `tools.gpu` has counted them")
    command.add_argument("--commit", help="what to write into the rows where the checkout has no .git")
    command.add_argument("--plots", type=pathlib.Path, default=pathlib.Path("runs/bench"), help="folder for the PNGs")
    command.add_argument("--no-plots", action="store_true", help="draw nothing")
    return command


def chosen(options) -> list[registry.Case]:
    """The cases that --cases and --tags leave. Raises ValueError where none is left or a tag is unknown."""
    tags = {tag for tag in options.tags.split(",") if tag}
    if tags - set(registry.TAGS):
        raise ValueError(f"--tags must be among {', '.join(registry.TAGS)}, got {', '.join(sorted(tags))}")
    found = [
        case
        for case in registry.cases(options.device)
        if re.search(options.cases, case.key) and (not tags or tags & case.tags)
    ]
    if not found:
        raise ValueError(f"no case matches --cases {options.cases!r} --tags {options.tags!r}")
    return [registry.shrunken(case) for case in found] if options.small else found


def run(options) -> list[dict]:
    """Measure what the options ask for; rows carry their surroundings. Progress goes to stderr, line by line."""
    device = torch.device(options.device)
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    stamp = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    context = {
        "run": f"{stamp:%Y%m%dT%H%M%SZ}-{os.getpid()}",
        "time": stamp.isoformat(),
        **machine.context(device),
    }
    if options.commit:
        context["commit"] = options.commit
    rows = []

    def keep(more):
        if options.small:
            more = [row | {"small": True} for row in more]
        rows.extend(more)
        if options.output is not None:
            history.append(options.output, [context | row for row in more])

    cases = chosen(options)
    if options.launches is not None:
        launches.load(options.launches)
    steps = not options.no_step and not options.cases and not options.tags
    # The training step comes last and must not be what runs out of time.
    cases_end = deadline - (60 * options.minutes * STEP_SHARE if steps else 0)
    for number, case in enumerate(cases, 1):
        left = cases_end - time.monotonic()
        if left <= 0:
            print(f"left out for lack of time: {', '.join(c.key for c in cases[number - 1 :])}", file=sys.stderr)
            break
        start = time.monotonic()
        try:
            found = measure.measure(
                case,
                device,
                min(options.seconds, left),
                compiled=not options.no_compile,
                graphs=options.graphs,
                backends=tuple(options.backends.split(",")) if options.backends else None,
            )
        except Exception as error:
            found = [measure.failed(case, device, error)]
        keep(found)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"[{number}/{len(cases)}] {case.key}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    if steps:
        keep(step.rows(device, small=options.small, deadline=deadline))
    return [context | row for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where one of diffdoctor's implementations gave a wrong result or failed; 2 for bad arguments."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads or machine.cores())
    # Some trainers' formulas break the graph, which torch.compile tells in many lines each time.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    if options.output is None and not options.small:
        options.output = history.RESULTS / f"{machine.slug(torch.device(options.device))}.jsonl"
    try:
        rows = run(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table.text(rows, options.all))
    steps = [row for row in rows if row["op"] == step.OP]
    if steps:
        print("\n" + step.text(steps))
    if not options.small:
        print("\n" + acceptance.text([row for row in rows if row["op"] != step.OP]))
    if options.output is not None:
        print(f"\n{len(rows)} rows were appended to {options.output}")
    if not options.no_plots:
        for path in plot.draw(rows, options.plots):
            print(f"wrote {path}")
    refused = [row for row in rows if row.get("ours") and row.get("reason")]
    if refused:
        first = refused[0]
        print(f"{len(refused)} of diffdoctor's implementations have no speed, the first: {first['case']} "
              f"{first['dtype']} {first['backend']}: {first['reason']}")  # fmt: skip
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
