"""What a treatment step keeps for backward and how long it takes: `python -m benchmarks.studies.treat_memory`.

The first table runs the demo's pipeline: `full` (every one of 10 steps in the graph) against `draft_k` (3 of 10), with
each option that saves memory. The second gives the same for networks of a real size, without their weights: shapes
alone go through them (meta tensors), so it has bytes and operations but no seconds, and is the same on every machine.
With `--device cuda` they are built there, with random weights, and their steps run: what the allocator hands out beyond
the weights, and seconds. Each row is printed, and written to `--output`, as it comes.

kept: bytes of distinct storages saved for backward at the worst moment, parameters left out.
peak: the most bytes of new tensors alive at any moment of replay and backward, what backward recomputes included.
time: of a whole step: roll-out, diagnosis, replay and backward.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from benchmarks.ops import machine
from benchmarks.studies.treat_memory.demo import demo_table
from benchmarks.studies.treat_memory.families import CASES, families_markdown, family_row
from benchmarks.studies.treat_memory.real import REAL, real_rows
from benchmarks.studies.treat_memory.table import (
    BOUNDS,
    GROWTH,
    demo_markdown,
    judged,
    measured_markdown,
    real_markdown,
)
from diffdoctor.runs.files import atomic_write_json


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 when `draft_k` misses a bound."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.treat_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, help="timed runs of every case (9; with cuda 3); 0: no seconds")
    parser.add_argument(
        "--networks", nargs="*", choices=tuple(REAL), default=tuple(REAL), help="of a real size (all); none: leave out"
    )
    parser.add_argument(
        "--families",
        nargs="*",
        choices=tuple(CASES),
        default=(),
        help="a step of nft at their own size instead",
    )
    parser.add_argument(
        "--device", choices=("meta", "cuda"), default="meta", help="where networks of a real size are (meta: nowhere)"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for everything that was measured")
    options = parser.parse_args(arguments)
    if options.repeats is None:
        options.repeats = 9 if options.device == "meta" else 3
    least = int(options.device == "cuda")
    if options.repeats < least:
        parser.error(f"--repeats: at least {least} was expected, got {options.repeats}")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: cuda was asked for, but torch finds no CUDA device")
        return _on_gpu(options)
    if options.families:
        found = [family_row(name) for name in options.families]
        print(families_markdown(found))
        if options.output:
            atomic_write_json(options.output, {"families": found})
        return 0
    demo = demo_table(options.repeats)
    print(demo_markdown(demo), flush=True)
    real = [row for name in options.networks for row in real_rows(name)]
    if real:
        print("\n" + real_markdown(real))
    print()
    shares = judged(demo)
    for name, value in shares.items():
        print(f"{name}: {value:.3f} (at most {BOUNDS.get(name, GROWTH)})")
    if options.output:
        atomic_write_json(options.output, {"demo": demo, "real": real, "shares": shares})
    met = all(shares[name] <= bound for name, bound in BOUNDS.items() if name in shares)
    return int(not (met and abs(shares["growth from 10 to 40 sampling steps"]) <= GROWTH))


def _on_gpu(options) -> int:
    rows = []
    steps = itertools.chain(
        (family_row(name, "cuda", options.repeats) for name in options.families),
        itertools.chain.from_iterable(real_rows(name, "cuda", options.repeats) for name in options.networks),
    )
    for row in steps:
        rows.append(row)
        print(measured_markdown([row], headed=len(rows) == 1), flush=True)
        if options.output:
            atomic_write_json(options.output, {**machine.context(torch.device("cuda")), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
