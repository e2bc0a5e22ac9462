"""What both example trainers share: options, a LoRA, batches, checkpoints and validation pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader

from diffdoctor.maps import (
    MapDataset,
    PairedTransform,
    PictureRanking,
    StepBatches,
    aspect_buckets,
    check_maps,
    collate,
    read_folder,
    read_picture,
    write_ranking,
)
from diffdoctor.runs.files import atomic_dir, atomic_path

CHECKPOINT_NAME = "checkpoint.pt"


@dataclass
class TrainingConfig:
    """Options of both trainers.

    Attributes:
        model: folder or hub id of a diffusers pipeline.
        pictures: folder of pictures; captions in metadata.jsonl or in a .txt file beside each picture.
        output: folder for the LoRA, the checkpoint, the log and the validation pictures.
        maps: folder of confidence maps that mirrors `pictures`; None looks for <picture>.mask.png beside each picture.
        caption: of pictures that have none.
        size: side in pixels of the training crops.
        buckets: crop to the nearest of several aspects with about size * size pixels instead of to squares.
        flip: probability of a left-right mirror; 0 for lettering.
        steps: optimizer steps.
        batch_size: pictures of a micro-batch, per process.
        accumulate: micro-batches of an optimizer step.
        learning_rate: AdamW's.
        rank: of the LoRA.
        alpha: of the LoRA; None: the rank.
        targets: the ends of the names of the modules that get a LoRA.
        max_grad_norm: the gradient is clipped to this norm.
        mixed_precision: "no", "fp16" or "bf16".
        gradient_checkpointing: recompute activations in backward, to save memory.
        artifact_weight: loss weight where the map is 1; 0 keeps the model from learning what is broken there.
        clean_weight: loss weight where the map is 0.
        loss_type: l2, l1, huber, smooth_l1, pseudo_huber or log_cosh.
        normalize: "sample" divides each picture's loss by its mean spatial weight; None does not.
        log_every: steps between lines of the log.
        validation_prompt: drawn every validate_every steps with the same seed; None: never.
        validate_every: steps.
        validation_steps: denoising steps of a validation picture.
        checkpoint_every: steps.
        resume: from the output folder's checkpoint, where there is one.
        workers: processes that read pictures.
        seed: of everything that is drawn at random.
    """

    model: str
    pictures: str
    output: str
    maps: str | None = None
    caption: str = ""
    size: int = 512
    buckets: bool = False
    flip: float = 0.0
    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    artifact_weight: float = 0.0
    clean_weight: float = 1.0
    loss_type: str = "l2"
    normalize: str | None = None
    log_every: int = 10
    validation_prompt: str | None = None
    validate_every: int = 100
    validation_steps: int = 25
    checkpoint_every: int = 100
    resume: bool = False
    workers: int = 0
    seed: int = 0


def start(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run, with its tracker."""
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulate,
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=config.output,
    )
    accelerator.init_trackers("logs")
    set_seed(config.seed)  # the LoRA's first weights, alike in all processes
    return accelerator


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """What the weights that are not trained are kept in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def open_pipeline(config: TrainingConfig, accelerator: Accelerator) -> DiffusionPipeline:
    """The pipeline on the device, frozen."""
    dtype = frozen_dtype(accelerator)
    pipeline = DiffusionPipeline.from_pretrained(
        config.model, **({} if dtype == torch.float32 else {"torch_dtype": dtype})
    )
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if accelerator.mixed_precision == "fp16":
        pipeline.vae.float()  # SDXL's overflows in fp16
    return pipeline.to(accelerator.device)


def add_lora(denoiser, config: TrainingConfig) -> list[torch.nn.Parameter]:
    """Add a LoRA to the frozen denoiser; returns its parameters, in fp32."""
    alpha = config.rank if config.alpha is None else config.alpha
    denoiser.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.targets)))
    cast_training_params(denoiser)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def open_set(pictures: str, config: TrainingConfig, accelerator: Accelerator, maps: str | None = None) -> MapDataset:
    """The pictures of a folder with their maps; says what its maps look like."""
    records = read_folder(pictures, maps, caption=config.caption)
    accelerator.print(f"{pictures}: {len(records)} pictures;", check_maps(record.confidence for record in records))
    buckets = aspect_buckets(config.size**2, multiple=config.size // 8) if config.buckets else None
    transform = PairedTransform(config.size, buckets=buckets, flip=config.flip)
    return MapDataset(records, transform, seed=config.seed, check=False)


def open_loader(data: MapDataset, config: TrainingConfig, accelerator: Accelerator, first_step: int) -> DataLoader:
    """This process's batches from `first_step` to the end of the run."""
    batches = StepBatches(
        data,
        config.batch_size,
        config.steps * config.accumulate,
        start=first_step * config.accumulate,
        seed=config.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=config.workers)


