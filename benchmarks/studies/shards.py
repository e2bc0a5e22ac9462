"""Shards of many small pictures: is memory flat, and how fast are they read against a plain folder?

`python -m benchmarks.studies.shards --output runs/shards` makes the pictures, writes them with `write_shards`, lays the
same files out in folders, and reads both. Each part is a process of its own; the readers take turns, a tenth of the set
each, so that a disturbance meets all of them. Prints a table and writes results.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from diffdoctor.runs.files import atomic_write_json

SIDE = 32
TURNS = 10
READERS = {
    "stream": "shards as a stream: ShardStream, buffer of 1,000",
    "plan": "shards by an exact plan: ShardData, shuffled indices",
    "folder": "the same files in folders: PIL, shuffled indices",
}


class Memory:
    """Samples the resident memory of this process and all that descend from it, with how much was done."""

    def __init__(self, period: float = 0.2):
        import psutil

        self.done, self.samples, self.process = 0, [], psutil.Process()
        self.error, self.stop = psutil.Error, threading.Event()
        threading.Thread(target=self._watch, args=(period,), daemon=True).start()

    def _watch(self, period: float) -> None:
        while not self.stop.wait(period):
            total = 0
            for process in (self.process, *self.process.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except self.error:
                    continue
            self.samples.append((self.done, total))

    def summary(self, total: int) -> dict:
        """Peaks in MiB over the first tenth of `total` and over the last, and a series of up to 50 (done, MiB)."""
        self.stop.set()
        mib = [(done, round(value / 2**20, 1)) for done, value in self.samples if done]
        early = [value for done, value in mib if done <= total / TURNS]
        late = [value for done, value in mib if done > total * (1 - 1 / TURNS)]
        step = max(1, len(mib) // 50)
        return {
            "peak_first_tenth_mib": max(early, default=None),
            "peak_last_tenth_mib": max(late, default=None),
            "peak_mib": max((value for _, value in mib), default=None),
            "series_mib": mib[::step],
        }


def samples(count: int, memory: Memory):
    """`count` labelled pictures (SIDE, SIDE, 3), every other one damaged; 512 different ones, over and over."""
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(512):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        pictures.append(np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[8:20, 6:24] = 255
    for index in range(count):
        memory.done = index
        yield {
            "picture": pictures[index % 512],
            "mask": mask if index % 2 else None,
            "category": f"category {index % 20}",
            "prompt": f"a small picture, number {index}",
        }


def write(folder: Path, count: int) -> dict:
    """Write the shards; returns pictures per second and memory."""
    from diffdoctor.data.shard_writer import write_shards

    memory = Memory()
    started = time.perf_counter()
    write_shards(samples(count, memory), folder / "shards")
    seconds = time.perf_counter() - started
    return {"pictures_per_second": count / seconds, **memory.summary(count)}


def lay_out(folder: Path) -> dict:
    """The members of the shards as loose files, a folder for each shard."""
    from diffdoctor.data.tar import SkipCounts, read_groups

    started = time.perf_counter()
    for path in sorted((folder / "shards").glob("*.tar")):
        place = folder / "files" / path.stem
        place.mkdir(parents=True)
        for key, members in read_groups(path, True, SkipCounts()):
            for extension, data in members.items():
                (place / f"{key}.{extension}").write_bytes(data)
    return {"seconds": time.perf_counter() - started}


class Files:
    """A plain reader of a folder: every sample is a picture, a mask and a JSON file."""

    def __init__(self, folder: Path):
        self.paths = sorted(path for path in folder.rglob("*.png") if not path.name.endswith(".mask.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        from PIL import Image

        path = self.paths[index]
        with Image.open(path) as picture:
            sample = {"picture": np.array(picture.convert("RGB"))}
        with Image.open(path.with_suffix(".mask.png")) as mask:
            sample["mask"] = np.array(mask.convert("L")).astype(np.float32) / 255
        return {**json.loads(path.with_suffix(".json").read_bytes()), **sample}


def collate(batch: list[dict]):
    """Pictures (B, H, W, 3) uint8 and masks (B, H, W) float32, as tensors."""
    import torch

    return tuple(torch.from_numpy(np.stack([sample[name] for sample in batch])) for name in ("picture", "mask"))


def loader(reader: str, folder: Path, workers: int, batch_size: int):
    """The DataLoader of one of READERS."""
    import torch

    from diffdoctor.data.shards import ShardData
    from diffdoctor.data.stream import ShardStream

    options = {"batch_size": batch_size, "num_workers": workers, "collate_fn": collate}
    if reader == "stream":
        return torch.utils.data.DataLoader(ShardStream(folder / "shards", strict=True), **options)
    data = ShardData(folder / "shards") if reader == "plan" else Files(folder / "files")
    order = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(data, shuffle=True, generator=order, **options)


def read(reader: str, folder: Path, count: int, workers: int, batch_size: int) -> None:
    """Read the set in TURNS turns, one for each line on standard input; prints a JSON line for each, then memory."""
    import torch

    torch.set_num_threads(1)
    memory, seen, damaged, batches = Memory(), 0, 0.0, None
    for turn in range(1, TURNS + 1):
        sys.stdin.readline()
        started, before = time.perf_counter(), seen
        if batches is None:
            batches = iter(loader(reader, folder, workers, batch_size))
        while seen < count * turn // TURNS:
            pictures, masks = next(batches)
            if not seen:
                first = time.perf_counter() - started
            seen += len(pictures)
            damaged += float(masks.sum())
            memory.done = seen
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "pictures": seen - before}), flush=True)
    result = {"first_batch_seconds": first, "seen": seen, "mask_sum": damaged, **memory.summary(count)}
    print(json.dumps(result), flush=True)


def take_turns(folder: Path, arguments) -> dict[str, dict]:
    """Run the readers in turns; their rates, the median and the extremes over the turns, and memory."""
    options = ["--pictures", str(arguments.pictures), "--workers", str(arguments.workers)]
    options += ["--batch-size", str(arguments.batch_size), "--output", str(folder)]
    children = {}
    for reader in READERS:
        command = [sys.executable, "-m", "benchmarks.studies.shards", "--part", reader, *options]
        children[reader] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rates: dict[str, list[float]] = {reader: [] for reader in READERS}
    try:
        for turn in range(TURNS):
            for reader, child in children.items():
                child.stdin.write("go\n")
                child.stdin.flush()
                answer = json.loads(child.stdout.readline())
                rates[reader].append(answer["pictures"] / answer["seconds"])
                print(f"turn {turn + 1}/{TURNS}: {reader:7s} {rates[reader][-1]:7.0f} pictures/s", flush=True)
        results = {reader: json.loads(child.stdout.readline()) for reader, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    for reader, values in rates.items():
        results[reader]["pictures_per_second"] = float(np.median(values))
        results[reader]["slowest_turn"], results[reader]["fastest_turn"] = min(values), max(values)
    if len({(result["seen"], result["mask_sum"]) for result in results.values()}) != 1:
        raise SystemExit("the readers did not read the same pictures")
    return results


def table(results: dict) -> str:
    """What is printed: a row for each part."""
    plain = results["read"]["folder"]["pictures_per_second"]
    rows = [("writing shards", results["write"], None)]
    rows += [(READERS[name], results["read"][name], results["read"][name]["first_batch_seconds"]) for name in READERS]
    lines = [
        f"{'':56s} {'pictures/s':>10s} {'of folder':>9s} {'first batch':>11s} {'MiB, first tenth':>16s} {'last':>7s}"
    ]
    for name, result, first in rows:
        share = f"{result['pictures_per_second'] / plain:.2f}" if first is not None else ""
        shown = f"{first:.2f} s" if first is not None else ""
        lines.append(
            f"{name:56s} {result['pictures_per_second']:10.0f} {share:>9s} {shown:>11s} "
            f"{result['peak_first_tenth_mib']:16.0f} {result['peak_last_tenth_mib']:7.0f}"
        )
    return "\n".join(lines)


def main(argv=None) -> None:
    """Run all parts, or with --part one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.shards", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and, meanwhile, the set")
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="DataLoader workers")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="keep the shards and the files")
    parser.add_argument("--part", choices=("write", "files", *READERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.output
    if arguments.part in READERS:
        read(arguments.part, folder, arguments.pictures, arguments.workers, arguments.batch_size)
        return
    if arguments.part:
        result = write(folder, arguments.pictures) if arguments.part == "write" else lay_out(folder)
        print(json.dumps(result))
        return
    started = time.perf_counter()
    for name in ("shards", "files"):
        shutil.rmtree(folder / name, ignore_errors=True)
    results = {"pictures": arguments.pictures, "side": SIDE, "workers": arguments.workers}
    for part in ("write", "files"):
        command = [sys.executable, "-m", "benchmarks.studies.shards", "--part", part, "--output", str(folder)]
        command += ["--pictures", str(arguments.pictures)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[part] = json.loads(answer)
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    results["shard_mib"] = round(sum(p.stat().st_size for p in (folder / "shards").iterdir()) / 2**20, 1)
    results["read"] = take_turns(folder, arguments)
    results["seconds"] = time.perf_counter() - started
    atomic_write_json(folder / "results.json", results)
    print(table(results))
    print(f"{results['seconds']:.0f} s in all; {folder / 'results.json'}", flush=True)
    if not arguments.keep:
        for name in ("shards", "files"):
            shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()
