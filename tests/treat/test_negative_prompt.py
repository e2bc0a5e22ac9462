"""A negative prompt in a treatment: the pictures are those of the pipeline's own call with it."""

import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families import family_of
from diffdoctor.treat.rollout import initial_latents, picture_generators, roll_out
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import BrightDetector, run

NEGATIVE = "a blue triangle"


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_rollout_draws_what_the_pipeline_draws_with_the_negative_prompt(name):
    pipeline = tiny_pipeline(name)
    family, cpu = family_of(pipeline), torch.device("cpu")
    family.max_sequence_length, size = 32, {"height": 16, "width": 16}
    drawn = {}
    for negative in (None, NEGATIVE):
        family.negative_prompt = negative
        sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options=family.timestep_options(2, 16, 16))
        sampling = Sampling(family, sampler, Guidance(4.0))
        conditioning = family.encode_prompts(PROMPTS, guidance_scale=4.0, **size, device=cpu)
        generators = picture_generators((1, 2, 3))
        latents = initial_latents(sampling, generators, 16, 16, cpu, torch.float32)
        drawn[negative] = family.decode(roll_out(sampling, conditioning, latents, generators).final).clamp(0, 1)
    more = {"max_sequence_length": 32} if name == "sd3" else {}
    theirs = pipeline(
        list(PROMPTS), negative_prompt=[NEGATIVE] * 3, num_inference_steps=2, guidance_scale=4.0, output_type="pt",
        generator=picture_generators((1, 2, 3)), **size, **more,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn[NEGATIVE], theirs, atol=1e-5, rtol=1e-5)
    assert (drawn[NEGATIVE] - drawn[None]).abs().max() > 1e-3


def test_a_treatment_draws_with_it_and_is_resumed_only_with_it(tmp_path, caplog):
    options = {
        "guidance_scale": 4.0,
        "steps": 1,
        "detector": BrightDetector(),
        "offline_weight": 0.0,
        "log_with": "none",
    }
    plain = run(**options)
    with_it = run(**options, negative_prompt=NEGATIVE, output_dir=tmp_path)
    assert with_it.measurements[0].mean_confidence != plain.measurements[0].mean_confidence
    with pytest.raises(UserError, match="another negative_prompt"):
        run(**options, negative_prompt="another", output_dir=tmp_path)
    run(**options, negative_prompt="red square " * 60)
    assert "1 of 1 prompts are longer than 77 tokens" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux", {"guidance_scale": 4.0}, "negative_prompt: expected none, since FluxPipeline makes no negative"),
        ("sd", {"guidance_scale": 1.0}, "negative_prompt: expected a guidance_scale above 1 with it"),
    ],
)
def test_a_negative_prompt_without_effect_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        run(tiny_pipeline(name), negative_prompt=NEGATIVE, **options)
