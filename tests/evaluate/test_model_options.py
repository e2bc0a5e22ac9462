"""What a treatment's folder answers for `diffdoctor evaluate model`."""

import pytest
import yaml

from diffdoctor.evaluate.model.config import EvaluateModelConfig, completed
from diffdoctor.evaluate.model.draw import call_options


class TestOptionsOfATreatment:
    @pytest.fixture
    def treatment(self, tmp_path):
        (tmp_path / "lora").mkdir()
        settings = {"pipeline": "p", "detector": "d", "prompts": "t", "sampling_steps": 4, "guidance_scale": 0.0}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "height": None, "scheduler": None}))
        return tmp_path

    def test_a_guidance_scale_of_0_is_taken_over(self, treatment):
        options = {"treatment": str(treatment), "judge": "j", "output": "o"}
        config = completed(EvaluateModelConfig(**options))
        assert (config.guidance_scale, config.sampling_steps, config.height) == (0.0, 4, None)
        assert call_options(config) == {"num_inference_steps": 4, "guidance_scale": 0.0}
        assert completed(EvaluateModelConfig(**options, guidance_scale=2.0)).guidance_scale == 2.0

    @pytest.mark.parametrize(("guidance_scale", "told"), [(None, True), (1.0, True), (0.0, False)])
    def test_a_lora_that_was_tuned_with_a_guidance_scale_of_0(self, treatment, capsys, guidance_scale, told):
        (treatment / "treat.json").write_text("{}")
        options = {"pipeline": "p", "detector": "d", "judge": "j", "prompts": "t", "output": "o", "sampling_steps": 4}
        completed(EvaluateModelConfig(**options, lora=str(treatment / "lora"), guidance_scale=guidance_scale))
        assert ('tuned with {"guidance_scale": 0.0}' in capsys.readouterr().err) == told
