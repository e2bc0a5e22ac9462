"""The Triton backend: one file per op, found by its name. kernels/*.py holds the kernels."""

from functools import cache

import torch


@cache
def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None.

    Raises:
        ImportError: triton is not installed.
    """
    import triton

    from diffdoctor.kernels.common import interprets
    from diffdoctor.kernels.weighted_loss import weighted_loss_kernel

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 4):
        return f"triton {triton.__version__} is too old, 3.4 or newer is needed"
    if interprets(weighted_loss_kernel):
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (7, 5):
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return None
