"""`policy_loss` by Triton: from a problem to launches of kernels/policy_loss.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffdoctor.backends.triton.launch import (
    INTERPRETS,
    Direct,
    counters,
    is_current,
    launch,
    need_memory,
    on_device,
)
from diffdoctor.backends.triton.weighted_loss import pack_per_sample, three
from diffdoctor.backends.triton.weighted_loss import scale_gradient as scale_gradient
from diffdoctor.backends.triton_tiles import make_channel_box, policy_arguments
from diffdoctor.kernels import policy_loss as policy
from diffdoctor.lowering.plan import REDUCTIONS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample, Plan
from diffdoctor.lowering.policy_loss import WRITE_LOG_PROB, PolicyProblem

_COLUMNS, _MOMENTS = policy.COLUMNS.value, policy.MOMENTS.value


def policy_loss(problem: PolicyProblem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    log_prob = problem.log_prob if problem.old_log_prob is None else problem.old_log_prob
    tensors = (
        problem.pred, problem.grad, *three(problem.terms), log_prob, problem.advantage, problem.mask, problem.loss,
        problem.sums,
    )  # fmt: skip
    _launch(problem.plan, _Settings.of(problem), problem.outputs, tensors, _entries(problem), problem.keeps_workspace)


class _Settings(NamedTuple):
    """What a call's kernels are told beside tensors and numbers per sample."""

    level: str
    old_kind: int
    has_ref: bool
    numbers: dict

    @classmethod
    def of(cls, problem: PolicyProblem) -> _Settings:
        low, high = problem.clip_range
        numbers = {
            "low": 1 - low, "high": 1 + high, "most": problem.advantage_clip, "kl_weight": problem.kl_weight,
            "reduction": REDUCTIONS[problem.reduction],
        }  # fmt: skip
        return cls(problem.level, problem.old_kind, problem.ref_pred is not None, numbers)


def _entries(problem: PolicyProblem) -> tuple[PerSample | None, ...]:
    """The problem's numbers in the kernel's order; None for one that is not there."""
    return problem.a, problem.b, problem.sigma, problem.old_mean, problem.grad_output


def _launch(plan: Plan, settings: _Settings, outputs: int, tensors: tuple, entries: tuple, keep: bool) -> Direct | None:
    """The launches of a call, one or two; where it is one, that launch to be made again as `launch` has it.

    Args:
        tensors: by _TENSORS, None for one that is not there.
        entries: of `_entries`.
        keep: as `counters` has it.
    """
    pred, _, latents, next_latents, ref_pred, log_prob, advantage, mask, *_ = tensors
    need_memory(
        model_pred=pred, latents=latents, next_latents=next_latents, ref_pred=ref_pred,
        old_log_prob=log_prob, advantage=advantage, mask=mask,
    )  # fmt: skip
    shared, device = _prepared(plan), pred.device
    stages = [policy.PIXEL_LEVEL.value]
    if outputs & WRITE_LOG_PROB:
        stages = [policy.LOG_PROB.value]
    elif settings.level == "sample":
        stages = [policy.SAMPLE_MOMENTS.value, policy.SAMPLE_LEVEL.value]
    with on_device(device):
        partial, zeros = _scratch(plan, device, keep)
        moments = partial.new_empty(plan.batch, _MOMENTS) if len(stages) > 1 else None
        pointers, tensor_bits, batched_bits = pack_per_sample(entries, partial)
        values = [1.0 if entry is None else entry.value for entry in entries]
        named = dict(zip(_TENSORS, tensors, strict=True))
        named |= {"moments_ptr": moments, "partial_ptr": partial, "counter_ptr": zeros, "number_ptrs": pointers}
        constants = {
            "OLD": settings.old_kind, "LOSS": bool(outputs & WRITE_LOSS), "GRAD": bool(outputs & WRITE_GRAD),
            "SUMS": bool(outputs & WRITE_SUMS), "KL": settings.has_ref, "ROUND_BF16": INTERPRETS,
        }  # fmt: skip
        numbers = {
            "tensor_bits": tensor_bits, "batched_bits": batched_bits, **dict(zip(_NUMBERS, values, strict=True)),
            **settings.numbers, **constants,
        }  # fmt: skip
        direct = None
        for stage in stages:
            direct = launch(
                policy.policy_loss_kernel, plan.batch * shared["programs"], plan.cache,
                (device, stage, *constants.values()), named, {**numbers, "STAGE": stage}, shared,
                again=len(stages) == 1,
            )  # fmt: skip
        return direct


