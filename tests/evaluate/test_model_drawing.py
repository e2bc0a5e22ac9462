"""What is measured is what the pipeline draws: no blacked-out pictures, the negative prompt, nothing forgotten."""

import json
import shutil

import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.detector import ConvDetector
from diffdoctor.evaluate.model import command, sample_pictures
from diffdoctor.runs.errors import UserError
from support.model_evaluation import SAMPLING, evaluate, options
from support.tiny_pipelines import PROMPTS, tiny_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("peft")

# without real pictures and what they need
FEW = {"real": "", "classifier": "", "features": "none", "pictures": 3}


def with_safety_checker():
    """The tiny pipeline with a safety checker to which every picture is unsafe."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config=vision, projection_dim=16)
    ).eval()
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
    pipeline = tiny_pipeline("sd")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(safety_checker=checker, feature_extractor=processor)
    pipeline.register_to_config(requires_safety_checker=True)
    return pipeline


def test_the_safety_checker_is_off_while_pictures_are_drawn_and_there_afterwards(tmp_path, caplog):
    pipeline, seeds = with_safety_checker(), range(3)
    theirs = pipeline(list(PROMPTS), output_type="pt", generator=torch.Generator().manual_seed(0), **SAMPLING)
    assert all(theirs.nsfw_content_detected)
    drawn = sample_pictures(pipeline, PROMPTS, seeds, progress=False, **SAMPLING)
    assert torch.equal(drawn, sample_pictures(tiny_pipeline("sd"), PROMPTS, seeds, progress=False, **SAMPLING))
    assert "safety checker is switched off" in caplog.text
    assert pipeline.safety_checker is not None
    pipeline.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["safety_checker"][1]


def test_a_filter_that_cannot_be_switched_off_is_counted_and_refused(monkeypatch):
    pipeline = tiny_pipeline("sd")
    call = type(pipeline).__call__

    def filtered(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        result.nsfw_content_detected = [False, True, True]
        return result

    monkeypatch.setattr(type(pipeline), "__call__", filtered)
    with pytest.raises(UserError, match=r"^pipeline: expected pictures as they were drawn, got 2 of 3 that"):
        sample_pictures(pipeline, PROMPTS, range(3), progress=False, **SAMPLING)


def test_a_negative_prompt_is_drawn_with_and_reported(files, tmp_path, capsys):
    changes = {**FEW, "guidance_scale": 4.0}
    plain = evaluate(files, tmp_path / "plain", **changes)
    metrics = evaluate(files, tmp_path / "out", **changes, negative_prompt="a blue triangle")
    assert metrics["sampling"]["negative_prompt"] == "a blue triangle"
    assert "a blue triangle" in (tmp_path / "out" / "report.html").read_text()
    assert metrics["flagged_area"] != plain["flagged_area"]
    # the pictures of one prompt are those of another
    assert main(options(files, tmp_path / "out", **changes, negative_prompt="else")) == 2
    assert "another sampling" in capsys.readouterr().err
    assert main(options(files, tmp_path / "new", **FEW, negative_prompt="else")) == 2
    assert "--negative_prompt: expected a guidance_scale above 1 with it" in capsys.readouterr().err
    assert main(options(files, tmp_path / "new", "flux", **changes, negative_prompt="else")) == 2
    assert "--negative_prompt: FluxPipeline does not take this option" in capsys.readouterr().err


def test_the_treated_side_alone_is_extrapolated(files, tmp_path, capsys):
    plain, out = tmp_path / "plain", tmp_path / "out"
    evaluate(files, plain, **FEW)
    evaluate(files, out, **FEW, autoguidance=1.5)
    for side, is_same in (("before", True), ("after", False)):
        pictures = [sorted((folder / "pictures" / side).glob("*.png")) for folder in (plain, out)]
        same = [a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True)]
        assert len(same) == 3 and set(same) == {is_same}
    assert main(options(files, out, **FEW, autoguidance=2.0)) == 2
    assert "autoguidance" in capsys.readouterr().err
    assert main(options(files, tmp_path / "new", **FEW, autoguidance=1.5, lora="", treated=files / "sd")) == 2
    assert "autoguidance: expected a LoRA with it" in capsys.readouterr().err


def test_what_was_left_out_is_remembered_and_half_files_are_removed(files, tmp_path):
    real = tmp_path / "real"
    shutil.copytree(files / "real", real)
    (real / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    changes = {"real": real, "features": "none", "classifier": "", "pictures": 3}
    first = evaluate(files, tmp_path / "out", **changes)
    assert sum(first["skipped"].values()) == 1
    half = tmp_path / "out" / "pictures" / "after" / ".00000001.png.diffdoctor-tmp-0123abcd.png"
    half.write_bytes(b"half")
    again = evaluate(files, tmp_path / "out", **changes)
    assert again == first
    assert not half.exists()
    strict = options(files, tmp_path / "strict", **changes)
    assert main([*strict, "--strict=true"]) == 2


@pytest.mark.parametrize("part", ["damaged/00000000.npz", "real/00000000.features.npy", "before/00000000-00000004.npz"])
def test_a_part_that_was_deleted_is_made_again(files, tmp_path, part):
    changes = {"classifier": "", "pictures": 4}
    first = evaluate(files, tmp_path / "out", **changes)
    path = tmp_path / "out" / "measures" / part
    path.unlink()
    assert evaluate(files, tmp_path / "out", **changes) == first
    assert path.is_file()


def blind(folder, bias):
    """A judge that says the same of every pixel."""
    torch.manual_seed(5)
    judge = ConvDetector((8, 8))
    with torch.no_grad():
        judge.head.weight.zero_()
        judge.head.bias.fill_(bias)
    judge.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("bias", "real", "sentence"),
    [
        (-5.0, True, "the judge is blind: it flags none of the damaged pictures"),
        (5.0, True, "the judge is of no use: it flags all of the real pictures"),
        (-5.0, False, "the judge flags no picture at all, before or after"),
    ],
)
def test_a_judge_that_sees_nothing_is_said_to_be_blind(files, tmp_path, capsys, bias, real, sentence):
    judge = blind(tmp_path / "judge", bias)
    changes = {**FEW, "judge": judge, "real": files / "real" if real else ""}
    metrics = evaluate(files, tmp_path / "out", **changes)
    assert any(doubt.startswith(sentence) for doubt in metrics["doubts"])
    assert f"warning: {sentence}" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    # at the head of the page, before the measures
    assert page.index(sentence[4:30]) < page.index("<h2>Measures")
    assert main([*options(files, tmp_path / "out", **changes), "--strict=true"]) == 3
    assert sentence in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["doubts"] == metrics["doubts"]


def test_processes_draw_the_same_pictures_and_only_those_that_are_missing(files, tmp_path, monkeypatch):
    first = evaluate(files, tmp_path / "one", **FEW)
    shutil.copytree(tmp_path / "one", tmp_path / "out")
    (tmp_path / "one" / ".after-engine").mkdir()  # of a run that was killed
    (tmp_path / "one" / "metrics.json").unlink()
    assert evaluate(files, tmp_path / "one", **FEW) == first
    assert not (tmp_path / "one" / ".after-engine").exists()
    (tmp_path / "out" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out" / "measures")
    gone = [tmp_path / "out" / "pictures" / "after" / f"0000000{number}.png" for number in (0, 2)]
    for path in gone:
        path.unlink()
    (tmp_path / "out" / ".after-engine").mkdir()  # of a run that was killed
    monkeypatch.setattr(command, "UNIT_BATCHES", 1)
    engine = {"engine": "processes", "engine.actors": 1, "engine.cpus": torch.get_num_threads()}
    assert evaluate(files, tmp_path / "out", **FEW, **engine) == first
    assert all(
        path.read_bytes() == (tmp_path / "one" / path.relative_to(tmp_path / "out")).read_bytes() for path in gone
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
