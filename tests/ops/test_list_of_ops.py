"""The one list of ops, and the files that follow from a line in it."""

import importlib
import importlib.util
import types

import pytest
import torch

import diffdoctor
from diffdoctor.ops import OPS, public


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_file_in_every_layer(op):
    assert callable(getattr(diffdoctor.reference, op))
    assert importlib.import_module(f"diffdoctor.ops.library.{op}")
    assert hasattr(torch.ops.diffdoctor, op)
    for backend in ("cpu", "cuda", "triton"):
        assert importlib.util.find_spec(f"diffdoctor.backends.{backend}.{OPS[op]}"), backend


def test_a_module_of_an_op_is_not_hidden_by_its_function():
    for op in OPS:
        module = importlib.import_module(f"diffdoctor.ops.{op}")
        assert isinstance(getattr(diffdoctor.ops, op), types.ModuleType)
        assert getattr(diffdoctor, op) is getattr(module, op)


def test_the_public_names_are_those_of_the_modules():
    names = public()
    assert set(OPS) <= set(names)
    assert set(names) < set(diffdoctor.__all__)
    assert all(getattr(diffdoctor, name) is value for name, value in names.items())
