"""What a treatment's folder answers for `diffdoctor evaluate model`."""

import pytest
import yaml

from diffdoctor.evaluate.model.config import EvaluateModelConfig, completed
from diffdoctor.runs.errors import UserError
from diffdoctor.treat.text_to_image import call_options


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

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("sampling_steps", "many"),
            ("sampling_steps", True),
            ("guidance_scale", [1]),
            ("pipeline", 7),
            ("scheduler", {}),
        ],
    )
    def test_values_of_other_types_are_named(self, treatment, name, value):
        settings = yaml.safe_load((treatment / "config.yaml").read_text())
        (treatment / "config.yaml").write_text(yaml.safe_dump(settings | {name: value}))
        options = {"treatment": str(treatment), "judge": "j", "output": "o"}
        with pytest.raises(UserError, match=rf"config\.yaml: expected {name} as `diffdoctor treat` writes it, got"):
            completed(EvaluateModelConfig(**options))

    def test_aliases_of_aliases_cost_nothing(self, treatment):
        lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)), "pipeline: *a39"]
        (treatment / "config.yaml").write_text("\n".join(lines))
        with pytest.raises(UserError, match="expected pipeline as `diffdoctor treat` writes it, got a list"):
            completed(EvaluateModelConfig(treatment=str(treatment), judge="j", output="o"))
        (treatment / "treat.json").write_text("{}")
        options = {"pipeline": "p", "detector": "d", "judge": "j", "prompts": "t", "output": "o", "sampling_steps": 4}
        completed(EvaluateModelConfig(**options, lora=str(treatment / "lora")))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"judge": ""}, "--judge: expected a name or a path, got an empty one"),
            ({"sampling_steps": 0}, "sampling_steps: expected >= 1, got 0"),
        ],
    )
    def test_what_is_not_given_is_null(self, options, message):
        with pytest.raises(UserError, match=message):
            EvaluateModelConfig(**options)
