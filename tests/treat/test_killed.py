"""A treatment that is killed ends with the LoRA of an undisturbed run, bit for bit, when it goes on.

It is killed with SIGKILL at file operations, in half-written files, at random moments, and again and again.

`python tests/programs/treat_killed.py FOLDER SEED` does it at every file operation.
"""

import os
import subprocess
import sys

import pytest

from support.launch import environment
from support.paths import PROGRAMS


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_treatments_end_with_the_same_lora(tmp_path):
    seed = 0
    operations = ["110"]
    command = [sys.executable, str(PROGRAMS / "treat_killed.py"), str(tmp_path), str(seed), *operations]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=2300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("killed True, same True") >= len(operations) + 2
    assert "chain: " in done.stdout
