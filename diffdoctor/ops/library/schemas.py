"""The library of registered operators behind torch.compile.

An eager call never comes here. A traced one is checked while it is traced, then becomes one operator whose arguments
are tensors, numbers and strings; its implementation lowers and runs the call as an eager call does. Backward works out
of place. <op>.py holds an op's schema, implementation, fake and backward.
"""

import contextlib

import torch

library = torch.library.Library("diffdoctor", "DEF")


@contextlib.contextmanager
def differentiating():
    """Inside an operator's implementation: autograd, below which the dispatcher calls it."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield
