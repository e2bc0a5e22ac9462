"""What the launches of every Triton kernel need: the device guard, counters, and whether they are interpreted."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from diffdoctor.backends.triton_tiles import LAUNCH
from diffdoctor.kernels.common import interprets
from diffdoctor.kernels.weighted_loss import weighted_loss_kernel
from diffdoctor.runs.errors import expected

INTERPRETS = interprets(weighted_loss_kernel)
SCALE_BLOCK = 2048  # elements that a program of a backward kernel scales at once
SCALE = {"BLOCK": SCALE_BLOCK, "ROUND_BF16": INTERPRETS, **LAUNCH}
SCALE_PROGRAMS = 1024  # at most: where nothing is to be scaled, few programs come and go
_direct = not INTERPRETS  # what compiles without a GPU takes every launch to the binder


def launch(kernel, programs: int, kept: dict, key: tuple, tensors: dict, numbers: dict, fixed: dict) -> None:
    """kernel[(programs,)](**tensors, **numbers, **fixed).

    Triton's binder takes 45 us for the 78 arguments of weighted_loss_kernel. A launch like an earlier one goes straight
    to what was compiled then.

    Args:
        kernel: jitted.
        programs: the grid.
        kept: what earlier launches with the same `fixed` left here; it lives as long as `fixed` does.
        key: what else the compiled code depends on: the device, and those of `numbers` that are constants of it.
        tensors: by argument: a tensor, None, or a tuple of tensors. Their dtypes follow from `fixed` and `key`.
        numbers: by argument; those that are not in `key` must be floats or `do_not_specialize`.
        fixed: the other arguments, the same in every launch with this `kept`.
    """
    if not _direct:
        kernel[(programs,)](**tensors, **numbers, **fixed)
        return
    key = (kernel.__name__, *key, *map(_alignment, tensors.values()))
    known = kept.get(key)
    if known is None:
        compiled = kernel[(programs,)](**tensors, **numbers, **fixed)
        names = kernel.arg_names
        # The tensors' places stay empty: a kept tensor would keep its memory.
        kept[key] = compiled, [fixed.get(name) for name in names], [names.index(name) for name in (*tensors, *numbers)]
        return
    compiled, arguments, places = known
    arguments = arguments.copy()
    for place, value in zip(places, (*tensors.values(), *numbers.values()), strict=True):
        arguments[place] = value
    compiled[(programs, 1, 1)](*arguments)


def specialised(count: int) -> int:
    """What Triton compiles anew for: a size of 1, one that 16 divides, one beyond 32 bits."""
    return 1 if count == 1 else 2 * (count % 16 == 0) + 4 * (count >= 1 << 31)


def _alignment(value):
    """What the compiled code knows of a tensor: whether it is there, and whether its address is a multiple of 16."""
    if value is None:
        return None
    if type(value) is tuple:
        return tuple(x.data_ptr() & 15 for x in value)
    return value.data_ptr() & 15


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
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept
