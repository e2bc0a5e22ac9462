"""What the engine costs, what a second worker brings, and whether a million pictures keep memory flat.

`python -m benchmarks.scale --output runs/scale` measures, each part in processes of its own:

- `unit`: 2,000 units in which nothing is done, so that what is left is the engine's: milliseconds a unit;
- `workers`: units of 128 pictures under a small detector on one thread each, by one and by two workers in turns:
  pictures a second between the first commits and the last, so that start-up does not count;
- `rows`: units of 1,000 rows without pictures, `--pictures` rows in all: what the end of a run takes, which puts a
  manifest together and looks for keys that come twice;
- `cost`: CPU seconds that 1,000 pictures of 32x32 take to be written, labelled (`diagnose --write shards`) and read
  back, in this process, the medians of `--turns`: hardly more on a machine that is busy;
- `set`: `--pictures` pictures of 32x32 written in units of 1,000, then labelled and read back, with the resident memory
  of all processes in the first tenth and in the last.

Prints a table and writes results.json. `--parts` chooses; `--engine ray` needs the extra ray, and starts one here.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.studies.shards import Memory
from diffdoctor.data.manifest import OFFSETS, ManifestWriter
from diffdoctor.data.shards import ShardData
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.running import run, settle
from diffdoctor.engine.sets import PARTS, SetSums, UnitFiles, assemble
from diffdoctor.engine.units import Plan, Unit, unit_name
from diffdoctor.runs.files import atomic_write_json

SIDE, SHARD, BATCH = 32, 1000, 32
MORE = ("uid", "phash")
PARTS_OF_RUN = ["unit", "workers", "rows", "cost", "set"]


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A worker that does nothing."""

    def build(self, place):
        return lambda unit, attempt: {"ended": time.time()}


@dataclasses.dataclass(frozen=True)
class Diagnosing:
    """A worker that diagnoses noise with a small detector."""

    side: int = 64
    batches: int = 4

    def build(self, place):
        import torch

        from diffdoctor.detector import ConvDetector

        torch.manual_seed(0)
        detector, pictures = ConvDetector((16, 32)).eval(), torch.rand(BATCH, 3, self.side, self.side)

        def work(unit, attempt):
            with torch.no_grad():
                for _ in range(self.batches):
                    detector.confidence(pictures)
            return {"records": BATCH * self.batches, "ended": time.time()}

        return work


@dataclasses.dataclass(frozen=True)
class Writing:
    """A worker that writes small pictures, each a function of its number."""

    def build(self, place):
        def work(unit, attempt):
            with UnitFiles(unit, attempt, more=MORE) as files:
                for number in range(unit.first, unit.first + unit.count):
                    rng = np.random.default_rng(number)
                    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                    picture = coarse.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
                    mask = np.zeros((SIDE, SIDE), np.uint8)
                    mask[8 : 8 + 12 * (number % 2), 6:24] = 255
                    category = f"category-{number % 200}"
                    files.add({"picture": picture, "mask": mask, "key": f"{number:09d}", "category": category})
            return files.result()

        return work


@dataclasses.dataclass(frozen=True)
class Rows:
    """A worker that writes the manifest's rows of pictures that are not there."""

    def build(self, place):
        def work(unit, attempt):
            sums, writer = SetSums(), ManifestWriter(attempt.path(f"{PARTS}/{unit.id}.parquet"), more=MORE)
            texts = {"shard": f"shard-{unit.id}.tar", "label": "pseudo", "generator": "", "prompt": "a prompt"}
            numbers = {"round": 0, "height": 1024, "width": 1024, "mask_mean": 0.1, "mask_max": 1.0, "phash": 0}
            for number in range(unit.first, unit.first + unit.count):
                category, uid = f"category-{number % 200}", f"{number:064x}"
                row = {"key": f"{number:09d}", "category": category, "uid": uid, **texts, **numbers}
                writer.add(row | dict.fromkeys(OFFSETS, number))
                sums.add(row)
            writer.close()
            return {"records": unit.count, "skipped": {}, "sums": sums.entries()}

        return work


def plan_of(units: int, size: int = 0) -> Plan:
    """So many units of so many pictures."""
    return Plan([Unit(unit_name(number), (), number * size, size) for number in range(units)])


def timed(plan, spec, folder: Path, options: EngineConfig) -> tuple[float, float, list[dict]]:
    """Seconds in all, seconds between the first two commits and the last, and the commits."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = run(plan, spec, folder, options)
    commits = list(settle(plan, folder, report))
    ended = sorted(commit["ended"] for commit in commits)
    return report.seconds, ended[-1] - ended[1], commits


def unit_cost(folder: Path, options: dict, units: int) -> dict:
    """Milliseconds a unit in which nothing is done."""
    seconds, between, _ = timed(plan_of(units), Nothing(), folder, EngineConfig(**options))
    return {"units": units, "ms_a_unit": 1000 * between / (units - 2), "seconds": seconds}


def worker_gain(folder: Path, options: dict, turns: int, units: int) -> dict:
    """Pictures a second by one worker and by two, in turns; the medians and their quotient."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for actors in (1, 2):
            settings = EngineConfig(**options | {"actors": actors, "cpus": 1})
            _, between, commits = timed(plan_of(units), Diagnosing(), folder, settings)
            rates[actors].append(sum(commit["records"] for commit in commits[2:]) / between)
    medians = {actors: statistics.median(values) for actors, values in rates.items()}
    return {"rates": rates, "one": medians[1], "two": medians[2], "gain": medians[2] / medians[1]}


def cost_of(folder: Path, turns: int) -> dict:
    """CPU seconds of this process for 1,000 pictures, step by step; the first turn, which also imports, is left out."""
    seconds: dict[str, list[float]] = {}
    for _ in range(1 + turns):
        for name, work, _ in steps_of(folder, 5 * SHARD, {"kind": "none"}):
            before = time.process_time()
            found = work()
            seconds.setdefault(name, []).append(1000 * (time.process_time() - before) / found)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def steps_of(
    folder: Path, pictures: int, options: dict, on_read: Callable[[int], None] = lambda number: None
) -> list[tuple[str, Callable[[], int], str | None]]:
    """(name, what writes, labels or reads a set and says how many pictures it has, the folder it makes).

    `on_read` is called with the number of each picture that is read, from 0.
    """
    plan = plan_of(-(-pictures // SHARD), SHARD)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "set").mkdir(parents=True)

    def write():
        report = run(plan, Writing(), folder / "set", EngineConfig(**options), desc="write")
        return assemble(folder / "set", settle(plan, folder / "set", report), MORE).records

    def label():
        import torch

        from diffdoctor.detector import ConvDetector
        from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose

        torch.manual_seed(0)
        ConvDetector((8,)).save_pretrained(folder / "detector")
        more = {"write": "shards", "gallery": 10, "batch_size": 250, "engine": EngineConfig(**options)}
        config = DiagnoseConfig([str(folder / "set")], str(folder / "detector"), str(folder / "labels"), **more)
        return run_diagnose(config)["pictures"]

    def read():
        data = ShardData(folder / "labels")
        for number, index in enumerate(np.random.default_rng(0).permutation(len(data)).tolist()):
            assert data[index]["picture"].shape == (SIDE, SIDE, 3)
            on_read(number)
        return len(np.unique(data.keys))

    return [("write", write, "set"), ("label", label, "labels"), ("read", read, None)]


def set_of(folder: Path, pictures: int, options: dict) -> dict:
    """Write a set, label it, and read it back; seconds, and memory of all processes."""
    results = {}

    def on_read(number: int) -> None:
        memory.done = number

    for name, work, output in steps_of(folder, pictures, options, on_read):
        memory, started = Memory(period=1.0), time.perf_counter()
        if output is not None:
            _follow(memory, folder / output / "commits")
        found = work()
        seconds = time.perf_counter() - started
        assert found == SHARD * -(-pictures // SHARD), (name, found)
        results[name] = {"pictures": found, "seconds": seconds, **memory.summary(found)}
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
    size = sum(path.stat().st_size for path in (folder / "labels").rglob("*") if path.is_file())
    results["labels_bytes_a_picture"] = size / found
    return results


def rows_of(folder: Path, pictures: int, options: dict) -> dict:
    """Put a manifest together; seconds, and memory before and at most."""
    import psutil

    plan, here = plan_of(-(-pictures // SHARD), SHARD), psutil.Process()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = run(plan, Rows(), folder, EngineConfig(**options), desc="rows")
    before, memory, started = here.memory_info().rss, Memory(), time.perf_counter()
    memory.done = 1
    found = assemble(folder, settle(plan, folder, report), MORE)
    seconds = time.perf_counter() - started
    assert found.records == len(plan) * SHARD
    peak = memory.summary(found.records)["peak_mib"]
    return {"rows": found.records, "seconds": seconds, "mib_before": before / 2**20, "mib_peak": peak}


def _follow(memory: Memory, commits: Path) -> None:
    """Let the memory's samples say how much is done, by the commits that are there."""
    import threading

    def count():
        while not memory.stop.wait(1.0):
            memory.done = (
                SHARD * sum(entry.name.startswith("0") for entry in os.scandir(commits)) if commits.is_dir() else 0
            )

    threading.Thread(target=count, daemon=True).start()


def main(argv: list[str] | None = None) -> dict:
    """Run the parts; returns what results.json holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/scale"))
    parser.add_argument("--parts", nargs="+", default=PARTS_OF_RUN, choices=PARTS_OF_RUN)
    parser.add_argument("--engine", default="processes", choices=["none", "processes", "ray"])
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args(argv)
    options = {"kind": given.engine} | ({"address": "local", "gpus": 0} if given.engine == "ray" else {})
    if given.engine != "none":
        options["actors"] = given.actors
    work, results = given.output / "work", {"engine": given.engine, "cores": os.cpu_count()}
    if "unit" in given.parts:
        results["unit"] = unit_cost(work / "unit", options, given.units)
    if "workers" in given.parts and given.engine != "none":
        results["workers"] = worker_gain(work / "workers", options, given.turns, max(4, given.units // 25))
    if "rows" in given.parts:
        results["rows"] = rows_of(work / "rows", given.pictures, options)
    if "cost" in given.parts:
        results["cpu_seconds_a_thousand"] = cost_of(work / "cost", given.turns)
    if "set" in given.parts:
        results["set"] = set_of(work / "set", given.pictures, options)
    shutil.rmtree(work, ignore_errors=True)
    given.output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(given.output / "results.json", results)
    print(json.dumps({name: value for name, value in results.items() if name != "set"}, indent=2))
    for name, part in results.get("set", {}).items():
        if isinstance(part, dict):
            rate, peaks = part["pictures"] / part["seconds"], [part[f"peak_{of}_tenth_mib"] for of in ("first", "last")]
            print(f"{name}: {part['pictures']:,} pictures, {part['seconds']:.0f} s, {rate:,.0f} a second, MiB {peaks}")
    return results


if __name__ == "__main__":
    main()
