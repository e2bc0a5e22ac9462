"""Run as a program: kills treatments with SIGKILL at chosen moments, lets each go on, and compares the LoRAs.

Every run is a fork of this process, which has loaded everything and treated nothing. Prints a line per kill and exits
with 1 at the first LoRA that is not, bit for bit, that of an undisturbed run.

    python tests/programs/treat_killed.py FOLDER SEED [OPERATIONS ...]

OPERATIONS are numbers of file operations at which to kill; without any, every one is tried.
"""

import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diffdoctor
from diffdoctor.detector import ConvDetector
from diffdoctor.treat import TreatConfig, treat
from support.tiny_pipelines import PROMPTS, tiny_pipeline

CONFIG = {
    "steps": 5, "batch_size": 2, "sampling_steps": 2, "height": 16, "width": 16, "rank": 2, "replay_area": 0.0,
    "evaluate_every": 2, "evaluate_pictures": 2, "checkpoint_every": 1, "ema_decay": 0.5, "learning_rate": 1e-2,
    "sample_pictures": 1, "min_sharpness": 0.0, "min_diversity": 0.0,
}  # fmt: skip
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.chmod", "os.scandir")


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def run(output):
    torch.manual_seed(0)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    detector = ConvDetector((8, 8)).eval()
    offline = (pictures, [PROMPTS[i % 3] for i in range(4)])
    treat(
        tiny_pipeline("sd"),
        detector,
        PROMPTS,
        TreatConfig(**CONFIG),
        offline=offline,
        output_dir=output,
        progress=False,
    )


def kill_at_operation(output, number):
    """Die at the number-th file operation inside the output folder; returns the operations seen so far, a list."""
    seen = []

    def hook(event, arguments):
        if event in FILE_EVENTS and arguments and str(output) in str(arguments[0]):
            seen.append(event)
            if len(seen) == number:
                die()

    sys.addaudithook(hook)
    return seen


def kill_after(seconds):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, lambda *_: die())


def kill_in_writing(which):
    """Die when half of a file's bytes are on the disk: of the which-th checkpoint, or of the LoRA where which is 0."""
    whole_save, whole_file, calls = torch.save, safetensors.torch.save_file, []

    def cut(path):
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    def save(state, path):
        whole_save(state, path)
        calls.append(path)
        if len(calls) == which:
            cut(path)

    def save_file(tensors, path, **options):
        whole_file(tensors, path, **options)
        if which == 0:
            cut(path)

    torch.save, safetensors.torch.save_file = save, save_file


def forked(action):
    """Run action in a fork; returns its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def lora(output):
    return safetensors.torch.load_file(output / "lora" / "pytorch_lora_weights.safetensors")


def same(output, expected):
    ours = lora(output)
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def leftovers(output):
    return [path.name for path in output.rglob(".*")]


def main(folder, seed, numbers):
    folder = Path(folder)
    torch.set_num_threads(1)
    # What an attempt would import, so that only this process pays for it: nearly all of an attempt's time otherwise.
    importlib.import_module("torch.utils.tensorboard")
    tiny_pipeline("sd")
    diffdoctor.weighted_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    diffdoctor.artifact_loss(torch.zeros(1, 1, 2, 2))

    whole = folder / "whole"
    count = folder / "count"

    def counting():
        seen = kill_at_operation(whole, 0)
        started = time.perf_counter()
        run(whole)
        count.write_text(f"{len(seen)} {time.perf_counter() - started}")

    assert forked(counting) == 0
    operations, seconds = count.read_text().split()
    operations, seconds = int(operations), float(seconds)
    print(f"undisturbed: {operations} file operations, {seconds:.2f} s", flush=True)
    expected = lora(whole)
    rng = random.Random(seed)
    kills = [("operation", n) for n in numbers or range(1, operations + 1)]
    # some of each where the operations are chosen, as in the tests
    kills += [("time", rng.uniform(0.1, 1.0) * seconds) for _ in range(1 if numbers else 3)]
    kills += [("writing", n) for n in ((0, 1) if numbers else (0, 1, 3))]
    for kind, value in kills:
        output = folder / f"{kind}-{value}"
        arrange = {"operation": lambda v, o=output: kill_at_operation(o, v), "time": kill_after,
                   "writing": kill_in_writing}[kind]  # fmt: skip
        status = forked(lambda arrange=arrange, value=value, output=output: (arrange(value), run(output)))
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and kind != "time" and not (kind == "operation" and value > operations - 8):
            sys.exit(f"{kind} {value}: not killed, status {status}")
        again = forked(lambda output=output: run(output))
        ok = again == 0 and same(output, expected) and not leftovers(output)
        print(f"{kind} {value}: killed {killed}, same {ok}", flush=True)
        if not ok:
            sys.exit(f"{kind} {value}: status {again}, left {leftovers(output)}")
    # one run, killed again and again
    output, kills, most = folder / "chain", 0, 3 if numbers else 60
    while True:
        # A third of them is what a run takes until its first checkpoint, so that most would end with nothing done.
        number = rng.randint(8, max(9, operations // 2)) if kills < most else 0
        status = forked(lambda number=number: (kill_at_operation(output, number), run(output)))
        if status == 0:
            break
        kills += 1
        if not os.WIFSIGNALED(status) or kills > most:
            sys.exit(f"chain: status {status} after {kills} kills")
    print(f"chain: {kills} kills, same {same(output, expected)}", flush=True)
    if not kills or not same(output, expected):
        sys.exit("chain: not the same, or never killed")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(number) for number in sys.argv[3:]])
