"""The library of registered operators behind torch.compile.

An eager call never comes here. A traced one is checked while it is traced, then becomes one operator whose arguments
are tensors, numbers and strings; its implementation lowers and runs the call as an eager call does. Backward works out
of place. <op>.py holds an op's schema, implementation, fake and backward.
"""

import contextlib

import torch
from torch import Tensor

library = torch.library.Library("diffdoctor", "DEF")


@contextlib.contextmanager
def differentiating():
    """Inside an operator's implementation: autograd, below which the dispatcher calls it."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield


def no_gradients(inputs) -> tuple:
    """None for every input, in the structure register_autograd asks of a schema that has lists of tensors."""
    return tuple(
        [None] * len(x) if isinstance(x, (list, tuple)) and all(isinstance(item, Tensor) for item in x) else None
        for x in inputs
    )
