"""What lies in an output folder and is nobody's result stays, whatever it is called; old folders are refused."""

import json
import shutil

import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.detector import ConvDetector
from diffdoctor.runs.files import leftovers
from support.pictures import tree, write_pictures
from support.tiny_pipelines import tiny_pipeline

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")

# Named as leftovers of other programs are, and of an older version of this one.
OWN = (
    ".vimrc.20240101.old",
    ".notes.deadbeef.tmp",
    ".project.20240102.old/was",
    "thesis/.chapter.20231231.old",
    "maps.old/.a.png.0123abcd.tmp.png",
    "thesis/.plan.diffdoctor-tmp-0a1b2c3d",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_pictures(folder / "pictures", 4)
    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(folder / "detector")
    tiny_pipeline("sd").save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat")
    assert main(["inject", str(folder / "pictures"), "--output", str(folder / "set"), "--kinds", '["tint"]']) == 0
    return folder


COMMANDS = {
    "diagnose": ("diagnose", "{}/pictures", "--detector", "{}/detector", "--gallery", "0"),
    "diagnose --write": (
        *("diagnose", "{}/pictures", "--detector", "{}/detector", "--gallery", "0", "--write", "shards"),
    ),
    "sample": ("sample", "--pipeline", "{}/pipeline", "--prompts", "{}/prompts.txt", "--sampling_steps", "1"),
    "set stats": ("set", "stats", "{}/set"),
    "set dedup": ("set", "dedup", "{}/set", "--distance", "null"),
    "set join": ("set", "join", "{}/set"),
    "repair": (
        *("repair", "{}/pictures", "--pipeline", "{}/pipeline", "--detector", "{}/detector", "--threshold", "1"),
        *("--method", "resume", "--gallery", "0"),
    ),
    "train-detector": (
        *("train-detector", "{}/set", "--architecture", "conv", "--min_side", "16", "--validation_share", "0"),
        *("--training.steps", "1", "--training.batch_size", "2", "--training.size", "16"),
    ),
    "round run": (
        *("round", "run", "--pool", "{}/pictures", "--detector", "{}/detector", "--test", "{}/set", "--budget", "2"),
    ),
    "evaluate compare": ("evaluate", "compare", "{}/pictures", "{}/pictures", "--serve", "false"),
    "evaluate detector": ("evaluate", "detector", "{}/set", "--detector", "{}/detector", "--bootstrap", "0"),
}


def run(files, command, output):
    return main([*(word.replace("{}", str(files)) for word in COMMANDS[command]), "--output", str(output)])


@pytest.mark.parametrize("command", COMMANDS)
def test_hidden_files_of_ones_own_stay(files, tmp_path, command):
    output = tmp_path / "out"
    for name in OWN:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")
    before = tree(output)
    # Again, when the folder is known to be a run's.
    for _ in range(2):
        assert run(files, command, output) == 0
        assert tree(output).items() >= before.items()
    assert not leftovers(output)


@pytest.mark.parametrize(
    ("command", "old", "message"),
    [
        ("diagnose", {"records/run.json": {"bits": 8}, "maps/a.png": 0}, "holds maps and records of another run"),
        (
            "train-detector",
            {"checkpoints/step-00000002/run.json": {"settings": {}}},
            "holds checkpoints of another run",
        ),
        ("train-detector", {"checkpoints/run.json": {"steps": 1}, "best/detector.json": {}}, "of another run"),
        ("evaluate detector", {".parts/run.json": {"weights": ""}}, "holds something else than a run of evaluate"),
    ],
)
def test_folders_of_an_older_version_are_refused_in_one_line(files, tmp_path, capsys, command, old, message):
    output = tmp_path / "out"
    for name, content in old.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(json.dumps(content))
    before = tree(output)
    assert run(files, command, output) == 2
    errors = capsys.readouterr().err.splitlines()
    assert sum(message in line for line in errors) == 1
    assert "Traceback" not in "".join(errors)
    assert tree(output) == before


def test_two_commands_do_not_mix_in_one_folder(files, tmp_path, capsys):
    assert run(files, "diagnose", tmp_path / "out") == 0
    before = tree(tmp_path / "out")
    assert run(files, "train-detector", tmp_path / "out") == 2
    assert "holds a run of diagnose, not a run of train-detector" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
