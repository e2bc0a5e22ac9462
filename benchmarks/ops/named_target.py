"""A Triton driver without a GPU."""

from __future__ import annotations

import torch


class NamedTarget:
    """Enough of a Triton driver to compile for compute capability `arch` (80, 90, 100) on any machine."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")
