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
    Direct,
    counters,
    is_current,
    launch,
    need_memory,
    on_device,
    specialised,
)
from diffdoctor.backends.triton_tiles import loss_arguments, make_box, mean_arguments
from diffdoctor.kernels import weighted_loss as weighted
from diffdoctor.lowering.plan import MAX_TERMS, SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample, Plan, Problem


def _prepared(plan: Plan, arguments, sums: int = 0) -> dict:
    """What launches on one plan share, made once by loss_arguments or mean_arguments and kept with the plan.

    Args:
        sums: not 0 where the launches write them.
    """
    key = ("triton", arguments.__name__, sums)
    kept = plan.cache.get(key)
    if kept is None:
        kept = plan.cache[key] = arguments(plan, make_box(plan, sums != 0))
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
    outputs = problem.outputs
    tensors = (
        problem.pred, problem.grad, *three(problem.terms), problem.weighting, problem.confidence, problem.mask,
        problem.loss if outputs & WRITE_LOSS else None, problem.sums,
    )  # fmt: skip
    _launch(problem.plan, outputs, tensors, _entries(problem), problem.keeps_workspace)


def _entries(problem: Problem) -> tuple[PerSample | None, ...]:
    """The problem's numbers in the kernel's order; None for one that is not there."""
    coefs, artifact_coefs = map(three, (problem.coefs, problem.artifact_coefs))
    return (
        problem.pred_scale, *coefs[:2], problem.huber_c, problem.weight, problem.z, problem.grad_output, coefs[2],
        *artifact_coefs,
    )  # fmt: skip


def _launch(plan: Plan, outputs: int, tensors: tuple, entries: tuple, keep: bool) -> Direct | None:
    """One launch of weighted_loss_kernel.

    Args:
        tensors: by _TENSORS, None for one that is not there.
        entries: of `_entries`.
        keep: as `counters` has it.
    """
    _need_inputs(tensors, entries)
    shared = _prepared(plan, loss_arguments, outputs & WRITE_SUMS)
    device = tensors[0].device
    with on_device(device):
        partial, zeros = _scratch(plan, outputs, device, keep)
        pointers, tensor_bits, batched_bits = pack_per_sample(entries, partial)
        values = [1.0 if entry is None else entry.value for entry in entries]
        named = dict(zip(_TENSORS, tensors, strict=True))
        named |= {"partial_ptr": partial, "counter_ptr": zeros, "number_ptrs": pointers}
        numbers = {
            "tensor_bits": tensor_bits, "batched_bits": batched_bits, **dict(zip(_NUMBERS, values, strict=True)),
            **_written(outputs),
        }  # fmt: skip
        programs = plan.batch * shared["programs"]
        return launch(
            weighted.weighted_loss_kernel, programs, plan.cache, (device, outputs), named, numbers, shared, again=True
        )  # fmt: skip


