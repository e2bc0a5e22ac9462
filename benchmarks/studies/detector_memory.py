"""How much memory does `diffdoctor evaluate detector` take, for more and more pictures?

`python -m benchmarks.studies.detector_memory --output runs/detector-memory` writes sets of 2,000 and of 10,000 labelled
pictures of 64x64 pixels, evaluates each in a process of its own, and beside it measures what all maps at once take
(`evaluate.detector.measure`); the figures of both must agree. Prints a table and writes results.json.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from diffdoctor.runs.files import atomic_write_json

SIDE = 64
WAYS = {"parts": "in parts, as the command does", "whole": "all maps at once"}


def samples(count: int):
    """`count` labelled pictures (SIDE, SIDE, 3) in ten categories, every other one with a marked bright square."""
    rng = np.random.default_rng(0)
    for index in range(count):
        picture = rng.integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        if index % 2:
            y, x = rng.integers(0, SIDE - 24, 2)
            picture[y : y + 24, x : x + 24] += 100
            mask[y : y + 24, x : x + 24] = 255
        yield {"picture": picture, "mask": mask, "category": f"category {index // 2 % 10}"}


def detector():
    """An untrained `ConvDetector` that marks what is bright, so that there are true and false finds."""
    import torch

    from diffdoctor.detector import ConvDetector

    class Bright(ConvDetector):
        def network(self, pixel_values):
            smooth = torch.nn.functional.avg_pool2d(pixel_values.mean(dim=1, keepdim=True), 5, 1, 2)
            return 3 * smooth + 0.5 * pixel_values[:, :1] + 2

    return Bright((8, 16))


def evaluate(way: str, folder: Path, count: int, bootstrap: int) -> dict:
    """Evaluate the set in this process; seconds, peak resident MiB and figures."""
    from accelerate import PartialState

    from diffdoctor.data.shards import ShardData
    from diffdoctor.detector.predict import diagnose_data
    from diffdoctor.evaluate.detector.measure import measure, measure_statistics
    from diffdoctor.evaluate.detector.parts import evaluate_in_parts
    from diffdoctor.runs.strict_json import nan_to_none

    data, model = ShardData(folder / str(count)), detector()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if way == "parts":
        parts, state = folder / f"parts-{count}", PartialState(cpu=True)
        found = evaluate_in_parts(model, [data], parts, {}, state, batch_size=64, size=None, strict=True)
        disk = sum(path.stat().st_size for path in parts.iterdir())
        names = (found.categories, found.generators, found.kinds, found.auprc)
        measured = measure_statistics(found.statistics, *names, bootstrap=bootstrap)
        shutil.rmtree(parts)
    else:
        disk = 0
        measured = measure(diagnose_data(model, data, strict=True), bootstrap=bootstrap)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = {"seconds": seconds, "before_mib": before / 2**10, "peak_mib": peak / 2**10, "disk_mib": disk / 2**20}
    return sizes | {"figures": nan_to_none(measured)}


def differences(one, two, path: str = "") -> list[str]:
    """The figures that differ, by more than rounding of a sum's order for the AUPRC."""
    if isinstance(one, dict):
        return [line for name in one for line in differences(one[name], two[name], f"{path}/{name}")]
    if isinstance(one, list):
        return [
            line
            for index, pair in enumerate(zip(one, two, strict=True))
            for line in differences(*pair, f"{path}/{index}")
        ]
    near = "auprc" in path and one is not None and abs(one - two) < 1e-12
    return [] if one == two or near else [f"{path}: {one} and {two}"]


def main(argv=None) -> None:
    """Run all parts, or with --part one of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.detector_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and, meanwhile, the sets")
    parser.add_argument("--pictures", type=int, nargs="+", default=[2_000, 10_000])
    parser.add_argument("--bootstrap", type=int, default=50, help="resamplings")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.output
    if arguments.part:
        way, count = arguments.part
        print(json.dumps(evaluate(way, folder, int(count), arguments.bootstrap)))
        return
    from diffdoctor.data.shard_writer import write_shards

    rows = []
    for count in arguments.pictures:
        write_shards(samples(count), folder / str(count))
        figures = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.studies.detector_memory", "--part", way, str(count)]
            command += ["--output", str(folder), "--bootstrap", str(arguments.bootstrap)]
            answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            figures[way] = answer.pop("figures")
            rows.append({"pictures": count, "way": way, **answer})
            print(f"{count} pictures, {WAYS[way]}: {answer['peak_mib']:.0f} MiB", flush=True)
        if different := differences(figures["parts"], figures["whole"]):
            raise SystemExit(f"the two ways differ: {'; '.join(different[:5])}")
        shutil.rmtree(folder / str(count))
    atomic_write_json(folder / "results.json", {"side": SIDE, "bootstrap": arguments.bootstrap, "rows": rows})
    names = f"{'MiB before':>10s} {'peak':>6s} {'grown by':>8s} {'on the disk':>11s} {'seconds':>7s}"
    print(f"\n{'pictures':>8s}  {'':30s} {names}")
    for row in rows:
        grown = row["peak_mib"] - row["before_mib"]
        print(
            f"{row['pictures']:8d}  {WAYS[row['way']]:30s} {row['before_mib']:10.0f} {row['peak_mib']:6.0f} "
            f"{grown:8.0f} {row['disk_mib']:11.0f} {row['seconds']:7.0f}"
        )
    print("every figure is the same both ways")


if __name__ == "__main__":
    main()
