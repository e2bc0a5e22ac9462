"""Which device and which processes: an accelerator that is there may be forbidden, and may be too few."""

import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.training.devices import accelerator_count, open_device_at
from diffdoctor.training.processes import process_state


@pytest.fixture
def one_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.usefixtures("one_accelerator")
def test_accelerates_variable_keeps_everything_on_the_cpu(monkeypatch):
    assert accelerator_count() == 1
    assert open_device_at(None, 3) == torch.device("cuda", 0)
    for value in ("true", "1", "YES"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
        assert accelerator_count() == 0
        assert open_device_at(None, 3) == torch.device("cpu")
        assert process_state().device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert accelerator_count() == 1


@pytest.mark.usefixtures("one_accelerator")
def test_more_processes_than_accelerators_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"processes: expected at most as many .* accelerators, 1 .*, got 2"):
        process_state()