def _scratch(plan: Plan, outputs: int, device: torch.device, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Partial sums and counters of a launch."""
    if not outputs & (WRITE_LOSS | WRITE_SUMS):
        return torch.empty(1, dtype=plan.acc_dtype, device=device), None
    columns = SUMS if outputs & WRITE_SUMS else 1
    size = plan.batch * (_prepared(plan, loss_arguments, outputs & WRITE_SUMS)["programs"] * columns + 1)
    return torch.empty(size, dtype=plan.acc_dtype, device=device), counters(device, plan.batch + 1, keep)


_TENSORS = (
    "pred_ptr", "grad_ptr", "term0_ptr", "term1_ptr", "term2_ptr", "weighting_ptr", "confidence_ptr", "mask_ptr",
    "loss_ptr", "sums_ptr",
)  # fmt: skip
_Z = 5  # of the entries, the divisor
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


def three(entries: tuple) -> tuple:
    """One entry for each term that the kernel knows, None for one that is not there."""
    return (*entries, *(None,) * (MAX_TERMS - len(entries)))


def _need_inputs(tensors: tuple, entries: tuple) -> None:
    pred, _, *terms, weighting, confidence, mask, _, _ = tensors
    need_memory(model_pred=pred, confidence=confidence, mask=mask, weighting=weighting)
    for term in terms:
        need_memory(target=term)
    for entry in entries:
        if entry is not None:
            need_memory(numbers_per_sample=entry.data)


def bind(problem: Problem) -> FastCall | None:
    """The problem's call with only its tensors left open; None where backward, another call, needs its mean weight."""
    return None if problem.pred.dtype == torch.float16 and problem.z_is_mean else FastCall(problem)


class FastCall:
    """weighted_loss on the tensors of another call with the same plan and the same numbers, but for those that are
    tensors: straight to the compiled kernel.

    Args:
        problem: of a first call.
    """

    __slots__ = ("_count", "_device", "_direct", "_entries", "_mean", "_plan", "_tensor_slots")

    def __init__(self, problem: Problem):
        self._plan, self._device, self._direct = problem.plan, problem.pred.device, {}
        self._count = problem.plan.batch * problem.plan.count
        entries = _entries(problem)
        self._mean = problem.z.data.shape[0] if problem.z_is_mean and problem.z.data is not None else 0
        self._tensor_slots = [
            k for k, entry in enumerate(entries)
            if entry is not None and entry.data is not None and not (self._mean and k == _Z)
        ]  # fmt: skip
        self._entries = [None if entry is None else PerSample(entry.value) for entry in entries]

    def __call__(
        self,
        pred: Tensor,
        terms: tuple[Tensor, ...],
        confidence: Tensor | None,
        mask: Tensor | None,
        weighting: Tensor | None,
        per_sample: list[Tensor] | None,
        loss: Tensor,
        grad: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """Fill the outputs that are given; `per_sample` are the numbers that are tensors, in the problem's order."""
        slots = self._tensor_slots
        if self._mean:
            z = loss.new_empty(self._mean)
            self._weight_mean(confidence, mask, z)
            slots, per_sample = [*slots, _Z], [*(per_sample or ()), z]
        outputs = WRITE_LOSS if grad is None else WRITE_LOSS | WRITE_GRAD
        if sums is not None:
            outputs |= WRITE_SUMS
        missing = (None,) * (MAX_TERMS - len(terms))
        tensors = (pred, grad, *terms, *missing, weighting, confidence, mask, loss, sums)
        direct = self._direct.get(outputs)
        if direct is not None and is_current(self._device):
            partial, zeros = _scratch(self._plan, outputs, self._device, True)
            pointers = [partial] * len(self._entries)
            addresses = [x.data_ptr() for x in tensors if x is not None]
            for slot, tensor in zip(slots, per_sample or (), strict=True):
                pointers[slot] = tensor if tensor.is_contiguous() else tensor.contiguous()
                addresses.append(pointers[slot].data_ptr())
            if direct.launch(addresses, *tensors, partial, zeros, tuple(pointers)):
                return
        entries = self._entries.copy()
        for slot, tensor in zip(slots, per_sample or (), strict=True):
            entries[slot] = PerSample(0.0, tensor)
        direct = _launch(self._plan, outputs, tensors, tuple(entries), True)
        if direct is not None:
            self._direct[outputs] = direct

    def _weight_mean(self, confidence: Tensor | None, mask: Tensor | None, out: Tensor) -> None:
        direct = self._direct.get("mean")
        if direct is not None and is_current(self._device):
            partial, zeros = _mean_scratch(self._plan, self._device, True)
            addresses = [x.data_ptr() for x in (confidence, mask) if x is not None]
            if direct.launch(addresses, confidence, mask, out, partial, zeros):
                return
        direct = _launch_mean(self._plan, confidence, mask, out, True)
        if direct is not None:
            self._direct["mean"] = direct

    def scale(self, grad: Tensor, g: Tensor, out: Tensor) -> None:
        """out = grad · g, of one number, for the call's gradient; in place nothing is written where g is 1."""
        key = "in place" if out is grad else "scale"
        direct = self._direct.get(key)
        if direct is not None and is_current(self._device):
            addresses = [grad.data_ptr(), out.data_ptr(), g.data_ptr()]
            if direct.launch(addresses, grad, out, g):
                return
        direct = _launch_scale(grad, g, out, 1, self._count)
        if direct is not None:
            self._direct[key] = direct


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean of ω into out: (B,) per sample, (1,) over the batch."""
    _launch_mean(problem.plan, problem.confidence, problem.mask, out, problem.keeps_workspace)


def _launch_mean(plan: Plan, confidence: Tensor | None, mask: Tensor | None, out: Tensor, keep: bool) -> Direct | None:
    need_memory(confidence=confidence, mask=mask)
    shared = _prepared(plan, mean_arguments)
    device = out.device
    with on_device(device):
        partial, zeros = _mean_scratch(plan, device, keep)
        tensors = {
            "confidence_ptr": confidence, "mask_ptr": mask, "out_ptr": out, "partial_ptr": partial,
            "counter_ptr": zeros,
        }  # fmt: skip
        per_sample = out.shape[0] == plan.batch
        return launch(
            weighted.weight_mean_kernel, plan.batch * shared["programs"], plan.cache, (device, per_sample), tensors,
            {"PER_SAMPLE": per_sample}, shared, again=True,
        )  # fmt: skip


def _mean_scratch(plan: Plan, device: torch.device, keep: bool) -> tuple[Tensor, Tensor]:
    size = plan.batch * (_prepared(plan, mean_arguments)["programs"] + 1)
    return torch.empty(size, dtype=plan.acc_dtype, device=device), counters(device, plan.batch + 1, keep)


_scale_launches: dict = {}


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    _launch_scale(grad, grad_output, out, batch, count)


def _launch_scale(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> Direct | None:
    need_memory(gradient=grad, gradient_of_the_loss=grad_output)
    with on_device(grad.device):
        blocks = -(-count // SCALE_BLOCK)
        steps = -(-blocks // max(1, SCALE_PROGRAMS // batch))
        programs = -(-blocks // steps)
        in_place = out.data_ptr() == grad.data_ptr()
        numbers = {
            "count": count, "programs": programs, "steps": steps,
            "g_stride": grad_output.stride(0) if grad_output.ndim else 0, "IN_PLACE": in_place,
        }  # fmt: skip
        return launch(
            weighted.scale_gradient_kernel, batch * programs, _scale_launches,
            (grad.device, grad.dtype, out.dtype, grad_output.dtype, in_place, specialised(count)),
            {"grad_ptr": grad, "out_ptr": out, "g_ptr": grad_output}, numbers, SCALE, again=True,
        )  # fmt: skip
