"""`diffdoctor evaluate model` on files: its figures, how it goes on, and what it says when something is wrong."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from diffdoctor.cli import main
from diffdoctor.detector import ConvDetector, load_detector
from diffdoctor.evaluate.model import compare_pictures, networks, sample_pictures
from diffdoctor.evaluate.model.measure import damage_pictures
from diffdoctor.evaluate.model.networks import Clip
from diffdoctor.evaluate.model.store import PictureFiles
from support.launch import free_port
from support.tiny_clip import save_tiny_clip
from support.tiny_pipelines import PROMPTS, tiny_pipeline

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
COUNT = 7


class Means(torch.nn.Module):
    """Three features: the mean of each channel."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean(dim=(2, 3))


def save_lora(family, folder):
    """A LoRA that visibly changes what the tiny pipeline draws."""
    from diffdoctor.treat.families import family_of
    from diffdoctor.treat.lora import add_lora
    from diffdoctor.treat.lora import save_lora as save

    served = family_of(tiny_pipeline(family))
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(served, rank=2, alpha=4, groups=("attention",), seed=0):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    save(served, folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    for family in ("sd", "flux"):
        tiny_pipeline(family).save_pretrained(folder / family)
        save_lora(family, folder / f"{family}-lora")
    for seed, name in enumerate(("detector", "judge")):
        torch.manual_seed(seed)
        detector = ConvDetector((8, 8))
        # Some pixels above 0.5, others below.
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.mul_(1.5)
        detector.save_pretrained(folder / name)
    rows = [{"prompt": prompt, "category": prompt.split()[-1], "label": "1"} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    rng = np.random.default_rng(0)
    (folder / "real").mkdir()
    for number in range(9):
        picture = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(picture).save(folder / "real" / f"{number}.png")
    return folder


def options(files, output, family="sd", /, **changes):
    values = {
        "pipeline": files / family,
        "lora": files / f"{family}-lora",
        "detector": files / "detector",
        "judge": files / "judge",
        "prompts": files / "prompts.jsonl",
        "real": files / "real",
        "features": files / "means.pt",
        "classifier": files / "means.pt",
        "pictures": COUNT,
        "sampling_steps": SAMPLING["num_inference_steps"],
        "guidance_scale": SAMPLING["guidance_scale"],
        "height": 16,
        "width": 16,
        "batch_size": 4,
        "examples": 2,
        "output": output,
        **({"max_sequence_length": 32} if family == "flux" else {}),
        **changes,
    }
    return ["evaluate", "model", *(f"--{name}={value}" for name, value in values.items() if value != "")]


def evaluate(files, output, family="sd", **changes):
    assert main(options(files, output, family, **changes)) == 0
    return json.loads((output / "metrics.json").read_text())


def pictures_of(output, side):
    return PictureFiles(output / "pictures" / side).load(range(COUNT))


def drawn(family, pipeline, count=COUNT):
    more = {"max_sequence_length": 32} if family == "flux" else {}
    prompts = [PROMPTS[number % 3] for number in range(count)]
    return sample_pictures(pipeline, prompts, range(count), batch_size=4, progress=False, **SAMPLING, **more)


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "sd"
    return output, evaluate(files, output)


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


def flat(values, known_to=None):
    """Nested figures as one dict; `known_to` leaves out what that one does not have."""
    if not isinstance(values, dict):
        values, known_to = {"": values}, None
    result = {}
    for name, value in values.items():
        if known_to is not None and name not in known_to:
            continue
        if isinstance(value, dict):
            inner = flat(value, None if known_to is None else known_to[name])
            result |= {f"{name}.{key}": number for key, number in inner.items()}
        elif isinstance(value, list):
            result |= {f"{name}.{place}": number for place, number in enumerate(value)}
        elif value is not None:
            result[name] = value
    return result


def test_what_is_written(evaluated):
    output, metrics = evaluated
    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml", "measures", "metrics.json", "pictures", "report.html", "run.json",
    ]  # fmt: skip
    assert set(metrics["per_category"]) == {"square", "circle", "triangle"}
    assert sum(group["pictures"] for group in metrics["per_category"].values()) == COUNT
    assert metrics["real_pictures"] == 9
    assert {"real", "damaged"} <= set(metrics["artifact_rate"]["judge"])
    assert metrics["versions"]["torch"] == torch.__version__.partition("+")[0] or metrics["versions"]["torch"]
    assert yaml.safe_load((output / "config.yaml").read_text())["guidance_scale"] == 1.0
    page = (output / "report.html").read_text()
    assert page.count("<img") >= 1 + 2 + 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a photo of a red square [square]; seed 0" in page or "seed 1" in page


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
    assert "the same command goes on" in capsys.readouterr().err
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


def test_two_processes_share_the_work(files, evaluated, tmp_path):
    port = free_port()
    output, running = tmp_path / "two", []
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        command = [sys.executable, "-m", "diffdoctor", *options(files, output)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
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
        "sampling_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "scheduler": "", "monitor": "",
    }  # fmt: skip
    (treatment / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = {name: "" for name in ("pipeline", "lora", *settings) if name != "monitor"}
    arguments |= {"sampling_steps": 0, "guidance_scale": "null", "treatment": treatment}
    for name in ("height", "width"):
        arguments[name] = 0
    assert main(options(files, tmp_path / "out", **arguments)) == 2
    shutil.copytree(files / "sd-lora", treatment / "lora")
    metrics = evaluate(files, tmp_path / "out", **arguments)
    assert metrics["sampling"]["num_inference_steps"] == 2
    assert metrics["artifact_rate"] == evaluated[1]["artifact_rate"]
    # The monitor watched the treatment: it is no judge.
    (treatment / "config.yaml").write_text(yaml.safe_dump({**settings, "monitor": str(files / "judge")}))
    assert main(options(files, tmp_path / "other", **arguments)) == 2


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
        (
            {"features": "pixels"},
            "expected more than 192 real pictures for a distance of 192 features (thumbnails of 8 x 8 pixels), got 9",
        ),
        ({"pictures": 3}, "expected more than 3 generated pictures"),
        ({"pictures": 0}, "pictures: expected >= 1, got 0"),
        ({"features": "inception-5"}, "--features: expected one of inception-64"),
        ({"classifier": "nowhere"}, "--classifier nowhere"),
        ({"prompts": "{files}/plain.txt"}, "--classifier: expected a `label` with every prompt"),
        ({"clip": "{files}/judge"}, "--clip"),
        ({"scheduler": "Nonsense"}, "--scheduler Nonsense"),
        ({"max_sequence_length": 32}, "StableDiffusionPipeline does not take this option"),
        ({"height": 15}, "15"),
        ({"dtype": "int8"}, "dtype: expected one of fp32"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"guide_options": '{"strength": 1}'}, "--guide_options: expected --guide true with it, got --guide false"),
        ({"guide": "true", "guide_options": '{"power": 1}'}, ", got power"),
        ({"output": "{files}/real"}, "holds something else"),
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
