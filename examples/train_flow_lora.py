"""Train a LoRA of Stable Diffusion 3 or FLUX by flow matching, each pixel weighted by a confidence map.

    python examples/train_flow_lora.py --model black-forest-labs/FLUX.1-dev --mixed_precision bf16 \
        --pictures set --maps maps --output runs/lora --artifact_weight 0 \
        --prior_pictures class --prior_caption "a photo of a dog" --prior_loss_weight 1

FLUX predicts packed tokens; the loss reads them as they are. `accelerate launch` in place of `python` uses several
devices. Needs `pip install '.[stages]'`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

# Before torch is imported: beside another program on the same cores, spinning threads make a step 5 to 10 times slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from lora_training import (
    TrainingConfig,
    add_lora,
    draw_validation,
    encode_captions,
    frozen_dtype,
    gather_captions,
    gather_ranking,
    load_checkpoint,
    log_stats,
    open_loader,
    open_pipeline,
    open_set,
    rank,
    save_checkpoint,
    save_lora,
    save_ranking,
    start,
    step_generator,
)
from tqdm.auto import tqdm

import diffdoctor
from diffdoctor.maps import PictureRanking


@dataclass
class FlowConfig(TrainingConfig):
    """Options that only flow-matching pipelines have.

    Attributes:
        weighting_scheme: of the noise levels: none, logit_normal, mode (how they are drawn), sigma_sqrt or cosmap (how
            they are weighted).
        shift: of the drawn noise levels towards more noise; None: what the pipeline's scheduler has.
        guidance_scale: that FLUX-dev is told; it has no other guidance.
        max_sequence_length: tokens of a caption for the T5 encoder.
        prior_pictures: folder of class pictures for prior preservation; a batch is then half of them.
        prior_caption: their prompt.
        prior_loss_weight: how much their loss counts.
    """

    weighting_scheme: str = "logit_normal"
    shift: float | None = None
    guidance_scale: float = 1.0
    max_sequence_length: int = 256
    prior_pictures: str | None = None
    prior_caption: str = ""
    prior_loss_weight: float = 1.0


def is_flux(pipeline) -> bool:
    """Whether the transformer takes packed tokens."""
    return "Flux" in type(pipeline.transformer).__name__


def encode(pipeline, caption: str, config: FlowConfig) -> dict[str, torch.Tensor]:
    """Prompt embeddings (1, tokens, dim) and pooled ones (1, dim)."""
    options = {"device": pipeline.text_encoder.device, "max_sequence_length": config.max_sequence_length}
    if is_flux(pipeline):
        prompt_embeds, pooled, _ = pipeline.encode_prompt(caption, None, **options)
    else:
        options["do_classifier_free_guidance"] = False
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(caption, None, None, **options)
    return {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled}


def draw_sigmas(count: int, config: FlowConfig, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (count,) in (0, 1], shifted as the scheduler shifts those it samples with."""
    u = compute_density_for_timestep_sampling(
        config.weighting_scheme, count, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, device=generator.device,
        generator=generator,
    )  # fmt: skip
    return shift * u / (1 + (shift - 1) * u)


def predict(transformer, pipeline, noisy_latents, sigmas, conditions, config: FlowConfig):
    """The model's prediction and the layout that it comes in (None: like the latents)."""
    timesteps, layout = sigmas * 1000, None
    if is_flux(pipeline):
        height, width = noisy_latents.shape[2:]
        layout = diffdoctor.Packed(height, width)
        tokens = layout.pack(noisy_latents)
        device, dtype = tokens.device, tokens.dtype
        conditions["img_ids"] = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, dtype)
        conditions["txt_ids"] = torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype)
        if pipeline.transformer.config.guidance_embeds:
            conditions["guidance"] = torch.full_like(sigmas, config.guidance_scale)
        noisy_latents, timesteps = tokens, sigmas
    return transformer(noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0], layout


