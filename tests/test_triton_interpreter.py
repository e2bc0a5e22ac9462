"""The Triton kernels, executed by Triton's interpreter on the CPU, against the reference over the shared cases and the
trainers' formulas.

The interpreter is chosen by TRITON_INTERPRET when a kernel is defined, so those tests, which stand in
triton_interpreted.py and triton_interpreted_formulas.py, run in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


PARTS = [
    ("triton_interpreted.py", "weighted_loss_equals"),
    ("triton_interpreted.py", "not weighted_loss_equals"),
    ("triton_interpreted_formulas.py", ""),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute each on an idle machine; the interpreter is slow on a busy one
@pytest.mark.parametrize(("file", "part"), PARTS, ids=["weighted_loss", "others", "formulas"])
def test_in_the_interpreter(file, part):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rs", "-k", part, HERE / file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
