"""`python -m benchmarks.studies.treatment --output runs/treatment`: both pipelines, every method, one table.

Each part runs in a process of its own, so that its peak memory is its own, and is stored when it is done: the same
command resumes where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time

import torch

from benchmarks.ops import machine
from benchmarks.studies.treatment.study import METHODS, PIPELINES, SHARED, Settings, Study
from benchmarks.studies.treatment.table import LIMITS, markdown, missed, put_into
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_json, atomic_write_text
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.progress import quiet_loaders
from diffdoctor.training.cpu_settings import cpu_settings


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.treatment", description=__doc__)
    parser.add_argument("--output", default="runs/treatment", help="folder of the study (runs/treatment)")
    parser.add_argument("--demo", help="folder of a demo with the same seed, whose stages are used again")
    chosen = {"default": ("sd", "flux"), "help": f"of {','.join(PIPELINES)} (sd,flux)"}
    parser.add_argument("--pipelines", type=_names(PIPELINES), **chosen)
    parser.add_argument("--methods", type=_names(METHODS), default=METHODS, help=f"of {','.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--pictures", type=int, default=2000, help="drawn for the measures by each (2000)")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: other fields of study.Settings")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--overwrite", action="store_true", help="start again where the folder holds another study")
    parser.add_argument("--docs", help="page whose table is replaced as well, such as docs/treat.md")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a method misses what it must reach")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser


def _names(allowed):
    def names(text):
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"of {', '.join(allowed)} expected, got {name!r}")
        return chosen

    return names


def parts(options) -> list[str]:
    """The parts in order: what all share, each pipeline, what it draws untreated, each method on it."""
    found = [SHARED]
    for kind in options.pipelines:
        found += [f"{kind}/pipeline", f"{kind}/before", *(f"{kind}/{method}" for method in options.methods)]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; with --strict 1 when a method misses its limit; 2 for bad arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    quiet_loaders()
    settings = Settings(seed=options.seed, pictures=options.pictures, **options.settings)
    folders, is_part = dict.fromkeys((options.output, *filter(None, [options.demo]))), bool(options.part)
    try:
        with cpu_settings(options.threads), contextlib.ExitStack() as stack:
            # Parts share the folders, with one another and with the study, which alone clears up, before its first one.
            locks = [stack.enter_context(locked_folder(folder, shared=is_part)) for folder in folders]
            overwrite = options.overwrite and not is_part
            study = Study(options.output, settings, demo=options.demo, overwrite=overwrite, alone=not is_part)
            if is_part:
                study.run(options.part)
                return 0
            for lock in locks:
                lock.share()
            return _run(study, options, [word for word in arguments if word != "--overwrite"])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _run(study, options, arguments) -> int:
    started = time.perf_counter()
    for part in parts(options):
        if study.done(part):
            continue
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.studies.treatment", *arguments, "--part", part], check=False
        )
        if done.returncode:
            print(f"the part {part} ended with exit code {done.returncode}", file=sys.stderr)
            return done.returncode if done.returncode > 0 else 1
    rows = [study.measure(kind, method) for kind in options.pipelines for method in options.methods]
    seconds = study.demo.stages.seconds | study.stages.seconds
    record = {
        "rows": rows,
        "stage_seconds": seconds,
        "seconds": sum(seconds.values()),
        "this_run_seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "cpu": machine.cpu_name(),
        "versions": machine.versions(),
        **machine.commit(),
    }
    atomic_write_json(study.output / "treatment.json", record)
    text = markdown(rows)
    atomic_write_text(study.output / "treatment.md", text + "\n")
    if options.docs:
        put_into(options.docs, f"{text}\n\n{_caption(record)}")
    print(text)
    print(f"{record['seconds']:.0f} s in all stages; wrote {study.output / 'treatment.json'} and treatment.md")
    faults = [row for row in rows if row["method"] in LIMITS and missed(row)]
    return int(options.strict and bool(faults))


def _caption(record) -> str:
    return (
        f"{record['rows'][0]['pictures']} pictures each; {record['cpu']}, CPU threads: {record['threads']}; "
        f"torch {record['versions']['torch']}; {record['seconds'] / 60:.0f} minutes for all stages."
    )


if __name__ == "__main__":
    sys.exit(main())
