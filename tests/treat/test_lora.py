"""A saved LoRA, loaded by the pipeline's own `load_lora_weights`, draws the pictures of the model in memory."""

import functools

import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.adapters import merged_adapters
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import (
    WEIGHTS_NAME,
    add_lora,
    load_lora_state,
    lora_state,
    save_lora,
    target_modules,
)
from support.tiny_pipelines import CALL_OPTIONS, FAMILIES, PROMPTS, drawn, tiny_pipeline

GROUPS = {name: ("attention", "convolution" if name in ("sd", "sdxl") else "feed_forward") for name in FAMILIES}


def draw(pipeline, family):
    pipeline.set_progress_bar_config(disable=True)
    options = CALL_OPTIONS.get(family, {})
    return drawn(pipeline(
        prompt=list(PROMPTS), height=16, width=16, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0), **options,
    ))  # fmt: skip


@functools.cache
def drawn_without(name):
    return draw(tiny_pipeline(name), name)


def with_lora(name, rank=3, alpha=7.0):
    pipeline = tiny_pipeline(name)
    family = family_of(pipeline)
    parameters = add_lora(family, rank=rank, alpha=alpha, groups=GROUPS[name], seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipeline, family, parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_reloaded_lora_draws_the_same_pictures(name, tmp_path):
    base = drawn_without(name)
    pipeline, family, _ = with_lora(name)
    treated = draw(pipeline, name)
    assert (treated - base).abs().max() > 1e-2
    save_lora(family, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [WEIGHTS_NAME]
    loaded = tiny_pipeline(name)
    loaded.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(draw(loaded, name), treated, atol=1e-5, rtol=0)
    loaded.unload_lora_weights()
    torch.testing.assert_close(draw(loaded, name), base, atol=1e-6, rtol=0)


def test_every_group_is_in_the_file(tmp_path):
    from safetensors import safe_open

    _, family, parameters = with_lora("sd")
    save_lora(family, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / WEIGHTS_NAME, "pt") as file:
        names = list(file.keys())
    assert len(names) == len(parameters)
    assert any("attn" in name for name in names)
    assert any("resnets" in name and "conv1" in name for name in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_lora_changes_nothing_and_leaves_the_random_state(name):
    base = drawn_without(name)
    pipeline = tiny_pipeline(name)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    parameters = add_lora(family_of(pipeline), rank=2, alpha=2.0, groups=GROUPS[name], seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.testing.assert_close(draw(pipeline, name), base, atol=1e-6, rtol=0)
    trainable = [p for module in pipeline.components.values() if isinstance(module, torch.nn.Module)
                 for p in module.parameters() if p.requires_grad]  # fmt: skip
    assert {id(p) for p in trainable} == {id(p) for p in parameters}


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_merging_samples_the_same_and_is_undone_bit_for_bit(name):
    pipeline, family, parameters = with_lora(name)
    treated = draw(pipeline, name)
    weights = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    with merged_adapters(family):
        torch.testing.assert_close(draw(pipeline, name), treated, atol=2e-5, rtol=0)
    assert all(torch.equal(value, weights[key]) for key, value in family.denoiser.state_dict().items())
    assert all(parameter.requires_grad for parameter in parameters)
    with pytest.raises(RuntimeError, match="stop"), merged_adapters(family):
        raise RuntimeError("stop")
    assert all(torch.equal(value, weights[key]) for key, value in family.denoiser.state_dict().items())


def test_state_round_trip():
    pipeline, family, parameters = with_lora("sd")
    state, treated = lora_state(family), draw(pipeline, "sd")
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    load_lora_state(family, state)
    torch.testing.assert_close(draw(pipeline, "sd"), treated)


def test_what_cannot_be_targeted_is_refused():
    family = family_of(tiny_pipeline("flux"))
    with pytest.raises(UserError, match=r"lora_targets.*convolution"):
        target_modules(family, ("convolution",))
    family = with_lora("sd")[1]
    with pytest.raises(UserError, match="already carries"):
        add_lora(family, rank=2, alpha=2.0, groups=("attention",), seed=0)
