"""One or several processes that work together: which has which part, and the sums over all of them."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffdoctor.runs.errors import UserError, expected, missing_extra
from diffdoctor.training.devices import accelerator_count, open_device

if TYPE_CHECKING:
    from accelerate import PartialState

# That a process waits for the others, of which one may read all pictures or write a report for all. NCCL's own ten
# minutes would end the run; where one has died, its launcher ends the others.
_PATIENCE = datetime.timedelta(days=1)


def seed_of(*parts: int) -> int:
    """A 63-bit seed that is a function of all parts; close parts give unrelated seeds."""
    return int(np.random.SeedSequence([int(part) for part in parts]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def process_state(device: str | None = None) -> PartialState:
    """Accelerate's state of the processes that `accelerate launch` or torchrun started; of one where nothing did.

    Args:
        device: of the command's option; several processes whose device is the CPU talk over it.

    Raises:
        UserError: Accelerate is not installed, or this machine has accelerators, but fewer than processes.
    """
    try:
        from accelerate import PartialState
    except ImportError:
        raise missing_extra("accelerate", "stages") from None
    count, local = accelerator_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # One process may use the CPU now and a GPU later: it has no partners, and the state outlives this call.
    on_cpu = not count or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and (device or "").split(":")[0] == "cpu")
    if not on_cpu and local > count:
        what = f"at most as many as this machine has accelerators, {count} (or ACCELERATE_USE_CPU=true)"
        raise UserError(expected("processes", what, local))
    # Without cpu=True, Accelerate takes several processes on a machine without accelerators for single ones.
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)


def largest(value: int, device: torch.device) -> int:
    """The largest of all processes' numbers; each has a device."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    packed = torch.tensor(value, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.MAX)
    return int(packed)


class Processes:
    """The processes that `accelerate launch` or torchrun started; one process where nothing did.

    Args:
        device: name of the device that all of them use; None: each has the one that Accelerate gives it.

    Attributes:
        rank: of this process, from 0.
        count: of all processes.
        device: of this process.

    Raises:
        UserError: the device is not there, or is one GPU for several processes.
    """

    def __init__(self, device: str | None = None):
        state = process_state(device)
        self.rank, self.count = state.process_index, state.num_processes
        self.device = open_device(device, state.device)
        if self.count > 1 and device and self.device.type != "cpu" and self.device.index is not None:
            what = "none or cpu with several processes, each of which has a GPU of its own"
            raise UserError(expected("device", what, repr(device)))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> tuple[int, int]:
        """This process's number among those of its machine, from 0, and how many these are."""
        if self.count == 1:
            return 0, 1
        # torchrun and `accelerate launch` set both
        return int(os.environ.get("LOCAL_RANK", self.rank)), int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def share(self, total: int) -> list[int]:
        """This process's part of range(total)."""
        return list(range(self.rank, total, self.count))

    def even_share(self, total: int) -> list[int]:
        """As `share`, but as many for every process: those that would have one less repeat the last one."""
        padded = math.ceil(total / self.count) * self.count
        return [min(number, total - 1) for number in range(self.rank, padded, self.count)]

    def gather(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """(total, ...) on the CPU, in order, from what every process has for its `even_share` (n, ...)."""
        if self.count == 1:
            return part.cpu()
        part = part.contiguous()  # what is received must have the strides of what is sent
        parts = [torch.empty_like(part) for _ in range(self.count)]
        torch.distributed.all_gather(parts, part)
        return torch.stack([other.cpu() for other in parts], 1).flatten(0, 1)[:total]

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

    def largest(self, value: int) -> int:
        """The largest of all processes' numbers."""
        return largest(value, self.device)

    def from_main(self, make: Callable[[], object]):
        """What make() gives on the main process, on all of them; its UserError is raised on all of them.

        The files of a run belong to the main process: another machine need not see them.
        """
        if self.count == 1:
            return make()
        answer = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except UserError as error:
                answer[1] = str(error)
        torch.distributed.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def gathered(self, value: object) -> list:
        """What each process has, in their order, on the main process; on others nothing that counts.

        Args:
            value: what can be pickled.
        """
        if self.count == 1:
            return [value]
        found: list[object] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()
