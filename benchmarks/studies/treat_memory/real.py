"""Networks of a real size without their weights: shapes alone go through them (meta tensors), or random weights."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.studies.treat_memory.counting import Alive, Kept
from diffdoctor.detector import ArtifactDetector
from diffdoctor.ops.policy_loss import policy_loss
from diffdoctor.ops.target import Target
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.treat.prepare import recompute

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
"""What the autoencoders of Stable Diffusion, SDXL and FLUX.1 have in common."""


@contextlib.contextmanager
def made_in(dtype):
    """Inside, parameters are made in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _stable_diffusion(dtype):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with made_in(dtype):
        denoiser = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(**VAE)

    def predict(latents):
        timesteps = torch.full((len(latents),), 500)
        hidden = torch.randn(len(latents), 77, 768, dtype=latents.dtype)
        return denoiser(latents, timesteps, hidden, return_dict=False)[0]

    return denoiser, vae, predict, (4, 64, 64), ("to_q", "to_k", "to_v", "to_out.0")


def _flux(dtype):
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from diffdoctor.ops.layout import Packed

    with made_in(dtype):
        denoiser = FluxTransformer2DModel()
    vae = AutoencoderKL(latent_channels=16, **VAE)

    def predict(latents):
        layout = Packed(*latents.shape[2:])
        tokens = denoiser(
            hidden_states=layout.pack(latents),
            encoder_hidden_states=torch.randn(len(latents), 512, 4096, dtype=latents.dtype),
            pooled_projections=torch.randn(len(latents), 768, dtype=latents.dtype),
            timestep=torch.full((len(latents),), 0.5, dtype=latents.dtype),
            txt_ids=torch.zeros(512, 3),
            img_ids=torch.zeros(layout.tokens, 3),
            return_dict=False,
        )[0]
        return layout.unpack(tokens)

    return denoiser, vae, predict, (16, 128, 128), ("to_q", "to_k", "to_v", "to_out.0")


REAL = {
    "sd": ("Stable Diffusion 1.5, 512 x 512, 10 sampling steps", _stable_diffusion, torch.float16, 10, 3),
    "flux": ("FLUX.1, 1024 x 1024, 4 sampling steps", _flux, torch.bfloat16, 4, 1),
}
"""Name -> (title, function that builds it, dtype of the denoiser, sampling steps, steps with a gradient)."""


