"""Treatments on another device than the CPU: nothing stays behind there, and the losses are the same."""

import contextlib

import diffusers
import pytest
import torch

import diffdoctor
import support.other_device
from diffdoctor.treat import treat
from diffdoctor.treat.schedulers import Sampler
from support.other_device import There, other_device
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import pairs, random_detector, small


def test_tensors_of_two_devices_refuse_each_other():
    with other_device() as device:
        leaf = torch.arange(3.0, device=device).requires_grad_()
        loss = (leaf * torch.tensor([1.0, 2.0, 3.0]).to(device) * torch.tensor(2.0)).sum()  # one number may be anywhere
        loss.backward()
        assert isinstance(loss, There)
        assert loss.device == device
        assert loss.item() == 16.0
        assert leaf.grad.cpu().tolist() == [2.0, 4.0, 6.0]
        first = leaf.detach()[:1]
        first.fill_(9.0)
        assert leaf.tolist() == [9.0, 1.0, 2.0]
        for meet in (lambda: leaf + torch.ones(3), lambda: torch.cat([leaf, torch.ones(3)])):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                meet()
        with pytest.raises(TypeError, match="to numpy"):
            leaf.detach().numpy()
        with pytest.raises(ValueError, match="confidence: expected a tensor on model_pred's device"):
            diffdoctor.weighted_loss(
                leaf.view(1, 1, 1, 3), torch.ones(1, 1, 1, 3).to(device), torch.ones(1, 1, 3), artifact_weight=2.0
            )


def losses(name, method, device):
    options = {"group_size": 3} if method == "grpo" else {"grad_steps": 2} if method == "leap" else {}
    config = small(method=method, **options)
    result = treat(
        tiny_pipeline(name), random_detector(), PROMPTS, config, offline=pairs(), progress=False, device=device
    )
    return [row["loss"] for row in result.history]


@pytest.mark.parametrize(
    ("name", "method"),
    [("sd", "draft_k"), ("sd", "nft"), ("sd", "grpo"), ("sd", "weighted"), ("flux", "leap"), ("wan", "grpo")],
)
def test_a_treatment_keeps_nothing_on_the_cpu(name, method):
    with other_device() as device:
        found = losses(name, method, str(device))
    assert found == pytest.approx(losses(name, method, "cpu"), rel=1e-5)


def test_guidance_takes_a_detector_from_the_cpu():
    found = []
    for place in (contextlib.nullcontext("cpu"), other_device()):
        pipeline, detector = tiny_pipeline("sd"), random_detector()
        pipeline.set_progress_bar_config(disable=True)
        with place as device:
            pipeline.to(device)
            with diffdoctor.guide(pipeline, detector, height=16, width=16, rewinds=1) as log:
                generator = torch.Generator().manual_seed(0)
                pipeline(PROMPTS[0], num_inference_steps=3, height=16, width=16, generator=generator, output_type="pt")
        found.append((log.flagged_area, log.final_area))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["DDIM", "DDPM", "LCM", "TCD", "EulerDiscrete", "FlowMatchEulerDiscrete"])
def test_a_step_does_not_wait_for_the_device(monkeypatch, kind):
    called, dispatch = [], support.other_device._dispatch

    def recorded(function, args, kwargs):
        if any(isinstance(x, There) for x in args):
            called.append(function)
        return dispatch(function, args, kwargs)

    monkeypatch.setattr(support.other_device, "_dispatch", recorded)
    with other_device() as device:
        options = {"timestep_options": {"num_inference_steps": 3}}
        sampler = Sampler(getattr(diffusers, f"{kind}Scheduler")(), device=device, **options)
        assert isinstance(sampler.timesteps, There)
        called.clear()
        latents = torch.ones(1, 4, 4, 4).to(device)
        for step in range(3):
            generators = [torch.Generator().manual_seed(step)]
            latents = sampler.step(sampler.scale_input(latents, step), step, latents, generators)
            clean = sampler.denoised(latents, step, latents)
            latents = sampler.renoised(clean, sampler.noise_of(clean, latents, step), step)
    assert isinstance(latents, There)
    assert torch.ops.aten.mul.Tensor in called
    assert torch.ops.aten._local_scalar_dense.default not in called
