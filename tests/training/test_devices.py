"""Which device and which processes: an accelerator that is there may be forbidden, and may be too few."""

from types import SimpleNamespace

import accelerate
import pytest
import torch

from diffdoctor.detector.commands import inject_units
from diffdoctor.evaluate.model.networks import FeatureNetwork
from diffdoctor.rounds import command
from diffdoctor.runs.errors import UserError
from diffdoctor.sets import join
from diffdoctor.training import processes
from diffdoctor.training.devices import accelerator_count, open_device_at
from diffdoctor.training.processes import Processes, process_state


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


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    state = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cuda", 1))
    monkeypatch.setattr(processes, "process_state", lambda device: state)
    monkeypatch.setattr(processes, "open_device", lambda name, default: torch.device(name or default))
    assert Processes().device == torch.device("cuda", 1)
    assert Processes("cuda").device == torch.device("cuda")
    assert Processes("cpu").device == torch.device("cpu")
    with pytest.raises(UserError, match=r"device: expected none or cpu with several processes, .*, got 'cuda:0'"):
        Processes("cuda:0")


def test_what_is_gathered_has_the_strides_of_what_is_sent(monkeypatch):
    state = SimpleNamespace(process_index=0, num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(processes, "process_state", lambda device: state)

    def all_gather(parts, part):
        assert {each.stride() for each in (*parts, part)} == {part.stride()}
        for each in parts:
            each.copy_(part)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    part = torch.rand(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(Processes().gather(part, 2), torch.cat([part, part]))


@pytest.mark.parametrize(
    ("module", "run"),
    [
        (inject_units, lambda: inject_units.inject_in_units(SimpleNamespace(output="s3://a/b"), None, [], None)),
        (join, lambda: join.run_set_join(None)),
        (command, lambda: command.run_round(None)),
    ],
    ids=["inject", "set join", "round run"],
)
def test_commands_that_need_no_gpu_ask_for_none(monkeypatch, module, run):
    class Asked(Exception):
        pass

    def ask(device=None):
        raise Asked(device)

    monkeypatch.setattr(module, "process_state", ask)
    with pytest.raises(Asked, match="cpu"):
        run()


def test_features_are_taken_where_their_network_is():
    seen = []

    def extract(pictures):
        seen.append(pictures.device.type)
        return torch.zeros(len(pictures), 2)

    FeatureNetwork("", extract, torch.nn.Linear(1, 1, device="meta"))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert seen == ["meta"]


def test_processes_wait_for_one_that_works_for_all(monkeypatch):
    asked = {}
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: asked.update(options))
    process_state()
    assert asked["timeout"].total_seconds() > 3600
