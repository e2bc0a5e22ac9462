"""The order of imports, as pyproject.toml fixes it: nothing points back up, and no package holds a circle.

Imports inside functions count; those under TYPE_CHECKING do not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

pytest.importorskip("importlinter")


def lint(root: Path) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def test_imports_run_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout[done.stdout.find("Contracts:") :]
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("lowering/plan.py", "from diffdoctor import ops", "Imports run one way"),
        ("measures/rates.py", "def f():\n    from diffdoctor.data import tar", "Imports run one way"),
        ("treat/families/base.py", "from diffdoctor.treat.families import flux", "No circle"),
    ],
)
def test_what_points_back_is_found(tmp_path, file, line, contract):
    for path in [*(ROOT / "diffdoctor").rglob("*.py"), ROOT / "pyproject.toml"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with open(tmp_path / "diffdoctor" / file, "a") as module:
        module.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stderr
    assert contract in done.stdout.split("Broken contracts")[1]