def flow_loss(transformer, pipeline, batch, encoded, config: FlowConfig, accelerator, generator, ranking):
    """The weighted loss of one micro-batch, and its `LossStats`."""
    device, dtype, vae = accelerator.device, frozen_dtype(accelerator), pipeline.vae
    with torch.no_grad():
        latents = vae.encode(batch["pixel_values"].to(device, vae.dtype)).latent_dist.sample(generator)
        latents = (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, device=device, generator=generator)
    shift = pipeline.scheduler.config.shift if config.shift is None else config.shift
    sigmas = draw_sigmas(len(latents), config, shift, generator)
    blend = sigmas.view(-1, 1, 1, 1)
    noisy_latents = (1 - blend) * latents + blend * noise

    conditions = gather_captions(encoded, batch["caption"], device, dtype)
    with accelerator.autocast():
        model_pred, layout = predict(transformer, pipeline, noisy_latents.to(dtype), sigmas, conditions, config)

    weighting = compute_loss_weighting_for_sd3(config.weighting_scheme, sigmas)
    if config.prior_pictures is not None:
        prior = diffdoctor.prior_preservation_weights(len(latents), config.prior_loss_weight, device)
        weighting = weighting * prior
    loss, stats = diffdoctor.weighted_loss(
        model_pred,
        diffdoctor.Target.flow(latents, noise),
        batch["confidence"].to(device),
        weighting=weighting,
        artifact_weight=config.artifact_weight,
        clean_weight=config.clean_weight,
        loss_type=config.loss_type,
        normalize=config.normalize,
        layout=layout,
        return_stats=True,
    )
    rank(ranking, batch, stats, sigmas, weighting)
    return loss, stats


def open_batches(data, prior, config: FlowConfig, accelerator, first_step: int):
    """Batches of the set; with prior preservation, each followed by as many class pictures."""
    batches = open_loader(data, config, accelerator, first_step)
    if prior is None:
        yield from batches
        return
    for batch, prior_batch in zip(batches, open_loader(prior, config, accelerator, first_step), strict=True):
        yield {
            name: value + prior_batch[name] if isinstance(value, list) else torch.cat([value, prior_batch[name]])
            for name, value in batch.items()
        }


def train(config: FlowConfig) -> list[dict[str, float]]:
    """Train; returns the lines of the log. The LoRA lies in `<output>/lora`."""
    if config.buckets and config.prior_pictures is not None:
        raise ValueError("buckets: expected False with prior_pictures, whose batches must have one size, got True")
    accelerator = start(config)
    pipeline = open_pipeline(config, accelerator)
    transformer = pipeline.transformer
    parameters = add_lora(transformer, config)
    data, prior = open_set(config.pictures, config, accelerator, config.maps), None
    if config.prior_pictures is not None:
        prior = open_set(config.prior_pictures, dataclasses.replace(config, caption=config.prior_caption), accelerator)
    records = [*data.records, *(prior.records if prior is not None else [])]
    encoded = encode_captions(records, lambda caption: encode(pipeline, caption, config), accelerator)

    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.steps // 20)
    ranking = PictureRanking()
    first_step = load_checkpoint(config, transformer, optimizer, schedule, ranking)
    model, optimizer = accelerator.prepare(transformer, optimizer)

    step, history = first_step, []
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    batches = open_batches(data, prior, config, accelerator, first_step)
    for micro_step, batch in enumerate(batches, start=first_step * config.accumulate):
        with accelerator.accumulate(model):
            generator = step_generator(config, accelerator, micro_step)
            loss, stats = flow_loss(model, pipeline, batch, encoded, config, accelerator, generator, ranking)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        step += 1
        bar.update()
        if step % config.log_every == 0 or step == config.steps:
            history.append(log_stats(loss, stats, schedule, accelerator, step))
            bar.set_postfix(loss=history[-1]["loss"], artifact_share=history[-1]["artifact_share"])
        due = step % config.checkpoint_every == 0 or step == config.steps
        if due:
            ranking = gather_ranking(ranking)
        if accelerator.is_main_process:
            if due:
                save_checkpoint(config, step, transformer, optimizer, schedule, ranking)
            if config.validation_prompt is not None and (step % config.validate_every == 0 or step == config.steps):
                options = {"guidance_scale": config.guidance_scale, "max_sequence_length": config.max_sequence_length}
                draw_validation(pipeline, config, accelerator, step, **options)
    if accelerator.is_main_process:
        save_lora(pipeline, transformer, config)
        save_ranking(config, ranking)
    accelerator.end_training()
    return history


if __name__ == "__main__":
    from jsonargparse import auto_cli

    train(auto_cli(FlowConfig, as_positional=False))
