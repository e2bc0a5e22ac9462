"""Peak memory of a call and what is held between forward and backward, beyond the inputs."""

import contextlib
import os
import sys

import torch


def forward_and_backward(forward, backward, device: torch.device) -> dict[str, int]:
    """{"held_bytes": alive after forward() beyond what was before it, "peak_bytes": the most at any time until the end
    of backward(result)}. Both callables have been called before, so that nothing is set up here."""
    measure = _cuda if device.type == "cuda" else _cpu
    return measure(forward, backward, device)


def _cuda(forward, backward, device):
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = forward()
    held = torch.cuda.memory_allocated(device) - before
    gradient = backward(result)
    peak = torch.cuda.max_memory_allocated(device) - before
    del gradient
    return {"held_bytes": held, "peak_bytes": peak}


def _cpu(forward, backward, device):
    """From the profiler's record of torch's CPU allocator, which Inductor's code and our operations use as well."""
    with _profiled() as events:
        result = forward()
    held = sum(events)
    with _profiled() as more:
        gradient = backward(result)
    running = peak = 0
    for change in (*events, *more):
        running += change
        peak = max(peak, running)
    del gradient
    return {"held_bytes": held, "peak_bytes": peak}


@contextlib.contextmanager
def _profiled():
    """Yields a list that holds the changes of the allocator in bytes, in order, once the block has ended."""
    changes: list[int] = []
    with _quiet_stderr():
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with profiler:
            yield changes
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes.extend(event.nbytes() for event in events if event.device_type() == torch.autograd.DeviceType.CPU)


@contextlib.contextmanager
def _quiet_stderr():
    """The profiler's library writes to the file descriptor itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
