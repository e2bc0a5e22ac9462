"""What a treatment step keeps for backward grows with the steps that carry a gradient, not with the sampling steps."""

import pytest
import torch

from diffdoctor.demo.pipeline import build_pipeline
from diffdoctor.detector import ArtifactDetector
from diffdoctor.treat import TreatConfig
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora
from diffdoctor.treat.methods import kept_steps
from diffdoctor.treat.rollout import Guidance, initial_latents, picture_generators, roll_out
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import artifact_term

PICTURES = 4


class Ledger:
    """Bytes of the distinct storages saved for backward, parameters left out, by where they were saved."""

    def __init__(self, modules):
        parameters = (p for module in modules for p in (*module.parameters(), *module.buffers()))
        self.known = {p.untyped_storage().data_ptr() for p in parameters}
        self.kept = []
        self.bytes = {"denoiser": 0, "rest": 0}
        self.place = "rest"

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            # held on to, so that no address is given out twice
            self.kept.append(storage)
            self.bytes[self.place] += storage.nbytes()
        return tensor


@pytest.fixture(scope="module")
def bench():
    pipeline = build_pipeline(["a dot"])
    family = family_of(pipeline)
    add_lora(family, rank=16, alpha=16.0, groups=("attention", "convolution"), seed=0)
    return family, ArtifactDetector.tiny().eval().requires_grad_(False)


def saved_bytes(bench, method, grad_steps, steps):
    family, detector = bench
    cpu = torch.device("cpu")
    config = TreatConfig(method=method, grad_steps=grad_steps, replay_area=0.0)
    sampler = Sampler(family.pipeline.scheduler, device=cpu, timestep_options={"num_inference_steps": steps})
    conditioning = family.encode_prompts(["a dot"] * PICTURES, guidance_scale=1.0, height=16, width=16, device=cpu)
    generators = picture_generators(range(PICTURES))
    latents = initial_latents(family, sampler, generators, 16, 16, cpu, torch.float32)
    keep = kept_steps(method, grad_steps, steps)
    rollout = roll_out(family, sampler, conditioning, latents, generators, Guidance(), keep=keep)
    ledger = Ledger((family.denoiser, family.vae, detector))
    own = family.denoise

    def denoise(*args):
        ledger.place = "denoiser"
        try:
            return own(*args)
        finally:
            ledger.place = "rest"

    family.denoise = denoise
    try:
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda tensor: tensor):
            artifact_term(
                family, sampler, rollout, torch.ones(PICTURES, 1, 16, 16), detector, Guidance(), config,
                total=PICTURES, generator=torch.Generator().manual_seed(0), seeds=range(PICTURES),
            )  # fmt: skip
    finally:
        del family.denoise
    return ledger.bytes


def test_a_replay_of_three_steps_keeps_a_third(bench):
    few, all_steps = (saved_bytes(bench, method, 3, 10) for method in ("draft_k", "full"))
    assert few["denoiser"] <= 0.31 * all_steps["denoiser"]
    assert sum(few.values()) <= 0.45 * sum(all_steps.values())


def test_more_sampling_steps_keep_no_more(bench):
    ten, forty = (sum(saved_bytes(bench, "draft_k", 3, steps).values()) for steps in (10, 40))
    assert forty == pytest.approx(ten, rel=0.02)
