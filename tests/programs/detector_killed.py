"""Runs of the detector's commands that are killed again and again: forks of one warm process.

An attempt ends at a chosen file operation in its output folder (an opening, a renaming, a removal, a synchronisation,
at which the file loses a random part of what has not reached the disk), or after a chosen time. Called as
`python tests/programs/detector_killed.py COMMAND FOLDER SEED`, with FOLDER/data and FOLDER/detector there, or `main` by
`support.warm`; prints what it did as JSON.

The detector's map of a picture depends on the pictures beside it in the batch, and in training on the random state: as
they would with BatchNorm and dropout, but visibly. TensorBoard's files hold what was flushed, and nothing else.
"""

import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose
from diffdoctor.detector.commands.inject import InjectConfig, run_inject
from diffdoctor.detector.commands.train import TrainDetectorConfig, run_train_detector
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.models.conv import ConvDetector
from diffdoctor.detector.train import DetectorTrainingConfig
from diffdoctor.evaluate.detector.command import EvaluateDetectorConfig, run_evaluate_detector
from diffdoctor.sets.config import SetJoinConfig
from diffdoctor.sets.join import run_set_join
from support.curves import events_of
from support.launch import free_port

# What an attempt would import, so that only the first process pays for it.
for name in (
    "accelerate.utils",
    "jinja2",
    "pycocotools.cocoeval",
    "pyarrow.parquet",
    "scipy.ndimage",
    "torch._dynamo",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
):
    importlib.import_module(name)
for name in ("detector.damage.kinds", "data.resumable", "evaluate.detector.measure", "viz.report"):
    importlib.import_module(f"diffdoctor.{name}")
importlib.import_module("torch.utils.tensorboard")
gfile = importlib.import_module("tensorboard.compat").tf.io.gfile.GFile

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
# What makes a change lasting: a kill right before and right after one is what most bugs need.
COMMITS = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fsync"}

_plain_network, _plain_write, _plain_flush = ConvDetector.network, gfile.write, gfile.flush


def network(self, pixel_values):
    logits = _plain_network(self, pixel_values)
    places = torch.arange(1.0, len(logits) + 1).view(-1, 1, 1, 1)
    logits = logits + 0.5 * pixel_values.mean() + 0.1 * places / len(logits)
    return torch.nn.functional.dropout(logits, 0.1, self.training)


def late_write(self, content):
    self.__dict__.setdefault("held", []).append(content)


def late_flush(self):
    for content in self.__dict__.pop("held", ()):
        _plain_write(self, content)
    _plain_flush(self)


ConvDetector.network, gfile.write, gfile.flush = network, late_write, late_flush


def diagnose(folder):
    # Both picture files and shards; a broken picture among them.
    places = [str(folder / "pictures"), str(folder / "data")]
    run_diagnose(DiagnoseConfig(places, str(folder / "detector"), "out", batch_size=3, gallery=5))


def label(folder):
    # Units of three files, and of shards.
    places = [str(folder / "pictures"), str(folder / "data")]
    options = {"batch_size": 2, "gallery": 2, "write": "shards", "shard_size": 3}
    run_diagnose(DiagnoseConfig(places, str(folder / "detector"), "out", **options))


def join(folder):
    run_set_join(SetJoinConfig([str(folder / "data"), str(folder / "validation")], "out", shard_size=3))


def train(folder, resampled=False):
    training = DetectorTrainingConfig(
        steps=7,
        batch_size=4,
        warmup_steps=2,
        checkpoint_every=2,
        validate_every=3,
        size=16,
        tensorboard=True,
        bce=1.0,
        seed=2,
    )
    training.augment = AugmentConfig(kinds=("tint", "pixelate"), area=(0.1, 0.3))
    data, validation = [str(folder / "data")], [str(folder / "validation")]
    options = {"initial": str(folder / "detector"), "resampled": resampled, "shuffle_buffer": 5, "training": training}
    run_train_detector(TrainDetectorConfig(data, "out", validation, **options))


def inject(folder):
    # Five versions of a picture in shards of four, so that shards end between them; two pictures are left out, and the
    # damaged ones of the shards.
    places = [str(folder / "pictures"), str(folder / "data")]
    run_inject(InjectConfig(places, "out", damaged=3, benign=1, kinds=["tint", "pixelate"], shard_size=4, seed=3))


def train_resampled(folder):
    train(folder, resampled=True)


def evaluate(folder):
    run_evaluate_detector(
        EvaluateDetectorConfig(str(folder / "detector"), [str(folder / "data")], "out", batch_size=2, bootstrap=5)
    )


COMMANDS = {
    "inject": inject,
    "diagnose": diagnose,
    "label": label,
    "join": join,
    "evaluate": evaluate,
    "train": train,
    "train_resampled": train_resampled,
}
SHARED = ("diagnose", "label", "join", "evaluate")


class Killer:
    """Notes the operations on `work`/out and on what is made for it, and kills this process' group at the `at`-th.

    An operation is noted as its kind and the form of its file's name, with # for numbers and for what is drawn by lot.
    """

    def __init__(self, work, at, chance):
        self.work, self.places = work, (str(work / "out"), str(work / ".out"))
        self.at, self.chance, self.kinds = at, chance, []
        # What of a file is on the disk, in bytes; what an earlier attempt left is.
        self.sync, self.synced = os.fsync, {str(p): p.stat().st_size for p in Path(work).rglob("*") if p.is_file()}
        sys.addaudithook(self.hook)
        os.fsync = self.fsync

    def hook(self, event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(arguments[0]))
        if event in ("os.rename", "os.remove"):
            size = self.synced.pop(path, None)
            if event == "os.rename" and size is not None:
                self.synced[os.path.abspath(os.fspath(arguments[1]))] = size
        if path.startswith(self.places):
            self.tick(event, path)

    def tick(self, kind, path):
        form = re.sub(r"[-.][0-9a-f]{8}\b|\d+", "#", os.path.relpath(path, self.work))
        self.kinds.append(f"{kind} {form}")
        if len(self.kinds) == self.at:
            os.killpg(0, signal.SIGKILL)

    def fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if len(self.kinds) + 1 == self.at and os.path.isfile(path):
            # Lines that an earlier call has synchronised stay.
            size = os.path.getsize(path)
            os.ftruncate(descriptor, self.chance.randint(min(self.synced.get(path, 0), size), size))
        self.tick("fsync", path)
        self.sync(descriptor)
        if os.path.isfile(path):
            self.synced[path] = os.path.getsize(path)


