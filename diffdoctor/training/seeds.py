"""Seeds of torch's global random numbers that leave those of other devices, which may be the caller's, as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's random numbers follow from a seed; afterwards they go on as before.

    `torch.manual_seed` would seed every GPU too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the CPU and of a device, and of no other device."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
