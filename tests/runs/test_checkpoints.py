"""A run's checkpoints: whole ones only, the last few of them."""

import os

import pytest
import torch

from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError
from diffdoctor.treat.files import writing


def test_the_last_few_are_kept_and_the_last_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.load() is None
    for step in (1, 2, 10):
        checkpoints.save(step, {"weights": torch.full((2,), step)}, {"history": [{"step": step, "loss": 0.1}]})
    assert [path.name for path in checkpoints.all()] == ["step-00000002", "step-00000010"]
    found = checkpoints.load()
    assert torch.equal(found["weights"], torch.full((2,), 10))
    assert found["history"] == [{"step": 10, "loss": 0.1}]
    checkpoints.keep_last()
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000010"]


def test_one_that_is_cut_short_is_none_and_is_cleared_away(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        checkpoints.save(2, {"step": 2})
    assert len(os.listdir(tmp_path)) == 2
    assert checkpoints.load() == {"step": 1}
    checkpoints.tidy()
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_record_is_the_same_bytes_whichever_of_its_values_are_one_object(tmp_path):
    one, again = Checkpoints(tmp_path / "one"), Checkpoints(tmp_path / "again")
    name = "loss"
    one.save(1, {}, {"history": [{name: 0.5}, {name: 0.5}]})
    loaded = one.load()
    again.save(1, {}, loaded)
    files = [folder / "step-00000001" / "record.json" for folder in (tmp_path / "one", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("state.pt", b""),
        ("state.pt", b"PK\x03\x04 cut"),
        ("state.pt", None),
        ("record.json", b"{"),
        ("record.json", b"\xff"),
    ],
    ids=["empty", "cut", "code", "record", "encoding"],
)
def test_a_damaged_one_is_named_and_nothing_of_it_runs(tmp_path, name, data):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"step": 1}, {"loss": 0.5})
    damaged = tmp_path / "checkpoints" / "step-00000001" / name
    if data is None:
        torch.save({"step": Payload(tmp_path / "ran")}, damaged)
    else:
        damaged.write_bytes(data)
    with pytest.raises(UserError, match=r"step-00000001: is damaged .*; remove this folder to resume"):
        checkpoints.load()
    assert not (tmp_path / "ran").exists()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_lost_gpu_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def lost(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch, "save", lost)
    with pytest.raises(torch.AcceleratorError):
        Checkpoints(tmp_path / "checkpoints").save(1, {})
    with pytest.raises(torch.AcceleratorError), writing(tmp_path):
        lost()
