"""The site: every page there, every link whole, every public name in the reference."""

import importlib
import os
import subprocess
import sys

import pytest

from support.paths import ROOT

pytest.importorskip("mkdocs")


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page, module in (
        ("operations", "diffdoctor"),
        ("treat", "diffdoctor.treat"),
        ("maps", "diffdoctor.maps"),
        ("repairs", "diffdoctor.repairs"),
    ):
        text = (tmp_path / "reference" / f"{page}.html").read_text(encoding="utf-8")
        package = importlib.import_module(module)
        for name in package.__all__:
            found = getattr(package, name)
            if hasattr(found, "__qualname__"):
                assert f'id="{found.__module__}.{found.__qualname__}"' in text, name
    commands = (tmp_path / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "usage: diffdoctor treat" in commands
    assert "\b" not in commands
    assert "Image diffusion models" in (tmp_path / "index.html").read_text(encoding="utf-8")
