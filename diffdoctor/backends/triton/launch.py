"""What the launches of every Triton kernel need: the device guard, counters, and whether they are interpreted."""

from __future__ import annotations

import contextlib
from functools import reduce
from operator import or_

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
LEAST_ADDRESS = 1 << 16  # no memory is ever mapped below
_nothing = contextlib.nullcontext()
# Without torch.cuda's check that CUDA is initialised, which a CUDA tensor has answered.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_direct = not INTERPRETS  # what compiles without a GPU takes every launch to the binder


class Direct:
    """A launch that was made, to be made again on other tensors at addresses that are multiples of 16.

    Args:
        compiled: the kernel.
        programs: the grid.
        others: its arguments behind the tensors.
    """

    __slots__ = ("_others", "run")

    def __init__(self, compiled, programs: int, others: list):
        self.run, self._others = compiled[(programs, 1, 1)], others

    def launch(self, addresses: list[int], *tensors) -> bool:
        """Launch on the tensors, each in its place or None; False where the code is not for such addresses."""
        if min(addresses) < LEAST_ADDRESS or reduce(or_, addresses) & 15:
            return False
        self.run(*tensors, *self._others)
        return True


def launch(
    kernel, programs: int, kept: dict, key: tuple, tensors: dict, numbers: dict, fixed: dict, again: bool = False
) -> Direct | None:
    """kernel[(programs,)](**tensors, **numbers, **fixed).

    Triton's binder takes 45 us for the 78 arguments of weighted_loss_kernel. A launch like an earlier one goes straight
    to what was compiled then.

    Args:
        kernel: jitted.
        programs: the grid.
        kept: what earlier launches with the same `fixed` left here; it lives as long as `fixed` does.
        key: what else the compiled code depends on: the device, and those of `numbers` that are constants of it.
        tensors: by argument: a tensor, None, or a tuple of tensors; the kernel's first arguments, in its order. Their
            dtypes follow from `fixed` and `key`.
        numbers: by argument; those that are not in `key` must be floats or `do_not_specialize`.
        fixed: the other arguments, the same in every launch with this `kept`.
        again: whether the same launch is to be made on other tensors.

    Returns:
        With `again` that launch, once the kernel is compiled for aligned addresses; else None.
    """
    if not _direct:
        kernel[(programs,)](**tensors, **numbers, **fixed)
        return None
    alignments = tuple(map(_alignment, tensors.values()))
    key = (kernel.__name__, *key, *alignments)
    known = kept.get(key)
    if known is None:
        compiled, names = kernel[(programs,)](**tensors, **numbers, **fixed), kernel.arg_names
        first = len(tensors)
        assert tuple(names[:first]) == tuple(tensors), kernel.__name__
        aligned = not any(any(bits) if type(bits) is tuple else bits for bits in alignments)
        others = [fixed.get(name) for name in names[first:]]
        kept[key] = compiled, others, [names.index(n) - first for n in numbers], aligned
        return None
    compiled, others, places, aligned = known
    others = others.copy()
    for place, value in zip(places, numbers.values(), strict=True):
        others[place] = value
    if not (again and aligned):
        compiled[(programs, 1, 1)](*tensors.values(), *others)
        return None
    direct = Direct(compiled, programs, others)
    direct.run(*tensors.values(), *others)
    return direct


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


def is_current(device: torch.device) -> bool:
    """Whether launches, which go to the current device, go to this one; the host is met in tests."""
    return device.type != "cuda" or device.index == _current_device()


def on_device(device: torch.device):
    """A context in which launches go to a device."""
    return _nothing if is_current(device) else torch.cuda.device(device)


def need_memory(**tensors: Tensor | None) -> None:
    """Refuse a tensor at the address 0, whose memory does not hold its values; by the arguments' names."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() < LEAST_ADDRESS:
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
