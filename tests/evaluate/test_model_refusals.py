"""`diffdoctor evaluate model` says in one line what is wrong, and leaves nothing behind."""

import errno
import os
import re
import shutil

import pytest
import torch
import yaml

from diffdoctor.cli import main
from diffdoctor.detector import load_detector
from diffdoctor.evaluate.model.store import PictureFiles
from support.model_evaluation import options
from support.tiny_pipelines import tiny_pipeline

pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest.importorskip("peft")


def test_a_full_disk_is_one_line_and_the_pictures_stay(files, tmp_path, monkeypatch, capsys):
    save = PictureFiles.save

    def full(self, number, picture):
        if self.folder.name == "after" and number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path(number)))
        save(self, number, picture)

    monkeypatch.setattr(PictureFiles, "save", full)
    assert main(options(files, tmp_path / "out")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffdoctor")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    kept = sorted(path.name for path in (tmp_path / "out" / "pictures" / "after").iterdir())
    assert kept == ["00000000.png", "00000001.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "/nowhere"}, "--pipeline /nowhere: no such folder"),
        ({"pipeline": "{files}/judge"}, "holds no diffusers pipeline"),
        ({"judge": "/nowhere"}, "/nowhere"),
        ({"judge": "{files}/sd"}, "not a complete detector"),
        (
            {"judge": "{files}/copy"},
            "that had no part in the treatment, got the detector's own weights",
        ),
        ({"judge": ""}, "--judge: expected a value, got none"),
        ({"prompts": "/nowhere.txt"}, "cannot be read"),
        ({"prompts": "{files}/empty.txt"}, "expected at least one prompt, got none"),
        ({"lora": "/nowhere"}, "--lora /nowhere: expected a file, a folder or a hub id"),
        ({"lora": "{files}/flux-lora"}, "does not fit this pipeline"),
        ({"lora": "{files}/partial-lora"}, "does not fit this pipeline: "),
        ({"lora": "{files}/judge"}, "--lora"),
        ({"lora": ""}, "expected one of them, the treatment to be evaluated, got none"),
        ({"treated": "{files}/flux"}, "--lora, --treated: expected one of them, got both"),
        ({"real": "/nowhere"}, "/nowhere: expected an existing file or folder"),
        ({"pictures": 3}, "--real: expected more than 3 generated pictures for a comparison, got 3"),
        ({"preference": "{files}/judge"}, "--preference"),
        ({"preference_processor": "{files}/judge"}, "--preference_processor: expected --preference with it, got none"),
        ({"pictures": 0}, "pictures: expected >= 1, got 0"),
        ({"features": "inception-5"}, "--features: expected one of inception-64"),
        ({"classifier": "nowhere"}, "--classifier nowhere"),
        ({"prompts": "{files}/plain.txt"}, "--classifier: expected a `label` with every prompt"),
        ({"clip": "{files}/judge"}, "--clip"),
        ({"scheduler": "Nonsense"}, "--scheduler: expected a diffusers scheduler such as DDIMScheduler, got Nonsense"),
        ({"max_sequence_length": 32}, "StableDiffusionPipeline does not take this option"),
        ({"height": 15}, "15"),
        ({"dtype": "int8"}, "dtype: expected one of fp32"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"guide_options": '{"strength": 1}'}, "--guide_options: expected --guide true with it, got --guide false"),
        ({"guide": "true", "guide_options": '{"power": 1}'}, ", got power"),
        ({"output": "{files}/real"}, "expected a folder that holds no picture of the input"),
        ({"output": "{files}/means.pt"}, "expected a folder or nothing, got a file"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:45],
)
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, capsys, changes, message):
    if not (files / "copy").exists():
        detector = load_detector(files / "detector")
        detector.load_state_dict({name: v.bfloat16().to(v.dtype) for name, v in detector.state_dict().items()})
        detector.save_pretrained(files / "copy")
        (files / "empty.txt").write_text("\n")
        (files / "plain.txt").write_text("a photo\n")
        save_partial_lora(files)
    changes = {name: str(value).replace("{files}", str(files)) for name, value in changes.items()}
    before = sorted((files / "real").iterdir())
    assert main(options(files, tmp_path / "out", **changes)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("diffdoctor")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()
    assert sorted((files / "real").iterdir()) == before


def save_partial_lora(files):
    """The LoRA with some of its modules under names that no pipeline has."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    name = "pytorch_lora_weights.safetensors"
    with safe_open(files / "sd-lora" / name, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    (files / "partial-lora").mkdir()
    state = {key.replace("mid_block", "middle_block"): value for key, value in state.items()}
    save_file(state, files / "partial-lora" / name, metadata=metadata)


def test_pictures_that_are_not_finite_are_said_to_be(files, tmp_path, capsys):
    pipeline = tiny_pipeline("sd")
    with torch.no_grad():
        next(pipeline.vae.decoder.parameters()).fill_(torch.nan)
    pipeline.save_pretrained(tmp_path / "broken")
    assert main(options(files, tmp_path / "out", pipeline=tmp_path / "broken")) == 2
    assert "values that are not finite (seed 0)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named(files, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "measures")
    path = tmp_path / "out" / "pictures" / "after" / "00000003.png"
    path.write_bytes(path.read_bytes()[:50])
    assert main(options(files, tmp_path / "out")) == 2
    assert "00000003.png: broken" in capsys.readouterr().err
    path.unlink()
    assert main(options(files, tmp_path / "out")) == 0


def test_a_lora_that_was_tuned_with_other_sampling_is_noticed(files, tmp_path, capsys):
    shutil.copytree(files / "sd-lora", tmp_path / "run" / "lora")
    (tmp_path / "run" / "treat.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"sampling_steps": 10, "guidance_scale": 5.0}))
    assert main(options(files, tmp_path / "out", lora=tmp_path / "run" / "lora", judge="/nowhere")) == 2
    assert 'tuned with {"sampling_steps": 10, "guidance_scale": 5.0' in capsys.readouterr().err


def test_real_pictures_that_cannot_be_read_are_named_and_none_is_an_error(files, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated[0], tmp_path / "out")
    (tmp_path / "real").mkdir()
    for number in range(4):
        (tmp_path / "real" / f"{number}.png").write_bytes(b"no picture")
    assert main(options(files, tmp_path / "out", real=tmp_path / "real")) == 2
    error = capsys.readouterr().err
    assert f"--real: left out: 4 x a broken picture (first: {tmp_path}/real/0.png" in error
    assert "--real: expected clean pictures that can be read, got none (left out: 4 x a broken picture)" in error