def real_rows(name: str, device: str = "meta", repeats: int = 3) -> Iterator[dict]:
    """One replay of one picture through a network of `REAL`, for each way to save: `real_step`'s row of each."""
    title, build, dtype, steps, grad_steps = REAL[name]
    cases = {
        "full": (steps, "kl", False, False),
        f"draft_k, K = {grad_steps}": (grad_steps, "kl", False, False),
        "+ denoiser checkpointed": (grad_steps, "kl", True, False),
        "+ denoiser and VAE checkpointed": (grad_steps, "kl", True, True),
        "+ both, VAE in tiles of 256": (grad_steps, "tiles", True, True),
        "+ the same, detector checkpointed": (grad_steps, "tiles", True, True, True),
        "+ both, a quarter of the tiles alone": (grad_steps, "flagged", True, True),
        "+ denoiser checkpointed, a tiny VAE": (grad_steps, "tiny", True, False),
        "leap, denoiser and VAE checkpointed": (2, "kl", True, True),
        "nft": (1, "nft", False, False),
        "nft, denoiser checkpointed": (1, "nft", True, False),
        "grpo, denoiser checkpointed": (1, "grpo", True, False),
    }
    for case, options in cases.items():
        started = time.perf_counter()
        row = {"network": title, "case": case, **real_step(build, dtype, *options, device=device, repeats=repeats)}
        print(f"{title}: {case}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        yield row


def real_step(
    build,
    dtype,
    count,
    decoder,
    denoiser_checkpointed,
    vae_checkpointed,
    detector_checkpointed=False,
    *,
    device: str = "meta",
    repeats: int = 3,
) -> dict:
    """count denoiser passes, decoder (fp32) and detector (SegFormer-b5, fp32) of one picture, with their backward.

    Where the decoder is "nft" or "grpo" it is a step of that method, which has none: for nft a pass for the old
    prediction, for both one with a graph, and the loss.

    Returns:
        `peak` (bytes of new tensors alive at once) and `operations` (floating-point operations). Of shapes alone also
        `kept` (bytes for backward by place, at the worst moment); on a CUDA device, whose `peak` is what torch's
        allocator handed out beyond the weights, `seconds`, the median of the repeats. Where the GPU's memory is too
        small, `error` alone.
    """
    options = (count, decoder, denoiser_checkpointed, vae_checkpointed, detector_checkpointed)
    with torch.device(device):
        if device == "meta":
            return _counted(*_prepared(build, dtype, *options))
        try:
            return _measured(*_prepared(build, dtype, *options), repeats)
        except torch.OutOfMemoryError as error:
            return {"error": str(error).split(". ")[0]}
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def _prepared(build, dtype, count, decoder, denoiser_checkpointed, vae_checkpointed, detector_checkpointed):
    """The denoiser, what counts the bytes kept, and the step."""
    from diffusers import AutoencoderTiny
    from peft import LoraConfig

    denoiser, vae, predict, shape, targets = build(dtype)
    if decoder == "tiny":
        vae = AutoencoderTiny(latent_channels=shape[0])
    detector = ArtifactDetector.of_size("b5").eval().requires_grad_(False)
    vae.requires_grad_(False)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=16, target_modules=list(targets)))
    if denoiser_checkpointed:
        denoiser.enable_gradient_checkpointing()
    if vae_checkpointed:
        vae.enable_gradient_checkpointing()
    if detector_checkpointed:
        for part in detector.recomputable():
            recompute(part)
    if decoder in ("tiles", "flagged"):
        _in_tiles(vae, 256, flagged=0.25 if decoder == "flagged" else 1.0)
    kept = Kept((denoiser, vae, detector))

    def nft_step():
        noisy, clean, noise = (torch.randn(1, *shape, dtype=dtype) for _ in range(3))
        with torch.no_grad():
            old = predict(noisy)
        prediction = kept.at("denoiser", predict)(noisy)
        target = Target.contrastive(Target.flow(clean, noise), old)
        weighted_loss(prediction, target, torch.zeros(1, 1, *shape[1:]), artifact_weight=1.0).backward()

    def grpo_step():
        before, after = (torch.randn(1, *shape, dtype=dtype) for _ in range(2))
        prediction = kept.at("denoiser", predict)(before)
        advantage = torch.zeros(1, 1, *shape[1:])
        policy_loss(prediction, before, after, None, advantage, coefs=(1.0, -0.1, 0.2)).backward()

    def replay_step():
        latents = torch.randn(1, *shape, dtype=dtype)
        for _ in range(count):
            latents = latents - 0.1 * kept.at("denoiser", predict)(latents)
        ends = latents.detach().float().requires_grad_()
        pictures = kept.at("vae", vae.decode)(ends, return_dict=False)[0]
        logits = kept.at("detector", detector)(pictures / 2 + 0.5)
        logits.sigmoid().mean().backward()
        latents.backward(ends.grad.to(dtype))

    return denoiser, kept, {"nft": nft_step, "grpo": grpo_step}.get(decoder, replay_step)


def _counted(denoiser, kept, step) -> dict:
    # One after the other: the counter of operations leaves tensors in cycles, alive until the collector comes by.
    with _fused_attention(), FlopCounterMode(display=False) as operations:
        step()
    denoiser.zero_grad()
    gc.collect()
    with _fused_attention(), Alive() as alive, kept.hooks():
        step()
    return {"kept": kept.worst, "peak": alive.peak, "operations": operations.get_total_flops()}


def _measured(denoiser, _, step, repeats) -> dict:
    with FlopCounterMode(display=False) as operations:
        step()
    peaks, taken = [], []
    for _ in range(repeats):
        denoiser.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return {"peak": max(peaks), "operations": operations.get_total_flops(), "seconds": statistics.median(taken)}


@contextlib.contextmanager
def _fused_attention():
    """Memory-efficient attention, as a GPU takes it; without it a meta tensor's attention keeps all its weights."""

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        return attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
        yield


def _in_tiles(vae, pixels, flagged):
    """Recompute the decoder tile by tile in backward, as `vae_tiling` does; a share of the tiles carries a graph."""
    from torch.utils.checkpoint import checkpoint

    vae.use_tiling, scale = True, 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = pixels, pixels // scale
    forward, calls = vae.decoder.forward, []

    def tile(latents, *rest):
        calls.append(1)
        if len(calls) % round(1 / flagged):
            with torch.no_grad():
                return forward(latents, *rest)
        return checkpoint(forward, latents, *rest, use_reentrant=False)

    vae.decoder.forward = tile
