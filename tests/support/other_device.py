"""A second device on a machine that has none: its tensors live on the CPU and refuse to meet the CPU's.

Inside `other_device()` whatever is made on, or moved to, `DEVICE` becomes a `There`, which wraps a tensor of the CPU.
Operators compute what they compute on the CPU, and raise where tensors of both devices meet, as on a GPU. `DEVICE` is
torch's lazy device: autograd serves it in the caller's thread, and no library treats it as a special case.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from diffdoctor.ops.library import modulate_gradient as registered

DEVICE = torch.device("lazy:0")
_ops = torch.ops.aten
#: What takes tensors of the CPU beside a GPU's: copies, and indices.
_MIXED = {
    _ops.copy_.default,
    _ops.index.Tensor,
    _ops.index_put.default,
    _ops.index_put_.default,
    _ops._index_put_impl_.default,
}


class There(torch.Tensor):
    """A tensor of `DEVICE`; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self):
        return f"There({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert a tensor of {DEVICE} to numpy: copy it to the CPU first")

    __array__ = numpy

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, meta, size, stride):
        return There(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


def _dispatch(function, args, kwargs):
    if function is torch.ops.diffdoctor.modulate_gradient_later_grad.default:  # its map is no argument
        modulator = registered.modulators[args[1]]
        return registered.scaled(args[0], modulator.confidence, modulator._options)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    if there and function not in _MIXED and any(x.ndim for x in tensors if not isinstance(x, There)):
        raise RuntimeError(f"expected all tensors on one device, {function} got some on {DEVICE} and some on cpu")
    values, options = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, kwargs))
    asked = kwargs.get("device")
    goes_there = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if asked is not None and goes_there:
        options["device"] = torch.device("cpu")
    if options.get("pin_memory"):
        options["pin_memory"] = False
    found = function(*values, **options)
    if function is _ops.copy_.default:
        return args[0]
    if not goes_there:
        return found
    known = {id(x.inner): x for x in there}

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else There(x)

    found = tree_map(wrapped, found)
    # of an operator of torch alone it is known which results are views
    return (
        return_and_correct_aliasing(function, args, kwargs, found) if there and function.namespace == "aten" else found
    )


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


@contextlib.contextmanager
def other_device():
    """As long as it is entered, `DEVICE` is there."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=DEVICE) comes by as a copy
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
