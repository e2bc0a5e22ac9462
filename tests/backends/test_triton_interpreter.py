"""The Triton kernels, executed by Triton's interpreter on the CPU, against the reference over the shared cases and the
trainers' formulas.

The interpreter is chosen by TRITON_INTERPRET when a kernel is defined, so those tests, which stand in interpreter/, run
in processes of their own.
"""

import subprocess
import sys

import pytest

from support.launch import environment
from support.paths import ROOT, TESTS

pytest.importorskip("triton")


PARTS = [
    ("test_kernels.py", "weighted_loss_equals"),
    ("test_kernels.py", "not weighted_loss_equals"),
    ("test_formulas.py", ""),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute each on an idle machine; the interpreter is slow on a busy one
@pytest.mark.parametrize(("file", "part"), PARTS, ids=["weighted_loss", "others", "formulas"])
def test_in_the_interpreter(file, part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rs", "-k", part]
    done = subprocess.run(
        [*command, TESTS / "backends" / "interpreter" / file],
        env=environment(TRITON_INTERPRET="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
