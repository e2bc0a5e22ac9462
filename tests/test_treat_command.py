"""`diffdoctor treat` on files: what it writes, and what it says when something is wrong."""

import json

import numpy as np
import pytest
from helpers_tiny_pipelines import PROMPTS, tiny_pipeline

from diffdoctor.cli import main
from diffdoctor.detector import ConvDetector, write_shards


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("treat")
    tiny_pipeline("sd").save_pretrained(folder / "pipeline")
    ConvDetector((8, 8)).save_pretrained(folder / "detector")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, ""]), encoding="utf-8")
    rng = np.random.default_rng(0)
    samples = (
        {
            "picture": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
            "mask": np.zeros((16, 16), np.float32),
            "prompt": PROMPTS[i % 3],
            "category": "",
            "generator": "",
            "label": "real",
            "round": 0,
        }
        for i in range(4)
    )
    write_shards(samples, folder / "shards", shard_size=4)
    return folder


def arguments(files, output, **changes):
    options = {
        "pipeline": files / "pipeline",
        "detector": files / "detector",
        "prompts": files / "prompts.txt",
        "offline": files / "shards",
        "output": output,
        "height": 16,
        "width": 16,
        "steps": 1,
        "batch_size": 2,
        "sampling_steps": 2,
        "evaluate_pictures": 2,
        "rank": 2,
        **changes,
    }
    return ["treat", *(f"--{name}={value}" for name, value in options.items())]


def test_writes_a_lora_that_loads(files, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(arguments(files, output)) == 0
    assert "load_lora_weights" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "logs", "lora", "samples", "treat.json"]
    assert len(json.loads((output / "treat.json").read_text())["history"]) == 1
    tiny_pipeline("sd").load_lora_weights(output / "lora")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["treat", "--help"])
    text = capsys.readouterr().out
    for part in ("--pipeline", "one prompt per line", "--clean_grad", "at the denoiser", "default: 10"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "/nowhere"}, "no such folder"),
        ({"detector": "/nowhere"}, "/nowhere"),
        ({"prompts": "/nowhere.txt"}, "cannot be read"),
        ({"prompts": ""}, "--prompts"),
        ({"offline": ""}, "offline"),
        ({"scheduler": "PNDMScheduler"}, "DDIMScheduler"),
        ({"scheduler": "Nonsense"}, "--scheduler"),
        ({"method": "magic"}, "method"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line_and_exit_code_2(files, tmp_path, capsys, changes, message):
    try:
        code = main(arguments(files, tmp_path / "run", **changes))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_pipeline(files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(arguments(files, tmp_path / "run", pipeline=tmp_path / "empty")) == 2
    assert "holds no diffusers pipeline" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text("\n\n")
    assert main(arguments(files, tmp_path / "run", prompts=tmp_path / "none.txt")) == 2
    assert "holds no prompt" in capsys.readouterr().err
