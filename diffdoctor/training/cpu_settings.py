"""How torch computes on the CPU for a while: its threads, and what becomes of denormal numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_settings(threads: int = 0) -> Iterator[None]:
    """Inside, torch has this many threads (0: as many as it has) and takes denormal numbers for 0.

    Denormal weights and activations slow small networks down: up to twice in the detector's training steps. Both
    settings belong to the process, numpy's arithmetic included, so both are put back at the end.
    """
    threads_before, flushed_before = torch.get_num_threads(), denormals_are_flushed()
    torch.set_num_threads(threads or threads_before)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)
        torch.set_num_threads(threads_before)


def denormals_are_flushed() -> bool:
    """Whether the calling thread takes denormal numbers for 0; torch has no such question."""
    return float(torch.tensor(1e-40) * 2) == 0
