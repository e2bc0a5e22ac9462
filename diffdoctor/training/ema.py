"""The exponential moving average (EMA) of weights in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch


class RunningAverage:
    """The exponential moving average of parameters, its decay warmed up as (1 + step) / (10 + step).

    Args:
        parameters: what is averaged.
        decay: in [0, 1); 0 keeps no average, and every method does nothing.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters] if decay else []

    def update(self, step: int) -> None:
        """Take in the parameters after this step, counted from 0."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
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
    for parameter, value in zip(parameters, values, strict=bool(values)):
        parameter.copy_(value)
