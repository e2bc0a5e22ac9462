"""A LoRA that the pipeline carries stays active and frozen; a treatment can begin with a LoRA; longer treatments."""

import json

import pytest
import torch
from safetensors.torch import load_file

import diffdoctor
from diffdoctor.runs.errors import UserError
from diffdoctor.treat import treat
from diffdoctor.treat.adapters import active_adapters, merged_adapters
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import WEIGHTS_NAME, add_lora, lora_state, save_lora, target_modules
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import BrightDetector, pairs, random_detector, small

GROUPS = {"sd": ("attention", "convolution"), "flux": ("attention",)}
# a treatment whose steps change nothing
STILL = {"steps": 1, "learning_rate": 1e-20, "offline_weight": 0.0, "log_with": "none"}


def write_style(folder, name="sd", alpha=4.0, seed=0):
    """A LoRA that visibly changes what the tiny pipeline draws."""
    family = family_of(tiny_pipeline(name))
    generator = torch.Generator().manual_seed(seed)
    for parameter in add_lora(family, rank=2, alpha=alpha, groups=("attention",), seed=0, adapter="style"):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return save_lora(family, folder, adapter="style")


def draw(pipeline, name="sd"):
    more = {"max_sequence_length": 32} if name == "flux" else {}
    return pipeline(
        list(PROMPTS), num_inference_steps=3, guidance_scale=1.0, height=16, width=16, output_type="pt",
        generator=[torch.Generator().manual_seed(i) for i in range(3)], **more,
    ).images  # fmt: skip


def styled(tmp_path, name="sd", adapter="style", weight=0.7):
    pipeline = tiny_pipeline(name)
    pipeline.load_lora_weights(write_style(tmp_path / "style", name), adapter_name=adapter)
    pipeline.set_adapters(adapter, adapter_weights=weight)
    return pipeline


def state_of(layer_owner, adapter):
    return {n: p.detach().clone() for n, p in layer_owner.named_parameters() if adapter in n.split(".")}


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_carried_lora_is_drawn_with_during_a_treatment_and_afterwards(tmp_path, name):
    plain = draw(tiny_pipeline(name), name)
    pipeline = styled(tmp_path, name, adapter="diffdoctor-style")
    before, style = draw(pipeline, name), state_of(family_of(pipeline).denoiser, "diffdoctor-style")
    assert (before - plain).abs().max() > 1e-2
    detector = BrightDetector()
    result = treat(pipeline, detector, PROMPTS, small(**STILL), output_dir=tmp_path / "out", progress=False)
    # what was measured first is what the pipeline drew
    unstyled = treat(tiny_pipeline(name), detector, PROMPTS, small(**STILL), progress=False)
    assert abs(result.measurements[0].mean_confidence - unstyled.measurements[0].mean_confidence) > 1e-4
    torch.testing.assert_close(draw(pipeline, name), before, atol=1e-5, rtol=0)
    assert sorted(pipeline.get_active_adapters()) == ["diffdoctor", "diffdoctor-style"]
    after = state_of(family_of(pipeline).denoiser, "diffdoctor-style")
    assert style.keys() == after.keys() and all(torch.equal(style[key], after[key]) for key in style)
    # the file holds what was learnt, of all modules, and not the style
    saved = load_file(tmp_path / "out" / "lora" / WEIGHTS_NAME)
    assert len(saved) == len(lora_state(family_of(unstyled.pipeline)))
    assert not any("style" in key for key in saved)


@pytest.mark.cpu
def test_what_is_learnt_beside_a_carried_lora_belongs_to_the_treatment_alone(tmp_path):
    pipeline = styled(tmp_path)
    style = state_of(pipeline.unet, "style")
    options = small(steps=2, learning_rate=3e-2, offline_weight=0.0, evaluate_every=1, min_sharpness=0.0)
    result = treat(pipeline, BrightDetector(), PROMPTS, options, progress=False)
    assert all(row["grad_norm"] > 0 for row in result.history)
    assert all(torch.equal(value, state_of(pipeline.unet, "style")[key]) for key, value in style.items())
    treated = draw(pipeline)
    result.save_lora(tmp_path / "lora")
    again = styled(tmp_path)
    assert (draw(again) - treated).abs().max() > 1e-3
    again.load_lora_weights(tmp_path / "lora", adapter_name="treated")
    again.set_adapters(["style", "treated"], adapter_weights=[0.7, 1.0])
    torch.testing.assert_close(draw(again), treated, atol=1e-5, rtol=0)


