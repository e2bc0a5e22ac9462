"""The example trainers on tiny random pipelines, and on the digits."""

import dataclasses
import importlib
import runpy
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("tensorboard")
pytest.importorskip("jsonargparse")

from PIL import Image

from diffdoctor.maps import PictureRanking, write_map
from support.paths import ROOT
from support.tiny_pipelines import PROMPTS, tiny_pipeline

EXAMPLES = ROOT / "examples"


def load_example(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pipelines, a dozen pictures with captions and maps, half a dozen class pictures."""
    root = tmp_path_factory.mktemp("examples")
    for family, options in (("sd", {}), ("sdxl", {"prediction_type": "v_prediction"}), ("sd3", {}), ("flux", {})):
        tiny_pipeline(family, **options).save_pretrained(root / family)
    rng = np.random.default_rng(0)
    for name, count in (("set", 12), ("class", 6)):
        (root / name).mkdir()
        for i in range(count):
            height, width = ((24, 24), (24, 36), (36, 24))[i % 3]
            colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)).copy()
            level = np.zeros((height, width), np.float32)
            if name == "set":
                top, left = rng.integers(0, 12, 2)
                level[top : top + 10, left : left + 10] = 1.0
                picture[level > 0] = rng.integers(0, 256, (100, 3))
                (root / name / f"{i}.txt").write_text(PROMPTS[i % 3], encoding="utf-8")
                write_map(root / "maps" / f"{i}.png", level)
            Image.fromarray(picture).save(root / name / f"{i}.png")
    return root


def config_of(example, folder, family, output, **changes):
    kind = next(value for name, value in vars(example).items() if name in ("TextToImageConfig", "FlowConfig"))
    base = {
        "model": str(folder / family),
        "pictures": str(folder / "set"),
        "maps": str(folder / "maps"),
        "output": str(output),
        "size": 16,
        "steps": 4,
        "batch_size": 4,
        "rank": 2,
        "alpha": 4.0,
        "learning_rate": 1e-3,
        "log_every": 1,
        "checkpoint_every": 2,
        "validate_every": 4,
        "validation_steps": 2,
        "validation_prompt": PROMPTS[0],
    }
    if family in ("sd3", "flux"):
        base["max_sequence_length"] = 16
    return kind(**(base | changes))


RUNS = {
    "sd": ("train_text_to_image_lora", {"snr_gamma": 5.0, "buckets": True, "artifact_weight": 2.0}),
    "sdxl": ("train_text_to_image_lora", {"snr_gamma": 5.0, "accumulate": 2, "batch_size": 2, "normalize": "sample"}),
    "sd3": ("train_flow_lora", {"weighting_scheme": "sigma_sqrt", "gradient_checkpointing": True}),
    "flux": ("train_flow_lora", {"prior_pictures": "class", "prior_caption": "a photo", "guidance_scale": 3.5}),
}


@pytest.mark.cpu
@pytest.mark.parametrize("family", RUNS)
def test_example_trains_logs_draws_saves_and_resumes(family, folder, tmp_path):
    name, options = RUNS[family]
    example = load_example(name)
    if "prior_pictures" in options:
        options = {**options, "prior_pictures": str(folder / "class")}
    config = config_of(example, folder, family, tmp_path / "run", **options)
    history = example.train(config)

    assert [line["step"] for line in history] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["nonfinite"] == 0 for line in history)
    assert all(0 < line["artifact_share"] < 1 for line in history)
    assert all(line["loss_artifact"] > 0 and line["loss_clean"] > 0 for line in history)
    with Image.open(tmp_path / "run" / "validation" / "step_000004.png") as drawn:
        assert drawn.size == (16, 16)
    assert list((tmp_path / "run" / "logs").rglob("events*"))

    # The LoRA that was saved draws what the trained pipeline drew, alpha and all.
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder / family)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "generator": torch.Generator().manual_seed(0)}
    if family in ("sd3", "flux"):
        call |= {"guidance_scale": config.guidance_scale, "max_sequence_length": 16}
    with Image.open(tmp_path / "run" / "validation" / "step_000004.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(pipeline(PROMPTS[0], **call).images[0])).all()

    # Stopped at step 2 and resumed, the run ends on the same losses, to the last bit.
    half = dataclasses.replace(config, output=str(tmp_path / "half"), steps=2, validation_prompt=None)
    example.train(half)
    resumed = example.train(dataclasses.replace(half, steps=4, resume=True))
    assert [(line["step"], line["loss"]) for line in resumed] == [(line["step"], line["loss"]) for line in history[2:]]
    rankings = [PictureRanking.load(tmp_path / name / "ranking.parquet").rows() for name in ("run", "half")]
    assert rankings[0] == rankings[1] and all(row["loss"] > 0 for row in rankings[0])
    assert "Training pictures" in (tmp_path / "half" / "ranking.html").read_text()


def test_map_steers_the_example(folder, tmp_path):
    example = load_example("train_text_to_image_lora")
    losses = {}
    for weight in (1.0, 0.0, 3.0):
        config = config_of(example, folder, "sd", tmp_path / str(weight), steps=1, artifact_weight=weight)
        losses[weight] = example.train(dataclasses.replace(config, validation_prompt=None))[0]
    plain, off, up = losses[1.0], losses[0.0], losses[3.0]
    # Same seed, same first prediction: the loss is affine in artifact_weight, and its parts do not depend on it.
    assert off["loss"] < plain["loss"] < up["loss"]
    assert up["loss"] - plain["loss"] == pytest.approx(2 * (plain["loss"] - off["loss"]), rel=1e-5)
    assert up["loss_artifact"] == pytest.approx(plain["loss_artifact"], rel=1e-6)
    share = plain["artifact_share"]
    mean = share * plain["loss_artifact"] + (1 - share) * plain["loss_clean"]
    assert plain["loss"] == pytest.approx(mean, rel=1e-5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """64 handwritten digits, 16 x 16, each with the number as caption and a smear that its map marks."""
    datasets = pytest.importorskip("sklearn.datasets")
    root = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    (root / "set").mkdir()
    loaded = datasets.load_digits()
    for i in range(64):
        picture = np.uint8(loaded.images[i] * 15.9).repeat(2, axis=0).repeat(2, axis=1)
        level = np.zeros((16, 16), np.float32)
        top, left = rng.integers(0, 11, 2)
        level[top : top + 5, left : left + 5] = 1.0
        picture[level > 0] = rng.integers(0, 256, 25)
        Image.fromarray(picture).convert("RGB").save(root / "set" / f"{i}.png")
        (root / "set" / f"{i}.txt").write_text(f"the digit {loaded.target[i]}", encoding="utf-8")
        write_map(root / "set" / f"{i}.mask.png", level)
    return root


@pytest.mark.parametrize(("name", "family"), [("train_text_to_image_lora", "sd"), ("train_flow_lora", "sd3")])
def test_loss_falls_on_the_digits(name, family, folder, digits, tmp_path):
    example = load_example(name)
    config = config_of(
        example,
        folder,
        family,
        tmp_path,
        pictures=str(digits / "set"),
        maps=None,
        steps=60,
        batch_size=16,
        rank=8,
        alpha=None,
        learning_rate=1e-2,
        targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out", "conv_in", "proj_out", "proj_in"),
        validation_prompt=None,
    )
    history = example.train(config)
    losses = [line["loss"] for line in history]
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    assert last < 0.8 * first, (first, last)


def test_missing_maps_are_said_before_training(folder, tmp_path, capsys):
    example = load_example("train_text_to_image_lora")
    config = config_of(example, folder, "sd", tmp_path, steps=1, maps=None, validation_prompt=None)
    history = example.train(config)
    assert "12 of 12 pictures have no map" in capsys.readouterr().out
    assert history[0]["artifact_share"] == 0


def test_flow_example_refuses_buckets_with_prior_pictures(folder, tmp_path):
    example = load_example("train_flow_lora")
    with pytest.raises(ValueError, match="buckets: expected False"):
        example.train(config_of(example, folder, "sd3", tmp_path, buckets=True, prior_pictures=str(folder / "class")))


@pytest.mark.parametrize("name", ["train_text_to_image_lora", "train_flow_lora"])
def test_command_line_names_every_option(name, monkeypatch, capsys):
    example = load_example(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    kind = next(value for key, value in vars(example).items() if key in ("TextToImageConfig", "FlowConfig"))
    for field in dataclasses.fields(kind):
        assert f"--{field.name}" in shown


def test_the_road_to_a_million_takes_options_of_the_drawing():
    words = ["--output", "o", "--draw=--height=512", "--draw=--width=512"]
    assert load_example("million").parser().parse_args(words).draw == ["--height=512", "--width=512"]


def test_the_sets_of_the_road_share_no_picture(tmp_path):
    million = load_example("million")
    options = million.parser().parse_args(["--output", "o", "--scale", "120"])
    drawn = []
    for name, pictures, words in million.steps_of(options, tmp_path, 10):
        if name.startswith("draw"):
            first, last = map(int, words[words.index("--seeds") + 1 :][:2])
            assert pictures == 10 * (last - first + 1)
            drawn += range(first, last + 1)
    assert len(drawn) == len(set(drawn)) == 3 + 12 + 1


@pytest.mark.study
def test_the_road_to_a_million_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    million, output = load_example("million"), tmp_path / "million"
    arguments = ["--output", str(output), "--scale", "120", "--base_steps", "20", "--steps", "10", "--budget", "20"]
    run, calls = million.run, []

    def stopped(words):
        calls.append(words[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(words)

    monkeypatch.setattr(million, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        million.main(arguments)
    assert million.main(arguments) == 0
    again = ["sample", "inject", "sample", "inject", "train-detector", "diagnose", "round"]
    assert calls == ["sample", "inject", "sample", *again]
    assert (output / "rounds" / "round-01" / "evaluation" / "metrics.json").is_file()
    assert "| diagnose | 240 |" in capsys.readouterr().out
