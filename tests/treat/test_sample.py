"""`diffdoctor sample`: every picture is a function of its prompt and seed, in a set that the other commands read."""

import json

import numpy as np
import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.data.shards import BrokenSample, ShardData, read_shards
from diffdoctor.detector import ConvDetector
from diffdoctor.evaluate.model import sample_pictures
from diffdoctor.runs.errors import UserError
from diffdoctor.treat.sample import SampleConfig
from diffdoctor.treat.text_to_image import open_pipeline, pipeline_options
from support.pictures import tree
from support.tiny_pipelines import PROMPTS, call_options, tiny_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")

TEXTS = ("a cat", "two dogs", "the word stop")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_pipeline("sd").save_pretrained(folder / "pipeline")
    lines = [{"prompt": text, "category": text.split()[-1]} for text in TEXTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def sample(files, output, *options):
    words = ["sample", "--pipeline", f"{files}/pipeline", "--prompts", f"{files}/prompts.jsonl"]
    words += ["--output", str(output), "--sampling_steps", "2", "--batch_size", "1", "--shard_size", "4"]
    return main([*words, *map(str, options)])


@pytest.mark.parametrize("scale", [0.5, 5.0])
@pytest.mark.parametrize("name", ["z_image", "qwen_image", "sana"])
def test_every_pipeline_is_told_the_guidance_in_its_own_words(name, scale):
    pipeline, config = tiny_pipeline(name), SampleConfig(sampling_steps=2, height=16, width=16, guidance_scale=scale)
    config.max_sequence_length = 32
    options = pipeline_options(pipeline, config)
    drawn = sample_pictures(pipeline, PROMPTS[:1], [3], progress=False, **options)
    theirs = pipeline(
        list(PROMPTS[:1]), height=16, width=16, num_inference_steps=2, generator=[torch.Generator().manual_seed(3)],
        output_type="pt", **call_options(name, scale, PROMPTS[:1]),
    ).images  # fmt: skip
    assert torch.equal(drawn, (theirs.clamp(0, 1) * 255).round().to(torch.uint8))
    assert ("negative_prompt" in options) == (name == "qwen_image" and scale > 1)


@pytest.mark.parametrize(("name", "scale", "least"), [("z_image", 0.0, 0), ("qwen_image", 1.0, 1)])
def test_a_negative_prompt_where_guidance_is_counted_from_0(tmp_path, name, scale, least):
    tiny_pipeline(name).save_pretrained(tmp_path / name)
    config = SampleConfig(guidance_scale=least + 0.5, negative_prompt="a blue triangle")
    options = pipeline_options(open_pipeline("pipeline", str(tmp_path / name), config), config)
    assert options["negative_prompt"] == "a blue triangle"
    config.guidance_scale = scale
    with pytest.raises(UserError, match=f"--negative_prompt: expected a guidance_scale above {least} with it"):
        open_pipeline("pipeline", str(tmp_path / name), config)


@pytest.mark.cpu
def test_a_set_of_prompts_and_seeds(files, tmp_path, capsys):
    output = tmp_path / "set"
    assert sample(files, output, "--seeds", 5, 7) == 0
    samples = list(read_shards(output, masks="ignored"))
    assert [s["key"] for s in samples] == [f"{row:06d}-{seed:06d}" for seed in (5, 6, 7) for row in range(3)]
    assert [s["shard"] for s in samples[3:5]] == ["shard-000000.tar", "shard-000001.tar"]
    pipeline = tiny_pipeline("sd")
    for s in (samples[0], samples[5], samples[8]):
        drawn = sample_pictures(pipeline, [s["prompt"]], [s["seed"]], progress=False, num_inference_steps=2)[0]
        assert np.array_equal(s["picture"], drawn.permute(1, 2, 0))
    assert [s["category"] for s in samples[:3]] == ["cat", "dogs", "stop"]
    assert {s["generator"] for s in samples} == {"pipeline"}
    # Nobody has looked for what is broken, so it is no set to train on.
    data = ShardData(output)
    assert set(data.labels) == {""}
    with pytest.raises(BrokenSample, match="a sample without a mask"):
        data[0]
    assert json.loads((output / "metrics.json").read_text())["pictures"] == 9

    before = tree(output)
    assert sample(files, output, "--seeds", 5, 7, "--engine", "none") == 0
    now = tree(output)
    assert {name for name in before if now[name] != before[name]} == {"config.yaml"}
    assert sample(files, output, "--seeds", 5, 8) == 2
    assert "of a run with another plan, seeds;" in capsys.readouterr().err

    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    words = ["diagnose", str(output), "--detector", str(tmp_path / "detector"), "--output", str(tmp_path / "labels")]
    assert main([*words, "--write", "shards", "--gallery", "0"]) == 0
    labels = ShardData(tmp_path / "labels")
    assert list(labels.keys) == [s["key"] for s in samples]
    assert np.array_equal(labels[4]["picture"], samples[4]["picture"])
    assert labels[4]["label"] == "pseudo"


def test_what_cannot_be_drawn_is_refused_and_leaves_the_folder_to_others(files, tmp_path, capsys):
    output = tmp_path / "set"
    for options, message in (
        (("--scheduler", "Nope"), "expected a diffusers scheduler such as DDIMScheduler, got Nope"),
        (("--seeds", 3, 2), "seeds: expected the first and the last seed, from 0, got 3 2"),
        (("--max_sequence_length", 9), "StableDiffusionPipeline does not take this option"),
        (("--engine", "processes", "--engine.actors", 0), "actors: expected >= 1, got 0"),
    ):
        assert sample(files, output, *options) == 2
        assert message in capsys.readouterr().err
    assert sample(files, output) == 0
    assert len(ShardData(output)) == 3
