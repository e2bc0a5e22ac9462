"""`artifact_loss` by Triton: from a problem to launches of kernels/artifact_loss.py."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends.triton.launch import SCALE, SCALE_BLOCK, counters, launch, need_memory, on_device, specialised
from diffdoctor.backends.triton_tiles import ACC, LAUNCH
from diffdoctor.kernels import artifact_loss as artifact
from diffdoctor.lowering.artifact_loss import ARTIFACT_METHODS, ArtifactProblem
from diffdoctor.lowering.plan import REDUCTIONS


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and unit_grad and factor where they are wanted."""
    logits = problem.logits
    need_memory(logits=logits)
    batch, h, w = logits.shape
    acc = problem.loss.dtype
    gathers = problem.unit_grad is not None
    n_tiles = -(-h * w // artifact.BLOCK)
    key = (
        logits.shape, logits.stride(), logits.dtype, logits.device, problem.size, problem.threshold, problem.method,
        problem.reduction, gathers,
    )  # fmt: skip
    kept = _kept.get(key)
    if kept is None:
        if len(_kept) >= 1024:
            _kept.clear()
        first = artifact_arguments(problem, gathers and problem.method != "max")
        first |= {"METHOD": ARTIFACT_METHODS[problem.method], "REDUCTION": REDUCTIONS[problem.reduction]}
        second = {"n_tiles": n_tiles, **artifact_arguments(problem, True)}
        kept = _kept[key] = ({"batch": batch, "n_tiles": n_tiles, **first}, second, {})
    first, second, launches = kept
    with on_device(logits.device):
        partial = torch.empty(batch * (2 * n_tiles + 1), dtype=acc, device=logits.device)
        tensors = {
            "logits_ptr": logits, "unit_grad_ptr": problem.unit_grad, "factor_ptr": problem.factor,
            "loss_ptr": problem.loss, "partial_ptr": partial,
            "counter_ptr": counters(logits.device, batch + 1, problem.keeps_workspace),
        }  # fmt: skip
        launch(artifact.artifact_loss_kernel, batch * n_tiles, launches, (), tensors, {}, first)
        if gathers and problem.method == "max":
            tensors = {"logits_ptr": logits, "unit_grad_ptr": problem.unit_grad}
            tensors["peak_ptr"] = partial[2 * batch * n_tiles :]
            launch(artifact.artifact_peak_kernel, batch * n_tiles, launches, (), tensors, {}, second)


_kept: dict[tuple, tuple[dict, dict, dict]] = {}  # by all that a launch depends on beside its addresses


def artifact_arguments(problem: ArtifactProblem, gathers: bool) -> dict:
    """Shapes and windows of a visit of the up-sampled map, gathering the gradient or not."""
    _, h, w = problem.logits.shape
    out_h, out_w = problem.size
    acc = problem.loss.dtype
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


def artifact_loss_backward(unit_grad: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = unit_grad · factor_b · g_b, in the logits' dtype."""
    need_memory(gradient=unit_grad, gradient_of_the_loss=grad_output)
    batch, h, w = unit_grad.shape
    n_tiles = -(-h * w // SCALE_BLOCK)
    with on_device(unit_grad.device):
        numbers = {"n": h * w, "n_tiles": n_tiles, "g_stride": grad_output.stride(0) if grad_output.ndim else 0}
        launch(
            artifact.artifact_scale_kernel, batch * n_tiles, _scale_launches,
            (out.device, out.dtype, unit_grad.dtype, grad_output.dtype, specialised(h * w)),
            {"unit_grad_ptr": unit_grad, "factor_ptr": factor, "g_ptr": grad_output, "out_ptr": out}, numbers, SCALE,
        )  # fmt: skip


_scale_launches: dict = {}
