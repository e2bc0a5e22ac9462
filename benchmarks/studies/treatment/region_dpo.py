"""Diffusion-DPO on the damaged regions of pairs, the recipe of docs/trainers.md, on a study's pipeline."""

from __future__ import annotations

import time

import numpy as np
import torch

from diffdoctor import dpo_loss, weighted_loss
from diffdoctor.demo import data as demo_data
from diffdoctor.detector.damage.injection import inject
from diffdoctor.runs.progress import progress
from diffdoctor.training.ema import RunningAverage
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora, save_lora
from diffdoctor.treat.schedulers import Sampler

STEPS, BATCH, LEARNING_RATE, BETA = 200, 32, 2e-4, 500.0


def injected_pairs(known: demo_data.DemoData, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """The undamaged training pictures, the same with damage, its masks (N, H, W), and the prompts."""
    clean = known.where(~known.damaged)
    rng = np.random.default_rng([seed, 17])
    options = {"visible": demo_data.VISIBLE, "attempts": 64}
    damaged, masks = np.empty_like(clean.pictures), np.empty_like(clean.masks)
    for i, picture in enumerate(clean.pictures):
        kinds = [demo_data.DETECTOR_KINDS[rng.integers(len(demo_data.DETECTOR_KINDS))]]
        made = inject(picture, rng, kinds, demo_data.STRENGTH, demo_data.AREA, **options)
        damaged[i], masks[i] = made.picture, made.mask
    return clean.pictures, damaged, masks, [demo_data.prompt_of(int(digit)) for digit in clean.digits]


@torch.no_grad()
def _latents(family, pictures: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return torch.cat([family.encode(part) for part in images.split(256)])


def train(
    pipeline,
    known: demo_data.DemoData,
    folder,
    *,
    seed: int,
    sampling_steps: int,
    max_sequence_length: int | None = None,
    steps: int = STEPS,
) -> dict:
    """Tune a LoRA, which stays in the pipeline and is written to the folder; {"seconds", "losses"}."""
    started = time.perf_counter()
    family, cpu = family_of(pipeline), torch.device("cpu")
    family.max_sequence_length = max_sequence_length
    clean, damaged, masks, prompts = injected_pairs(known, seed)
    pair = [_latents(family, pictures) for pictures in (clean, damaged)]
    regions = torch.from_numpy(masks)[:, None]
    names = sorted(set(prompts))
    rows = torch.tensor([names.index(prompt) for prompt in prompts])
    size = {"height": demo_data.SIDE, "width": demo_data.SIDE}
    text = family.encode_prompts(names, guidance_scale=1.0, device=cpu, **size)
    sampler = Sampler(
        pipeline.scheduler, device=cpu, timestep_options=family.timestep_options(sampling_steps, *size.values())
    )
    parameters = add_lora(family, rank=16, alpha=16.0, groups=list(family.lora_targets), seed=seed)
    reference = RunningAverage(parameters, 1.0)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []

    def region_losses(index, noise, uniform):
        for latents in pair:
            model_input, timesteps, target = sampler.training_pair(latents[index], noise, uniform)
            prediction = family.predict(model_input, timesteps, text.rows(rows[index]), 1.0, "both")
            yield weighted_loss(prediction, target, mask=regions[index], normalize="sample", reduction="sample")

    with progress(steps, desc="region dpo") as bar:
        for _ in range(steps):
            index = torch.randint(len(rows), (BATCH,), generator=generator)
            noise = torch.randn(BATCH, *pair[0].shape[1:], generator=generator)
            drawn = (index, noise, torch.rand(BATCH, generator=generator))
            with torch.no_grad(), reference.in_place():
                before = list(region_losses(*drawn))
            loss = dpo_loss(*region_losses(*drawn), *before, beta=BETA)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=losses[-1])
            bar.update()
    save_lora(family, folder)
    return {"seconds": time.perf_counter() - started, "losses": losses}
