"""What the launches of every Triton kernel need: the device guard, counters, and whether they are interpreted."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from diffdoctor.kernels.common import interprets
from diffdoctor.kernels.weighted_loss import weighted_loss_kernel
from diffdoctor.runs.errors import expected

INTERPRETS = interprets(weighted_loss_kernel)
SCALE_BLOCK = 2048  # elements that a program of a backward kernel scales at once


def on_device(tensor: Tensor):
    """Launches go to the current device; make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def need_memory(**tensors: Tensor | None) -> None:
    """Refuse a tensor at the address 0, whose memory does not hold its values; by the arguments' names."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() < 1 << 16:  # no memory is ever mapped there
            raise ValueError(expected(name, "a tensor whose memory holds its values", "address 0"))


_counters: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device, count: int, keep: bool) -> Tensor:
    """At least `count` int32 zeros for the current stream of the current device.

    Kernels leave them at zero, so they are cleared once and kept. A graph under capture gets its own: it may be
    replayed on another stream than the one that captured it. So does a compiled graph (`keep` is False): under
    mode="reduce-overhead" it first runs in its graphs' memory pool, which may hold nothing that outlives the call.
    """
    if not keep or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept
