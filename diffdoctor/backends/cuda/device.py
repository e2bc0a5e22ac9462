"""What every launch of csrc/cuda needs: the device guard, the raw stream and a workspace."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from diffdoctor.backends import native as _loader

native = _loader.load()
_nothing = contextlib.nullcontext()
_MIN_WORKSPACE = 1 << 16
_ready: set[torch.device] = set()  # devices on which the kernels have been loaded
# Per device and stream: launches on one stream never overlap, so they may share partial sums and the block counter.
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def guard(device: torch.device):
    """A context in which `device` is current; tensors of the host are met in tests of the kernels alone."""
    if device.type != "cuda":
        return _nothing
    if device not in _ready:
        with torch.cuda.device(device):
            native.cuda_problem()  # loads every kernel: later that might be under a capture
        _ready.add(device)
    return _nothing if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def raw_stream(device: torch.device) -> int:
    """The address of the device's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def workspace_for(device: torch.device, stream: int, size: int, keep: bool) -> Tensor | None:
    """`size` bytes for one launch on the current stream, their head zero; to be held until the launch is queued.

    A captured graph gets memory of its own: replays may run beside other work on the capturing stream. So does a
    compiled graph (`keep` is False): under mode="reduce-overhead" it first runs in its graphs' memory pool, and torch
    raises where that holds what no output accounts for.
    """
    if size == 0:
        return None
    if not keep or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    key = (device, stream)
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < size:
        # Zeroed once; each launch leaves the head zero. The old one's memory is reused in stream order.
        workspace = torch.zeros(max(_MIN_WORKSPACE, 2 * size), dtype=torch.uint8, device=device)
        _workspaces[key] = workspace
    return workspace


def address(tensor: Tensor | None) -> int:
    """A tensor's address; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
