"""`weighted_loss` and `modulate_gradient` by Triton: from a lowered problem to launches of kernels/weighted_loss.py."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from diffdoctor.backends.triton.launch import (
    INTERPRETS,
    SCALE,
    SCALE_BLOCK,
    SCALE_PROGRAMS,
    counters,
    launch,
    need_memory,
    on_device,
    specialised,
)
from diffdoctor.backends.triton_tiles import loss_arguments, make_box, mean_arguments
from diffdoctor.kernels import weighted_loss as weighted
from diffdoctor.lowering.plan import MAX_TERMS, SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample, Plan, Problem


def _prepared(plan: Plan, arguments) -> dict:
    """What launches on one plan share, made once by loss_arguments or mean_arguments and kept with the plan."""
    key = ("triton", arguments.__name__)
    kept = plan.cache.get(key)
    if kept is None:
        kept = plan.cache[key] = arguments(plan, make_box(plan))
    return kept


def pack_per_sample(entries: tuple[PerSample | None, ...], placeholder: Tensor) -> tuple[tuple[Tensor, ...], int, int]:
    """Per-sample numbers as the kernel takes them.

    Args:
        entries: in the kernel's order; None for one that is not there.
        placeholder: given as the pointer of a number that is no tensor.

    Returns:
        The pointers, a bit for each entry that is a tensor, and one for each of those with one number per sample.
    """
    tensor_bits = batched_bits = 0
    pointers = []
    for k, entry in enumerate(entries):
        data = placeholder if entry is None or entry.data is None else entry.data
        if data is not placeholder:
            tensor_bits |= 1 << k
            if data.shape[0] > 1 and data.stride(0) != 0:
                batched_bits |= 1 << k
                data = data.contiguous()
        pointers.append(data)
    return tuple(pointers), tensor_bits, batched_bits


def weighted_loss(problem: Problem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    plan = problem.plan
    _need_inputs(problem)
    shared = _prepared(plan, loss_arguments)
    device = problem.pred.device
    columns = SUMS if problem.outputs & WRITE_SUMS else 1
    reduces = problem.outputs & (WRITE_LOSS | WRITE_SUMS)
    with on_device(problem.pred):
        partial_size = plan.batch * (shared["programs"] * columns + 1) if reduces else 1
        partial = torch.empty(partial_size, dtype=plan.acc_dtype, device=device)
        coefs, artifact_coefs = map(_three, (problem.coefs, problem.artifact_coefs))
        entries = (
            problem.pred_scale, *coefs[:2], problem.huber_c, problem.weight, problem.z, problem.grad_output, coefs[2],
            *artifact_coefs,
        )  # fmt: skip
        pointers, tensor_bits, batched_bits = pack_per_sample(entries, partial)
        values = [1.0 if entry is None else entry.value for entry in entries]
        zeros = counters(device, plan.batch + 1, problem.keeps_workspace) if reduces else None
        tensors = {
            "pred_ptr": problem.pred, "grad_ptr": problem.grad, **dict(zip(_TERMS, _three(problem.terms), strict=True)),
            "weighting_ptr": problem.weighting, "confidence_ptr": problem.confidence, "mask_ptr": problem.mask,
            "loss_ptr": problem.loss if problem.outputs & WRITE_LOSS else None, "sums_ptr": problem.sums,
            "partial_ptr": partial, "counter_ptr": zeros, "number_ptrs": pointers,
        }  # fmt: skip
        numbers = {
            "tensor_bits": tensor_bits, "batched_bits": batched_bits, **dict(zip(_NUMBERS, values, strict=True)),
            **_written(problem.outputs),
        }  # fmt: skip
        launch(
            weighted.weighted_loss_kernel, plan.batch * shared["programs"], plan.cache, (device, problem.outputs),
            tensors, numbers, shared,
        )  # fmt: skip


_TERMS = ("term0_ptr", "term1_ptr", "term2_ptr")
_NUMBERS = (
    "pred_scale", "coef0", "coef1", "huber_c", "weight", "z", "grad_output", "coef2", "artifact_coef0",
    "artifact_coef1", "artifact_coef2",
)  # fmt: skip


@cache
def _written(outputs: int) -> dict[str, bool]:
    """The kernel's constants that say what is written."""
    return {
        "LOSS": bool(outputs & WRITE_LOSS), "GRAD": bool(outputs & WRITE_GRAD), "SUMS": bool(outputs & WRITE_SUMS),
        "ROUND_BF16": INTERPRETS,
    }  # fmt: skip


def _three(entries: tuple) -> tuple:
    """One entry for each term that the kernel knows, None for one that is not there."""
    return (*entries, *(None,) * (MAX_TERMS - len(entries)))


def _need_inputs(problem: Problem) -> None:
    need_memory(model_pred=problem.pred, confidence=problem.confidence, mask=problem.mask, weighting=problem.weighting)
    for term in problem.terms:
        need_memory(target=term)
    numbers = (problem.pred_scale, problem.huber_c, problem.weight, problem.z, problem.grad_output)
    for entry in (*numbers, *problem.coefs, *problem.artifact_coefs):
        need_memory(numbers_per_sample=entry.data)


def bind(problem: Problem) -> None:
    """There is no fast path here: a launch is lowered each time."""
    return


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean of ω into out: (B,) per sample, (1,) over the batch."""
    need_memory(confidence=problem.confidence, mask=problem.mask)
    plan = problem.plan
    shared = _prepared(plan, mean_arguments)
    device = problem.pred.device
    with on_device(problem.pred):
        programs = shared["programs"]
        partial = torch.empty(plan.batch * (programs + 1), dtype=plan.acc_dtype, device=device)
        tensors = {
            "confidence_ptr": problem.confidence, "mask_ptr": problem.mask, "out_ptr": out, "partial_ptr": partial,
            "counter_ptr": counters(device, plan.batch + 1, problem.keeps_workspace),
        }  # fmt: skip
        per_sample = out.shape[0] == plan.batch
        launch(
            weighted.weight_mean_kernel, plan.batch * programs, plan.cache, (device, per_sample), tensors,
            {"PER_SAMPLE": per_sample}, shared,
        )  # fmt: skip


_scale_launches: dict = {}


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    need_memory(gradient=grad, gradient_of_the_loss=grad_output)
    with on_device(grad):
        blocks = -(-count // SCALE_BLOCK)
        steps = -(-blocks // max(1, SCALE_PROGRAMS // batch))
        programs = -(-blocks // steps)
        in_place = out.data_ptr() == grad.data_ptr()
        numbers = {
            "count": count, "programs": programs, "steps": steps,
            "g_stride": grad_output.stride(0) if grad_output.ndim else 0, "IN_PLACE": in_place,
        }  # fmt: skip
        launch(
            weighted.scale_gradient_kernel, batch * programs, _scale_launches,
            (grad.device, grad.dtype, out.dtype, grad_output.dtype, in_place, specialised(count)),
            {"grad_ptr": grad, "out_ptr": out, "g_ptr": grad_output}, numbers, SCALE,
        )  # fmt: skip
