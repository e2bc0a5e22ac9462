"""A detector, judge or monitor that gives NaN, or anything else that is no confidence, is refused."""

import numpy as np
import pytest
import torch

import diffdoctor
from diffdoctor.cli import main
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.detector import ConvDetector, load_detector
from diffdoctor.detector.confidence import check_confidence, confidence_of
from diffdoctor.evaluate.model import diagnose_pictures
from diffdoctor.runs.errors import UserError
from diffdoctor.treat import treat
from support.pictures import tree, write_pictures
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import BrightDetector, pairs, random_detector, small

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")


class Constant(torch.nn.Module):
    """A map of one value, from logits of that value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, pictures):
        return torch.full_like(pictures[:, :1], self.value)

    def confidence(self, pictures):
        return self(pictures)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.5, -0.2, 255.0])
def test_a_map_of_other_values_is_refused_by_the_detectors_name(value):
    with pytest.raises(UserError, match=r"^judge: expected confidences in \[0, 1\], got .* in a map"):
        confidence_of(Constant(value), torch.rand(2, 3, 8, 8), name="judge")
    with pytest.raises(UserError, match=r"^detector: expected confidences"):
        diagnose_pictures(Constant(value), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_a_single_broken_pixel_is_enough_and_rounding_is_not():
    images = torch.rand(2, 3, 8, 8)
    maps = torch.rand(2, 1, 8, 8)
    assert torch.equal(check_confidence(maps, images), maps)
    maps[1, 0, 3, 3] = 1 + 1e-6
    assert float(check_confidence(maps, images).max()) == 1
    maps[1, 0, 3, 3] = torch.nan
    with pytest.raises(UserError, match="got nan in a map"):
        check_confidence(maps, images)
    # of a picture that is itself broken nothing can be said: that is not the detector's fault
    images[1, 0, 0, 0] = torch.inf
    assert check_confidence(maps, images).isnan().sum() == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures, shards, a pipeline, prompts, a good detector and one whose last bias is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    write_pictures(folder / "pictures", 2)
    rng = np.random.default_rng(0)
    samples = [
        {"picture": rng.integers(0, 256, (16, 16, 3), np.uint8), "mask": np.full((16, 16), i % 2), "prompt": PROMPTS[0]}
        for i in range(4)
    ]
    write_shards(samples, folder / "set")
    tiny_pipeline("sd").save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    good = random_detector()
    good.save_pretrained(folder / "good")
    with torch.no_grad():
        good.head.bias.fill_(torch.nan)
    good.save_pretrained(folder / "nan")
    torch.manual_seed(9)
    ConvDetector((8, 8)).save_pretrained(folder / "other")
    return folder


SMALL = ["--height=16", "--width=16", "--sampling_steps=2"]
USES = {
    "diagnose": ["diagnose", "{f}/pictures", "--detector={f}/nan"],
    "train": ["train-detector", "{f}/set", "--initial={f}/nan", "--training.steps=1", "--training.batch_size=2"],
    "evaluate detector": ["evaluate", "detector", "{f}/set", "--detector={f}/nan"],
    "judge": ["evaluate", "model", "--detector={f}/good", "--judge={f}/nan", "--guide=true", *SMALL],
    "evaluated": ["evaluate", "model", "--detector={f}/nan", "--judge={f}/good", "--guide=true", *SMALL],
    "treat": ["treat", "--detector={f}/nan", "--offline={f}/set", "--steps=1", *SMALL],
    "monitor": ["treat", "--detector={f}/good", "--monitor={f}/nan", "--offline={f}/set", "--steps=1", *SMALL],
}


def command(files, output, words):
    words = [word.format(f=files) for word in words]
    if words[0] == "treat" or words[:2] == ["evaluate", "model"]:
        words += [f"--pipeline={files}/pipeline", f"--prompts={files}/prompts.txt"]
    return main([*words, f"--output={output}"])


@pytest.mark.parametrize("use", USES)
def test_every_command_refuses_weights_that_are_not_finite_and_leaves_nothing(files, tmp_path, capsys, use):
    assert command(files, tmp_path / "out", USES[use]) == 2
    assert f"{files}/nan: expected finite weights, got NaN or infinity in head.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", [name for name in USES if name != "train"])
def test_every_command_refuses_maps_that_are_nan_at_the_first(files, tmp_path, capsys, monkeypatch, use):
    network = ConvDetector.network
    weights = load_detector(files / "other").state_dict()["head.bias"]

    def broken(self, pixels):
        # finite weights, and a network that overflows with them
        is_broken = torch.equal(self.head.bias.detach().cpu(), weights)
        return network(self, pixels) * (torch.nan if is_broken else 1.0)

    monkeypatch.setattr(ConvDetector, "network", broken)
    words = [word.replace("{f}/nan", "{f}/other") for word in USES[use]]
    assert command(files, tmp_path / "out", words) == 2
    assert "expected confidences in [0, 1], got nan in a map" in capsys.readouterr().err
    written = tree(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert not any(name.startswith(("maps", "pictures", "lora", "metrics")) for name in written)
    assert not any(b"NaN" in text for name, text in written.items() if ".json" in name)


def test_a_treatment_asks_its_monitor_before_it_writes_or_learns(tmp_path):
    for detector, monitor, name in ((Constant(float("nan")), None, "detector"),
                                    (BrightDetector(), Constant(float("nan")), "monitor")):  # fmt: skip
        with pytest.raises(UserError, match=f"^{name}: expected confidences"):
            treat(
                tiny_pipeline("sd"), detector, PROMPTS, small(offline_weight=0.0), monitor=monitor,
                output_dir=tmp_path / "out", progress=False,
            )  # fmt: skip
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"^detector: expected confidences"):
        treat(tiny_pipeline("sd"), Constant(2.0), PROMPTS, small(method="weighted"), offline=pairs(), progress=False)


@pytest.mark.parametrize("options", [{"rewinds": 0, "start": 0.0}, {"strength": 0.0}], ids=["moves", "rewinds"])
def test_guide_refuses_a_detector_that_gives_nan(options):
    pipeline = tiny_pipeline("sd")
    guided = diffdoctor.guide(pipeline, Constant(float("nan")), height=16, width=16, **options)
    with pytest.raises(UserError, match=r"^detector: expected confidences"), guided:
        pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, height=16, width=16)


def test_a_file_with_weights_of_a_published_checkpoint_is_refused_too(tmp_path):
    from diffdoctor.detector.models.files import load_exactly

    module = torch.nn.Linear(2, 2)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["weight"][0, 0] = torch.inf
    with pytest.raises(UserError, match=r"^a\.bin: expected finite weights, got NaN or infinity in weight$"):
        load_exactly(module, state, "a.bin")
    assert module.weight.isfinite().all()
