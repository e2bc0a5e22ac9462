"""The term of the treatment's loss that comes from sampled and diagnosed pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffdoctor.training.ema import RunningAverage
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.methods import METHODS, Replay
from diffdoctor.treat.rollout import Rollout
from diffdoctor.treat.sampling import Sampling


def pictures_to_replay(confidence: torch.Tensor, config: TreatConfig) -> torch.Tensor:
    """Indices (M,) of the pictures whose maps (B, 1, H, W), of videos (B, 1, T, H, W), show enough to treat."""
    share = (confidence >= config.replay_confidence).flatten(1).float().mean(1)
    return torch.nonzero(share >= config.replay_area).flatten()


def artifact_term(
    sampling: Sampling,
    rollout: Rollout,
    confidence: torch.Tensor,
    config: TreatConfig,
    *,
    total: int,
    generator: torch.Generator,
    seeds: Sequence[int],
    old: RunningAverage,
    initial: RunningAverage,
) -> tuple[float, int]:
    """Replay the diagnosed pictures and run backward.

    The sum over pictures is divided by `total`, so that several processes add up to what one would compute. With
    map_source "shuffled" picture i is replayed when its partner is diagnosed, and receives the partner's map and the
    partner's gradient at the decoded picture. With "uniform" every map is replaced by its mean.

    Args:
        sampling: as in the roll-out.
        rollout: of B pictures.
        confidence: (B, 1, H, W), the roll-out's diagnosis.
        config: names the method.
        total: pictures of the step over all processes.
        generator: of the method's random choices, the same on every process.
        seeds: of the B pictures.
        old: see `Replay`.
        initial: see `Replay`.

    Returns:
        The loss, and how many pictures were replayed.
    """
    chosen, divisor = pictures_to_replay(confidence, config), total
    if len(chosen) == 0:
        if not sampling.family.is_sharded:
            return 0.0, 0
        # every process must call a sharded denoiser equally often: one picture goes along, and counts for nothing
        chosen, divisor = torch.zeros(1, dtype=torch.long), math.inf
    partners = None
    if config.map_source == "shuffled":
        shift = int(torch.randint(1, max(2, len(confidence)), (), generator=generator))
        partners, chosen = chosen, (chosen + shift) % len(confidence)
    if config.map_source == "uniform":
        confidence = confidence.mean(tuple(range(2, confidence.ndim)), keepdim=True).expand_as(confidence)
    batch = Replay(
        sampling,
        rollout,
        config,
        index=chosen,
        confidence=sampling.family.maps_for_latents(confidence[chosen if partners is None else partners]),
        generator=generator,
        seeds=[seeds[i] for i in chosen.tolist()],
        divisor=divisor,
        old=old,
        initial=initial,
        partners=None if partners is None else rollout.final[partners],
    )
    loss = METHODS[config.method].run(batch)
    return loss, 0 if math.isinf(divisor) else len(chosen)