def test_the_rollout_merges_every_active_adapter_and_puts_all_back(tmp_path):
    pipeline = styled(tmp_path)
    family = family_of(pipeline)
    trained = add_lora(family, rank=2, alpha=2.0, groups=GROUPS["sd"], seed=1)
    for parameter in trained:
        parameter.data += 0.1
    assert active_adapters(family.denoiser) == ["style", "diffdoctor"]
    assert {id(p) for p in family.denoiser.parameters() if p.requires_grad} == {id(p) for p in trained}
    expected, weights = draw(pipeline), {k: v.clone() for k, v in family.denoiser.state_dict().items()}
    with merged_adapters(family):
        # weights of size 1 are summed in another order: 3e-4; without the style it is 0.1
        torch.testing.assert_close(draw(pipeline), expected, atol=1e-3, rtol=0)
    assert all(torch.equal(value, weights[key]) for key, value in family.denoiser.state_dict().items())
    assert {id(p) for p in family.denoiser.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert torch.equal(draw(pipeline), expected)


def test_the_modules_that_are_targeted_do_not_depend_on_a_carried_lora(tmp_path):
    plain = target_modules(family_of(tiny_pipeline("sd")), GROUPS["sd"])
    # an adapter that is called like the end of a module's name is no module
    assert target_modules(family_of(styled(tmp_path, adapter="conv")), GROUPS["sd"]) == plain


@pytest.mark.cpu
def test_a_lora_that_is_switched_off_stays_out(tmp_path):
    pipeline = styled(tmp_path)
    pipeline.disable_lora()
    plain = draw(pipeline)
    treat(pipeline, BrightDetector(), PROMPTS, small(**STILL), progress=False)
    torch.testing.assert_close(draw(pipeline), plain, atol=1e-5, rtol=0)
    assert active_adapters(pipeline.unet) == ["diffdoctor"]


@pytest.mark.cpu
def test_a_fused_lora_is_refused_until_it_is_unloaded(tmp_path):
    pipeline = styled(tmp_path)
    pipeline.fuse_lora()
    before = draw(pipeline)
    with pytest.raises(UserError, match=r"^pipeline: a LoRA is fused .*unload_lora_weights"):
        treat(pipeline, BrightDetector(), PROMPTS, small(**STILL), progress=False)
    assert torch.equal(draw(pipeline), before)
    pipeline.unload_lora_weights()
    treat(pipeline, BrightDetector(), PROMPTS, small(**STILL), progress=False)
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)


def test_guide_leaves_a_carried_lora_as_it_is(tmp_path):
    pipeline = styled(tmp_path)
    before = draw(pipeline)
    with diffdoctor.guide(pipeline, BrightDetector(), height=16, width=16, strength=0.0, rewinds=0):
        assert torch.equal(draw(pipeline), before)
    with diffdoctor.guide(pipeline, BrightDetector(), height=16, width=16):
        draw(pipeline)
    assert torch.equal(draw(pipeline), before)
    assert pipeline.get_active_adapters() == ["style"]


def test_a_treatment_is_resumed_only_with_the_same_carried_lora(tmp_path):
    def run(weight):
        treat(
            styled(tmp_path, weight=weight), BrightDetector(), PROMPTS, small(**STILL), output_dir=tmp_path / "out",
            progress=False,
        )  # fmt: skip

    run(0.7)
    with pytest.raises(UserError, match="a run with another adapters"):
        run(0.8)
    run(0.7)


def begun(tmp_path, lora, pipeline=None, **options):
    return treat(
        pipeline or tiny_pipeline("sd"), BrightDetector(), PROMPTS, small(**{**STILL, "rank": 16, **options}),
        output_dir=tmp_path / "out", lora=lora, progress=False,
    )  # fmt: skip


