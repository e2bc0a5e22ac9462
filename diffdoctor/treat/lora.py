"""LoRA on a pipeline's denoiser, saved so that `pipeline.load_lora_weights` draws the same pictures.

The file holds peft's own state dict under the denoiser's prefix with the adapter's configuration as metadata. The usual
converter is not used: with attention and convolution targets mixed it silently drops the attention part, and without
the metadata an alpha that differs from the rank is read back as the rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_dir
from diffdoctor.training.seeds import seeded
from diffdoctor.treat.adapters import activate, active_adapters, adapter_layers, check_adapters
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Family
from diffdoctor.treat.loading import COMPONENT, METADATA_KEY, load_lora, read_lora

ADAPTER = "diffdoctor"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def target_modules(family: Family, groups: Sequence[str]) -> list[str]:
    """Full names of the denoiser's linear and convolution modules in the named groups of `Family.lora_targets`.

    Raises:
        UserError: if a group is unknown or nothing is found.
    """
    unknown = [group for group in groups if group not in family.lora_targets]
    if unknown:
        raise UserError(expected("lora_targets", f"some of {', '.join(sorted(family.lora_targets))}", unknown))
    ends = {end for group in groups for end in family.lora_targets[group]}
    wrapped = adapter_layers(family.denoiser) if getattr(family.denoiser, "peft_config", None) else {}
    modules = {name: wrapped[name].get_base_layer() if name in wrapped else module
               for name, module in family.denoiser.named_modules()}  # fmt: skip
    found = [
        name
        for name, module in modules.items()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and any(name == end or name.endswith("." + end) for end in ends)
        # what is inside such a layer is an adapter's own
        and not any(name.startswith(f"{outer}.") for outer in wrapped)
    ]
    if not found:
        raise UserError(f"lora_targets: the denoiser has no module of {list(groups)}")
    return found


def add_lora(
    family: Family, *, rank: int, alpha: float, groups: Sequence[str], seed: int, adapter: str = ADAPTER
) -> list[torch.nn.Parameter]:
    """Freeze the pipeline and add a LoRA that changes nothing yet; adapters that are active stay so.

    Args:
        family: whose denoiser gets it.
        rank: of the two factors.
        alpha: the update is alpha / rank times their product.
        groups: of `Family.lora_targets`.
        seed: of the first factors; the global random state is left as it was.
        adapter: its name.

    Returns:
        The LoRA's parameters, in fp32.

    Raises:
        UserError: if the denoiser has an adapter of that name or a fused one, or none of the modules.
    """
    from peft import LoraConfig

    denoiser = family.denoiser
    check_adapters(family, adapter)
    carried = active_adapters(denoiser)
    _freeze(family)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules(family, groups))
    with seeded(seed):
        denoiser.add_adapter(config, adapter_name=adapter)
    return activate(denoiser, carried, adapter)


def start_from(family: Family, source: str | Path, *, adapter: str = ADAPTER) -> list[torch.nn.Parameter]:
    """Freeze the pipeline and add a LoRA of weights that are there; adapters that are active stay so.

    Args:
        family: whose denoiser gets it.
        source: a folder or file of a LoRA, or a hub id.
        adapter: its name.

    Returns:
        The LoRA's parameters, in fp32.

    Raises:
        UserError: if it does not fit, or the denoiser has an adapter of that name or a fused one.
    """
    check_adapters(family, adapter)
    carried = active_adapters(family.denoiser)
    _freeze(family)
    load_lora(family.pipeline, source, adapter=adapter, component=family.denoiser_name)
    return activate(family.denoiser, carried, adapter)


def treatment_lora(
    family: Family, config: TreatConfig, source: str | Path | None, seed: int
) -> list[torch.nn.Parameter]:
    """Freeze the pipeline and add the LoRA that a treatment tunes: that of `source`, or a new one by the options.

    Args:
        family: whose denoiser gets it.
        config: rank, alpha and lora_targets of a new one; groups that the denoiser's kind does not have are left out.
        source: see `start_from`; None: a new one.
        seed: of a new one, see `add_lora`.

    Returns:
        The LoRA's parameters, in fp32.

    Raises:
        UserError: see `start_from` and `add_lora`.
    """
    if source is not None:
        return start_from(family, source)
    groups = [group for group in config.lora_targets if group in family.lora_targets] or config.lora_targets
    alpha = config.rank if config.alpha is None else config.alpha
    return add_lora(family, rank=config.rank, alpha=alpha, groups=groups, seed=seed)


def lora_digest(family: Family, source: str | Path) -> str:
    """A hash of a LoRA's weights, after checking that it is one of the denoiser alone.

    Raises:
        UserError: if it cannot be read, or changes a text encoder too.
    """
    state = read_lora(family.pipeline, source)
    others = sorted({key.split(".")[0] for key in state} & {*family.text_encoder_names})
    if others:
        what = f"a LoRA of the {family.denoiser_name} alone, the only part that is tuned"
        raise UserError(expected(f"--lora {source}", what, f"one of {', '.join(others)} too"))
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _freeze(family: Family) -> None:
    for module in (*family.denoisers, family.vae, *family.text_encoders):
        module.requires_grad_(False)


def lora_state(family: Family, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
    """The adapter's weights, on the CPU, by peft's names."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(family.denoiser, adapter_name=adapter)
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def load_lora_state(family: Family, state: dict[str, torch.Tensor], adapter: str = ADAPTER) -> None:
    """Put weights from `lora_state` into the adapter that is already there.

    Raises:
        UserError: they are of another adapter.
    """
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(family.denoiser, state, adapter_name=adapter)
    if getattr(outcome, "unexpected_keys", None):
        raise UserError(f"LoRA weights do not fit the adapter: unexpected {outcome.unexpected_keys[:3]}")


def save_lora(
    family: Family, folder: str | Path, *, state: dict[str, torch.Tensor] | None = None, adapter: str = ADAPTER
) -> Path:
    """Write the adapter to `folder`, for `pipeline.load_lora_weights(folder)`; whole or not at all.

    Of Wan 2.2's second transformer for `load_lora_weights(folder, load_into_transformer_2=True)`.

    Args:
        family: whose denoiser carries the adapter.
        folder: made when it is not there, replaced when it is.
        state: weights to write instead of the adapter's present ones.
        adapter: its name.
    """
    from safetensors.torch import save_file

    # the loader takes the first denoiser's name for the second one too
    prefix = type(family).denoiser_name
    weights = lora_state(family, adapter) if state is None else state
    config = family.denoiser.peft_config[adapter].to_dict()
    metadata = {f"{prefix}.{name}": _as_json(value) for name, value in config.items()}
    if family.denoiser_name != prefix:
        metadata[COMPONENT] = family.denoiser_name
    with atomic_dir(folder) as temporary:
        save_file(
            {f"{prefix}.{name}": value for name, value in weights.items()},
            temporary / WEIGHTS_NAME,
            # one entry alone: safetensors writes several in an order that changes from call to call
            metadata={METADATA_KEY: strict_json.dumps(metadata, sort_keys=True)},
        )
    return Path(folder)


def _as_json(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
