"""The Triton backend: from a lowered problem to kernel launches. kernels/*.py holds the kernels."""

from __future__ import annotations

import contextlib
from functools import cache

import torch
import triton
from torch import Tensor

from diffdoctor.backends.triton_tiles import ACC, LAUNCH, loss_arguments, make_box, mean_arguments
from diffdoctor.kernels import artifact_loss as artifact
from diffdoctor.kernels import weighted_loss as weighted
from diffdoctor.kernels.common import interprets
from diffdoctor.lowering.plan import (
    ARTIFACT_METHODS,
    REDUCTIONS,
    WRITE_GRAD,
    WRITE_LOSS,
    WRITE_SUMS,
    ArtifactProblem,
    PerSample,
    Plan,
    Problem,
)

_INTERPRETS = interprets(weighted.weighted_loss_kernel)
_SCALE_BLOCK = 2048


@cache
def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 4):
        return f"triton {triton.__version__} is too old, 3.4 or newer is needed"
    if _INTERPRETS:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (7, 5):
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return None


def _prepared(plan: Plan, arguments) -> dict:
    """What launches on one plan share, made once by loss_arguments or mean_arguments and kept with the plan."""
    key = ("triton", arguments.__name__)
    kept = plan.cache.get(key)
    if kept is None:
        kept = plan.cache[key] = arguments(plan, make_box(plan))
    return kept


