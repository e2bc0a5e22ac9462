"""LoRA on a pipeline's denoiser, saved so that `pipeline.load_lora_weights` draws the same pictures.

The file holds peft's own state dict under the denoiser's prefix with the adapter's configuration as metadata. The usual
converter is not used: with attention and convolution targets mixed it silently drops the attention part, and without
the metadata an alpha that differs from the rank is read back as the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_dir
from diffdoctor.treat.families import Family

ADAPTER = "diffdoctor"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# the key under which diffusers looks for adapter configurations in a safetensors header
_METADATA_KEY = "lora_adapter_metadata"


def target_modules(family: Family, groups: Sequence[str]) -> list[str]:
    """Full names of the denoiser's linear and convolution modules in the named groups of `Family.lora_targets`.

    Raises:
        UserError: if a group is unknown or nothing is found.
    """
    unknown = [group for group in groups if group not in family.lora_targets]
    if unknown:
        raise UserError(expected("lora_targets", f"some of {', '.join(sorted(family.lora_targets))}", unknown))
    ends = {end for group in groups for end in family.lora_targets[group]}
    found = [
        name
        for name, module in family.denoiser.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and any(name == end or name.endswith("." + end) for end in ends)
    ]
    if not found:
        raise UserError(f"lora_targets: the denoiser has no module of {list(groups)}")
    return found


def add_lora(
    family: Family, *, rank: int, alpha: float, groups: Sequence[str], seed: int, adapter: str = ADAPTER
) -> list[torch.nn.Parameter]:
    """Freeze the pipeline and add a LoRA that changes nothing yet.

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
        UserError: if the denoiser has an adapter of that name, or none of the modules.
    """
    from peft import LoraConfig

    denoiser = family.denoiser
    if adapter in getattr(denoiser, "peft_config", {}):
        raise UserError(f"the pipeline already carries an adapter named {adapter!r}: load it afresh")
    for module in (denoiser, family.vae, *family.text_encoders):
        module.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules(family, groups))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(config, adapter_name=adapter)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def lora_state(family: Family, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
    """The adapter's weights, on the CPU, by peft's names."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(family.denoiser, adapter_name=adapter)
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def load_lora_state(family: Family, state: dict[str, torch.Tensor], adapter: str = ADAPTER) -> None:
    """Put weights from `lora_state` into the adapter that is already there."""
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(family.denoiser, state, adapter_name=adapter)
    if getattr(outcome, "unexpected_keys", None):
        raise UserError(f"LoRA weights do not fit the adapter: unexpected {outcome.unexpected_keys[:3]}")


def save_lora(
    family: Family, folder: str | Path, *, state: dict[str, torch.Tensor] | None = None, adapter: str = ADAPTER
) -> Path:
    """Write the adapter to `folder`, for `pipeline.load_lora_weights(folder)`; whole or not at all.

    Args:
        family: whose denoiser carries the adapter.
        folder: made when it is not there, replaced when it is.
        state: weights to write instead of the adapter's present ones.
        adapter: its name.
    """
    from safetensors.torch import save_file

    prefix = family.denoiser_name
    weights = lora_state(family, adapter) if state is None else state
    config = family.denoiser.peft_config[adapter].to_dict()
    metadata = {f"{prefix}.{name}": _as_json(value) for name, value in config.items()}
    with atomic_dir(folder) as temporary:
        save_file(
            {f"{prefix}.{name}": value for name, value in weights.items()},
            temporary / WEIGHTS_NAME,
            # one entry alone: safetensors writes several in an order that changes from call to call
            metadata={_METADATA_KEY: strict_json.dumps(metadata, sort_keys=True)},
        )
    return Path(folder)


@contextmanager
def merged_lora(family: Family, adapter: str = ADAPTER) -> Iterator[None]:
    """Inside, the adapter's update is part of the denoiser's weights, so that sampling costs no more than without it.

    The original weights are put back as they were, bit for bit; nothing inside may train. Costs a second copy of the
    targeted weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        module
        for module in family.denoiser.modules()
        if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "lora_A", {})
    ]
    originals = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight
                originals.append((weight, weight.data))
                weight.data = weight.data + layer.get_delta_weight(adapter).to(weight.dtype)
                layer.enable_adapters(False)
        yield
    finally:
        for weight, data in originals:
            weight.data = data
        for layer in layers:
            layer.enable_adapters(True)


def _as_json(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
