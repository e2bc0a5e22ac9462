"""Train a LoRA of Stable Diffusion or SDXL on pictures with captions, each pixel weighted by a confidence map.

    python examples/train_text_to_image_lora.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --pictures set --maps maps --output runs/lora --artifact_weight 0 --snr_gamma 5

`accelerate launch` in place of `python` uses several devices. Needs `pip install '.[stages]'`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

# Before torch is imported: beside another program on the same cores, spinning threads make a step 5 to 10 times slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
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
class TextToImageConfig(TrainingConfig):
    """Options that only UNet pipelines have.

    Attributes:
        snr_gamma: min-SNR weighting (5 is usual); None: every timestep counts alike.
        caption_dropout: share of pictures that are trained on without their caption, for classifier-free guidance.
    """

    snr_gamma: float | None = None
    caption_dropout: float = 0.1


def encode(pipeline, caption: str) -> dict[str, torch.Tensor]:
    """Prompt embeddings (1, tokens, dim), and SDXL's pooled ones (1, dim)."""
    device = pipeline.text_encoder.device
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    encoded = pipeline.encode_prompt(caption, **options)
    return {"prompt_embeds": encoded[0]} | ({"text_embeds": encoded[2]} if len(encoded) == 4 else {})


def denoising_loss(unet, vae, scheduler, batch, encoded, config, accelerator, generator, ranking):
    """The weighted loss of one micro-batch, and its `LossStats`."""
    device, dtype = accelerator.device, frozen_dtype(accelerator)
    with torch.no_grad():
        posterior = vae.encode(batch["pixel_values"].to(device, vae.dtype)).latent_dist
        latents = posterior.sample(generator).float() * vae.config.scaling_factor
    noise = torch.randn(latents.shape, device=device, generator=generator)
    timesteps = torch.randint(len(scheduler), (len(latents),), device=device, generator=generator)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    dropped = torch.rand(len(latents), device=device, generator=generator) < config.caption_dropout
    captions = ["" if drop else caption for caption, drop in zip(batch["caption"], dropped.tolist(), strict=True)]
    conditions = gather_captions(encoded, captions, device, dtype)
    prompt_embeds = conditions.pop("prompt_embeds")
    if conditions:  # SDXL
        sizes = [batch[name] for name in ("original_size", "crop_top_left", "target_size")]
        conditions["time_ids"] = torch.cat(sizes, dim=1).to(device, dtype)
    with accelerator.autocast():
        model_pred = unet(
            noisy_latents.to(dtype), timesteps, prompt_embeds, added_cond_kwargs=conditions or None, return_dict=False
        )[0]

    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    prediction_type = scheduler.config.prediction_type
    weighting = None
    if config.snr_gamma is not None:
        weighting = diffdoctor.snr_weights(timesteps, alphas_cumprod, config.snr_gamma, prediction_type)
    target = {
        "epsilon": lambda: noise,
        "sample": lambda: latents,
        "v_prediction": lambda: diffdoctor.Target.velocity(latents, noise, alphas_cumprod[timesteps]),
    }[prediction_type]()
    loss, stats = diffdoctor.weighted_loss(
        model_pred,
        target,
        batch["confidence"].to(device),
        weighting=weighting,
        artifact_weight=config.artifact_weight,
        clean_weight=config.clean_weight,
        loss_type=config.loss_type,
        normalize=config.normalize,
        return_stats=True,
    )
    rank(ranking, batch, stats, timesteps / len(scheduler), weighting)
    return loss, stats


def train(config: TextToImageConfig) -> list[dict[str, float]]:
    """Train; returns the lines of the log. The LoRA lies in `<output>/lora`."""
    accelerator = start(config)
    pipeline = open_pipeline(config, accelerator)
    unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    parameters = add_lora(unet, config)
    data = open_set(config.pictures, config, accelerator, config.maps)
    encoded = encode_captions(data.records, lambda caption: encode(pipeline, caption), accelerator)

    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.steps // 20)
    ranking = PictureRanking()
    first_step = load_checkpoint(config, unet, optimizer, schedule, ranking)
    model, optimizer = accelerator.prepare(unet, optimizer)
    loader = open_loader(data, config, accelerator, first_step)

    step, history = first_step, []
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    for micro_step, batch in enumerate(loader, start=first_step * config.accumulate):
        with accelerator.accumulate(model):
            generator = step_generator(config, accelerator, micro_step)
            parts = (model, pipeline.vae, scheduler, batch, encoded, config, accelerator, generator, ranking)
            loss, stats = denoising_loss(*parts)
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
                save_checkpoint(config, step, unet, optimizer, schedule, ranking)
            if config.validation_prompt is not None and (step % config.validate_every == 0 or step == config.steps):
                draw_validation(pipeline, config, accelerator, step)
    if accelerator.is_main_process:
        save_lora(pipeline, unet, config)
        save_ranking(config, ranking)
    accelerator.end_training()
    return history


if __name__ == "__main__":
    from jsonargparse import auto_cli

    train(auto_cli(TextToImageConfig, as_positional=False))
