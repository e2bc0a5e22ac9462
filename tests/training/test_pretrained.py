"""What comes from elsewhere is loaded by a list of formats, and none of its own code runs."""

import ast
import io
import json
import os
import sys

import pytest
import torch

from diffdoctor.evaluate.model.networks import Classifier, Clip, load_features
from diffdoctor.runs.errors import UserError
from diffdoctor.training.pretrained import load_script, load_state_dict_file
from support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

TAKEN = "expected a folder or hub id of a model of transformers, or a TorchScript file"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("load", [load_features, Classifier], ids=["features", "classifier"])
@pytest.mark.parametrize("name", ["n.pt2", "N.PT2", "n.pt", "n.bin"])
def test_a_pickle_is_refused_unread(tmp_path, load, name):
    torch.save(Payload(tmp_path / "ran"), tmp_path / name)
    with pytest.raises(UserError, match=TAKEN):
        load(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_a_state_dict_is_tensors_by_name(tmp_path):
    for value in ({1: torch.ones(1)}, [torch.ones(1)], {"a": 1}, {"a": Payload(tmp_path / "ran")}):
        torch.save(value, tmp_path / "state.bin")
        with pytest.raises(UserError, match=r"state\.bin: expected a state dict"):
            load_state_dict_file(tmp_path / "state.bin")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "state.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"state\.bin: expected a state dict"):
        load_state_dict_file(tmp_path / "state.bin")


class Saves(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        torch.save(x, self.path)
        return x.mean((2, 3))


class SavesWhenLoaded(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return x.mean((2, 3))

    @torch.jit.export
    def __getstate__(self):
        return self.path

    @torch.jit.export
    def __setstate__(self, path: str):
        self.path = path
        self.training = False
        torch.save(torch.ones(1), path)


class Maps(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return x.mean((2, 3)) + torch.from_file(self.path, size=3)


@pytest.mark.parametrize("network", [Saves, SavesWhenLoaded, Maps])
def test_a_script_that_reaches_for_files_is_refused(tmp_path, network):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(network(str(tmp_path / "there"))), buffer)
    (tmp_path / "n.pt").write_bytes(buffer.getvalue())
    (tmp_path / "there").unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"{TAKEN}, got one that does more than compute"):
        load_script("--features", tmp_path / "n.pt")
    assert not (tmp_path / "there").exists()


def test_a_script_of_numbered_layers_is_taken(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten()))
    torch.jit.script(network).save(str(tmp_path / "n.pt"))
    images = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(load_script("--features", tmp_path / "n.pt")(images), network(images))


OWN_CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
VIT = {"model_type": "vit", "architectures": ["ViTModel"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OWN_CODE, "it is code of its own, which is never run"),
        ({**VIT, "attn_implementation": "somebody/kernels"}, "attn_implementation names code from elsewhere"),
        ({**VIT, "quantization_config": {"quant_method": "gptq"}}, "code of other packages"),
        ({**VIT, "num_hidden_layers": 10**6}, "num_hidden_layers: expected at most 1000, got 1000000"),
        ({**VIT, "hidden_size": 10**9}, "hidden_size: expected at most"),
        (VIT, "cannot be loaded"),
    ],
    ids=["code", "kernels", "quantised", "deep", "wide", "no-weights"],
)
@pytest.mark.parametrize("load", [load_features, Classifier, Clip], ids=["features", "classifier", "clip"])
def test_a_folder_s_own_code_never_runs(tmp_path, monkeypatch, load, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    with pytest.raises(UserError, match=message) as refused:
        load(str(tmp_path))
    assert TAKEN in str(refused.value)
    assert sys.stdin.tell() == 0
    assert not (tmp_path / "ran").exists()


def test_nothing_in_the_package_unpickles():
    # Whoever adds a loader is sent to diffdoctor/training/pretrained.py.
    found = []
    for path in sorted((ROOT / "diffdoctor").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            call = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = {
                "torch.load": given.get("weights_only") != "True",
                "np.load": given.get("allow_pickle", "False") != "False",
                "yaml.load": True,
                "torch.jit.load": path.name != "pretrained.py",
                "torch.export.load": True,
            }
            if unsafe.get(call) or call.split(".")[0] in ("pickle", "joblib", "dill", "cloudpickle", "marshal"):
                found.append(f"{path.name}:{node.lineno}: {call}")
            own = call == "Detector.from_pretrained"  # ours, of safetensors
            if node.func.attr == "from_pretrained" and not own and not given.keys() & {None, "local_files_only"}:
                found.append(f"{path.name}:{node.lineno}: {call}")
    assert found == []
