"""The device that a command runs on."""

from __future__ import annotations

import os

import torch

from diffdoctor.runs.errors import UserError, first_line


def accelerator_count() -> int:
    """How many accelerators torch finds on this machine; 0 where Accelerate's variable ACCELERATE_USE_CPU is true."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        return 0
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def open_device(name: str | None, default) -> torch.device:
    """The torch device of this name, or `default` for None; raises `UserError` for one that is not there."""
    try:
        device = torch.device(name) if name else torch.device(default)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used ({first_line(error)})") from None
    return device


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a network's parameters are, or its buffers if it has none; the CPU for one without tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def as_numbers(value):
    """Lists and tuples with numbers in place of the tensors in them: NumPy takes no tensor from a GPU."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [as_numbers(each) for each in value] if isinstance(value, (list, tuple)) else value


def open_device_at(name: str | None, number: int) -> torch.device:
    """The device of the number-th worker of this machine: the one of this name, or for None, accelerators in turn.

    Raises:
        UserError: it is not there.
    """
    count = accelerator_count()
    if name is None and count:
        return torch.device(torch.accelerator.current_accelerator().type, number % count)
    return open_device(name, "cpu")