@pytest.mark.cpu
def test_a_treatment_begins_with_a_lora_and_its_file_contains_it(tmp_path):
    source = write_style(tmp_path / "style")
    expected = tiny_pipeline("sd")
    expected.load_lora_weights(source)
    result = begun(tmp_path, source, lora_targets=("attention", "convolution", "feed_forward"))
    assert result.measurements[0].mean_confidence == pytest.approx(
        float(BrightDetector().confidence(drawn_fixed(expected)).mean()), abs=1e-5
    )
    saved, start = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path / "out" / "lora", source))
    assert saved.keys() == start.keys()
    assert all(torch.equal(saved[key], start[key]) for key in start)
    # alpha, which is not the rank, goes along
    again = tiny_pipeline("sd")
    again.load_lora_weights(tmp_path / "out" / "lora")
    torch.testing.assert_close(draw(again), draw(expected), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"a run with another lora[;,]"):
        begun(tmp_path, write_style(tmp_path / "other", seed=1))
    learnt = treat(
        tiny_pipeline("sd"), BrightDetector(), PROMPTS, small(steps=1, rank=16, learning_rate=1e-2, offline_weight=0.0),
        lora=source, progress=False,
    )  # fmt: skip
    assert not all(torch.equal(lora_state(family_of(learnt.pipeline))[k[5:]], v) for k, v in start.items())


def drawn_fixed(pipeline):
    """The fixed pictures of a treatment of seed 0."""
    from diffdoctor.training.processes import seed_of
    from diffdoctor.treat.drawing import Purpose

    seeds = [seed_of(0, Purpose.FIXED, number) for number in range(3)]
    return pipeline(
        list(PROMPTS), num_inference_steps=3, guidance_scale=1.0, height=16, width=16, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("style", {"rank": 4}, "^rank: expected none with lora, whose own is kept, got 4"),
        ("style", {"alpha": 2.0}, "^alpha: expected none with lora"),
        ("nowhere", {}, "--lora .*nowhere: expected a file, a folder or a hub id"),
        ("styl", {}, "holds style"),
        ("flux-style", {}, "does not fit this pipeline"),
        ("text", {}, "expected a LoRA of the unet alone, .*, got one of text_encoder too"),
    ],
)
def test_a_lora_that_cannot_be_begun_with_is_refused(tmp_path, source, options, message):
    write_style(tmp_path / "style")
    if source == "flux-style":
        write_style(tmp_path / source, "flux")
    if source == "text":
        state = load_file(tmp_path / "style" / WEIGHTS_NAME)
        key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
        (tmp_path / source).mkdir()
        from safetensors.torch import save_file

        extra = {key.format("A"): torch.zeros(2, 32), key.format("B"): torch.zeros(32, 2)}
        save_file(state | extra, tmp_path / source / WEIGHTS_NAME)
    with pytest.raises(UserError, match=message):
        begun(tmp_path, tmp_path / source, lora_targets=("attention", "convolution", "feed_forward"), **options)
    assert not (tmp_path / "out").exists()


LONG = {"final_learning_rate": 1.0, "learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.5, "log_with": "none",
        "sample_pictures": 0}  # fmt: skip


def treated(folder, steps, **options):
    return treat(
        tiny_pipeline("sd", prediction_type="v_prediction"), random_detector(), PROMPTS,
        small(steps=steps, **{**LONG, **options}), offline=pairs(), output_dir=folder, progress=False,
    )  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("every", [0, 2, 3])
def test_more_steps_continue_a_finished_treatment_as_if_asked_for_at_first(tmp_path, every):
    whole = treated(tmp_path / "whole", 4, evaluate_every=every)
    treated(tmp_path / "longer", 2, evaluate_every=every)
    longer = treated(tmp_path / "longer", 4, evaluate_every=every)
    assert longer.history == whole.history
    assert (longer.measurements, longer.best_step) == (whole.measurements, whole.best_step)
    one, two = (load_file(tmp_path / name / "lora" / WEIGHTS_NAME) for name in ("whole", "longer"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert len(json.loads((tmp_path / "longer" / "treat.json").read_text())["history"]) == 4
    with pytest.raises(UserError, match=r"^steps: expected at least 4, which are done in .*longer, got 3"):
        treated(tmp_path / "longer", 3, evaluate_every=every)


def test_more_steps_are_refused_where_the_first_would_have_been_others(tmp_path):
    treated(tmp_path / "run", 1, final_learning_rate=0.1)
    with pytest.raises(UserError, match=r"another steps .*--lora begins .* more steps continue one only with final"):
        treated(tmp_path / "run", 2, final_learning_rate=0.1)
