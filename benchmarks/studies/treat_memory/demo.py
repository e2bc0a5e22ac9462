"""The demo's untrained pipeline, really run: bytes and seconds of a step, case by case."""

from __future__ import annotations

import contextlib
import statistics
import time

import torch

from benchmarks.studies.treat_memory.counting import Alive, Kept
from diffdoctor.demo.pipeline import build_pipeline
from diffdoctor.detector import ArtifactDetector
from diffdoctor.training.ema import RunningAverage
from diffdoctor.treat import TreatConfig
from diffdoctor.treat.adapters import merged_adapters
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.prepare import memory_options
from diffdoctor.treat.rollout import initial_latents, picture_generators, roll_out
from diffdoctor.treat.sampling import Sampling
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import artifact_term

PICTURES = 8


class Step:
    """One replay with its backward, of `PICTURES` pictures of the demo's untrained pipeline."""

    def __init__(self, sampling_steps=10, **options):
        self.config = TreatConfig(replay_area=0.0, log_with="none", sampling_steps=sampling_steps, **options)
        self.family = family_of(build_pipeline(["a dot"]))
        self.parameters = add_lora(self.family, rank=16, alpha=16.0, groups=("attention", "convolution"), seed=0)
        self.old = RunningAverage(self.parameters, float(METHODS[self.config.method].has_old))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.detector = ArtifactDetector.tiny().eval().requires_grad_(False)
        family, cpu = self.family, torch.device("cpu")
        schedule = {"num_inference_steps": sampling_steps}
        sampler = Sampler(family.pipeline.scheduler, device=cpu, timestep_options=schedule)
        self.sampling = Sampling(family, sampler, detector=self.detector)
        self.conditioning = family.encode_prompts(
            ["a dot"] * PICTURES, guidance_scale=1.0, height=16, width=16, device=cpu
        )
        self.draw()

    def draw(self):
        """Roll out and diagnose."""
        config = self.config
        generators = picture_generators(range(PICTURES))
        latents = initial_latents(self.sampling, generators, 16, 16, torch.device("cpu"), torch.float32)
        keep = METHODS[config.method].checkpointed_steps(config, range(config.sampling_steps), torch.Generator())
        with merged_adapters(self.family):
            rollout = roll_out(self.sampling, self.conditioning, latents, generators, keep=keep)
        self.sampling.diagnose(rollout.final)
        self.rollout = rollout

    def run(self):
        """Replay and backward."""
        artifact_term(
            self.sampling,
            self.rollout,
            torch.ones(PICTURES, 1, 16, 16),
            self.config,
            total=PICTURES,
            generator=torch.Generator().manual_seed(0),
            seeds=range(PICTURES),
            old=self.old,
            initial=RunningAverage(self.parameters, 0),
        )

    def measured(self) -> dict:
        """{"kept": bytes by place, "peak": bytes}."""
        with memory_options(self.family, self.config, self.detector):
            kept = Kept((self.family.denoiser, self.family.vae, self.detector))
            with _booked(kept, self.family, self.detector), kept.hooks():
                self.run()
            with Alive() as alive:
                self.run()
        return {"kept": kept.worst, "peak": alive.peak}

    def gradient(self) -> torch.Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        with memory_options(self.family, self.config, self.detector):
            self.run()
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters])


@contextlib.contextmanager
def _booked(kept, family, detector):
    family.denoise, family.decode = kept.at("denoiser", family.denoise), kept.at("vae", family.decode)
    detector.forward = kept.at("detector", detector.forward)
    try:
        yield
    finally:
        del family.denoise, family.decode, detector.forward


CASES = {
    "full": {"method": "full"},
    "draft_k": {},
    "draft_k, vae_slicing": {"vae_slicing": True},
    "draft_k, gradient_checkpointing": {"gradient_checkpointing": True},
    "draft_k, both": {"vae_slicing": True, "gradient_checkpointing": True},
    "nft": {"method": "nft"},
    "nft, gradient_checkpointing": {"method": "nft", "gradient_checkpointing": True},
}


def demo_table(repeats: int) -> list[dict]:
    """Bytes and seconds of every case, seconds interleaved over the cases."""
    steps = {name: Step(grad_steps=3, **options) for name, options in CASES.items()}
    forty = Step(40, grad_steps=3)
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 1 if repeats else 0):
        for name, step in steps.items():
            with memory_options(step.family, step.config, step.detector):
                started = time.perf_counter()
                step.draw()
                step.run()
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
    plain = steps["draft_k"].gradient()
    rows = []
    for name, step in steps.items():
        row = {"case": name, **step.measured(), "seconds": statistics.median(seconds[name]) if repeats else None}
        if name.startswith("draft_k,"):
            row["gradient_difference"] = float((step.gradient() - plain).norm() / plain.norm())
        rows.append(row)
    return [*rows, {"case": "draft_k, 40 sampling steps", **forty.measured(), "seconds": None}]
