"""The road to a million labelled pictures, small: draw, damage, train, diagnose, label, train again, measure.

    python examples/million.py --output runs/million [--scale 4000] [--engine processes]

Every step is a command of `diffdoctor`, printed before it runs; started again, the script resumes within the step that
was stopped. The same commands make a real set from `--pipeline` and `--prompts`; without these a small pipeline learns
handwritten digits first. Labels that people would give come from the simulated rater, and what the detector labels by
itself passes the audit gate of `diffdoctor round`.

OUTPUT/million.json has the pictures, seconds, CPU seconds and peak memory of each step.
"""

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# What the first detector learns, and what only people can show it.
KNOWN, UNKNOWN = ("texture_noise", "tint"), ("duplicate", "warp", "smear", "seam")
SHOWN = "million.json"
# Of Linux's prctl.
_SET_CHILD_SUBREAPER = 36
_TRAIN = """
import pathlib, sys, million
million.train_pipeline(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))
"""
# Pictures with which a step takes longer than to start its processes.
ENOUGH = 2000


def train_pipeline(folder: Path, prompts: Path, steps: int) -> None:
    """Train the demo's pipeline on clean digits, and write it and the prompts that it knows."""
    from diffdoctor.demo.data import WORDS, clean_digits, prompt_of
    from diffdoctor.demo.pipeline import build_pipeline, train_autoencoder, train_base
    from diffdoctor.runs.files import atomic_dir, atomic_write_text

    known = [prompt_of(digit) for digit in range(10)]
    lines = [json.dumps({"prompt": prompt, "category": WORDS[digit]}) for digit, prompt in enumerate(known)]
    atomic_write_text(prompts, "\n".join(lines) + "\n")
    if folder.is_dir():
        return
    pictures, digits = clean_digits()
    pipeline = build_pipeline(known)
    train_autoencoder(pipeline, pictures, steps=steps)
    train_base(pipeline, pictures, [known[digit] for digit in digits], steps=steps)
    with atomic_dir(folder) as temporary:
        pipeline.save_pretrained(temporary)


