"""Denoisers whose frozen weights are held in fewer bits: formats of torchao and bitsandbytes, loaded by diffusers."""

from __future__ import annotations

import importlib.util

import torch

from diffdoctor.runs.errors import UserError, expected, missing_extra

# option -> the library that has it
QUANTIZED = {"int8": "torchao", "fp8": "torchao", "bnb8": "bitsandbytes", "bnb4": "bitsandbytes"}
_DENOISERS = ("unet", "transformer", "transformer_2")


def check_format(how: str | None) -> None:
    """Refuse a format that there is none of.

    Raises:
        UserError: names those that there are.
    """
    if how not in (None, *QUANTIZED):
        raise UserError(expected("quantize", f"one of {', '.join(QUANTIZED)}, or None", repr(how)))


def check_available(how: str | None) -> None:
    """Refuse a format of `QUANTIZED` that cannot be made on this machine; None passes.

    Raises:
        UserError: its library is not installed, or needs a GPU and there is none.
    """
    check_format(how)
    if how is None:
        return
    if importlib.util.find_spec(QUANTIZED[how]) is None:
        raise missing_extra(QUANTIZED[how], "quantize")
    if QUANTIZED[how] == "bitsandbytes" and not torch.cuda.is_available():
        raise UserError(expected("quantize", "int8 or fp8 without a GPU, which bitsandbytes needs", repr(how)))


def quantization_config(how: str, components, dtype: torch.dtype):
    """What `DiffusionPipeline.from_pretrained` takes to hold the denoisers' linear layers in fewer bits.

    Args:
        how: of `QUANTIZED`: a weight's format alone, or with bnb8 an activation's too; products are taken in `dtype`.
            bnb4 is NF4 with its scales quantized again, as QLoRA has it (arXiv 2305.14314).
        components: names of the pipeline's parts.
        dtype: of the denoiser's other weights.
    """
    import diffusers

    if QUANTIZED[how] == "torchao":
        from torchao import quantization

        kind = quantization.Int8WeightOnlyConfig if how == "int8" else quantization.Float8WeightOnlyConfig
        config = diffusers.TorchAoConfig(kind())
    elif how == "bnb8":
        config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    mapping = {name: config for name in _DENOISERS if name in components}
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def has_quantized(module: torch.nn.Module) -> bool:
    """Whether any linear layer in a module is quantized."""
    return any(isinstance(layer, torch.nn.Linear) and is_quantized(layer) for layer in module.modules())


def is_quantized(layer: torch.nn.Module) -> bool:
    """Whether a layer's weight is held in another form than its numbers, to which nothing can be added."""
    return type(layer.weight) is not torch.nn.Parameter
