"""A treatment that is killed ends with the LoRA of an undisturbed run, bit for bit, when it goes on.

It is killed with SIGKILL at file operations, in half-written files, at random moments, and again and again.

`python tests/programs/treat_killed.py FOLDER SEED` does it at every file operation.
"""

import pytest

from support.paths import PROGRAMS


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_treatments_end_with_the_same_lora(commands, tmp_path):
    operations = [110]
    said = commands.run(tmp_path, 0, operations, output=tmp_path / "said", program=PROGRAMS / "treat_killed.py")
    assert said.count("killed True, same True") >= len(operations) + 2
    assert "chain: " in said
