"""The CUDA C++ backend: device guard, raw stream and workspace around the launches of csrc/cuda."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from diffdoctor.backends import native
from diffdoctor.backends.native_call import artifact_arguments, call_arguments, native_plan
from diffdoctor.lowering.plan import DTYPES, ArtifactProblem, Problem

_native = native.load()
_nothing = contextlib.nullcontext()
_MIN_WORKSPACE = 1 << 16
# Per device and stream: launches on one stream never overlap, so they may share partial sums and the block counter.
_workspaces: dict[tuple[torch.device, int], Tensor] = {}
_unavailable: str | bool | None = False  # False: not yet known


def unavailable() -> str | None:
    global _unavailable
    if _unavailable is False:
        _unavailable = _find_problem()
    return _unavailable


def _find_problem() -> str | None:
    if _native is None:
        return native.reason()
    if not _native.has_cuda:
        left_out = native.build_info().get("left_out", {}).get("cuda")
        return left_out or "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "torch is built for ROCm"
    torch.cuda.init()
    problem = _native.cuda_problem()
    if problem is None:
        return None
    return f"the compiled kernels cannot run on {torch.cuda.get_device_name()}: {problem}"


def _guard(device: torch.device):
    """Makes `device` current for the launch. (Tensors of the host are met in tests of the kernels alone.)"""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _nothing
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _workspace(device: torch.device, stream: int, size: int, keep: bool) -> Tensor | None:
    """`size` bytes for one launch on the current stream, their head zero; to be held until the launch is queued.

    A captured graph gets memory of its own: replays may run beside other work on the capturing stream. So does a
    compiled graph (`keep` is False): under mode="reduce-overhead" it first runs in its graphs' memory pool, and torch
    raises where that holds what no output accounts for.
    """
    if size == 0:
        return None
    if not keep or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    key = (device, stream)
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < size:
        # Zeroed once; each launch leaves the head zero. The old one's memory is reused in stream order.
        workspace = torch.zeros(max(_MIN_WORKSPACE, 2 * size), dtype=torch.uint8, device=device)
        _workspaces[key] = workspace
    return workspace


def _address(workspace: Tensor | None) -> int:
    return 0 if workspace is None else workspace.data_ptr()


def weighted_loss(problem: Problem) -> None:
    plan, work, device = problem.plan, problem.work, problem.pred.device
    native_form = native_plan(plan, _native)
    size = plan.cache.get(("cuda", work))
    if size is None:
        size = plan.cache["cuda", work] = _native.weighted_loss_cuda_workspace(native_form, work)
    pointers, per_sample = call_arguments(problem)
    with _guard(device):
        stream = _stream(device)
        workspace = _workspace(device, stream, size, problem.keeps_workspace)
        _native.weighted_loss_cuda(native_form, work, pointers, per_sample, _address(workspace), stream)


def weight_mean(problem: Problem, out: Tensor) -> None:
    plan, device = problem.plan, problem.pred.device
    native_form = native_plan(plan, _native)
    confidence, mask = problem.confidence, problem.mask
    with _guard(device):
        stream = _stream(device)
        size = _native.weight_mean_cuda_workspace(native_form)
        workspace = _workspace(device, stream, size, problem.keeps_workspace)
        _native.weight_mean_cuda(
            native_form,
            0 if confidence is None else confidence.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            out.data_ptr(),
            out.shape[0] == plan.batch and plan.batch > 1,
            _address(workspace),
            stream,
        )


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    stride = grad_output.stride(0) if grad_output.ndim else 0
    with _guard(grad.device):
        _native.scale_gradient_cuda(
            grad.data_ptr(),
            out.data_ptr(),
            DTYPES[grad.dtype],
            batch,
            count,
            grad_output.data_ptr(),
            stride,
            _stream(grad.device),
        )


def artifact_loss(problem: ArtifactProblem) -> None:
    device = problem.logits.device
    description = artifact_arguments(problem)
    with _guard(device):
        stream = _stream(device)
        size = _native.artifact_loss_cuda_workspace(description)
        workspace = _workspace(device, stream, size, problem.keeps_workspace)
        _native.artifact_loss_cuda(description, _address(workspace), stream)


def artifact_loss_backward(kept: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    stride = grad_output.stride(0) if grad_output.ndim else 0
    with _guard(kept.device):
        _native.artifact_loss_backward_cuda(
            kept.data_ptr(),
            factor.data_ptr(),
            grad_output.data_ptr(),
            stride,
            out.data_ptr(),
            DTYPES[out.dtype],
            kept.shape[0],
            kept[0].numel(),
            _stream(kept.device),
        )
