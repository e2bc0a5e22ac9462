"""Interleaved timing: every round calls every implementation once, so that a slow second falls on all of them."""

import gc
import math
import time
from collections.abc import Callable

import torch

Implementations = dict[str, Callable[[], object]]


class HostClock:
    """Wall-clock time of work that is done when the call returns."""

    smallest = 200e-6

    def time(self, impl, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            impl()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Device time between two events around the calls: launch gaps count; the host's first call and the final wait do
    not, since the device is kept waiting while the first calls are queued."""

    smallest = 5e-3
    #: Cycles that the device waits before the clock starts, about 1.5 ms.
    head_start = 3_000_000

    def __init__(self):
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def time(self, impl, calls: int) -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(self.head_start)
        self.begin.record()
        for _ in range(calls):
            impl()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e-3 / calls


def clock_for(device: torch.device):
    return CudaClock() if device.type == "cuda" else HostClock()


def interleaved(implementations: Implementations, clock, seconds: float, least_rounds: int = 7, most_rounds: int = 200):
    """Seconds per call of each implementation, a list with one entry per round.

    A sample repeats a short call until it lasts `clock.smallest`. Rounds end after `seconds`, but not before
    `least_rounds` of them; each starts with another implementation.
    """
    calls = {}
    for name, impl in implementations.items():
        for _ in range(3):
            clock.time(impl, 1)
        calls[name] = max(1, math.ceil(clock.smallest / max(clock.time(impl, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    names = list(implementations)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        for number in range(most_rounds):
            if number >= least_rounds and time.perf_counter() > deadline:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(clock.time(implementations[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def percentile(samples: list[float], share: float) -> float:
    """The share-quantile (0 to 1) by linear interpolation, as numpy's default."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles_us(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    return {f"p{share}_us": round(percentile(samples, share / 100) * 1e6, 3) for share in (20, 50, 80)}


def copy_of(nbytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that moves `nbytes` in all, reads and writes together: what the memory can do at this size."""
    source = torch.randint(0, 255, (max(nbytes // 8, 1),), dtype=torch.int32, device=device).view(torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
