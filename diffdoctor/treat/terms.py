"""The terms of the treatment's loss: of sampled and diagnosed pictures, and of the pipeline's own training pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.processes import seed_of
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.drawing import Drawing, Purpose, chunks
from diffdoctor.treat.lora_training import LoraTraining
from diffdoctor.treat.methods import METHODS, Replay
from diffdoctor.treat.offline import OfflinePairs, Seen, offline_term, offline_weight
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


def sampled_term(drawing: Drawing, training: LoraTraining, step: int) -> tuple[float, int]:
    """Draw this process's pictures of a step, diagnose them, and run backward through those to replay.

    Args:
        drawing: draws and diagnoses, by the treatment's options.
        training: of the LoRA.
        step: of the treatment, from 0.

    Returns:
        The loss, and how many pictures were replayed.
    """
    config, sampling = drawing.config, drawing.sampling
    method, seed = METHODS[config.method], seed_of(config.seed, Purpose.METHOD, step)
    keep = method.checkpointed_steps(config, sampling.own_steps, torch.Generator().manual_seed(seed))
    loss, replayed = 0.0, 0
    for numbers in chunks(drawing.processes.share(config.batch_size), drawing.chunk):
        seeds = [seed_of(config.seed, Purpose.PICTURES, step, i) for i in numbers]
        rows = [drawing.prompt_row(step * config.batch_size + i) for i in numbers]
        rollout = drawing.roll_out(rows, seeds, keep)
        confidence = drawing.diagnose(rollout)[1]  # the pictures are not kept during the replay
        part, count = artifact_term(
            sampling,
            rollout,
            confidence,
            config,
            total=config.batch_size,
            # the method's choices are those of the step, whatever the part of the batch
            generator=torch.Generator().manual_seed(seed),
            seeds=seeds,
            old=training.old,
            initial=training.initial,
        )
        loss, replayed = loss + part, replayed + count
    return loss, replayed


def paired_term(drawing: Drawing, pairs: OfflinePairs, step: int, seen: Seen) -> float:
    """Run backward through the denoising loss on this process's pairs of a step, at its weight.

    Args:
        drawing: says by which options and processes.
        pairs: to choose from.
        step: of the treatment, from 0.
        seen: see `offline_term`.

    Returns:
        The loss, not yet weighted.
    """
    config = drawing.config
    total = config.batch_size if config.offline_batch_size is None else config.offline_batch_size
    value = 0.0
    for numbers in chunks(drawing.processes.share(total), config.micro_batch_size or total):
        draws = [seed_of(config.seed, Purpose.PAIRS, step, i) for i in numbers]
        loss = offline_term(drawing.sampling, pairs, draws=draws, total=total, seen=seen)
        (offline_weight(config) * loss).backward()
        value += float(loss.detach())
    return value
