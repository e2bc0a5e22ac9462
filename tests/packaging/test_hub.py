"""The kernel repository for the Hugging Face Hub: a folder that needs no installation and disturbs none."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from support.launch import environment
from support.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")

# With an installed diffdoctor in the same process, whose operators have names of their own.
CALLS = """
import sys, torch, diffdoctor
hub = LOAD
torch.manual_seed(0)
pred, target, confidence = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2, 1, 16, 16)

def value_and_gradient(package, backend, compiled=False):
    def call(x):
        return package.weighted_loss(x, target, confidence, artifact_weight=2.0, backend=backend)
    x = pred.clone().requires_grad_()
    value = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(x)
    return value.detach(), *torch.autograd.grad(value, x)

expected = value_and_gradient(diffdoctor, "reference")
for found in (value_and_gradient(hub, None, compiled=True), value_and_gradient(hub, "triton")):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
assert sorted(set(hub.__all__)) == sorted(set(diffdoctor.__all__) - {"autoguide", "guide", "repair"})
print(hub.__name__, hub.available_backends()["cuda"])
"""
BY_PATH = """
import importlib.util
spec = importlib.util.spec_from_file_location("some_kernel", FOLDER / "build/torch-cpu/__init__.py")
module = sys.modules["some_kernel"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
BY_KERNELS = """
from kernels import get_local_kernel
module = get_local_kernel(FOLDER)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    command = [sys.executable, "-m", "tools.hub", "--output", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(BY_PATH, id="path"),
        pytest.param(
            BY_KERNELS,
            id="kernels",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("kernels") is None or importlib.util.find_spec("kernels").origin is None,
                reason="needs the package kernels",
            ),
        ),
    ],
)
def test_the_folder_serves_every_call_beside_an_installation(hub, load, tmp_path):
    pytest.importorskip("triton")
    program = tmp_path / "program.py"
    imports = f"import sys, pathlib\nFOLDER = pathlib.Path({str(hub)!r})\n"
    program.write_text(imports + load + CALLS.replace("LOAD", "module"))
    done = subprocess.run(
        [sys.executable, program], env=environment(TRITON_INTERPRET="1"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "holds the Triton kernels and the reference alone" in done.stdout


def test_its_sources_import_little(hub):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "typing_extensions"}  # and what torch installs
    for variant in (hub / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        names = {
            path.relative_to(variant).as_posix()
            for path in variant.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert set(metadata["digest"]["files"]) == names - {"metadata.json"}
        for path in variant.rglob("*.py"):
            text = path.read_text()
            assert set(re.findall(r"^\s*(?:from|import) ([a-z_]\w*)", text, re.MULTILINE)) <= allowed, path
            assert "torch.ops.diffdoctor" not in text and '"diffdoctor::' not in text, path


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "work").write_text("")
    command = [sys.executable, "-m", "tools.hub", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected a new folder or one that this command wrote" in done.stderr
    assert (tmp_path / "work").is_file()
