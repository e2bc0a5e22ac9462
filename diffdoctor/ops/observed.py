"""Whether a kernel may be called on a call's addresses, or must be called as an operator that others can see.

A kernel writes into memory behind torch's back. What records operations would record an allocation and miss that; what
replaces them would hand over tensors that have no memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

_is_compiling = torch.compiler.is_compiling
_tracing_state, _set_tracing_state = torch._C._get_tracing_state, torch._C._set_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes, _function_mode = torch._C._len_torch_function_stack, torch._C._get_function_stack_at

#: The types whose memory is their values; any other says by its own rules what an operator does with it.
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_observed() -> bool:
    """Whether operations are recorded or replaced: by torch.compile, torch.jit.trace, make_fx or any mode."""
    if _is_compiling() or _tracing_state() is not None or _dispatch_modes():
        return True
    return _function_modes() > 0 and _replaced()


def _replaced() -> bool:
    """Whether a mode of torch functions is active that is not a default device."""
    return any(type(_function_mode(k)) is not DeviceContext for k in range(_function_modes()))


def is_plain(*values) -> bool:
    """Whether every tensor among the values is one whose memory holds its values; what is no tensor is passed by."""
    return all(type(x) in PLAIN or not isinstance(x, Tensor) for x in values)


def unrecorded(check, *arguments):
    """check(*arguments), unseen by torch.jit.trace, which records each size that is read and warns of each."""
    state = None if _is_compiling() else _tracing_state()
    if state is None:
        return check(*arguments)
    _set_tracing_state(None)
    try:
        return check(*arguments)
    finally:
        _set_tracing_state(state)
