"""A LoRA's file for ComfyUI and A1111: the names that each of them looks for, and the strength that each gives it."""

import re

import pytest
import torch
from safetensors.torch import load_file

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora, target_modules
from diffdoctor.treat.webui import original_name, save_for_webui, wan_name, webui_state
from support.tiny_pipelines import CALL_OPTIONS, PROMPTS, drawn, tiny_pipeline

GROUPS = dict.fromkeys(("sd", "sdxl"), ("attention", "convolution"))
GROUPS |= dict.fromkeys(("sd3", "flux", "chroma", "qwen_image", "wan"), ("attention", "feed_forward"))
SD15 = {"layers_per_block": 2, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
SDXL = {"layers_per_block": 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]}


def tuned(name, alpha=5.0):
    pipeline = tiny_pipeline(name)
    family = family_of(pipeline)
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(family, rank=2, alpha=alpha, groups=GROUPS[name], seed=0):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipeline, family


def draw(pipeline):
    options = CALL_OPTIONS["wan"] if hasattr(pipeline, "transformer") else {}
    return drawn(pipeline(
        list(PROMPTS), num_inference_steps=2, guidance_scale=1.0, height=16, width=16, output_type="pt",
        generator=torch.Generator().manual_seed(0), **options,
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "sdxl", "wan"])
def test_diffusers_own_reader_of_the_layout_draws_the_same_pictures(name, tmp_path):
    pipeline, family = tuned(name)
    save_for_webui(family, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    assert len(state) == 3 * len(target_modules(family_of(tiny_pipeline(name)), GROUPS[name]))
    layout = r"lora_unet_\w+\.(lora_(down|up)\.weight|alpha)"
    if name == "wan":
        # the modules of the original code, by which ComfyUI knows them too
        layout = r"diffusion_model\.blocks\.0\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.(lora_[AB]\.weight|alpha)"
    assert all(re.fullmatch(layout, key) for key in state)
    loaded = tiny_pipeline(name)
    loaded.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(draw(loaded), draw(pipeline), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd3", "flux", "chroma", "qwen_image"])
def test_transformers_keep_the_names_that_comfyui_reads_with_alpha_beside_them(name):
    _, family = tuned(name)
    state = webui_state(family)
    modules = target_modules(family_of(tiny_pipeline(name)), GROUPS[name])
    ends = ("lora_A.weight", "lora_B.weight", "alpha")
    assert state.keys() == {f"transformer.{module}.{end}" for module in modules for end in ends}
    # both programs scale by alpha / rank
    assert {float(value) for key, value in state.items() if key.endswith("alpha")} == {5.0}


def test_names_of_sdxl_are_those_of_published_loras():
    """Keys of kohya's own SDXL files, which both programs read as the original code's modules."""
    for name, key in {
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.attentions.0.transformer_blocks.1.norm2": "input_blocks_4_1_transformer_blocks_1_norm2",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q": "output_blocks_2_1_transformer_blocks_0_attn1_to_q",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
        "conv_out": "out_2",
        "time_embedding.linear_2": "time_embed_2",
    }.items():  # fmt: skip
        assert original_name(name, SDXL).replace(".", "_") == key, name


def as_a1111_reads(key):
    """A module of the original code as A1111 finds it from diffusers' names, for SD 1.5's three modules a level."""
    inside = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
    if found := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", key):
        return f"input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", key):
        return f"output_blocks_{2 + 3 * int(found[1])}_{2 if int(found[1]) else 1}_conv"
    if found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d)_(.+)", key):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block_{place}_{inside.get(found[3], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", key)
    number = 3 * int(found[2]) + int(found[4]) + (found[1] == "down")
    side = "input" if found[1] == "down" else "output"
    return f"{side}_blocks_{number}_{int(found[3] == 'attentions')}_{inside.get(found[5], found[5])}"


@pytest.mark.parametrize(
    "name",
    ["down_blocks.0.resnets.0.conv1", "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_k",
     "down_blocks.2.downsamplers.0.conv", "mid_block.resnets.0.conv2", "mid_block.attentions.0.proj_out",
     "up_blocks.0.resnets.2.conv_shortcut", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv",
     "up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_out.0", "up_blocks.3.resnets.1.time_emb_proj"],
)  # fmt: skip
def test_a1111_finds_the_modules_of_sd15_by_diffusers_names(name):
    assert as_a1111_reads(name.replace(".", "_")) == original_name(name, SD15).replace(".", "_")


@pytest.mark.parametrize("name", ["sd", "sdxl", "wan"])
def test_a_treatment_can_begin_with_the_file(name, tmp_path):
    from diffdoctor.treat.lora import start_from

    pipeline, family = tuned(name)
    save_for_webui(family, tmp_path / "lora.safetensors")
    again = tiny_pipeline(name)
    start_from(family_of(again), tmp_path / "lora.safetensors")
    torch.testing.assert_close(draw(again), draw(pipeline), atol=1e-5, rtol=0)


def test_blocks_that_the_layout_cannot_name_are_refused():
    with pytest.raises(UserError, match="layers_per_block: expected one number"):
        original_name("down_blocks.0.resnets.0.conv1", {"layers_per_block": [1, 2]})
    with pytest.raises(UserError, match="lora_targets: expected modules that the layout of kohya names"):
        original_name("encoder_hid_proj", SDXL)
    for name in ("proj_out", "blocks.0.attn2.add_k_proj"):
        with pytest.raises(UserError, match="lora_targets: expected attentions and feed-forward layers.*" + name):
            wan_name(name)
