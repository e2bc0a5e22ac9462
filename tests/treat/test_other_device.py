"""Treatments on another device than the CPU: nothing stays behind there, and the losses are the same."""

import pytest
import torch

import diffdoctor
from diffdoctor.treat import treat
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
