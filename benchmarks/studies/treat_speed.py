"""Seconds and memory of whole treatment steps at real sizes on a GPU: `python -m benchmarks.studies.treat_speed`.

Stable Diffusion 1.5, SDXL and FLUX.1 as diffusers configures them, with random weights, tuned by `diffdoctor.treat`
itself: drawing, diagnosis by a SegFormer-b5, replay, optimizer. Text encoders are small: prompts are encoded once.
Nothing is learnt, and nothing is downloaded. A row is printed, and written to `--output`, as it comes.

step: the time between two diagnoses, the smallest of a run; the first step, which loads kernels, does not count.
peak: the most that torch's allocator handed out, weights included.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.ops import machine
from benchmarks.studies.treat_memory.real import VAE, made_in
from benchmarks.studies.treat_memory.table import head, row, size
from diffdoctor.demo.flow_pipeline import build_t5_tokenizer
from diffdoctor.demo.pipeline import build_tokenizer
from diffdoctor.detector import ArtifactDetector
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.treat import TreatConfig, treat

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

PROMPTS = [f"a photograph of {what}" for what in ("two hands", "a shop's sign", "a street", "a face")]
_SMALL_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def _clip(tokenizer, width: int, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5(width: int):
    from transformers import T5Config, T5EncoderModel

    tokenizer = build_t5_tokenizer(PROMPTS, max_length=512)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def _ddim(**options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **options
    )


def _sd(small: bool):
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    less = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1} if small else {}
    tokenizer = build_tokenizer(PROMPTS, max_length=77)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE | (_SMALL_VAE if small else {})),
        text_encoder=_clip(tokenizer, 768),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=4 if small else 8, **less
        ),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(small: bool):
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    less = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "layers_per_block": 1} if small else {}
    less |= {"transformer_layers_per_block": 1, "attention_head_dim": 2} if small else {}
    size = {
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
    }
    tokenizer = build_tokenizer(PROMPTS, max_length=77)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(scaling_factor=0.13025, **VAE | (_SMALL_VAE if small else {})),
        text_encoder=_clip(tokenizer, 768),
        text_encoder_2=_clip(tokenizer, 1280, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(PROMPTS, max_length=77),
        unet=UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
            **size | less,
        ),
        scheduler=_ddim(),
    )


def _flux(small: bool):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    less = (
        {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2} if small else {}
    )
    less |= {"axes_dims_rope": (4, 4, 8)} if small else {}
    tokenizer, (tokenizer_2, text_encoder_2) = build_tokenizer(PROMPTS, max_length=77), _t5(4096)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False, **VAE | (_SMALL_VAE if small else {}),
        ),
        text_encoder=_clip(tokenizer, 768),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(guidance_embeds=True, **less),
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A pipeline, the side of its pictures, sampling steps, guidance, pictures of a step, and LoRA's modules."""

    title: str
    build: Callable[[bool], DiffusionPipeline]
    side: int
    sampling_steps: int
    guidance: float
    batch_size: int
    modules: tuple[str, ...]


ATTENTION = ("attention",)
NETWORKS = {
    "sd": Network("SD 1.5, 512²", _sd, 512, 20, 1.0, 16, ATTENTION),
    "sdxl": Network("SDXL, 1024²", _sdxl, 1024, 20, 1.0, 8, ATTENTION),
    "flux": Network("FLUX.1, 1024²", _flux, 1024, 20, 3.5, 4, ATTENTION),
}
METHODS = {
    "nft": {},
    "grpo": {"group_size": 4},
    "draft_k": {"grad_steps": 1, "offline_weight": 0.0, "gradient_checkpointing": True},
}


class Watched(torch.nn.Module):
    """A detector that notes when each step's first pictures reach it, and flags all of them."""

    def __init__(self, detector: torch.nn.Module):
        super().__init__()
        self.detector, self.moments = detector, []

    def forward(self, pictures):
        return self.detector(pictures)

    def confidence(self, pictures):
        if pictures.is_cuda:
            torch.cuda.synchronize()
        self.moments.append((time.perf_counter(), len(pictures)))
        # All count: what a method spares on clean pictures is not what is timed.
        return self.detector.confidence(pictures).clamp(0.4, 0.6)


def measured(network: Network, method: str, device: str, small: bool, steps: int) -> dict:
    """One treatment's row: `step` (seconds), `peak` (bytes, on a GPU), `pictures` of a step."""
    options = METHODS[method]
    with torch.device(device), made_in(torch.bfloat16):
        pipeline = network.build(small)
    side = 64 if small else network.side
    config = TreatConfig(
        method=method, steps=steps, batch_size=network.batch_size, height=side, width=side, precision="bf16",
        sampling_steps=4 if small else network.sampling_steps, guidance_scale=network.guidance,
        evaluate_every=0, evaluate_pictures=2, lora_targets=network.modules, micro_batch_size=4,
        **{"gradient_checkpointing": True, "text_encoders": "free"} | options,
    )  # fmt: skip
    detector = Watched(ArtifactDetector.of_size("b5").to(device) if not small else ArtifactDetector.tiny())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = treat(pipeline, detector, PROMPTS, config, progress=False, device=device)
    whole = time.perf_counter() - began
    # The fixed pictures are measured first and last; between are the steps', in equal numbers of calls.
    starts, seen = [], 0
    for moment, count in detector.moments:
        if count == config.evaluate_pictures:
            continue
        if seen % config.batch_size == 0:
            starts.append(moment)
        seen += count
    taken = [after - before for before, after in itertools.pairwise(starts)]
    return {
        "network": network.title,
        "method": method,
        "pictures": config.batch_size,
        "sampling_steps": config.sampling_steps,
        "step": min(taken[1:] or taken),
        "steps": taken,
        "whole": whole,
        "skipped": result.skipped,
        "losses": [entry["loss"] for entry in result.history],
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def markdown(rows: list[dict], headed: bool = True) -> str:
    """The rows as lines of a Markdown table."""
    lines = head("pipeline", "method", "pictures a step", "sampling steps", "a step", "peak memory") if headed else []
    for each in rows:
        peak = "" if each["peak"] is None else size(each["peak"])
        counts = f"{each['pictures']}", f"{each['sampling_steps']}"
        lines.append(row(each["network"], each["method"], *counts, f"{each['step']:.2f} s", peak))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where a treatment had to skip a step."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.treat_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="*", choices=tuple(NETWORKS), default=tuple(NETWORKS), help="which (all)")
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=tuple(METHODS), help="which (all)")
    parser.add_argument("--steps", type=int, default=4, help="of each treatment, at least 3 (4)")
    parser.add_argument("--small", action="store_true", help="tiny networks on the CPU: whether it runs, no figures")
    parser.add_argument("--output", type=Path, help="a JSON file for what was measured")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps: at least 3 was expected, got {options.steps}")
    device = "cpu" if options.small else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA device is needed, and torch finds none (--small runs on the CPU)")
    rows = []
    for name in options.networks:
        for method in options.methods:
            rows.append(measured(NETWORKS[name], method, device, options.small, options.steps))
            print(markdown(rows[-1:], headed=len(rows) == 1), flush=True)
            if options.output:
                atomic_write_json(options.output, {**machine.context(torch.device(device)), "rows": rows})
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return int(any(each["skipped"] for each in rows))


if __name__ == "__main__":
    sys.exit(main())
