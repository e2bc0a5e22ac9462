"""Does a treatment's memory grow with its prompts and pairs, and is anything encoded twice after a kill?

`python -m benchmarks.studies.many_prompts --output runs/many-prompts` treats, each in a process of its own:

- the demo's untrained pipeline of 64x64 pixels with 100 and with 10,000 prompts and as many pairs;
- the same with 10,000 and all of it in files, killed (SIGKILL) in the middle of the prompts and of the pairs;
- a FLUX pipeline of one block whose T5 is as wide as FLUX's own, with 16 and with 200 prompts of 512 tokens in bf16.

Prints a table, writes results.json, and ends with exit code 1 where a bound is missed.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffdoctor.runs.files import atomic_write_json

SIDE = 64
CACHE = {"treatment": 10 / 1024, "killed": 0.0, "long": 0.25}
"""GiB of `embedding_cache`."""
GROWTH = 100.0
"""MiB that the larger of two treatments may take more, beside what it may keep of long embeddings."""
BATCH = 4
"""Long prompts that are encoded at a time."""
TOKENS, WIDTH = 512, 4096
LOG = "encoded.txt"


class Pairs:
    """So many pictures (SIDE, SIDE, 3) with captions, none of which is held."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        picture = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return {"picture": picture, "prompt": f"{index}", "name": f"{index:06d}"}


def flux():
    """An untrained `FluxPipeline` of one block of either kind, whose T5 has one layer and FLUX's width."""
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    from diffdoctor.demo.flow_pipeline import build_flow_pipeline, build_t5_tokenizer
    from diffdoctor.demo.pipeline import build_pipeline

    words = [*map(str, range(10))]
    pipeline = build_flow_pipeline(words, build_pipeline(words).vae, layers=1, single=1)
    pipeline.tokenizer_2 = build_t5_tokenizer(words, max_length=TOKENS)
    pipeline.text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(pipeline.tokenizer_2), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=1,
            dropout_rate=0.0,
        )
    ).to(torch.bfloat16)  # fmt: skip
    pipeline.transformer = FluxTransformer2DModel.from_config(pipeline.transformer.config, joint_attention_dim=WIDTH)
    return pipeline


def treat_here(kind: str, count: int, folder: Path) -> dict:
    """Treat in this process; seconds, peak resident MiB, and how much the files of embeddings and latents take."""
    from diffdoctor.demo.pipeline import build_pipeline
    from diffdoctor.detector import ConvDetector
    from diffdoctor.treat import TreatConfig, treat
    from diffdoctor.treat.rows import RowStore

    is_long, size = kind == "long", {}
    add = RowStore.add

    def noted(store: RowStore, rows: int, make: Callable) -> None:
        start = len(store)

        def made():
            with open(folder / LOG, "a") as file:
                file.write(f"{store._path(start).name if store._folder else store.name}\n")
            return make()

        add(store, rows, made)
        if store.in_files:
            files = store._folder.glob(f"{store.name}-*")
            size[store.name] = sum(path.stat().st_size for path in files) if len(store) >= count else 0

    RowStore.add = noted
    prompts = [f"{number}" for number in range(count)]
    pipeline = flux() if is_long else build_pipeline(["0123456789"], picture_size=SIDE)
    config = TreatConfig(
        steps=2, batch_size=4, sampling_steps=2, rank=4, replay_area=0.0, method="draft_k", log_with="none",
        evaluate_every=0, evaluate_pictures=4, sample_pictures=0, embedding_cache=CACHE[kind],
        encode_batch_size=BATCH if is_long else 32, offline_weight=0.0 if is_long else None,
        max_sequence_length=TOKENS if is_long else None, height=16 if is_long else SIDE, width=16 if is_long else SIDE,
    )  # fmt: skip
    torch.manual_seed(0)
    detector, offline = ConvDetector((8, 8)).eval(), None if is_long else Pairs(count)
    started = time.perf_counter()
    result = treat(pipeline, detector, prompts, config, offline=offline, output_dir=folder, progress=False)
    return {
        "kind": kind,
        "count": count,
        "seconds": time.perf_counter() - started,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "files_mib": sum(size.values()) / 2**20,
        "losses": [row["loss"] for row in result.history],
    }


