"""`diffdoctor env`: what is installed, what was built, what serves which operation, and why not the rest."""

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass

from diffdoctor.version import __version__

PACKAGES = (
    "torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "peft", "xformers", "kernels",
    "torchao", "bitsandbytes", "webdataset", "pyarrow", "torchmetrics", "pycocotools", "scikit-learn",
)  # fmt: skip
VARIABLES = (
    "DIFFDOCTOR_BACKEND", "DIFFDOCTOR_BUILD", "DIFFDOCTOR_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@dataclass
class EnvConfig:
    """Options of `diffdoctor env`.

    Attributes:
        json: print one JSON object instead of text, for a bug report or a script.
    """

    json: bool = False


def collect() -> dict:
    """Everything that `diffdoctor env` shows, as nested dictionaries of strings, numbers, lists and None."""
    import torch

    from diffdoctor.backends.select import describe
    from diffdoctor.ops import OPS

    cuda = torch.cuda.is_available()
    return {
        "diffdoctor": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) or "not installed" for name in PACKAGES},
        "torch": {
            "cuda": torch.version.cuda or "not built in",
            "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **describe(OPS),
    }


def _version(name):
    if name == "triton" and os.name == "nt":
        name = "triton-windows"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(value, indent=0):
    pad = "  " * indent
    for key, item in value.items():
        if isinstance(item, dict):
            yield f"{pad}{key}:" if item else f"{pad}{key}: none"
            yield from _lines(item, indent + 1)
        elif isinstance(item, (list, tuple)):
            yield f"{pad}{key}: {', '.join(map(str, item)) or 'none'}"
        else:
            yield f"{pad}{key}: {item}"


def run_env(config: EnvConfig) -> None:
    """Print what `collect` found."""
    found = collect()
    print(json.dumps(found, indent=2) if config.json else "\n".join(_lines(found)))
