"""The output folder of a treatment: what belongs to it, what a kill left behind, what to say of a full disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError, first_line
from diffdoctor.runs.files import atomic_write_text, clear_leftovers, refuse_foreign
from diffdoctor.runs.lock import FolderLock
from diffdoctor.training.weights import weights_digest
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Family
from diffdoctor.treat.lora import WEIGHTS_NAME

# options that change what is kept, watched or held in memory, but not the result: a run may go on with others
_FREE = (
    "attention_backend",
    "checkpoint_every",
    "log_with",
    "sample_every",
    "sample_pictures",
    "strict",
    "text_encoders",
)


def run_checkpoints(output_dir: Path, config: TreatConfig, origins: dict) -> Checkpoints:
    """The checkpoints of this treatment: those of other options, or of other `origins`, are refused."""
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return Checkpoints(
        output_dir / "checkpoints",
        settings | origins,
        refusal="holds checkpoints of a treatment with another {}: choose another output folder or remove them",
    )


def origins_of(
    family: Family,
    detector: torch.nn.Module,
    monitor: torch.nn.Module | None,
    prompts: Sequence[str],
    pairs: tuple[Sequence[np.ndarray], Sequence[str]] | None,
) -> dict:
    """What a treatment begins with beside its options, each as a digest: a run goes on only with the same.

    Reads every weight once: call it before anything is added to the pipeline or taken out of it.

    Args:
        pairs: the offline pictures, (H, W, 3) uint8, and their prompts; None: there are none.
    """
    pipeline = hashlib.sha256()
    for part in (family.denoiser, family.vae, *family.text_encoders):
        pipeline.update(weights_digest(part).encode())
    scheduler = family.pipeline.scheduler
    # names that begin with _ are diffusers' own notes: its version, where the file lay
    steps = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    offline = hashlib.sha256()
    for picture, prompt in zip(*(pairs or ((), ())), strict=True):
        offline.update(repr((picture.shape, prompt)).encode("utf-8"))
        offline.update(np.ascontiguousarray(picture))
    return {
        "pipeline": pipeline.hexdigest(),
        "scheduler": [type(scheduler).__name__, steps],
        "detector": weights_digest(detector),
        "monitor": None if monitor is None else weights_digest(monitor),
        "prompts": hashlib.sha256("\n".join(prompts).encode("utf-8")).hexdigest(),
        "offline": offline.hexdigest(),
    }


def check_lora_folder(output_dir: Path) -> None:
    """Refuse an output folder whose `lora` is not a treatment's: it would be replaced.

    Raises:
        UserError: if it holds other files, or nothing beside it says that a treatment wrote it.
    """
    treated = (output_dir / "treat.json").exists() or (output_dir / "checkpoints").is_dir()
    refuse_foreign(output_dir / "lora", [WEIGHTS_NAME] if treated else [])


def open_output(lock: FolderLock, settings: dict) -> None:
    """Make the output folder, keep it, clear away what a kill left half-written there, and write `config.yaml`."""
    output_dir = lock.folder
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.take()
        for name in ("config.yaml", "treat.json", "lora"):
            clear_leftovers(output_dir, name)
        for part in ("samples", "checkpoints"):
            clear_leftovers(output_dir / part)
        write_settings(output_dir, settings)


def write_settings(output_dir: Path, settings: dict) -> None:
    """Write what was asked and the versions that served it as `config.yaml`."""
    import yaml

    from diffdoctor.version import __version__

    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    text = yaml.safe_dump({"diffdoctor": __version__, **plain}, sort_keys=False)
    atomic_write_text(output_dir / "config.yaml", text)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while files are written into one line; what was there before stays.

    Raises:
        UserError: with the reason and the free space.
    """
    from safetensors import SafetensorError

    try:
        yield
    # torch.save reports a full disk as a RuntimeError
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{folder}: cannot be written ({reason}; {_free(folder)} free). Checkpoints from before are whole: "
            "make room, and the same call goes on from the last"
        ) from error


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
