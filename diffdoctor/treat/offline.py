"""The term of the treatment's loss that comes from the pipeline's own training pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from diffdoctor.data.pictures import to_images
from diffdoctor.detector.confidence import confidence_of
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Conditioning
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.sampling import Sampling


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


def offline_weight(config: TreatConfig) -> float:
    """The weight of the offline term in the loss: 1 where the method samples nothing, since it is all there is."""
    method = METHODS[config.method]
    return method.offline_weight if config.offline_weight is None or not method.samples else config.offline_weight


def checked_pairs(offline, config: TreatConfig) -> tuple[list[np.ndarray], list[str]] | None:
    """Pictures and prompts of the offline argument of `treat`, or None where the treatment has no use for them.

    Args:
        offline: (pictures uint8 (N, H, W, 3), prompts), or a sequence of dicts with "picture" (H, W, 3) uint8 and
            "prompt"; None: there are none.
        config: says whether they are needed.

    Raises:
        UserError: if they are needed and missing or empty, or the two differ in length.
    """
    optional = config.offline_weight is None and not METHODS[config.method].needs_pairs
    if offline_weight(config) == 0 or (offline is None and optional):
        return None
    if offline is None:
        raise UserError(expected("offline", "(pictures, prompts) pairs, since offline_weight > 0", None))
    if isinstance(offline, tuple):
        pictures, prompts = offline
        pictures, prompts = list(pictures), list(prompts)
    else:
        samples = [offline[i] for i in range(len(offline))]
        pictures, prompts = [s["picture"] for s in samples], [s["prompt"] for s in samples]
    if not pictures or len(pictures) != len(prompts):
        counts = f"{len(pictures)} and {len(prompts)}"
        raise UserError(expected("offline", "as many pictures as prompts, and at least one", counts))
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(expected("offline", "uint8 pictures (H, W, 3)", f"{picture.dtype} {picture.shape}"))
    return pictures, [str(prompt) for prompt in prompts]


@torch.no_grad()
def prepare_offline(
    sampling: Sampling,
    pairs: tuple[Sequence[np.ndarray], Sequence[str]],
    config: TreatConfig,
    *,
    height: int,
    width: int,
    device: torch.device,
    chunk: int,
) -> OfflinePairs:
    """Encode and diagnose the offline pairs.

    Args:
        sampling: its family encodes, its detector diagnoses.
        pairs: pictures uint8 (H, W, 3) and their prompts, from `checked_pairs`.
        config: of the masks.
        height: of the pictures, in pixels; those of another size are resized.
        width: as height.
        device: where the networks are.
        chunk: pictures at a time.
    """
    family, (pictures, prompts) = sampling.family, pairs
    names = sorted(set(prompts))
    row_of = {name: row for row, name in enumerate(names)}
    conditioning = family.encode_prompts(names, guidance_scale=1.0, height=height, width=width, device=device)
    latents, keep = [], []
    for start in range(0, len(pictures), chunk):
        batch = as_batch(pictures[start : start + chunk], height, width).to(device)
        latents.append(family.encode(batch).float().cpu())
        keep.append(keep_mask(sampling.detector, batch, config).cpu())
    masks = torch.cat(keep)
    if config.map_source == "shuffled":
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(config.seed))
        masks = masks[order]
    return OfflinePairs(torch.cat(latents), masks, torch.tensor([row_of[p] for p in prompts]), conditioning)


def offline_term(sampling: Sampling, pairs: OfflinePairs, *, draws: Sequence[int], total: int) -> torch.Tensor:
    """The denoising loss on some of the pairs, with a graph.

    Each draw chooses its own pair, time and noise, so that several processes together compute what one would.

    Args:
        sampling: its family predicts, its sampler says which times and targets.
        pairs: to choose from.
        draws: seeds, one per chosen pair.
        total: what the sum over the chosen pairs is divided by.
    """
    family = sampling.family
    device = next(family.denoiser.parameters()).device
    chosen, noise, uniform = [], [], []
    for seed in draws:
        generator = torch.Generator().manual_seed(seed)
        chosen.append(int(torch.randint(len(pairs), (), generator=generator)))
        noise.append(torch.randn(pairs.latents.shape[1:], generator=generator))
        uniform.append(torch.rand((), generator=generator))
    index = torch.tensor(chosen)
    latents, noise = pairs.latents[index].to(device), torch.stack(noise).to(device)
    model_input, timesteps, target = sampling.sampler.training_pair(latents, noise, torch.stack(uniform))
    inputs = pairs.conditioning.rows(pairs.rows[index]).positive
    prediction = family.run_denoiser(model_input, timesteps, inputs)
    mask = pairs.keep[index].to(device)
    loss = weighted_loss(prediction, target, mask=mask, reduction="sample")
    return loss.sum() / total


def keep_mask(detector, pictures: torch.Tensor, config: TreatConfig) -> torch.Tensor:
    """(B, 1, H, W), 0 where pictures (B, 3, H, W) are flagged, with a rim, and 1 where they may teach."""
    if config.map_source == "uniform":
        return torch.ones(len(pictures), 1, *pictures.shape[2:])
    flagged = (confidence_of(detector, pictures) >= config.offline_confidence).float()
    if config.offline_dilation:
        flagged = F.max_pool2d(flagged, 2 * config.offline_dilation + 1, 1, config.offline_dilation)
    return 1 - flagged


def as_batch(pictures: Sequence[np.ndarray], height: int, width: int) -> torch.Tensor:
    """Pictures uint8 (H, W, 3) as (B, 3, height, width) in [0, 1], resized where they are of another size."""
    batch = []
    for picture in pictures:
        image = to_images([np.asarray(picture)])
        if image.shape[2:] != (height, width):
            image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=True)
        batch.append(image)
    return torch.cat(batch)
