"""The adapters that a pipeline's denoiser carries: a style of the user's own stays active, and frozen, beside ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families import Family
from diffdoctor.treat.quantization import is_quantized


def adapter_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a network to which peft has added an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def active_adapters(denoiser: torch.nn.Module) -> list[str]:
    """The names of the adapters that take part in what the denoiser predicts."""
    layers = adapter_layers(denoiser).values() if getattr(denoiser, "peft_config", None) else ()
    return list(dict.fromkeys(n for layer in layers if not layer.disable_adapters for n in layer.active_adapters))


def check_adapters(family: Family, adapter: str) -> None:
    """Refuse a denoiser that carries an adapter of this name, or one that is fused into its weights and still there.

    Raises:
        UserError: says how to load the pipeline instead.
    """
    denoiser = family.denoiser
    carried = getattr(denoiser, "peft_config", None) or {}
    if adapter in carried:
        raise UserError(f"the pipeline already carries an adapter named {adapter!r}: load it afresh")
    if carried and any(layer.merged for layer in adapter_layers(denoiser).values()):
        raise UserError(
            "pipeline: a LoRA is fused into its weights and still loaded, which would keep any other from taking part; "
            "call pipeline.unload_lora_weights(), which leaves the fused weights, or do not fuse it"
        )


def activate(denoiser: torch.nn.Module, carried: Sequence[str], adapter: str) -> list[torch.nn.Parameter]:
    """Let the adapters that were active before, frozen, and a new one, trainable, take part together.

    Args:
        denoiser: that carries them.
        carried: from `active_adapters`, before the new one was added.
        adapter: the new one's name.

    Returns:
        The new one's parameters, in fp32.
    """
    trained = []
    for layer in adapter_layers(denoiser).values():
        layer.enable_adapters(True)
        layer.set_adapter([*carried, adapter])
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        for name, parameter in layer.named_parameters():
            is_ours = adapter in name.split(".") and id(parameter) not in base
            parameter.requires_grad_(is_ours)
            if is_ours:
                parameter.data = parameter.data.float()
                trained.append(parameter)
    return trained


def adapters_digest(denoiser: torch.nn.Module) -> str | None:
    """Which adapters take part and how strongly, as a digest; None where there is none."""
    if not active_adapters(denoiser):
        return None
    found = [
        (name, [(adapter, layer.scaling.get(adapter)) for adapter in layer.active_adapters])
        for name, layer in adapter_layers(denoiser).items()
        if not layer.disable_adapters
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


@contextmanager
def merged_adapters(family: Family) -> Iterator[None]:
    """Inside, the update of all active adapters is part of the denoiser's weights: sampling costs no more than without.

    The original weights are put back as they were, bit for bit; nothing inside may train. Costs a second copy of the
    targeted weights. Layers whose adapters are more than a product of two matrices (DoRA), or whose weights are
    quantized, keep them.
    """
    layers = [layer for layer in adapter_layers(family.denoiser).values() if _is_sum_of_products(layer)]
    originals, trainable = [], [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight
                originals.append((weight, weight.data))
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A:
                        weight.data = weight.data + layer.get_delta_weight(adapter).to(weight.dtype)
                layer.enable_adapters(False)
        yield
    finally:
        for weight, data in originals:
            weight.data = data
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)


def _is_sum_of_products(layer) -> bool:
    if layer.disable_adapters or not hasattr(layer, "lora_A") or is_quantized(layer.get_base_layer()):
        return False
    return not any(
        getattr(layer, names, {}).get(adapter)
        for adapter in layer.active_adapters
        for names in ("use_dora", "lora_bias", "lora_variant")
    )
