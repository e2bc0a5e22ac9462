"""The Triton kernels, executed by Triton's interpreter on the CPU, against the reference over the shared cases and the
trainers' formulas.

The interpreter is chosen by TRITON_INTERPRET when a kernel is defined, so those tests, which stand in interpreter/, run
in a process of their own.
"""

import subprocess
import sys

import pytest

from support.launch import environment
from support.paths import ROOT, TESTS

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on an idle machine; the interpreter is slow on a busy one
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rs"]
    done = subprocess.run(
        [*command, TESTS / "backends" / "interpreter"],
        env=environment(TRITON_INTERPRET="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
