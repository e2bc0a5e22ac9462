"""What is refused before a treatment spends time on it."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import torch

from diffdoctor.detector.confidence import check_finite_weights
from diffdoctor.detector.external import has_gradient, same_detector
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.processes import Processes
from diffdoctor.training.weights import same_weights
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Family
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.quantization import has_quantized
from diffdoctor.treat.sampling import Sampling

logger = logging.getLogger(__name__)


def check_pipeline(family: Family) -> None:
    """Refuse a pipeline that moves its own parts about.

    Raises:
        UserError: if offloading hooks or a device map are in place.
    """
    parts = [part for part in family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    if getattr(family.pipeline, "hf_device_map", None) or any(hasattr(part, "_hf_hook") for part in parts):
        raise UserError("pipeline: offloading or a device map is in place; load it without: treat() places its parts")


def check_detectors(detector: torch.nn.Module, monitor: torch.nn.Module | None, config: TreatConfig) -> None:
    """Refuse weights that are not finite, and a monitor that is the detector: it would see what the detector sees.

    Args:
        detector: steers the treatment.
        monitor: watches it, or None.
        config: names the method.

    Raises:
        UserError: if one is broken, both have the same weights, rounding aside, or the method needs a gradient that the
            detector does not have.
    """
    if METHODS[config.method].needs_gradient and not has_gradient(detector):
        others = ", ".join(name for name, method in METHODS.items() if not method.needs_gradient)
        what = f"a detector with a gradient for method {config.method} ({others} need none)"
        raise UserError(expected("detector", what, "a function of pictures"))
    check_finite_weights(detector.state_dict(), "detector")
    if monitor is None:
        return
    check_finite_weights(monitor.state_dict(), "monitor")
    if same_weights(monitor, detector) or same_detector(monitor, detector):
        raise UserError(expected("monitor", "a detector with other weights", "those of the detector"))


def check_start(lora: str | Path | None, config: TreatConfig) -> None:
    """Refuse options of a new LoRA where a treatment begins with one that is there.

    Raises:
        UserError: names the first of them.
    """
    if lora is None:
        return
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("rank", "alpha", "lora_targets") and value != field.default:
            raise UserError(expected(field.name, "none with lora, whose own is kept", repr(value)))


def check_reward(reward, config: TreatConfig) -> None:
    """Refuse a reward that would have no effect.

    Raises:
        UserError: for another method than grpo.
    """
    if reward is not None and not METHODS[config.method].draws_groups:
        raise UserError(expected("reward", f"none with method {config.method}, since grpo alone has one", "a function"))


_REPLAYING = ("draft_k", "draft_lv", "drtune", "full", "leap")
# The methods with which an option acts, where these are not all.
_ACTING = {
    "grad_steps": ("draft_k", "drtune"),
    "leap_discount": ("leap",),
    **dict.fromkeys(("artifact_grad", "clean_grad", "modulate", "artifact_threshold", "artifact_method"), _REPLAYING),
    **dict.fromkeys(("old_decay", "nft_clean", "nft_artifact", "nft_repeats", "anchor_weight"), ("nft",)),
    **dict.fromkeys(("group_size", "grpo_window", "grpo_eta", "grpo_updates", "grpo_clip", "grpo_level"), ("grpo",)),
    **dict.fromkeys(("kl_weight", "reward_weight"), ("grpo",)),
}


def warn_of_idle_options(config: TreatConfig) -> None:
    """Warn of options that were given and do not act with the method, such as a `kl_weight` that holds nothing.

    Args:
        config: as it was asked for.
    """
    defaults = {field.name: field.default for field in fields(config)}
    given = [name for name in _ACTING if getattr(config, name) != defaults[name]]
    if idle := [name for name in given if config.method not in _ACTING[name]]:
        logger.warning("options without effect with method %s: %s", config.method, ", ".join(idle))


def check_negative_prompt(family: Family, prompt: str | None, guidance_scale: float) -> None:
    """Refuse a negative prompt that would have no effect.

    Raises:
        UserError: if the family takes none, or none is used at this guidance scale.
    """
    if prompt is None:
        return
    if not family.takes_negative_prompt:
        name = type(family.pipeline).__name__
        raise UserError(expected("negative_prompt", f"none, since {name} makes no negative prediction", repr(prompt)))
    if not family.uses_negative(guidance_scale):
        least = 0 if family.uses_negative(1.0) else 1
        what = f"a guidance_scale above {least} with it, since {guidance_scale} makes no negative prediction"
        raise UserError(expected("negative_prompt", what, repr(prompt)))


def check_second_scale(family: Family, guidance_scale_2: float | None) -> None:
    """Refuse a second denoiser's guidance scale where there is no second denoiser.

    Raises:
        UserError: if there is none.
    """
    if guidance_scale_2 is not None and len(family.denoisers) < 2:
        what = f"none, since {type(family.pipeline).__name__} has one denoiser here"
        raise UserError(expected("guidance_scale_2", what, guidance_scale_2))


def check_own_steps(sampling: Sampling, config: TreatConfig) -> None:
    """Refuse a method that has no step to teach the denoiser that is tuned, where there are two.

    Raises:
        UserError: says which, and how many steps there would have to be.
    """
    own, steps = sampling.own_steps, len(sampling.sampler)
    if len(own) == steps:
        return
    least = {"leap": 2, "weighted": 0, "nft": 0}.get(config.method, 1)
    found = [step for step in own if step < steps - 1] if config.method == "grpo" else own
    if len(found) < least:
        what = f"so many that at least {least} are the tuned denoiser's for method {config.method}"
        raise UserError(expected("sampling_steps", what, f"{steps}, of which {len(found)} are"))
    if config.method == "draft_lv" and own[-1] != steps - 1:
        raise UserError(expected("denoiser", "low with method draft_lv, which teaches the last step", config.denoiser))


def check_finite(family: Family, values: torch.Tensor, what: str, latents: torch.Tensor | None = None) -> None:
    """Refuse a pipeline whose untreated model gives values that are not finite, and say which part does.

    Args:
        family: of the pipeline.
        values: what came out of the VAE.
        what: what the VAE was doing, in words.
        latents: what went in, where the denoiser made it.

    Raises:
        UserError: if values are not finite.
    """
    if bool(torch.isfinite(values).all()):
        return
    dtype = str(next(family.vae.parameters()).dtype).removeprefix("torch.")
    if latents is not None and not bool(torch.isfinite(latents).all()):
        raise UserError(
            "pipeline: the untreated denoiser draws latents that are not finite; try precision fp32 or bf16, "
            "and load the weights in such a dtype"
        )
    advice = "load the VAE in float32" if dtype == "float16" else "its weights may be broken"
    raise UserError(f"pipeline: the VAE {what} with values that are not finite in {dtype}: {advice}")


def check_resident_blocks(family: Family, config: TreatConfig, sharded: bool) -> None:
    """Refuse `resident_blocks` where weights cannot be taken out of the denoiser's layers.

    Args:
        family: whose denoisers these are.
        config: the options.
        sharded: whether FSDP spreads the weights.

    Raises:
        UserError: it does, or a denoiser is quantized.
    """
    if config.resident_blocks is None:
        return
    if sharded:
        raise UserError(expected("resident_blocks", "None with FSDP", config.resident_blocks))
    if any(map(has_quantized, family.denoisers)):
        raise UserError(expected("resident_blocks", "None with a denoiser that is quantized", config.resident_blocks))


def check_partners(config: TreatConfig, processes: Processes, chunk: int) -> None:
    """With shuffled maps, no picture may be worked on alone: it would keep its own map.

    Args:
        config: of the treatment.
        processes: that share a batch.
        chunk: pictures that a process works on at a time.

    Raises:
        UserError: some process has one picture left over.
    """
    if config.map_source != "shuffled" or METHODS[config.method].run is None:
        return
    shares = [len(range(rank, config.batch_size, processes.count)) for rank in range(processes.count)]
    if any(share and (chunk == 1 or share % chunk == 1) for share in shares):
        name = "batch_size" if config.micro_batch_size is None else "micro_batch_size"
        what = "with shuffled maps no picture alone at a time, which would keep its own map"
        raise UserError(expected(name, what, f"{chunk} at a time of {min(shares)} on a process"))


def check_even_batches(family: Family, config: TreatConfig, processes: Processes) -> None:
    """With a sharded denoiser every process must have equally many pictures.

    Raises:
        UserError: if a batch cannot be dealt out evenly, there are two denoisers, or one is quantized.
    """
    if has_quantized(family.denoiser):
        raise UserError(expected("FSDP", "a denoiser that is not quantized", "one that is"))
    if len(family.denoisers) > 1:
        what = "a pipeline with one denoiser, since two are not called equally often"
        raise UserError(expected("FSDP", what, type(family.pipeline).__name__))
    for name in ("batch_size", "offline_batch_size"):
        value, unit = getattr(config, name), 1
        if name == "batch_size" and METHODS[config.method].draws_groups:
            unit = config.group_size
        if value is not None and value % (processes.count * unit):
            what = f"with FSDP a multiple of the {processes.count} processes"
            raise UserError(expected(name, what if unit == 1 else f"{what} times group_size {unit}", value))
