"""Loading a diffusers pipeline, and refusing what is none in one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra

# option -> dtype
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(option: str, source: str, *, dtype: str = "fp32", vae: str | None = None):
    """A diffusers pipeline from a folder or a hub id, on the CPU.

    Args:
        option: the command line's name for it, for messages.
        source: the folder or id.
        dtype: of `DTYPES`, what its parts are loaded in.
        vae: likewise, of the VAE; None: as the rest.

    Raises:
        UserError: if there is none or it cannot be loaded.
    """
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "stages") from None
    folder = Path(os.path.expanduser(source))
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not folder.is_dir():
        raise UserError(f"--{option} {source}: no such folder")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"--{option} {source}: holds no diffusers pipeline (no model_index.json)")
    wanted = DTYPES[dtype] if vae in (None, dtype) else {"vae": DTYPES[vae], "default": DTYPES[dtype]}
    # the argument's name changes with diffusers 1.0; 0.42 already knows both and warns of the old one
    name = "dtype" if int(diffusers.__version__.split(".")[0]) >= 1 else "torch_dtype"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            origin = str(folder) if folder.is_dir() else source
            safe = {"trust_remote_code": False, "local_files_only": folder.is_dir()}
            return diffusers.DiffusionPipeline.from_pretrained(origin, **{name: wanted}, **safe)
    except Exception as error:  # each component's loader raises its own
        raise UserError(f"--{option} {source}: cannot be loaded ({first_line(error)})") from error


def replace_scheduler(pipeline, name: str | None) -> None:
    """Put a diffusers scheduler with the configuration of the pipeline's own in its place.

    Args:
        pipeline: that gets it.
        name: its class; None: the pipeline keeps its own.

    Raises:
        UserError: if diffusers has no such class.
    """
    if not name:
        return
    import diffusers

    scheduler = getattr(diffusers, name, None)
    if scheduler is None or not hasattr(scheduler, "from_config"):
        raise UserError(expected("--scheduler", "a diffusers scheduler such as DDIMScheduler", name))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
