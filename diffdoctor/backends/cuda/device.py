"""What every launch of csrc/cuda needs: the device guard, the raw stream and a workspace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdoctor.backends import native as _loader
from diffdoctor.backends.native_call import address

native = _loader.load()
_MIN_WORKSPACE = 1 << 16
# Without torch.cuda's check that CUDA is initialised, which a CUDA tensor has answered.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_ready: set[torch.device] = set()  # devices on which the kernels have been loaded
# Per device and stream: launches on one stream never overlap, so they may share partial sums and the block counter.
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def launch(function: Callable, arguments: tuple, where: torch.device, size: int | None = None, keep: bool = True):
    """function(*arguments, the current stream of `where`), with `where` the current device.

    Args:
        function: of the native module.
        arguments: what it takes before a workspace and the stream.
        where: a CUDA device; the host is met in tests of the kernels alone.
        size: bytes of the workspace whose address it takes before the stream; None where it takes none.
        keep: as `workspace_for` has it.
    """
    if where.type == "cuda":
        if where not in _ready:
            with torch.cuda.device(where):
                native.cuda_problem()  # loads every kernel: later that might be under a capture
            _ready.add(where)
        if _current_device() != where.index:
            with torch.cuda.device(where):
                return launch(function, arguments, where, size, keep)
    stream = raw_stream(where)
    if size is None:
        return function(*arguments, stream)
    workspace = workspace_for(where, stream, size, keep)  # held until the launch is queued
    return function(*arguments, address(workspace), stream)


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
