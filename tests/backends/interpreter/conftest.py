"""Collected only with TRITON_INTERPRET=1: kernels run in the interpreter then (see test_triton_interpreter.py)."""

import inspect
import os
import sys
import types
import warnings

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*"]


def _index_by_one_element(interpreter):
    """Loop bounds in Triton 3.4 to 3.6 are arrays of one element, which NumPy 2.4 no longer makes an int of.

    What Triton 3.7 does, put over the patch that its interpreter lays on tensors for the time of a launch.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)

        def index(self):
            return int(self.handle.data.squeeze())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def _list_builtins_once(interpreter):
    """Every call of a jitted function by another looks through all of triton.language for what it must replace.

    That was more than a third of the interpreter's time. The builtins are the same each time, and those that the caller
    has replaced are none any more.
    """
    builtins = {}

    def getmembers(scope):
        if scope not in builtins:
            builtins[scope] = [name for name, member in inspect.getmembers(scope) if tl.core.is_builtin(member)]
        return [(name, getattr(scope, name)) for name in builtins[scope]]

    interpreter.inspect = types.SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})


if INTERPRETED:
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    @triton.jit
    def count_to(out_ptr, n):
        for i in range(n):
            tl.store(out_ptr + i, i)

    try:
        count_to[(1,)](torch.empty(2), 2)
    except Exception as error:
        if "0-dimensional" not in str(error):
            raise
        _index_by_one_element(interpreter)
        count_to[(1,)](torch.empty(2), 2)
    _list_builtins_once(interpreter)


@pytest.fixture(autouse=True)
def no_division_warnings():
    """log2(0) is meant to be −∞ in the kernels; numpy says so aloud."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture
def served(monkeypatch):
    """The public functions, served by the interpreted kernels."""
    backends = sys.modules["diffdoctor.backends.select"]  # the package's attribute of that name is the function
    monkeypatch.setattr(backends, "_BY_DEVICE", {"cpu": ("triton",)})
    monkeypatch.setattr(backends, "_chosen", {})
