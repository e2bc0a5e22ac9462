"""What a treatment's folder answers for `diffdoctor evaluate model`."""

import pytest
import torch
import yaml

from diffdoctor._errors import UserError
from diffdoctor.detector import ConvDetector
from diffdoctor.evaluate.model.command import run_evaluate_model
from diffdoctor.evaluate.model.options import EvaluateModelConfig, completed
from diffdoctor.evaluate.model.pipeline import call_options


class TestOptionsOfATreatment:
    @pytest.fixture
    def treatment(self, tmp_path):
        (tmp_path / "lora").mkdir()
        settings = {"pipeline": "p", "detector": "d", "prompts": "t", "sampling_steps": 4, "guidance_scale": 0.0}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "height": 0, "scheduler": ""}))
        return tmp_path

    def test_a_guidance_scale_of_0_is_taken_over(self, treatment):
        options = {"treatment": str(treatment), "judge": "j", "output": "o"}
        config = completed(EvaluateModelConfig(**options))
        assert (config.guidance_scale, config.sampling_steps, config.height) == (0.0, 4, 0)
        assert call_options(config) == {"num_inference_steps": 4, "guidance_scale": 0.0}
        assert completed(EvaluateModelConfig(**options, guidance_scale=2.0)).guidance_scale == 2.0

    @pytest.mark.parametrize(("guidance_scale", "told"), [(None, True), (1.0, True), (0.0, False)])
    def test_a_lora_that_was_tuned_with_a_guidance_scale_of_0(self, treatment, capsys, guidance_scale, told):
        (treatment / "treat.json").write_text("{}")
        options = {"pipeline": "p", "detector": "d", "judge": "j", "prompts": "t", "output": "o", "sampling_steps": 4}
        completed(EvaluateModelConfig(**options, lora=str(treatment / "lora"), guidance_scale=guidance_scale))
        assert ('tuned with {"guidance_scale": 0.0}' in capsys.readouterr().err) == told


class TestPathsOfATreatment:
    """Called with relative paths, `treat` writes relative paths into its config.yaml."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        pytest.importorskip("diffusers")
        pytest.importorskip("accelerate")
        (tmp_path / "run" / "lora").mkdir(parents=True)
        settings = {"pipeline": "models/a", "detector": "detector", "prompts": "prompts.txt", "monitor": "monitor"}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
        for seed, name in enumerate(("detector", "judge")):
            torch.manual_seed(seed)
            ConvDetector((8, 8)).save_pretrained(tmp_path / name)
        (tmp_path / "prompts.txt").write_text("a cat")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return tmp_path

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((), r"--prompts prompts.txt: cannot be read .*; this prompts stands in .*config.yaml, .*--prompts$"),
            (("prompts",), r"detector: .*; this detector stands in .*, or give --detector$"),
            (("prompts", "detector"), r"monitor: .*; this monitor stands in .*: call from there$"),
        ],
        ids=["prompts", "detector", "monitor"],
    )
    def test_a_path_that_is_not_there_is_said_to_be_the_treatments(self, folder, given, message):
        places = {"prompts": "../prompts.txt", "detector": "../detector"}
        options = {name: places[name] for name in given}
        with pytest.raises(UserError, match=message):
            run_evaluate_model(EvaluateModelConfig(treatment="../run", judge="../judge", output="out", **options))
        assert not (folder / "elsewhere" / "out").exists()

    def test_a_path_that_was_given_here_is_no_treatments(self, folder):
        config = EvaluateModelConfig(treatment="../run", judge="../judge", output="out", prompts="nowhere.txt")
        with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read") as caught:
            run_evaluate_model(config)
        assert "config.yaml" not in str(caught.value)
