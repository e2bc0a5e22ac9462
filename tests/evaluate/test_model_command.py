"""`diffdoctor evaluate model` on files: its figures, and how it resumes."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml

from diffdoctor.cli import main
from diffdoctor.detector import load_detector
from diffdoctor.evaluate.model import compare_pictures, networks
from diffdoctor.evaluate.model.measure import damage_pictures
from diffdoctor.evaluate.model.networks import Clip
from diffdoctor.evaluate.model.store import PictureFiles
from support.model_evaluation import COUNT, Means, drawn, evaluate, flat, options, pictures_of
from support.tiny_clip import save_tiny_clip
from support.tiny_pipelines import PROMPTS, tiny_pipeline

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_figures_are_those_of_the_same_pictures_in_memory(files, evaluated, tmp_path, family):
    output, metrics = evaluated if family == "sd" else (tmp_path / family, evaluate(files, tmp_path / family, family))
    pipeline = tiny_pipeline(family)
    before = drawn(family, pipeline)
    pipeline.load_lora_weights(files / f"{family}-lora")
    after = drawn(family, pipeline)
    assert torch.equal(pictures_of(output, "before"), before)
    assert torch.equal(pictures_of(output, "after"), after)
    assert (before != after).float().mean() > 0.1
    real = [np.asarray(Image.open(path)) for path in sorted((files / "real").iterdir())]
    damaged = (
        damage_pictures(real[:4], 0, 0, 0) + damage_pictures(real[4:8], 0, 0, 4) + damage_pictures(real[8:], 0, 0, 8)
    )

    def as_tensor(pictures):
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    network = Means()
    expected = compare_pictures(
        before, after, torch.ones(COUNT, dtype=torch.long),
        detector=load_detector(files / "detector"), judge=load_detector(files / "judge"),
        features=network, classify=network, real=as_tensor(real), damaged=as_tensor(damaged),
    )  # fmt: skip
    shares = expected.severity_before
    assert 0 < float(shares.min()) < float(shares.max()) < 1
    assert metrics["fid"]["before"] > 0
    for group, values in expected.metrics.items():
        assert flat(metrics[group], known_to=values) == pytest.approx(flat(values), rel=1e-5, abs=1e-7), group


def test_what_is_written(evaluated):
    output, metrics = evaluated
    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml", "measures", "metrics.json", "pictures", "pictures.parquet", "report.html", "run.json",
    ]  # fmt: skip
    assert set(metrics["per_category"]) == {"square", "circle", "triangle"}
    assert sum(group["pictures"] for group in metrics["per_category"].values()) == COUNT
    assert metrics["real_pictures"] == 9
    assert {"real", "damaged"} <= set(metrics["artifact_rate"]["judge"])
    assert metrics["versions"]["torch"] == torch.__version__.partition("+")[0] or metrics["versions"]["torch"]
    assert yaml.safe_load((output / "config.yaml").read_text())["guidance_scale"] == 1.0
    table = pyarrow.parquet.read_table(output / "pictures.parquet").to_pylist()
    assert [(row["side"], row["index"]) for row in table] == [(s, i) for s in ("before", "after") for i in range(COUNT)]
    assert all((output / row["file"]).is_file() and row["prompt"] in PROMPTS for row in table)
    flagged = sum(row["flagged"] for row in table if row["side"] == "after") / COUNT
    assert flagged == metrics["artifact_rate"]["judge"]["after"]
    assert {row["seed"] for row in table} == set(range(COUNT))
    page = (output / "report.html").read_text()
    assert page.count("<img") >= 1 + 2 + 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a photo of a red square [square]; seed 0" in page or "seed 1" in page


def test_few_pictures_have_a_distance_and_no_fid(files, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated[0], tmp_path / "run")
    metrics = evaluate(files, tmp_path / "run", features="pixels")
    assert "fid" not in metrics
    assert metrics["no_fid"].startswith("no FID: 192 features (thumbnails of 8 x 8 pixels) need more than 9 real pict")
    assert metrics["no_fid"] in capsys.readouterr().err
    for name in ("kid", "mmd"):
        low, high = metrics[name]["after_interval"]
        assert low < metrics[name]["after"] < high
        assert metrics[name]["ceiling"] is not None
    assert 0 <= metrics["precision"]["after"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "unbiased, 0 for the same distribution" in page
    assert metrics["no_fid"] in page


def test_an_interrupted_run_goes_on_to_the_same_figures(files, evaluated, tmp_path, monkeypatch, capsys):
    output, saved, save = tmp_path / "run", [], PictureFiles.save
    left = iter([5, 5, 10**9])

    def interrupted(self, number, picture):
        if len(saved) >= limit:
            raise KeyboardInterrupt
        saved.append((self.folder.name, number))
        save(self, number, picture)

    monkeypatch.setattr(PictureFiles, "save", interrupted)
    for code in (130, 130, 0):
        limit = len(saved) + next(left)
        assert main(options(files, output)) == code
        assert (output / "metrics.json").is_file() == (code == 0)
    assert sorted(saved) == sorted((side, number) for side in ("before", "after") for number in range(COUNT))
    assert "the same command resumes" in capsys.readouterr().err
    metrics, undisturbed = json.loads((output / "metrics.json").read_text()), evaluated[1]
    # The batches were cut elsewhere, which may move a pixel by a rounding.
    assert flat(metrics["fid"]) == pytest.approx(flat(undisturbed["fid"]), rel=1e-2)
    # More pictures: those that are there stay. Another judge: only the measures are made again.
    limit = len(saved) + 10**9
    del saved[:]
    assert main(options(files, output, pictures=COUNT + 2)) == 0
    assert saved == [("before", 7), ("before", 8), ("after", 7), ("after", 8)]
    more = json.loads((output / "metrics.json").read_text())
    assert main(options(files, output, pictures=COUNT + 2, judge=files / "detector", detector=files / "judge")) == 0
    assert len(saved) == 4
    swapped = json.loads((output / "metrics.json").read_text())
    assert swapped["artifact_rate"]["judge"]["after"] == more["artifact_rate"]["detector"]["after"]
    assert swapped["flagged_area"]["judge"] == more["flagged_area"]["detector"]
    # Other pictures are refused, or replaced when that is asked for.
    capsys.readouterr()
    assert main(options(files, output, seed=1)) == 2
    assert "of a run with another seed (expected 0, got 1)" in capsys.readouterr().err
    assert main(options(files, output, seed=1, overwrite="true")) == 0
    assert len(saved) == 4 + 2 * COUNT


def test_two_processes_share_the_work(files, evaluated, commands, tmp_path):
    output = tmp_path / "two"
    commands.run(*options(files, output), output=tmp_path / "said", count=2)
    metrics, one = json.loads((output / "metrics.json").read_text()), evaluated[1]
    assert (pictures_of(output, "after").int() - pictures_of(evaluated[0], "after").int()).abs().max() <= 1
    for group in ("flagged_area", "variance"):
        assert flat(metrics[group]) == pytest.approx(flat(one[group]), rel=0.02), group
    # Such a rounding may turn a guess of the random classifier.
    assert flat(metrics["accuracy"]) == pytest.approx(flat(one["accuracy"]), abs=1.01 / COUNT)


def test_a_treatments_folder_answers_for_its_options(files, evaluated, tmp_path):
    treatment = tmp_path / "treated"
    treatment.mkdir()
    settings = {
        "pipeline": str(files / "sd"), "detector": str(files / "detector"), "prompts": str(files / "prompts.jsonl"),
        "sampling_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "scheduler": None, "monitor": None,
    }  # fmt: skip
    (treatment / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = {name: "null" for name in ("pipeline", "lora", *settings) if name != "monitor"}
    arguments["treatment"] = treatment
    assert main(options(files, tmp_path / "out", **arguments)) == 2
    shutil.copytree(files / "sd-lora", treatment / "lora")
    metrics = evaluate(files, tmp_path / "out", **arguments)
    assert metrics["sampling"]["num_inference_steps"] == 2
    assert metrics["artifact_rate"] == evaluated[1]["artifact_rate"]
    # The monitor watched the treatment: it is no judge.
    (treatment / "config.yaml").write_text(yaml.safe_dump({**settings, "monitor": str(files / "judge")}))
    assert main(options(files, tmp_path / "other", **arguments)) == 2


@pytest.mark.cpu
def test_another_pipeline_and_guidance_as_treatments(files, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "inception_weights", lambda: None)
    pipeline = tiny_pipeline("sd", seed=5)
    pipeline.save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    evaluate(files, out, lora="", treated=tmp_path / "other", real="", classifier="", features="none")
    assert torch.equal(pictures_of(out, "after"), drawn("sd", pipeline))
    import diffdoctor

    guide = {"strength": 1.0, "start": 0.0, "clean_grad": 1.0}
    arguments = {"lora": "", "guide": "true", "guide_options": json.dumps(guide), "real": "", "classifier": ""}
    save_tiny_clip(tmp_path / "clip", PROMPTS)
    metrics = evaluate(files, tmp_path / "guided", clip=tmp_path / "clip", **arguments, features="auto")
    pipeline = tiny_pipeline("sd")
    with diffdoctor.guide(pipeline, load_detector(files / "detector"), height=16, width=16, **guide):
        expected = drawn("sd", pipeline)
    assert torch.equal(pictures_of(tmp_path / "guided", "after"), expected)
    assert not torch.equal(pictures_of(tmp_path / "guided", "before"), expected)
    assert metrics["variance"]["before"] > 0
    assert "fid" not in metrics
    # auto: CLIP's features, where CLIP is there and Inception is not.
    assert "image embeddings" in metrics["features"]["name"]
    prompts = [PROMPTS[number % 3] for number in range(COUNT)]
    scores = Clip(str(tmp_path / "clip")).scores(expected, prompts)
    assert metrics["clip_score"]["after"] == pytest.approx(float(scores.mean()), rel=1e-4)
    assert metrics["clip_score"]["difference"] != 0
