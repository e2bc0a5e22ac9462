"""What a denoiser is told of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Inputs = dict[str, torch.Tensor]
_MASK = "_mask"


@dataclass
class Conditioning:
    """Prompt embeddings of N prompts, by the denoiser's own argument names.

    An input NAME_mask (N, L), bool, says which of the L entries of NAME (N, L, ...) are real, where prompts are of
    unequal length; without it all are.

    Attributes:
        positive: name -> (N, ...).
        negative: name -> (N, ...) for classifier-free guidance, or None where none is used.
    """

    positive: Inputs
    negative: Inputs | None = None

    def rows(self, index: torch.Tensor) -> Conditioning:
        """The conditioning of the prompts at index (M,)."""
        return self._each(lambda inputs: _changed(inputs, lambda value: value.index_select(0, index.to(value.device))))

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        return self._each(lambda inputs: _changed(inputs, lambda value: value.to(device)))

    def trimmed(self) -> Conditioning:
        """The same without the entries that are real in no row, and without masks that say nothing any more."""
        return self._each(_trimmed)

    def both(self) -> Inputs:
        """The inputs of one call for both predictions: N negative rows, then N positive ones."""
        parts = [dict(self.negative), dict(self.positive)]
        for name in self.positive:
            if name.endswith(_MASK) or not _is_ragged(parts, name):
                continue
            for part in parts:
                part.setdefault(name + _MASK, part[name].new_ones(part[name].shape[:2], dtype=torch.bool))
            for which in (name, name + _MASK):
                for part, value in zip(parts, padded([part[which] for part in parts], dim=1), strict=True):
                    part[which] = value
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _each(self, change: Callable[[Inputs], Inputs]) -> Conditioning:
        return Conditioning(change(self.positive), None if self.negative is None else change(self.negative))


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The denoiser's inputs with their floating-point tensors in this dtype."""
    return _changed(inputs, lambda value: value.to(dtype) if value.is_floating_point() else value)


def padded(values: Sequence[torch.Tensor], *, dim: int) -> list[torch.Tensor]:
    """Tensors with zeros behind them along a dimension, as long there as the longest is."""
    longest = max(value.shape[dim] for value in values) if values[0].ndim > dim else 0
    found = []
    for value in values:
        if value.ndim > dim and value.shape[dim] < longest:
            shape = (*value.shape[:dim], longest - value.shape[dim], *value.shape[dim + 1 :])
            value = torch.cat([value, value.new_zeros(shape)], dim)
        found.append(value)
    return found


def lengths(inputs: Inputs, name: str) -> list[int]:
    """How many entries of each row of the input of this name are real, where they are its first ones."""
    value, mask = inputs[name], inputs.get(name + _MASK)
    return [value.shape[1]] * len(value) if mask is None else mask.sum(1).tolist()


def _is_ragged(parts: Sequence[Inputs], name: str) -> bool:
    return any(name + _MASK in part for part in parts) or len({part[name].shape[1:2] for part in parts}) > 1


def _trimmed(inputs: Inputs) -> Inputs:
    inputs = dict(inputs)
    for name in [name for name in inputs if name.endswith(_MASK)]:
        real = inputs[name].any(0)
        real[:1] = True  # of a text without a token
        for which in (name, name.removesuffix(_MASK)):
            inputs[which] = inputs[which][:, real]
        if inputs[name].all():
            del inputs[name]
    return inputs


def _changed(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    return {name: change(value) for name, value in inputs.items()}
