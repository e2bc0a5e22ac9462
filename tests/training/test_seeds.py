"""Seeds of torch's random numbers: those of the caller's GPUs are left alone."""

import contextlib

import pytest
import torch

from diffdoctor.detector import train_detector
from diffdoctor.training.seeds import seed_device, seeded
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora
from support.detector import fresh, quick, shapes
from support.tiny_pipelines import tiny_pipeline


@pytest.fixture
def seeded_gpus(monkeypatch):
    """The indices of the GPUs that are seeded, as this happens; None stands for all of them."""
    found, current = [], [0]

    @contextlib.contextmanager
    def on(device):
        current.append(device.index or 0)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: found.append(current[-1]))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: found.append(None))
    return found


def test_the_numbers_are_those_of_torchs_own_seed(seeded_gpus):
    before = torch.random.get_rng_state()
    with seeded(5):
        found = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seeded_gpus == []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), found)


def test_one_gpu_is_seeded_and_no_other(seeded_gpus):
    with torch.random.fork_rng(devices=[]):
        seed_device(5, torch.device("cuda", 1))
        found = torch.rand(3)
        seed_device(5, torch.device("cpu"))
        assert torch.equal(torch.rand(3), found)
    assert seeded_gpus == [1]


def test_a_new_lora_and_a_training_on_the_cpu_seed_no_gpu(seeded_gpus):
    pipeline, detector = tiny_pipeline("sd"), fresh()
    seeded_gpus.clear()
    add_lora(family_of(pipeline), rank=2, alpha=2, groups=("attention",), seed=3)
    train_detector(quick(steps=1), shapes(), detector=detector, progress=False, device="cpu")
    assert seeded_gpus == []
