"""A denoiser whose frozen blocks wait in the CPU's memory, and are on the device a few at a time, forward and backward.

diffusers' group offloading takes a block away once its forward pass is done, where backward would still need it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves


def blocks_of(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that a denoiser consists of: the entries of its lists of modules."""
    lists = (child for child in denoiser.children() if isinstance(child, torch.nn.ModuleList))
    return [block for entries in lists for block in entries]


@contextmanager
def resident_blocks(denoiser: torch.nn.Module, count: int, device: torch.device) -> Iterator[ResidentBlocks]:
    """Inside, the denoiser is on the device but for its frozen blocks, of which at most so many are there.

    What has a gradient stays there too. Afterwards all of the denoiser is on the CPU.

    Args:
        denoiser: not quantized (see `checks.check_resident_blocks`), and checkpointed where there is a gradient: else
            autograd keeps matrices of every block, on the device, until its backward pass.
        count: of blocks.
        device: of the computation.
    """
    denoiser.to("cpu")  # from where alone memory can be pinned
    blocks = ResidentBlocks(blocks_of(denoiser), count, device)
    try:
        denoiser.to(device)
        yield blocks
    finally:
        blocks.close()
        denoiser.to("cpu")


class ResidentBlocks:
    """Keeps the blocks that were used last on the device.

    A block comes when its forward pass begins, and again when its backward pass does, which is where the gradient of
    one of its outputs arrives: autograd is done by then with every block that was called later. A block that is not
    there has empty weights.

    Args:
        blocks: on the CPU.
        count: how many may be on the device.
        device: of the computation.

    Attributes:
        resident: those that are there, the one that was used last at the end.
    """

    def __init__(self, blocks: list[torch.nn.Module], count: int, device: torch.device):
        self.count, self.device = count, device
        self.resident: OrderedDict[torch.nn.Module, None] = OrderedDict()
        self._kept: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
        self._hooks = []
        try:
            for block in blocks:
                self._put_away(block)
        except BaseException:  # there may be too little memory to pin
            self.close()
            raise

    def _put_away(self, block: torch.nn.Module) -> None:
        frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
        self._kept[block] = [(p, p.data.pin_memory() if self.device.type == "cuda" else p.data) for p in frozen]
        self._take_away(block)
        self._hooks += [
            block.register_forward_pre_hook(lambda block, inputs: self._fetch(block)),
            block.register_forward_hook(self._await_gradient),
        ]

    def close(self) -> None:
        """Put all weights back into their blocks, on the CPU."""
        for hook in self._hooks:
            hook.remove()
        for kept in self._kept.values():
            for parameter, data in kept:
                parameter.data = data
        self.resident.clear()

    def _fetch(self, block: torch.nn.Module) -> None:
        if block in self.resident:
            self.resident.move_to_end(block)
            return
        while len(self.resident) >= self.count:
            self._take_away(self.resident.popitem(last=False)[0])
        for parameter, data in self._kept[block]:
            parameter.data = data.to(self.device, non_blocking=True)
        self.resident[block] = None

    def _take_away(self, block: torch.nn.Module) -> None:
        for parameter, data in self._kept[block]:
            parameter.data = data.new_empty(0, device=self.device)

    def _await_gradient(self, block: torch.nn.Module, inputs, outputs) -> None:
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(self._on_gradient(block))

    def _on_gradient(self, block: torch.nn.Module) -> Callable[[torch.Tensor], None]:
        return lambda gradient: self._fetch(block)