def step_generator(config: TrainingConfig, accelerator: Accelerator, micro_step: int) -> torch.Generator:
    """Of a micro-step's noise and timesteps, from (seed, micro-step, process): a resumed run draws the same ones."""
    seed = np.random.SeedSequence([config.seed, micro_step, accelerator.process_index]).generate_state(1, np.uint64)
    return torch.Generator(accelerator.device).manual_seed(int(seed[0] >> np.uint64(1)))


def encode_captions(records, encode, accelerator: Accelerator) -> dict[str, dict[str, torch.Tensor]]:
    """The text encoders' output for each caption of the set, and for the empty one, kept on the CPU."""
    captions = sorted({record.caption for record in records} | {""})
    with torch.no_grad():
        return {caption: {name: value.cpu() for name, value in encode(caption).items()} for caption in captions}


def gather_captions(encoded, captions, device, dtype) -> dict[str, torch.Tensor]:
    """A batch of what `encode_captions` kept."""
    rows = [encoded[caption] for caption in captions]
    return {name: torch.cat([row[name] for row in rows]).to(device, dtype) for name in rows[0]}


def rank(ranking: PictureRanking, batch, stats, levels: torch.Tensor, weighting: torch.Tensor | None) -> None:
    """Add a micro-batch: each picture's mean loss where it may teach, and the flagged share of its crop.

    The loss is the one before `weighting` (B,): a prior picture would else differ from the others by its weight.
    """
    shares = (batch["confidence"] >= 0.5).float().flatten(1).mean(1)
    losses = stats.numerator / stats.weight_sum.clamp_min(1)
    ranking.update(batch["name"], losses if weighting is None else losses / weighting, shares, levels)


def gather_ranking(ranking: PictureRanking) -> PictureRanking:
    """What all processes have seen, on the main process; the others begin anew."""
    states = gather_object([ranking.state_dict()])
    return PictureRanking.merged(states if PartialState().is_main_process else ())


def save_ranking(config: TrainingConfig, ranking: PictureRanking) -> None:
    """Write ranking.parquet and ranking.html: the training pictures by their loss and artifact share."""
    write_ranking(config.output, ranking, lambda wanted: ((key, np.asarray(read_picture(key))) for key in wanted))


def save_checkpoint(config: TrainingConfig, step: int, denoiser, optimizer, schedule, ranking: PictureRanking) -> None:
    """Write all that a resumed run needs, whole or not at all."""
    state = {
        "step": step,
        "lora": get_peft_model_state_dict(denoiser),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "ranking": ranking.state_dict(),
    }
    with atomic_path(Path(config.output) / CHECKPOINT_NAME) as temporary:
        torch.save(state, temporary)


def load_checkpoint(config: TrainingConfig, denoiser, optimizer, schedule, ranking: PictureRanking) -> int:
    """Put a checkpoint's state back where it is asked for and there; returns the steps that are done."""
    path = Path(config.output) / CHECKPOINT_NAME
    if not config.resume or not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    set_peft_model_state_dict(denoiser, state["lora"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if PartialState().is_main_process:
        ranking.load_state_dict(state["ranking"])
    return state["step"]


def save_lora(pipeline, denoiser, config: TrainingConfig) -> None:
    """Write the LoRA for `pipeline.load_lora_weights(output)`."""
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(denoiser),
        # Without it, an alpha that is not the rank would be read back as the rank.
        f"{part}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
    }
    with atomic_dir(Path(config.output) / "lora") as temporary:
        pipeline.save_lora_weights(temporary, **layers)


@torch.no_grad()
def draw_validation(pipeline, config: TrainingConfig, accelerator: Accelerator, step: int, **options) -> None:
    """Draw the validation prompt, always from the same noise, into `validation/` and into the tracker."""
    generator = torch.Generator().manual_seed(config.seed)
    with accelerator.autocast():
        picture = pipeline(
            config.validation_prompt,
            num_inference_steps=config.validation_steps,
            height=config.size,
            width=config.size,
            generator=generator,
            **options,
        ).images[0]
    with atomic_path(Path(config.output) / "validation" / f"step_{step:06d}.png") as temporary:
        picture.save(temporary)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")


def log_stats(loss, stats, schedule, accelerator: Accelerator, step: int) -> dict[str, float]:
    """One line of the log. Reading the tensors is the only synchronisation with the device that logging costs."""
    line = {
        "loss": loss.item(),
        "loss_artifact": stats.loss_artifact.item(),
        "loss_clean": stats.loss_clean.item(),
        "artifact_share": stats.artifact_share.item(),  # 0: the map did nothing
        "nonfinite": stats.nonfinite.item(),
        "map_outside": stats.map_outside.item(),  # not 0: the maps are not in [0, 1]
        "learning_rate": schedule.get_last_lr()[0],
    }
    accelerator.log(line, step=step)
    return {"step": step, **line}
