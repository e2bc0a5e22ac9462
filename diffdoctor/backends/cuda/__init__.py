"""The CUDA C++ backend: one file per op, found by its name."""

from functools import cache

import torch

from diffdoctor.backends import native


@cache
def unavailable() -> str | None:
    """Why the backend cannot be used here, or None."""
    module = native.load()
    if module is None:
        return native.reason()
    if not module.has_cuda:
        left_out = native.build_info().get("left_out", {}).get("cuda")
        return left_out or "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "torch is built for ROCm"
    torch.cuda.init()
    current = torch.cuda.current_device()
    kinds = {torch.cuda.get_device_capability(device): device for device in range(torch.cuda.device_count())}
    kinds[torch.cuda.get_device_capability(current)] = current
    for device in kinds.values():  # one of each kind: a context costs memory
        with torch.cuda.device(device):
            problem = module.cuda_problem()
        if problem is not None:
            return f"the compiled kernels cannot run on {torch.cuda.get_device_name(device)}: {problem}"
    return None
