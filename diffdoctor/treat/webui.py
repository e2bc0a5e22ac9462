"""A LoRA as ComfyUI and A1111 read it: one file of safetensors, by the names that each of them knows.

Of a U-Net it is kohya's layout: SDXL by the names of the original code, others by diffusers'. Of a transformer it is
diffusers' own, which ComfyUI reads, or for Wan that of the original code, with alpha beside the matrices, since both
programs overlook the metadata.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_path
from diffdoctor.treat.adapters import adapter_layers
from diffdoctor.treat.families import Family
from diffdoctor.treat.families.wan import WanFamily
from diffdoctor.treat.lora import ADAPTER

WEBUI_NAME = "lora-webui.safetensors"
# the original code's names inside a residual block
_RESIDUAL = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_WAN = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_WAN |= {"net.0.proj": "0", "net.2": "2"}


def save_for_webui(family: Family, path: str | Path, *, adapter: str = ADAPTER) -> Path:
    """Write the adapter to one file for ComfyUI and A1111, whole or not at all.

    Args:
        family: whose denoiser carries it.
        path: of the file.
        adapter: its name.
    """
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(webui_state(family, adapter=adapter), temporary)
    return Path(path)


def webui_state(family: Family, *, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
    """The adapter's matrices and alphas, on the CPU, by the names that ComfyUI and A1111 read.

    Raises:
        UserError: the denoiser's blocks are not as those programs know them.
    """
    denoiser, state = family.denoiser, {}
    is_unet = family.denoiser_name == "unet"
    is_sdxl = is_unet and denoiser.config.get("addition_embed_type") == "text_time"
    for name, layer in adapter_layers(denoiser).items():
        if adapter not in layer.lora_A:
            continue
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if is_unet:
            key = f"lora_unet_{(original_name(name, denoiser.config) if is_sdxl else name).replace('.', '_')}"
        elif isinstance(family, WanFamily):
            key = f"diffusion_model.{wan_name(name)}"
        else:
            key = f"{type(family).denoiser_name}.{name}"
        ends = ("lora_down", "lora_up") if is_unet else ("lora_A", "lora_B")
        matrices = dict(zip(ends, (down, up), strict=True))
        state |= {f"{key}.{end}.weight": value.detach().cpu().contiguous().clone() for end, value in matrices.items()}
        state[f"{key}.alpha"] = torch.tensor(float(layer.scaling[adapter] * len(down)))
    return state


def wan_name(name: str) -> str:
    """A module's name in the original code of Wan, from diffusers' name such as "blocks.0.attn1.to_out.0".

    Raises:
        UserError: it is not in a block, or in no part of one that gets a LoRA.
    """
    found = re.fullmatch(r"(blocks\.\d+)\.(attn[12]|ffn)\.(.+)", name)
    if found is None or found[3] not in _WAN:
        raise UserError(expected("lora_targets", "attentions and feed-forward layers, for a LoRA of Wan", name))
    return f"{found[1]}.{_WAN.get(found[2], found[2])}.{_WAN[found[3]]}"


def original_name(name: str, config) -> str:
    """A module's name in the original code of latent diffusion, from diffusers' name.

    Args:
        name: such as "down_blocks.1.attentions.0.proj_in".
        config: of the U-Net.

    Raises:
        UserError: the blocks differ in their number of layers, or there is no such module in the original code.
    """
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise UserError(expected("layers_per_block", "one number, for a LoRA in the layout of kohya", layers))
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    if found is None:
        raise UserError(expected("lora_targets", "modules that the layout of kohya names", name))
    side, block, kind, layer, rest = found.groups()
    block, layer = int(block or 0), int(layer)
    if kind == "resnets":
        rest = _RESIDUAL[rest]
    place = 1 if kind == "attentions" else 0
    if side == "mid":
        return f"middle_block.{1 if place else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
    if side == "down":
        return f"input_blocks.{1 + block * (layers + 1) + layer}.{place}.{rest}"
    if kind == "upsamplers":
        place = 2 if "Attn" in config["up_block_types"][block] else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{place}.conv"
    return f"output_blocks.{block * (layers + 1) + layer}.{place}.{rest}"