def _prepared(plan: Plan) -> dict:
    shared = plan.cache.get("triton")
    if shared is None:
        shared = plan.cache["triton"] = policy_arguments(plan, make_channel_box(plan))
    return shared


def _scratch(plan: Plan, device: torch.device, keep: bool) -> tuple[Tensor, Tensor]:
    """Partial sums and counters of a launch."""
    size = plan.batch * (_prepared(plan)["programs"] * _COLUMNS + 1)
    return torch.empty(size, dtype=plan.acc_dtype, device=device), counters(device, plan.batch + 1, keep)


def bind(problem: PolicyProblem) -> FastCall:
    """The problem's call with only its tensors left open."""
    return FastCall(problem)


class FastCall:
    """policy_loss on the tensors of another call with the same plan and the same numbers, but for those that are
    tensors: straight to the compiled kernel.

    Args:
        problem: of a first call.
    """

    __slots__ = ("_device", "_direct", "_entries", "_plan", "_settings", "_tensor_slots")

    def __init__(self, problem: PolicyProblem):
        self._plan, self._device, self._direct = problem.plan, problem.pred.device, {}
        self._settings, entries = _Settings.of(problem), _entries(problem)
        self._tensor_slots = [k for k, entry in enumerate(entries) if entry is not None and entry.data is not None]
        self._entries = [None if entry is None else PerSample(entry.value) for entry in entries]

    def __call__(
        self,
        pred: Tensor,
        latents: Tensor,
        next_latents: Tensor,
        ref_pred: Tensor | None,
        log_prob: Tensor | None,
        advantage: Tensor,
        mask: Tensor | None,
        per_sample: list[Tensor],
        loss: Tensor,
        grad: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """Fill the outputs that are given; `per_sample` are the numbers that are tensors, in the problem's order."""
        outputs = WRITE_LOSS if grad is None else WRITE_LOSS | WRITE_GRAD
        if sums is not None:
            outputs |= WRITE_SUMS
        tensors = (pred, grad, latents, next_latents, ref_pred, log_prob, advantage, mask, loss, sums)
        direct = self._direct.get(outputs)
        if direct is not None and is_current(self._device):
            partial, zeros = _scratch(self._plan, self._device, True)
            pointers = [partial] * len(self._entries)
            addresses = [x.data_ptr() for x in tensors if x is not None]
            for slot, tensor in zip(self._tensor_slots, per_sample, strict=True):
                pointers[slot] = tensor if tensor.is_contiguous() else tensor.contiguous()
                addresses.append(pointers[slot].data_ptr())
            if direct.launch(addresses, *tensors, None, partial, zeros, tuple(pointers)):
                return
        entries = self._entries.copy()
        for slot, tensor in zip(self._tensor_slots, per_sample, strict=True):
            entries[slot] = PerSample(0.0, tensor)
        direct = _launch(self._plan, self._settings, outputs, tensors, tuple(entries), True)
        if direct is not None:
            self._direct[outputs] = direct


_TENSORS = (
    "pred_ptr", "grad_ptr", "latents_ptr", "next_ptr", "ref_ptr", "log_prob_ptr", "advantage_ptr", "mask_ptr",
    "loss_ptr", "sums_ptr",
)  # fmt: skip
_NUMBERS = ("a", "b", "sigma", "old_mean", "grad_output")