def steps_of(options, prompts: Path, count: int) -> list[tuple[str, int, list[str]]]:
    """(name, pictures, words of the command) of each step.

    Args:
        options: of the script.
        prompts: the file of prompts.
        count: of prompts.
    """
    output, engine = options.output, ["--engine", options.engine]
    sizes = {"train": options.scale // 4, "pool": options.scale, "test": max(count, options.scale // 20)}
    steps, first = [], 0
    for name, size in sizes.items():
        seeds = max(1, size // count)
        drawn, damaged, kinds = output / f"{name}-drawn", output / name, KNOWN if name == "train" else UNKNOWN
        words = ["sample", "--pipeline", str(options.pipeline), "--prompts", str(prompts), "--output", str(drawn)]
        words += ["--seeds", str(first), str(first + seeds - 1), "--batch_size", "64", *options.draw, *engine]
        steps.append((f"draw {name}", seeds * count, words))
        words = ["inject", str(drawn), "--output", str(damaged), "--kinds", *kinds, *engine]
        steps.append((f"damage {name}", 2 * seeds * count, words))
        first += seeds
    training = ["steps", str(options.steps), "batch_size", "32", "checkpoint_every", "100", "order", "blocks"]
    training = [word if number % 2 else f"--training.{word}" for number, word in enumerate(training)]
    small = ["--min_side", str(options.min_side), "--architecture", options.architecture]
    words = ["train-detector", str(output / "train"), "--output", str(output / "first"), *small, *training]
    steps.append(("train", 32 * options.steps, words))
    labels = ["diagnose", str(output / "pool"), "--detector", str(output / "first" / "detector")]
    labels += ["--output", str(output / "pool-labels"), "--write", "shards", "--batch_size", "64", *engine]
    steps.append(("diagnose", steps[3][1], labels))
    words = ["round", "run", "--pool", str(output / "pool"), "--detector", str(output / "first" / "detector")]
    words += ["--output", str(output / "rounds"), "--test", str(output / "test"), "--data", str(output / "train")]
    words += ["--annotator", "simulated", "--truth", str(output / "pool"), "--budget", str(options.budget)]
    words += ["--audit_share", "0.5", "--bootstrap", "300", *training]
    steps.append(("round: ask, accept, train again, compare", steps[3][1], words))
    return steps


def adopt_orphans() -> None:
    """On Linux, let processes whose parent ends become this one's: only then is their time known. Else do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(words: list[str]) -> dict[str, float]:
    """Run a command of diffdoctor.

    Returns:
        Of all of its processes: `cpu_seconds`, and `peak_mib`, the memory of the largest. Elsewhere than on Linux: of
        the command's own process and those that it waits for.
    """
    print("+ diffdoctor", *words, flush=True)
    process, usages = subprocess.Popen([sys.executable, "-m", "diffdoctor", *words]), []
    while process.returncode is None:
        pid, status, usage = os.wait4(-1, 0)
        usages.append(usage)
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    patience = time.monotonic() + 10
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < patience:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
            if pid:
                usages.append(usage)
            else:
                time.sleep(0.05)
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return {"cpu_seconds": seconds, "peak_mib": max(usage.ru_maxrss for usage in usages) / 1024}


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--output", type=Path, required=True, help="folder of everything")
    command.add_argument("--scale", type=int, default=4000, help="pictures drawn for the pool (4000: ten minutes)")
    command.add_argument("--pipeline", type=Path, help="diffusers pipeline (one that learns digits first)")
    command.add_argument("--prompts", type=Path, help="its prompts, a line each, or .jsonl (the digits')")
    drawing = "an option of `diffdoctor sample`, as in --draw=--height=512; any number of them"
    command.add_argument("--draw", action="append", default=[], help=drawing)
    command.add_argument("--engine", default="processes", help="see docs/scale.md (processes)")
    command.add_argument("--budget", type=int, default=400, help="tasks for people (400)")
    command.add_argument("--steps", type=int, default=300, help="of each training of the detector (300)")
    command.add_argument("--architecture", default="conv", help="of the first detector (conv)")
    command.add_argument("--min_side", type=int, default=16, help="see `diffdoctor train-detector` (16)")
    command.add_argument("--base_steps", type=int, default=800, help="of the digits' pipeline (800)")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; a step that fails ends the script with its message."""
    options = parser().parse_args(arguments)
    if (options.pipeline is None) != (options.prompts is None):
        sys.exit("--pipeline and --prompts: expected both or neither")
    from diffdoctor.data.prompts import read_prompt_file
    from diffdoctor.runs.files import atomic_write_json

    options.output.mkdir(parents=True, exist_ok=True)
    prompts = options.prompts or options.output / "prompts.jsonl"
    if options.pipeline is None:
        options.pipeline = options.output / "pipeline"
        options.draw = [*options.draw, "--sampling_steps=10", "--guidance_scale=1"]
        # In a process of its own: what this one has held at most would count as the peak of each that it starts.
        words = [str(options.pipeline.absolute()), str(prompts.absolute()), str(options.base_steps)]
        if code := subprocess.run([sys.executable, "-c", _TRAIN, *words], cwd=Path(__file__).parent).returncode:
            sys.exit(code)
    count = len(read_prompt_file(prompts))
    path = options.output / SHOWN
    adopt_orphans()
    done = json.loads(path.read_text()) if path.is_file() else []
    for name, pictures, words in steps_of(options, prompts, count):
        if words in [step["words"] for step in done]:
            continue
        started = time.monotonic()
        used = run(words)
        step = {"name": name, "words": words, "pictures": pictures, "seconds": time.monotonic() - started}
        done.append(step | used)
        atomic_write_json(path, done)
    print(table(done))
    return 0


def table(done: list[dict]) -> str:
    """Markdown: what each step took, and at the same speed a million pictures, where there were enough to tell."""
    lines = ["| step | pictures | seconds | CPU seconds | pictures/s | peak of a process, MiB | hours for a million |"]
    lines += ["| --- " * 7 + "|"]
    for step in done:
        speed = step["pictures"] / step["seconds"]
        hours = f"{1e6 / speed / 3600:.1f}" if step["pictures"] >= ENOUGH else "–"
        times = f"{step['pictures']:,} | {step['seconds']:.0f} | {step['cpu_seconds']:.0f}"
        numbers = f"{times} | {speed:.0f} | {step['peak_mib']:.0f}"
        lines.append(f"| {step['name']} | {numbers} | {hours} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
