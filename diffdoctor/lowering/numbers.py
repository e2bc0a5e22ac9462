"""Numbers as kernels take them."""

import ctypes

import torch


def round_to_fp32(value: float) -> float:
    """The value as kernels compare with it."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace ctypes; the operator rounds when it runs
        return value
    return ctypes.c_float(value).value
