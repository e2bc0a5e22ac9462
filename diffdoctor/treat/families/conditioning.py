"""What a denoiser is told of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Inputs = dict[str, torch.Tensor]


@dataclass
class Conditioning:
    """Prompt embeddings of N prompts, by the denoiser's own argument names.

    All that is done to embeddings is done here, so that a kind that is no tensor of N rows concerns this file alone.

    Attributes:
        positive: name -> (N, ...).
        negative: name -> (N, ...) for classifier-free guidance, or None where none is used.
    """

    positive: Inputs
    negative: Inputs | None = None

    def rows(self, index: torch.Tensor) -> Conditioning:
        """The conditioning of the prompts at index (M,)."""
        return self._each(lambda value: value.index_select(0, index.to(value.device)))

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def both(self) -> Inputs:
        """The inputs of one call for both predictions: N negative rows, then N positive ones."""
        return {name: torch.cat([self.negative[name], value]) for name, value in self.positive.items()}

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        negative = None if self.negative is None else _changed(self.negative, change)
        return Conditioning(_changed(self.positive, change), negative)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The denoiser's inputs with their floating-point tensors in this dtype."""
    return _changed(inputs, lambda value: value.to(dtype) if value.is_floating_point() else value)


def _changed(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    return {name: change(value) for name, value in inputs.items()}
