"""An editor sees every public name: pyright's basic mode finds nothing in a script that uses all of them."""

import ast
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("user_script.py")
PACKAGES = (
    "diffdoctor",
    "diffdoctor.detector",
    "diffdoctor.treat",
    "diffdoctor.evaluate.model",
    "diffdoctor.maps",
    "diffdoctor.repairs",
)


def test_the_script_uses_every_public_name():
    for module in ("diffusers", "peft", "accelerate", "transformers"):
        pytest.importorskip(module)
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for package in PACKAGES:
        assert not set(importlib.import_module(package).__all__) - used, package


@pytest.mark.parametrize(("name", "spelt_out"), [("weighted_loss", ()), ("policy_loss", ("coefs",))])
def test_the_overloads_name_the_functions_own_arguments(name, spelt_out):
    module = importlib.import_module(f"diffdoctor.ops.{name}")
    parameters = inspect.signature(getattr(module, name)).parameters
    by_name = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for left_out in ("return_stats", *spelt_out):
        del by_name[left_out]
    assert {name: a.__forward_arg__ for name, a in module._Keywords.__annotations__.items()} == by_name


def test_pyright_finds_nothing(tmp_path):
    pytest.importorskip("diffusers")
    checker = shutil.which("basedpyright", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if checker is None:
        pytest.skip("basedpyright is not installed")
    root = SCRIPT.parents[2]
    config = {
        "include": [str(SCRIPT)],
        "extraPaths": [str(root)],
        "typeCheckingMode": "basic",
        "reportMissingModuleSource": False,
        "pythonVersion": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [checker, "--project", str(tmp_path), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = [
        f"{item['range']['start']['line'] + 1}: {item['message']}"
        for item in json.loads(done.stdout)["generalDiagnostics"]
    ]
    assert not found, "\n".join(found)
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] == 1