def attempt(command, folder, work, *, at=0, seconds=None, processes=1, chance=None):
    """One attempt at a run in `work`/out; returns the kinds of operation it noted, or None when it was killed."""
    work.mkdir(parents=True, exist_ok=True)
    port = free_port()
    counted, group, children = work / "counted", 0, []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            # Here and below, so that it is done before either goes on: an attempt kills its whole group.
            os.setpgid(0, group)
            _child(command, folder, work, at if rank == processes - 1 else 0, processes, rank, port, chance)
        children.append(child)
        group = group or child
        os.setpgid(child, group)
    if seconds is not None:
        time.sleep(seconds)
        os.killpg(group, signal.SIGKILL)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if all(os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 for status in statuses):
        kinds = json.loads(counted.read_text())
        counted.unlink()
        return kinds
    assert any(os.WIFSIGNALED(s) and os.WTERMSIG(s) == signal.SIGKILL for s in statuses), statuses
    return None


def _child(command, folder, work, at, processes, rank, port, chance):
    try:
        os.chdir(work)
        if processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(processes))
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end of the process)
        killer = Killer(work, at, chance or random.Random(0))
        COMMANDS[command](folder)
        if processes > 1:
            torch.distributed.destroy_process_group()
        if rank == processes - 1:
            (work / "counted").write_text(json.dumps(killer.kinds))
        os._exit(0)
    except BaseException:
        sys.stderr = sys.__stderr__
        traceback.print_exc()
        os._exit(1)


def scalars(folder):
    """What TensorBoard would show: {tag: [(step, value)]}."""
    events = events_of(folder, scalars=0)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def contents(work):
    """{file: bytes} of all that a run leaves but the records of its attempts; the curves as they would be shown.

    Of a unit's commit what counts: which files it has, and what they came to.
    """
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_dir():
            found[f"{name}/"] = None
        elif name.startswith("out/commits/"):
            commit = json.loads(path.read_text())
            found[name] = [commit[each] for each in ("unit", "files", "records", "skipped", "sums")]
        elif not name.startswith(("out/records/part-", "out/logs/")):
            found[name] = path.read_bytes()
    if (work / "out" / "logs").is_dir():
        found["out/logs"] = scalars(work / "out" / "logs")
    return found


def compare(work, expected):
    """Fail where a run did not end in what an undisturbed one left; then remove it."""
    left = contents(work)
    assert sorted(left) == sorted(expected), sorted(set(left) ^ set(expected))
    different = [name for name in expected if left[name] != expected[name]]
    assert not different, different
    shutil.rmtree(work)


# Of the points that `kill_points` finds, so many are tried.
KILLED = 2


def kill_points(kinds, chance):
    """Numbers of operations to be killed at: of every kind one, and the last ones, after which nothing tidies."""
    forms, commits = {}, []
    for number, kind in enumerate(kinds, 1):
        forms.setdefault(kind, []).append(number)
        if kind.split()[0] in COMMITS:
            commits.append(number)
    chosen = {*commits[-4:], *(chance.choice(numbers) for numbers in forms.values())}
    return chance.sample(sorted(chosen), len(chosen))


def chain(command, folder, work, kinds, seconds, how, processes, chance):
    """Lives killed at random one after the other, and one that comes to the end; returns the kills."""
    kills = 0
    while True:
        at = chance.randint(1, max(2, len(kinds) // 2)) if how == "operation" else 0
        wait = seconds * (chance.uniform(0.1, 0.6) + 0.1 * kills) if how == "time" else None
        if attempt(command, folder, work, at=at, seconds=wait, processes=processes, chance=chance) is not None:
            return kills
        kills += 1
        assert kills < 60, "no attempt reaches the end"
        if how == "operation" and kills >= (8 if processes == 1 else 3):
            assert attempt(command, folder, work, processes=processes) is not None
            return kills


def main(command, folder, seed, brief=False):
    torch.set_num_threads(1)
    folder, chance = Path(folder), random.Random(seed)
    started = time.monotonic()
    kinds = attempt(command, folder, folder / "whole")
    seconds = time.monotonic() - started
    expected = contents(folder / "whole")
    points = kill_points(kinds, chance)
    report = {"operations": len(kinds), "files": len(expected), "points": len(points), "kills": [], "processes": []}
    # each costs two attempts; the last operations always
    for point in sorted(points)[-2:] if brief else {*sorted(points)[-2:], *points[:KILLED]}:
        work = folder / f"point-{point}"
        assert attempt(command, folder, work, at=point, chance=chance) is None, f"operation {point} never came"
        assert attempt(command, folder, work) is not None
        compare(work, expected)
    chains = [("operation", 2)] * (command in SHARED)
    if not brief:
        chains = [("operation", 1), ("time", 1), *chains]
    for number, (how, processes) in enumerate(chains):
        work = folder / f"chain-{number}"
        report["kills"].append(chain(command, folder, work, kinds, seconds, how, processes, chance))
        report["processes"].append(processes)
        compare(work, expected)
    print(json.dumps(report | {"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
