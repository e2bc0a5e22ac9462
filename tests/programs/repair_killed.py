"""Runs of `diffdoctor repair` that are killed (-9) at chosen changes in their output folder: forks of one warm process.

`main(arguments, kills)` runs the command once for each number in `kills`, each time killed at that renaming of a file
into its output folder, and then to its end.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffdoctor.repairs.command import run_repair
from diffdoctor.repairs.config import RepairConfig

# What a run would import, so that only the first process pays for it.
for name in ("accelerate.utils", "diffusers", "jinja2", "scipy.ndimage", "PIL.PngImagePlugin"):
    importlib.import_module(name)
for name in ("StableDiffusionPipeline", "DDPMScheduler", "AutoencoderKL"):
    getattr(importlib.import_module("diffusers"), name)


def main(arguments: dict, kills: list[int] | None = None) -> None:
    for number in kills or ():
        if (child := os.fork()) == 0:
            _die_at(number)
            run_repair(RepairConfig(**arguments))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), f"the run ended before change {number}"
        assert os.WTERMSIG(status) == signal.SIGKILL
    run_repair(RepairConfig(**arguments))


def _die_at(number: int) -> None:
    left = [number]

    def watch(event: str, _) -> None:
        if event == "os.rename":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