def started(kind: str, count: int, folder: Path) -> subprocess.Popen:
    """`treat_here` in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "benchmarks.studies.many_prompts", "--child", kind, str(count), str(folder)]
    # the allocator's pools of further threads are no growth
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen) -> dict:
    """What the process has measured."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a treatment ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def killed(count: int, folder: Path) -> dict:
    """Kill a treatment twice, in the middle of its prompts and of its pairs, then finish it.

    Returns:
        What `treat_here` measures, with "written": how many files lay there at the kills, and "again": how many of
        these were encoded once more.
    """
    written, position = set(), 0
    found = {"written": 0, "again": 0}

    def check() -> None:
        nonlocal position
        lines = (folder / LOG).read_text().splitlines()
        found["again"] += sum(name in written for name in lines[position:])
        position = len(lines)

    for name in ("prompts", "pairs"):
        process, half = started("killed", count, folder), None
        while half is None and process.poll() is None:
            files = list((folder / "encoded").glob(f"*/{name}-*.safetensors"))
            rows = max((int(path.stem.split("-")[1]) for path in files), default=0)
            half = rows if rows >= count // 2 else None
            time.sleep(0.02)
        if half is None:
            raise SystemExit(f"a treatment ended before it was killed among its {name}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        check()
        written |= {path.name for path in (folder / "encoded").glob("*/*.safetensors")}
    found["written"] = len(written)
    result = finished(started("killed", count, folder))
    check()
    return {**result, **found}


def main() -> int:
    """Exit code 0; 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/many-prompts"))
    parser.add_argument("--counts", type=int, nargs=2, default=(100, 10_000), help="prompts and pairs")
    parser.add_argument("--long", type=int, nargs=2, default=(16, 200), help="prompts of 512 tokens")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, count, folder = options.child
        print(json.dumps(treat_here(kind, int(count), Path(folder))))
        return 0
    rows, growth = [], {}
    for kind, counts in (("treatment", options.counts), ("long", options.long)):
        for count in counts:
            folder = options.output / f"{kind}-{count}"
            shutil.rmtree(folder, ignore_errors=True)
            rows.append(finished(started(kind, count, folder)))
            print(row(rows[-1]), flush=True)
        growth[kind] = rows[-1]["peak_mib"] - rows[-2]["peak_mib"]
    folder = options.output / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    after = killed(options.counts[1], folder)
    same = after["losses"] == rows[1]["losses"]
    # what is kept, and one batch on its way
    kept = CACHE["long"] * 2**10 + BATCH * TOKENS * WIDTH * 2 / 2**20
    print(
        f"growth: {growth['treatment']:.1f} MiB (at most {GROWTH:.0f}), with long prompts {growth['long']:.1f} MiB ",
        end="",
    )
    print(f"(at most {kept + GROWTH:.0f}, of which embeddings {kept:.0f})")
    print(
        f"killed twice: {after['written']} files were written, of which {after['again']} were encoded again; ", end=""
    )
    print(f"the same losses: {same}")
    atomic_write_json(options.output / "results.json", {"rows": rows, "growth_mib": growth, "killed": after})
    met = growth["treatment"] <= GROWTH and growth["long"] <= kept + GROWTH and same and not after["again"]
    return int(not met)


def row(found: dict) -> str:
    """A line of Markdown."""
    what = "prompts of 512 tokens" if found["kind"] == "long" else "prompts and pairs"
    cells = f"{found['count']:,} {what}", f"{found['peak_mib']:.0f} MiB", f"{found['files_mib']:.0f} MiB"
    return f"| {' | '.join(cells)} | {found['seconds']:.0f} s |"


if __name__ == "__main__":
    sys.exit(main())
