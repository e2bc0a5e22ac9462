"""Counting bytes: what autograd keeps, and what is alive."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Kept:
    """Bytes that autograd keeps, by the place where they were saved: at the worst moment, parameters left out.

    Args:
        modules: whose parameters and buffers do not count.
    """

    def __init__(self, modules):
        self.modules = modules  # an address is only theirs as long as they live
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        self.parameters = {_address(tensor) for tensor in tensors}
        self.users: dict[int, int] = {}
        self.sizes: dict[int, tuple[str, int]] = {}
        self.place = "rest"
        self.now = {"denoiser": 0, "vae": 0, "detector": 0, "rest": 0}
        self.worst = dict(self.now)

    def pack(self, tensor):
        address = _address(tensor)
        if address in self.parameters:
            return tensor
        held = _Held(tensor)
        if not self.users.get(address):
            self.sizes[address] = (self.place, tensor.untyped_storage().nbytes())
            self.now[self.place] += self.sizes[address][1]
            if sum(self.now.values()) > sum(self.worst.values()):
                self.worst = dict(self.now)
        self.users[address] = self.users.get(address, 0) + 1
        weakref.finalize(held, self._drop, address)
        return held

    def unpack(self, held):
        return held.tensor if isinstance(held, _Held) else held

    def _drop(self, address):
        self.users[address] -= 1
        if not self.users[address]:
            place, size = self.sizes.pop(address)
            self.now[place] -= size

    def hooks(self):
        """As long as it is entered, what autograd saves is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def at(self, place, function):
        """The function, with what is saved inside it booked under this place."""

        def counted(*args, **kwargs):
            before, self.place = self.place, place
            try:
                return function(*args, **kwargs)
            finally:
                self.place = before

        return counted


class _Held:
    # as long as autograd holds this, the storage lives and its address is not given out again
    def __init__(self, tensor):
        self.tensor = tensor


class Alive(TorchDispatchMode):
    """The most bytes of new storages alive at once while it is entered; `peak` holds it."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), known)
        return result

    def _see(self, storage, known):
        key = id(storage)
        if key in self.seen or key in known:
            return
        size = storage.nbytes()
        self.seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self.seen.pop(key)


def _address(tensor) -> int:
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.device.type == "meta" else storage.data_ptr()
