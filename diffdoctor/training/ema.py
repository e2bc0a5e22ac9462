"""The exponential moving average (EMA) of weights in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch


class RunningAverage:
    """The exponential moving average of parameters.

    Args:
        parameters: what is averaged.
        decay: in [0, 1]; 0 keeps no average, and every method does nothing; 1 keeps the parameters as they are now.
        warm_up: whether the decay is at most (1 + step) / (10 + step).
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float, *, warm_up: bool = True):
        self.parameters, self.decay, self.warm_up = list(parameters), decay, warm_up
        self.values = [p.detach().clone() for p in self.parameters] if decay else []

    def update(self, step: int) -> None:
        """Take in the parameters after this step, counted from 0."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def load(self, values: Sequence[torch.Tensor]) -> None:
        """Resume with the `values` of a checkpoint."""
        self.values = [value.to(p.device) for value, p in zip(values, self.parameters, strict=bool(values))]

    def keep(self) -> None:
        """Put the average into the parameters for good."""
        put(self.values, self.parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the average."""
        trained = [p.detach().clone() for p in self.parameters] if self.values else []
        put(self.values, self.parameters)
        try:
            yield
        finally:
            put(trained, self.parameters)


@torch.no_grad()
def put(values: Sequence[torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> None:
    """Copy values into the parameters; no values leave them as they are."""
    if values:
        # a few launches on a GPU in place of one for each tensor
        torch._foreach_copy_(list(parameters), list(values))
