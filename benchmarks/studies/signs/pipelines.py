"""The untreated pipelines: a U-Net with v-prediction and a flow-matching transformer, trained on clean signs alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from benchmarks.studies.signs import world
from benchmarks.studies.signs.oracle import read_signs
from benchmarks.studies.signs.parts import Parts, cpu_seconds, record_of
from diffdoctor.runs.progress import progress

KINDS = ("sd", "flux")
SAMPLING_STEPS = 10
BATCH = {"sd": 32, "flux": 64}
TRIED, TRIED_SEED = 300, 6_000_000
"""Signs by which it is decided whether a pipeline has learnt enough, and the first one's seed."""


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """What decides the untreated pipelines.

    Args:
        seed: of signs, weights, batches and noise.
        signs: clean ones to train on.
        autoencoder_steps: of 16 signs; both pipelines share the autoencoder.
        sd_legs: (steps, peak learning rate) of each leg of the U-Net's training, at 32 signs a step. Chosen so that
            half of what the first seed's draws is broken.
        flux_legs: of the transformer's, at 64 signs a step. Chosen likewise.
        further_leg: of either, taken as often as more than `until` of `TRIED` signs that it draws are broken, since
            seeds differ in how soon they have learnt letters.
        until: see there.
        most_further: how often at most.
    """

    seed: int = 0
    signs: int = 6000
    autoencoder_steps: int = 1200
    sd_legs: tuple[tuple[int, float], ...] = ((2000, 2e-3), (400, 1e-3))
    flux_legs: tuple[tuple[int, float], ...] = ((3000, 2e-3),)
    further_leg: tuple[int, float] = (500, 1e-3)
    until: float = 0.65
    most_further: int = 12

    def clean(self) -> world.Signs:
        """What the pipelines are trained on, and the pairs of a treatment."""
        return world.draw_signs(self.signs, self.seed)


def autoencoder(parts: Parts, settings: BaseSettings) -> Path:
    """The folder of the trained autoencoder."""
    names = ("seed", "signs", "autoencoder_steps")

    def make(folder):
        from diffdoctor.demo.pipeline import train_autoencoder

        pipeline = untrained(settings)
        steps = settings.autoencoder_steps
        with progress(steps, desc="autoencoder") as bar:
            options = {"steps": steps, "seed": settings.seed, "on_step": lambda *_: bar.update()}
            train_autoencoder(pipeline, settings.clean().pictures, **options)
        pipeline.vae.save_pretrained(folder / "vae")

    return parts.made("autoencoder", {name: getattr(settings, name) for name in names}, make) / "vae"


def base_pipeline(parts: Parts, settings: BaseSettings, kind: str) -> Path:
    """The folder of a trained pipeline, one of `KINDS`."""
    vae, folder = autoencoder(parts, settings), None
    legs = getattr(settings, f"{kind}_legs")
    for number, (steps, rate) in enumerate((*legs, *[settings.further_leg] * settings.most_further)):
        if number >= len(legs) and _broken(parts, kind, folder) <= settings.until:
            break
        folder = _leg(parts, settings, kind, vae, folder, steps, rate, settings.seed + 1000 * number)
    return folder


def _broken(parts, kind, folder) -> float:
    """The share of broken ones of `TRIED` signs that a pipeline draws, of seeds that serve nothing else."""

    def make(_):
        return {"broken": read_signs(draw(loaded(folder), kind, TRIED, TRIED_SEED, f"{kind} tried")).rate()}

    needs = {"pipeline": folder.parent.name, "count": TRIED, "first": TRIED_SEED}
    return record_of(parts.made(f"{kind}-tried", needs, make))["broken"]


def _leg(parts, settings, kind, vae, before, steps, rate, seed) -> Path:
    needs = {"seed": seed, "signs": settings.signs, "steps": steps, "rate": rate}
    needs |= {"autoencoder": vae.parent.name, "before": None if before is None else before.parent.name}

    def make(folder):
        if before is not None:
            pipeline = loaded(before)
        else:
            pipeline = untrained(settings, vae)
            if kind == "flux":
                from diffdoctor.demo.flow_pipeline import build_flow_pipeline

                pipeline = build_flow_pipeline(world.PROMPTS, pipeline.vae, seed=settings.seed)
        training = train_on(pipeline, kind, settings.clean(), steps, seed=seed, learning_rate=rate)
        pipeline.save_pretrained(folder / "pipeline")
        return training

    return parts.made(f"{kind}-pipeline", needs, make) / "pipeline"


def loaded(folder: Path):
    """A stored pipeline."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def step_seconds(base: Path) -> float:
    """CPU seconds that one step of a base pipeline's training took."""
    return record_of(base.parent)["step_cpu_seconds"]


def train_on(pipeline, kind: str, clean: world.Signs, steps: int, **options) -> dict:
    """Train a pipeline's denoiser on clean signs in place.

    Args:
        pipeline: of the kind.
        kind: one of `KINDS`.
        clean: the signs.
        steps: of the optimizer.
        **options: of `train_base` and `train_flow`, such as seed and learning_rate.

    Returns:
        {"steps", "losses" (every hundredth), "step_cpu_seconds"}.
    """
    from diffdoctor.demo.flow_pipeline import train_flow
    from diffdoctor.demo.pipeline import train_base

    train = train_base if kind == "sd" else train_flow
    with cpu_seconds() as cost, progress(steps, desc=f"{kind} pipeline") as bar:
        options |= {"steps": steps, "batch_size": BATCH[kind], "on_step": lambda *_: bar.update()}
        trained = train(pipeline, clean.pictures, clean.prompts, **options)
    return {"steps": steps, "losses": trained.losses[::100], "step_cpu_seconds": cost["cpu_seconds"] / steps}


def call_options(kind: str) -> dict:
    """How a pipeline is called: ten steps, no guidance scale, the signs' size."""
    options = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": 1.0}
    options |= {"height": world.HEIGHT, "width": world.WIDTH}
    if kind == "flux":
        from diffdoctor.demo.flow_pipeline import MAX_SEQUENCE_LENGTH

        options["max_sequence_length"] = MAX_SEQUENCE_LENGTH
    return options


def prompts_of(count: int) -> list[str]:
    """What is asked for: every colour as often as any other."""
    return [world.PROMPTS[index % len(world.PROMPTS)] for index in range(count)]


def draw(
    pipeline, kind: str, count: int, first_seed: int, name: str, *, steps: int | None = None, batch_size: int = 100
) -> torch.Tensor:
    """Pictures (count, 3, 16, 40) uint8 of `prompts_of(count)`, picture i from the seed first_seed + i."""
    from diffdoctor.evaluate.model import sample_pictures

    seeds = range(first_seed, first_seed + count)
    options = call_options(kind) | ({} if steps is None else {"num_inference_steps": steps})
    return sample_pictures(pipeline, prompts_of(count), seeds, batch_size=batch_size, desc=name, **options)


def untrained(settings: BaseSettings, vae: Path | None = None):
    """The U-Net's pipeline before its training, with the autoencoder of a folder, or untrained too."""
    from diffusers import AutoencoderKL

    from diffdoctor.demo.pipeline import build_pipeline

    pipeline = build_pipeline(world.PROMPTS, picture_size=(world.HEIGHT, world.WIDTH), seed=settings.seed)
    if vae is not None:
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False))
    return pipeline
