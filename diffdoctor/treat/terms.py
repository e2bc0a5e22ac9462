"""The two terms of the treatment's loss: the diagnosed pictures, and the pipeline's own training pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from diffdoctor.data.pictures import to_images
from diffdoctor.ops import GradientModulator, artifact_loss, weighted_loss
from diffdoctor.runs.errors import UserError
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Conditioning, Family
from diffdoctor.treat.methods import FINAL_LATENTS, LV_REPEATS, Replay
from diffdoctor.treat.rollout import Guidance, Rollout
from diffdoctor.treat.schedulers import Sampler


class StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient passes where the value was outside.

    Without it a pixel that the decoder puts slightly above white or below black could not be treated at all.
    """

    @staticmethod
    def forward(ctx, pictures):
        return pictures.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@torch.no_grad()
def diagnose(family: Family, detector, latents: torch.Tensor, chunk: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, H, W) in [0, 1] of latents (B, C, h, w), and their confidence maps (B, 1, H, W)."""
    pictures = torch.cat([family.decode(part).float().clamp(0, 1) for part in latents.split(chunk or len(latents))])
    confidence = torch.cat([detector.confidence(part) for part in pictures.split(chunk or len(pictures))])
    return pictures, confidence


def picture_loss(detector, pictures: torch.Tensor, config: TreatConfig) -> torch.Tensor:
    """The artifact loss (B,) of pictures (B, 3, H, W), not yet clamped."""
    logits = detector(StraightThroughClamp.apply(pictures.float()))
    return artifact_loss(
        logits,
        size=tuple(pictures.shape[-2:]),
        threshold=config.artifact_threshold,
        method=config.artifact_method,
        reduction="sample",
    )


def pictures_to_replay(confidence: torch.Tensor, config: TreatConfig) -> torch.Tensor:
    """Indices (M,) of the pictures whose maps (B, 1, H, W) show enough to treat."""
    share = (confidence >= config.replay_confidence).flatten(1).float().mean(1)
    return torch.nonzero(share >= config.replay_area).flatten()


def artifact_term(
    family: Family,
    sampler: Sampler,
    rollout: Rollout,
    confidence: torch.Tensor,
    detector,
    guidance: Guidance,
    config: TreatConfig,
    *,
    total: int,
    generator: torch.Generator,
    seeds: Sequence[int],
) -> tuple[float, int]:
    """Replay the diagnosed pictures and run backward; returns the loss and how many were replayed.

    The sum over pictures is divided by `total`, the number of pictures over all processes, so that several processes
    add up to what one would compute. With map_source "shuffled" picture i is replayed when its partner is diagnosed,
    and receives the partner's map and the partner's gradient at the decoded picture.

    Args:
        confidence: (B, 1, H, W), the roll-out's diagnosis.
        generator: of the method's random choices, the same on every process.
        seeds: of the B pictures.
    """
    chosen = pictures_to_replay(confidence, config)
    share = total * (LV_REPEATS if config.method == "draft_lv" else 1)
    if len(chosen) == 0:
        if not family.is_sharded:
            return 0.0, 0
        # every process must call a sharded denoiser equally often: one picture goes along, and counts for nothing
        chosen, share = torch.zeros(1, dtype=torch.long), math.inf
    partners = None
    if config.map_source == "shuffled":
        shift = int(torch.randint(1, max(2, len(confidence)), (), generator=generator))
        partners, chosen = chosen, (chosen + shift) % len(confidence)
    modulator = None
    if config.modulate != "none":
        modulator = GradientModulator(artifact_grad=config.artifact_grad, clean_grad=config.clean_grad)
        modulator.set(confidence[chosen if partners is None else partners])
    own_seeds = [seeds[i] for i in chosen.tolist()]
    batch = Replay(family, sampler, rollout, guidance, chosen, config.modulate, modulator, generator, own_seeds)
    loss = 0.0
    for latents in FINAL_LATENTS[config.method](batch, config.grad_steps):
        sources = None if partners is None else rollout.final[partners]
        gradient, value = _latents_gradient(family, detector, latents.detach(), sources, config, share)
        latents.backward(gradient)
        loss += value
    return loss, 0 if math.isinf(share) else len(chosen)


def _latents_gradient(family, detector, latents, sources, config, share) -> tuple[torch.Tensor, float]:
    """Loss and gradient at final latents (M, C, h, w), so that the decoder's graph is gone before the denoiser's is
    used; with vae_slicing picture by picture. Where `sources` (M, C, h, w) are given their pictures' gradient is taken.
    """
    ends = latents.requires_grad_()
    loss = 0.0
    for rows in torch.arange(len(ends)).split(1 if config.vae_slicing else len(ends)):
        pictures = family.decode(ends[rows[0] : rows[-1] + 1])
        if sources is None:
            term = picture_loss(detector, pictures, config).sum() / share
            term.backward()
            loss += float(term.detach())
        else:
            gradient, value = _partners_gradient(family, detector, sources[rows[0] : rows[-1] + 1], config)
            pictures.backward(gradient.to(pictures.dtype) / share)
            loss += value / share
    return ends.grad, loss


def _partners_gradient(family, detector, latents, config) -> tuple[torch.Tensor, float]:
    with torch.no_grad():
        pictures = family.decode(latents)
    pictures = pictures.detach().float().requires_grad_()
    value = picture_loss(detector, pictures, config).sum()
    return torch.autograd.grad(value, pictures)[0], float(value.detach())


@dataclass
class OfflinePairs:
    """The pipeline's own (picture, prompt) pairs, encoded and diagnosed once and kept.

    Attributes:
        latents: (N, C, h, w).
        keep: (N, 1, H, W), 1 where the training picture may teach, 0 where it is flagged.
        rows: (N,) the row of `conditioning` of each pair's prompt.
        conditioning: of the distinct prompts, without guidance.
    """

    latents: torch.Tensor
    keep: torch.Tensor
    rows: torch.Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.latents)


def pairs_of(offline) -> tuple[list[np.ndarray], list[str]]:
    """Pictures and prompts of the offline argument of `treat`.

    Args:
        offline: (pictures uint8 (N, H, W, 3), prompts), or a sequence of dicts with "picture" (H, W, 3) uint8 and
            "prompt".

    Raises:
        UserError: if it is empty or the two differ in length.
    """
    if isinstance(offline, tuple):
        pictures, prompts = offline
        pictures, prompts = list(pictures), list(prompts)
    else:
        samples = [offline[i] for i in range(len(offline))]
        pictures, prompts = [s["picture"] for s in samples], [s["prompt"] for s in samples]
    if not pictures or len(pictures) != len(prompts):
        raise UserError(f"offline: as many pictures as prompts were expected, got {len(pictures)} and {len(prompts)}")
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(f"offline: uint8 pictures (H, W, 3) were expected, got {picture.dtype} {picture.shape}")
    return pictures, [str(prompt) for prompt in prompts]


@torch.no_grad()
def prepare_offline(
    family: Family, detector, offline, config: TreatConfig, height: int, width: int, device: torch.device, chunk: int
) -> OfflinePairs:
    """Encode and diagnose the offline pairs; pictures of another size are resized to height x width pixels."""
    pictures, prompts = pairs_of(offline)
    names = sorted(set(prompts))
    place = {name: row for row, name in enumerate(names)}
    conditioning = family.encode_prompts(names, guidance_scale=1.0, height=height, width=width, device=device)
    latents, keep = [], []
    for start in range(0, len(pictures), chunk):
        batch = _as_batch(pictures[start : start + chunk], height, width).to(device)
        latents.append(family.encode(batch).float().cpu())
        keep.append(_teachable(detector, batch, config).cpu())
    masks = torch.cat(keep)
    if config.map_source == "shuffled":
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(config.seed))
        masks = masks[order]
    return OfflinePairs(torch.cat(latents), masks, torch.tensor([place[p] for p in prompts]), conditioning)


def offline_term(
    family: Family, sampler: Sampler, pairs: OfflinePairs, config: TreatConfig, *, draws: Sequence[int], total: int
) -> torch.Tensor:
    """The denoising loss on the pairs that the seeds `draws` choose, summed and divided by `total` pairs.

    Each draw chooses its own pair, time and noise, so that several processes together compute what one would.
    """
    device = next(family.denoiser.parameters()).device
    chosen, noise, uniform = [], [], []
    for seed in draws:
        generator = torch.Generator().manual_seed(seed)
        chosen.append(int(torch.randint(len(pairs), (), generator=generator)))
        noise.append(torch.randn(pairs.latents.shape[1:], generator=generator))
        uniform.append(torch.rand((), generator=generator))
    index = torch.tensor(chosen)
    latents, noise = pairs.latents[index].to(device), torch.stack(noise).to(device)
    model_input, timesteps, target = sampler.training_pair(latents, noise, torch.stack(uniform))
    inputs = pairs.conditioning.rows(pairs.rows[index]).positive
    prediction = family.run_denoiser(model_input, timesteps, inputs)
    mask = pairs.keep[index].to(device)
    loss = weighted_loss(prediction, target, mask=mask, reduction="sample")
    return loss.sum() / total


def _as_batch(pictures, height, width) -> torch.Tensor:
    batch = []
    for picture in pictures:
        image = to_images([np.asarray(picture)])
        if image.shape[2:] != (height, width):
            image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=True)
        batch.append(image)
    return torch.cat(batch)


def _teachable(detector, pictures, config) -> torch.Tensor:
    if config.map_source == "uniform":
        return torch.ones(len(pictures), 1, *pictures.shape[2:])
    flagged = (detector.confidence(pictures) >= config.offline_confidence).float()
    if config.offline_dilation:
        flagged = F.max_pool2d(flagged, 2 * config.offline_dilation + 1, 1, config.offline_dilation)
    return 1 - flagged
