"""One or several processes that treat together: who draws which picture, and the sum of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A 63-bit seed that is a function of all parts; close parts give unrelated seeds."""
    return int(np.random.SeedSequence([int(part) for part in parts]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Processes:
    """The processes that `accelerate launch` or torchrun started; one process where nothing did."""

    def __init__(self):
        from accelerate import PartialState

        state = PartialState() if torch.cuda.is_available() else PartialState(cpu=True)
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> list[int]:
        """This process's part of range(total)."""
        return list(range(self.rank, total, self.count))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes in place; one that has none contributes zeros."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.count == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def sum_values(self, *values: float) -> list[float]:
        """Add up numbers of all processes."""
        if self.count == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(packed)
        return packed.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()
