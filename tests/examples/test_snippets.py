"""Every block of Python on README.md and in docs/ runs, among stand-ins for what a reader has around it, and every
`diffdoctor …` in a block of shell has options that the command takes.

A block of Python that cannot run says why in a comment before it: `<!-- not run: why -->`. Those of the walkthrough
belong together and run in test_walkthrough.py.
"""

import json
import re
import shlex
import shutil
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffdoctor
from support.maps import marked_pair
from support.model_evaluation import save_lora
from support.paths import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
from PIL import Image

from diffdoctor.data.prompts import Prompt
from diffdoctor.detector import ConvDetector, DetectorTrainingConfig, load_detector
from diffdoctor.detector.damage import registry as damage
from diffdoctor.evaluate.model.summary import PictureMeasures
from diffdoctor.evaluate.model.table import write_table
from diffdoctor.maps import attach_map, detach_map, find_map, write_map
from diffdoctor.treat.families import registry as families
from support.tiny_pipelines import tiny_pipeline
from support.treatment import SMALL, pairs
from support.videos import moving_square, write_mp4

PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "walkthrough.md")]
BLOCK = re.compile(r"^(?:<!--(?P<mark>.*?)-->\n+)? *```python\n(?P<code>.*?)^ *```", re.DOTALL | re.MULTILINE)
# What makes a block quick; each stands in a block.
QUICK = {"config=TreatConfig(steps=60)": "config=TreatConfig(**SMALL)", 'pipeline("a hand': 'small_pipeline("a hand'}


def found():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            name = f"{page.name}:{text.count(chr(10), 0, block.start('code'))}"
            yield pytest.param(block["mark"] or "", textwrap.dedent(block["code"]), id=name)


class Batch(dict):
    """A batch as trainers have them: by key, and by attribute."""

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the pages name."""
    from diffdoctor.data.shard_writer import write_shards

    root = tmp_path_factory.mktemp("reader")
    (root / "set").mkdir()
    samples = []
    for i in range(4):
        picture, level = marked_pair(64, 64, 4 * i, i, 20, 24)
        Image.fromarray(picture).save(root / "set" / f"{i}.png")
        (root / "diagnosis" / "maps").mkdir(parents=True, exist_ok=True)
        write_map(root / "diagnosis" / "maps" / f"{i}.png", level)
        samples.append({"picture": picture, "mask": level, "prompt": f"picture {i}"})
    for name in ("train", "clean"):
        write_shards(iter(samples), root / "data" / name)
    Image.fromarray(picture).save(root / "photo.jpg")
    (root / "clips").mkdir()
    frames, moving = moving_square(frames=20, height=36, width=60)
    write_mp4(root / "clips" / "0.mp4", frames)
    for number, level in enumerate(moving):
        write_map(root / "diagnosis" / "maps" / "0" / f"{number:06d}.png", level)
    for name in ("pictures", "masks"):
        (root / name).mkdir()
        Image.fromarray(picture if name == "pictures" else picture[..., 0]).save(root / name / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": 0, "area": 400}
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}],
        "annotations": [annotation | {"segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}],
        "categories": [{"id": 1, "name": "artifact"}],
    }
    (root / "instances.json").write_text(json.dumps(coco))
    ConvDetector((8, 8)).save_pretrained(root / "runs" / "my-detector")
    shutil.copytree(root / "runs" / "my-detector", root / "detector")
    shutil.move(root / "detector", root / "runs" / "my-detector" / "detector")
    (root / "cache").mkdir()
    save_file({"latents_1x8x8_float32": torch.zeros(4, 1, 8, 8)}, root / "cache" / "0_0064x0064_qi.safetensors")
    tiny_pipeline("sd").save_pretrained(root / "runs" / "my-pipeline")
    save_lora("sd", root / "runs" / "treatment" / "lora")
    shares = torch.linspace(0, 1, 3)
    measures = PictureMeasures(judge=shares, detector=shares)
    (root / "runs" / "evaluation").mkdir()
    write_table(root / "runs" / "evaluation", lambda index: Prompt(f"picture {index}"), 0, measures, measures)
    return root


def names(folder):
    """What a reader has around the lines of a page, by the names that they use."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    g = torch.Generator().manual_seed(0)
    latents, noise, target = torch.randn(3, 2, 4, 8, 8, generator=g)
    model_pred = torch.randn(2, 4, 8, 8, generator=g, requires_grad=True)
    maps = torch.rand(2, 1, 64, 64, generator=g)
    layer, scheduler, flow = torch.nn.Conv2d(4, 4, 1), DDPMScheduler(), FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    image = Image.open(folder / "set" / "0.png")
    attached = [np.asarray(attach_map(image, find_map(image.filename, folder / "diagnosis/maps")))] * 2
    pipeline = tiny_pipeline("sd")
    pipeline.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 64, 64, generator=g)
    training_pictures, captions = pairs()

    def unet(sample, timesteps, prompt_embeds):
        return SimpleNamespace(sample=layer(sample))

    config = {"mse_strength": 1.0, "mae_strength": 0.5, "log_cosh_strength": 0.1, "huber_strength": 0.1}
    return {
        "SMALL": SMALL,
        "accelerator": SimpleNamespace(reduce=lambda x, reduction: x, num_processes=1),
        "apply_conditioning_mask": True,
        "args": SimpleNamespace(
            snr_gamma=5.0, with_prior_preservation=True, prior_loss_weight=0.5, loss_type="huber"
        ),
        "attach_map": attach_map,
        "batch": Batch(
            confidence=maps, loss_weights=torch.ones(2), conditioning_images=2 * images - 1, mask_tensor=maps,
            latent_mask=maps[..., ::8, ::8],
        ),
        "bsz": 2,
        "captions": captions,
        "class_image": image,
        "clean_latents": latents,
        "confidence": maps,
        "config": SimpleNamespace(**config, huber_delta=1.0, normalize_masked_area_loss=True),
        "data": {"predicted": model_pred, "target": target},
        "dataset": {"train": {"image": [image], "confidence": [find_map(image.filename, folder / "diagnosis/maps")]}},
        "damaged_latents": target,
        "decoded": 2 * images - 1,
        "detach_map": detach_map,
        "detector": load_detector(folder / "runs" / "my-detector"),
        "diffdoctor": diffdoctor,
        "examples": {"image": [image], "confidence": [find_map(image.filename, folder / "diagnosis/maps")]},
        "find_map": find_map,
        "image": image,
        "image_column": "image",
        "images": images,
        "label": (target, maps[..., ::8, ::8]),
        "latents": latents,
        "loss_type": "huber",
        "mask": maps,
        "micro_batches": [(latents, target, maps)],
        "model": layer,
        "model_input": latents,
        "model_pred": model_pred,
        "noise": noise,
        "noise_pred": model_pred,
        "noise_scheduler": scheduler,
        "noisy_latents": latents,
        "old_model": unet,
        "output": model_pred,
        "parameters": list(layer.parameters()),
        "pictures": images,
        "pipeline": pipeline,
        "pixel_values": torch.tensor(np.stack(attached)).permute(0, 3, 1, 2) / 127.5 - 1,
        "pred": model_pred,
        "prepared_batch": {
            "conditioning_pixel_values": 2 * images - 1, "conditioning_type": "mask",
            "timesteps": torch.tensor([10.0, 500.0]),
        },
        "prompt_embeds": None,
        "rank": 0,
        "reference_unet": unet,
        "region": maps,
        "scheduler": scheduler,
        "self": SimpleNamespace(compute_scheduled_huber_c=lambda timesteps: timesteps / 1000, confidence=maps),
        "small_pipeline": lambda prompt: pipeline(prompt, height=16, width=16, num_inference_steps=2),
        "target": target,
        "timesteps": torch.tensor([10, 500]),
        "torch": torch,
        "unet": unet,
        "video_pred": torch.randn(2, 4, 5, 4, 6, generator=g, requires_grad=True),
        "video_target": torch.randn(2, 4, 5, 4, 6, generator=g),
        "weighting": torch.rand(2, 1, 1, 1, generator=g),
        "world_size": 2,
        # Where a block that holds these words needs something else by one of the names.
        "Packed(*model_input": {"model_pred": torch.randn(2, 16, 16, generator=g, requires_grad=True)},
        "offline=(pictures": {"pictures": training_pictures},
        "flow_sde_coefs(sigmas": {
            "decode": lambda latents: images, "group_size": 2, "scheduler": flow, "window": range(1, 3),
            "timesteps": flow.timesteps, "transformer": lambda latents, timestep, prompt_embeds: layer(latents),
        },
        "shares=(1, 1)": {
            "config": DetectorTrainingConfig(steps=1, batch_size=2), "masks": [np.zeros((64, 64), np.float32)],
            "pictures": [np.asarray(image)],
        },
        "output.pred": {"output": SimpleNamespace(pred=model_pred, target=target)},
    }  # fmt: skip


