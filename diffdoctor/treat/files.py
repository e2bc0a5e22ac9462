"""The output folder of a treatment: what belongs to it, what a kill left behind, what to say of a full disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, first_line
from diffdoctor.runs.functions import identity_of
from diffdoctor.runs.record import RunFolder
from diffdoctor.training.weights import weights_digest
from diffdoctor.treat.adapters import adapters_digest
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Family
from diffdoctor.treat.lora import WEIGHTS_NAME
from diffdoctor.treat.offline import PairSource

# options that change what is kept, watched or held in memory, but not the result: a run may be resumed with others
_FREE = (
    "attention_backend",
    "checkpoint_every",
    "embedding_cache",
    "log_with",
    "sample_every",
    "sample_pictures",
    "strict",
    "text_encoders",
)


def treatment_folder(output_dir: Path, config: TreatConfig, inputs: dict) -> RunFolder:
    """The output folder of this treatment: what other options, or other `inputs`, have made there is refused."""
    free = (*_FREE, "steps") if config.can_be_longer else _FREE
    options = {name: value for name, value in asdict(config).items() if name not in free}
    results = {
        "lora": [WEIGHTS_NAME],
        "lora-webui.safetensors": None,
        "treat.json": None,
        "ranking.parquet": None,
        "ranking.html": None,
        "samples": None,
        "checkpoints": None,
    }
    advice = (
        "choose another output folder or remove it (--lora begins with the weights of a finished treatment; more steps "
        "continue one only with final_learning_rate 1)"
    )
    return RunFolder(output_dir, "treat", options | inputs, results, advice=advice)


ENCODED = "encoded"
"""In the output folder, until the treatment is done: embeddings and latents that do not fit into memory."""


def encoded_folder(folder: RunFolder) -> Path:
    """Where this very treatment, and no other, finds them again."""
    identity = strict_json.dumps(folder.identity, sort_keys=True)
    return folder.path / ENCODED / hashlib.sha256(identity.encode()).hexdigest()[:16]


def digests_of(
    family: Family,
    detector: torch.nn.Module,
    monitor: torch.nn.Module | None,
    prompts: Sequence[str],
    pairs: PairSource | None,
    lora: str | None,
    reward: Callable | None,
    quality: Callable | None,
) -> dict:
    """What a treatment begins with beside its options, each as a digest: it is resumed only with the same.

    Reads every weight once: call it before anything is added to the pipeline or taken out of it.

    Args:
        pairs: the offline pictures with their prompts; None: there are none.
        lora: from `lora_digest`, of the LoRA that is begun with; None: there is none.
        reward: the function of whole pictures; None: there is none.
        quality: the function that chooses the best weights; None: there is none.
    """
    pipeline = hashlib.sha256()
    for part in (*family.denoisers, family.vae, *family.text_encoders):
        pipeline.update(weights_digest(part).encode())
    scheduler = family.pipeline.scheduler
    # names that begin with _ are diffusers' own notes: its version, where the file lay
    steps = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {
        "pipeline": pipeline.hexdigest(),
        "scheduler": [type(scheduler).__name__, steps],
        "lora": lora,
        "adapters": _adapters_digest(family),
        "detector": weights_digest(detector),
        "monitor": None if monitor is None else weights_digest(monitor),
        "reward": _function_digest(reward),
        "quality": _function_digest(quality),
        "prompts": hashlib.sha256("\n".join(prompts).encode("utf-8")).hexdigest(),
        "offline": hashlib.sha256().hexdigest() if pairs is None else pairs.digest(),
    }


def _adapters_digest(family: Family) -> str | list[str | None] | None:
    found = [adapters_digest(denoiser) for denoiser in family.denoisers]
    return found if len(found) > 1 else found[0]


def _function_digest(function: Callable | None) -> str | None:
    return None if function is None else hashlib.sha256(identity_of(function).encode("utf-8")).hexdigest()


def with_version(settings: dict) -> dict:
    """What `config.yaml` holds: what was asked, and the version that served it."""
    from diffdoctor.version import __version__

    return {"diffdoctor": __version__, **settings}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while files are written into one line; what was there before stays.

    Raises:
        UserError: with the reason and the free space.
    """
    from safetensors import SafetensorError

    try:
        yield
    except torch.AcceleratorError:
        raise  # of the GPU that tensors were to be read from
    # torch.save reports a full disk as a RuntimeError
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{folder}: cannot be written ({reason}; {_free(folder)} free). Checkpoints from before are whole: "
            "make room, and the same call resumes from the last"
        ) from error


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
