"""Telling networks apart by their weights."""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def weights_digest(module: torch.nn.Module) -> str:
    """A hash of a network's class, parameters and buffers."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        for part in _parts(value.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or those that one of a quantized weight consists of."""
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _parts(getattr(value, name))


def same_weights(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 0.01) -> bool:
    """Whether two networks are one: all parameters alike but for rounding, such as a copy stored in bf16.

    Args:
        one: a network.
        other: another one.
        tolerance: largest norm of the difference, as a share of the norm of `other`'s parameters.
    """
    if one is other:
        return True
    ours, theirs = ([p.detach() for p in network.parameters()] for network in (one, other))
    if not ours or [p.shape for p in ours] != [p.shape for p in theirs]:
        return False
    apart = sum(float((a.cpu().double() - b.cpu().double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return apart <= tolerance**2 * sum(float(b.double().square().sum()) for b in theirs)
