"""The Triton kernels, executed by Triton's interpreter on the CPU, against the reference over the shared cases.

The interpreter is chosen by TRITON_INTERPRET when a kernel is defined, so those tests, which stand in
triton_interpreted.py, run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.timeout(1800)  # half a minute each on an idle machine; the interpreter is slow on a busy one
@pytest.mark.parametrize("part", ["weighted_loss_equals", "not weighted_loss_equals"])
def test_in_the_interpreter(part):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "-rs",
            "-k",
            part,
            HERE / "triton_interpreted.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