def on_device(tensor: Tensor):
    """Launches go to the current device; make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


_counters: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device, count: int, keep: bool) -> Tensor:
    """At least `count` int32 zeros for the current stream of the current device.

    Kernels leave them at zero, so they are cleared once and kept. A graph under capture gets its own: it may be
    replayed on another stream than the one that captured it. So does a compiled graph (`keep` is False): under
    mode="reduce-overhead" it first runs in its graphs' memory pool, which may hold nothing that outlives the call.
    """
    if not keep or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept


def _numbers(entries: tuple[PerSample | None, ...], stand_in: Tensor):
    """Pointers of the per-sample numbers, which of them are tensors, and which of those have one entry per sample."""
    given = strided = 0
    pointers = []
    for k, entry in enumerate(entries):
        data = stand_in if entry is None or entry.data is None else entry.data
        if data is not stand_in:
            given |= 1 << k
            if data.shape[0] > 1 and data.stride(0) != 0:
                strided |= 1 << k
                data = data.contiguous()
        pointers.append(data)
    return tuple(pointers), given, strided


def weighted_loss(problem: Problem) -> None:
    """Fill the outputs that `problem.work` names."""
    plan = problem.plan
    shared = _prepared(plan, loss_arguments)
    device = problem.pred.device
    columns = 8 if problem.work & WRITE_SUMS else 1
    reduces = problem.work & (WRITE_LOSS | WRITE_SUMS)
    with on_device(problem.pred):
        room = plan.batch * (shared["programs"] * columns + 1) if reduces else 1
        partial = torch.empty(room, dtype=plan.acc_dtype, device=device)
        coefs = (*problem.coefs, None, None)[:2]
        entries = (problem.pred_scale, *coefs, problem.huber_c, problem.weight, problem.z, problem.grad_output)
        pointers, given, strided = _numbers(entries, partial)
        values = [1.0 if entry is None else entry.value for entry in entries]
        terms = (*problem.terms, None, None)[:2]
        zeros = counters(device, plan.batch + 1, problem.keeps_workspace) if reduces else None
        weighted.weighted_loss_kernel[(plan.batch * shared["programs"],)](
            problem.pred, problem.grad, *terms, problem.weighting, problem.confidence, problem.mask,
            problem.loss if problem.work & WRITE_LOSS else None, problem.sums, partial, zeros, pointers, given=given,
            strided=strided, pred_scale=values[0], coef0=values[1], coef1=values[2], huber_c=values[3],
            weight=values[4], z=values[5], grad_output=values[6], LOSS=bool(problem.work & WRITE_LOSS),
            GRAD=bool(problem.work & WRITE_GRAD), SUMS=bool(problem.work & WRITE_SUMS), ROUND_BF16=_INTERPRETS,
            **shared,
        )  # fmt: skip


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean of ω into out: (B,) per sample, (1,) over the batch."""
    plan = problem.plan
    shared = _prepared(plan, mean_arguments)
    device = problem.pred.device
    with on_device(problem.pred):
        programs = shared["programs"]
        partial = torch.empty(plan.batch * (programs + 1), dtype=plan.acc_dtype, device=device)
        weighted.weight_mean_kernel[(plan.batch * programs,)](
            problem.confidence, problem.mask, out, partial,
            counters(device, plan.batch + 1, problem.keeps_workspace),
            PER_SAMPLE=out.shape[0] == plan.batch, **shared,
        )  # fmt: skip


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    with on_device(grad):
        blocks = -(-count // _SCALE_BLOCK)
        steps = -(-blocks // max(1, 8192 // batch))
        programs = -(-blocks // steps)
        weighted.scale_gradient_kernel[(batch * programs,)](
            grad, out, grad_output, count, programs, steps, grad_output.stride(0) if grad_output.ndim else 0,
            IN_PLACE=out.data_ptr() == grad.data_ptr(), BLOCK=_SCALE_BLOCK, ROUND_BF16=_INTERPRETS, **LAUNCH,
        )  # fmt: skip


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and kept and factor where they are wanted."""
    logits = problem.logits
    batch, h, w = logits.shape
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    gathers = problem.kept is not None
    n_tiles = -(-h * w // artifact.BLOCK)
    with on_device(logits):
        partial = torch.empty(batch * (2 * n_tiles + 1), dtype=acc, device=logits.device)
        artifact.artifact_loss_kernel[(batch * n_tiles,)](
            logits, problem.kept, problem.factor, problem.loss, partial,
            counters(logits.device, batch + 1, problem.keeps_workspace),
            batch, n_tiles, **artifact_arguments(problem, gathers and problem.method != "max"),
            METHOD=ARTIFACT_METHODS[problem.method], REDUCTION=REDUCTIONS[problem.reduction],
        )  # fmt: skip
        if gathers and problem.method == "max":
            artifact.artifact_peak_kernel[(batch * n_tiles,)](
                logits, problem.kept, partial[2 * batch * n_tiles :], n_tiles, **artifact_arguments(problem, True)
            )


def artifact_arguments(problem: ArtifactProblem, gathers: bool) -> dict:
    """Shapes and windows of a visit of the up-sampled map, gathering the gradient or not."""
    _, h, w = problem.logits.shape
    out_h, out_w = problem.size
    acc = torch.float64 if problem.logits.dtype is torch.float64 else torch.float32
    window_y, window_x, slack = artifact.windows(h, w, out_h, out_w, gathers)
    stride_b, stride_y, stride_x = problem.logits.stride()
    return dict(
        h=h, w=w, out_h=out_h, out_w=out_w, stride_b=stride_b, stride_y=stride_y, stride_x=stride_x,
        scale_y=_ratio(h, out_h, acc), scale_x=_ratio(w, out_w, acc), tau=problem.threshold,
        window_y=window_y, window_x=window_x, slack=slack,
        GATHER=gathers, ACC=ACC[acc], BLOCK=artifact.BLOCK, **LAUNCH,
    )  # fmt: skip


def _ratio(size: int, out_size: int, acc: torch.dtype) -> float:
    """size / out_size as ATen rounds it."""
    if acc is torch.float64:
        return size / out_size
    return (torch.tensor(float(size), dtype=torch.float32, device="cpu") / float(out_size)).item()


def artifact_loss_backward(kept: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = kept · factor_b · g_b, in the logits' dtype."""
    batch, h, w = kept.shape
    n_tiles = -(-h * w // _SCALE_BLOCK)
    with on_device(kept):
        artifact.artifact_scale_kernel[(batch * n_tiles,)](
            kept, factor, grad_output, out, h * w, n_tiles, grad_output.stride(0) if grad_output.ndim else 0,
            BLOCK=_SCALE_BLOCK, ROUND_BF16=_INTERPRETS, **LAUNCH,
        )  # fmt: skip
