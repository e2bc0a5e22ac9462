"""The detector study: `python -m benchmarks.studies.detector --output runs/detector-study`.

From the photographs and digits in scikit-image's and scikit-learn's packages it makes labelled sets, trains a detector
on some kinds of damage, measures it on other pictures and other kinds, and trains it again without each of: real
negatives, class balance, dynamic augmentation. Stopped and started again, it resumes.
"""

import argparse
import concurrent.futures
import multiprocessing
import pathlib
import sys
import time

from benchmarks.studies.detector import parts, report
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.lock import locked_folder

STEPS, ABLATION_STEPS = 12000, 1500


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.studies.detector", description=__doc__)
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/detector-study"), help="folder")
    command.add_argument(
        "--steps", type=int, default=STEPS, help=f"of the detector (default: {STEPS}); 0: leave it out"
    )
    command.add_argument(
        "--ablation-steps",
        type=int,
        default=ABLATION_STEPS,
        help=f"of each training of the ablation (default: {ABLATION_STEPS}); 0: leave it out",
    )
    command.add_argument(
        "--variants",
        nargs="+",
        choices=[variant for variant in parts.VARIANTS if variant != parts.DETECTOR],
        default=[variant for variant in parts.VARIANTS if variant != parts.DETECTOR],
        help="rows of the ablation (default: all)",
    )
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the ablation (default: 0)")
    command.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each (default: 2)")
    return command


def plan(options) -> list[tuple[str, str, int, int]]:
    """(name, variant, steps, seed) of every training, the longest first."""
    jobs = [("detector", parts.DETECTOR, options.steps, 0)] if options.steps else []
    if options.ablation_steps:
        jobs += [
            (variant.replace(" ", "-"), variant, options.ablation_steps, seed)
            for seed in options.seeds
            for variant in options.variants
        ]
    return jobs


def run(options) -> dict:
    """Do what is left to do, write metrics.json and the report, and return the metrics."""
    start = time.monotonic()
    sets = parts.make_sets(options.output, 0, options.jobs)
    jobs = plan(options)
    print(
        f"{len(jobs)} trainings, {options.jobs} at a time; how far they are: {options.output}/runs/*/log.txt",
        flush=True,
    )
    results: dict = {}
    # "spawn": a process that has used threads must not be forked.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = {pool.submit(parts.train, options.output, *job): job for job in jobs}
        for future in concurrent.futures.as_completed(waiting):
            name, variant, steps, seed = waiting[future]
            results[f"{name}-seed-{seed}"] = {"variant": variant, "steps": steps, "seed": seed, **future.result()}
            print(f"{name}, seed {seed}: {report.one_line(results[f'{name}-seed-{seed}'])}", flush=True)
    return report.write(options.output, sets, results, time.monotonic() - start)


def main(arguments=None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    if min(options.steps, options.ablation_steps) < 0 or options.jobs < 1:
        command.error("--steps and --ablation-steps must be >= 0, --jobs >= 1")
    try:
        with locked_folder(options.output):
            metrics = run(options)
    except UserError as error:
        print(f"detector_study: {error}", file=sys.stderr)
        return 2
    print(report.text(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