@pytest.fixture
def registries(monkeypatch):
    """What a block registers is gone after it."""
    monkeypatch.setattr(damage, "_KINDS", dict(damage._KINDS))
    for name, value in vars(families).items():
        if name.startswith("_") and isinstance(value, (list, dict)) and not name.startswith("__"):
            monkeypatch.setattr(families, name, value.copy())


@pytest.mark.parametrize(("mark", "code"), list(found()))
def test_the_block_runs(mark, code, folder, monkeypatch, registries):
    if mark.strip().startswith("not run"):
        assert re.match(r"not run: \w+ \w+", mark.strip()), "say why"
        return
    world = names(folder)
    for words in [name for name in world if not name.isidentifier()]:
        changes = world.pop(words)
        world |= changes if words in code else {}
    for text, quick in QUICK.items():
        code = code.replace(text, quick)
    monkeypatch.chdir(folder)
    body = textwrap.indent(code, "    ")
    functions = {}
    exec(f"def block({', '.join(world)}):\n{body}\n    return locals()", functions)
    made = functions["block"](**world)
    if not isinstance(made, dict):
        made = {"loss": made[0] if isinstance(made, tuple) else made}
    if "save_file(tensors" in code:
        confidence = load_file("cache/0_0064x0064_qi.safetensors")["confidence_float32"]
        assert confidence.shape == (1, 8, 8)
        assert confidence.max() == 1
    if made.get("loss") is not None:
        assert made["loss"].isfinite().all()
        assert made["loss"].requires_grad


def test_every_block_is_found():
    """Also one that is not marked as Python would be read as such by a reader."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == len(re.findall(r"^ *```python", text, re.MULTILINE)), page
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            assert language in ("python", "bash", "yaml", "json") or not re.search(r"^(import|from) \w", code), page
    for text in QUICK:
        assert any(text in page.read_text(encoding="utf-8") for page in PAGES), text


def command_lines():
    """The words of every `diffdoctor …` in a block of shell."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").split("\n"):
                if line.strip().startswith("diffdoctor "):
                    yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_the_command_takes_its_options(words, tmp_path, monkeypatch):
    """Everything of a command but what it does."""
    from diffdoctor import cli

    load, commands = cli._load, {command.run for command in cli.COMMANDS.values()}
    monkeypatch.setattr(cli, "_load", lambda path: (lambda config: 0) if path in commands else load(path))
    monkeypatch.chdir(tmp_path)
    rounds = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")
    (tmp_path / "round.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", rounds, re.DOTALL | re.MULTILINE)[1])
    assert cli.main(words) == 0
