"""`policy_loss` by Triton: from a problem to launches of kernels/policy_loss.py."""

from __future__ import annotations

import torch

from diffdoctor.backends.triton.launch import INTERPRETS, counters, launch, need_memory, on_device
from diffdoctor.backends.triton.weighted_loss import pack_per_sample, three
from diffdoctor.backends.triton.weighted_loss import scale_gradient as scale_gradient
from diffdoctor.backends.triton_tiles import make_channel_box, policy_arguments
from diffdoctor.kernels import policy_loss as policy
from diffdoctor.lowering.plan import REDUCTIONS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from diffdoctor.lowering.policy_loss import WRITE_LOG_PROB, PolicyProblem

_COLUMNS, _MOMENTS = policy.COLUMNS.value, policy.MOMENTS.value


def policy_loss(problem: PolicyProblem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    plan, outputs = problem.plan, problem.outputs
    need_memory(
        model_pred=problem.pred, latents=problem.latents, next_latents=problem.next_latents, ref_pred=problem.ref_pred,
        old_log_prob=problem.old_log_prob, advantage=problem.advantage, mask=problem.mask,
    )  # fmt: skip
    shared = plan.cache.get("triton")
    if shared is None:
        shared = plan.cache["triton"] = policy_arguments(plan, make_channel_box(plan))
    device, programs = problem.pred.device, shared["programs"]
    stages = [policy.PIXEL_LEVEL.value]
    if outputs & WRITE_LOG_PROB:
        stages = [policy.LOG_PROB.value]
    elif problem.level == "sample":
        stages = [policy.SAMPLE_MOMENTS.value, policy.SAMPLE_LEVEL.value]
    with on_device(problem.pred.device):
        partial = torch.empty(plan.batch * (programs * _COLUMNS + 1), dtype=plan.acc_dtype, device=device)
        moments = partial.new_empty(plan.batch, _MOMENTS) if len(stages) > 1 else None
        entries = (problem.a, problem.b, problem.sigma, problem.old_mean, problem.grad_output)
        pointers, tensor_bits, batched_bits = pack_per_sample(entries, partial)
        values = [1.0 if entry is None else entry.value for entry in entries]
        tensors = {
            "pred_ptr": problem.pred, "grad_ptr": problem.grad, **dict(zip(_TERMS, three(problem.terms), strict=True)),
            "log_prob_ptr": problem.log_prob if problem.old_log_prob is None else problem.old_log_prob,
            "advantage_ptr": problem.advantage, "mask_ptr": problem.mask, "loss_ptr": problem.loss,
            "sums_ptr": problem.sums, "moments_ptr": moments, "partial_ptr": partial,
            "counter_ptr": counters(device, plan.batch + 1, problem.keeps_workspace), "number_ptrs": pointers,
        }  # fmt: skip
        constants = {
            "OLD": problem.old_kind, "LOSS": bool(outputs & WRITE_LOSS), "GRAD": bool(outputs & WRITE_GRAD),
            "SUMS": bool(outputs & WRITE_SUMS), "KL": problem.ref_pred is not None, "ROUND_BF16": INTERPRETS,
        }  # fmt: skip
        numbers = {
            "tensor_bits": tensor_bits, "batched_bits": batched_bits, **dict(zip(_NUMBERS, values, strict=True)),
            "low": 1 - problem.clip_range[0], "high": 1 + problem.clip_range[1], "most": problem.advantage_clip,
            "kl_weight": problem.kl_weight, "reduction": REDUCTIONS[problem.reduction], **constants,
        }  # fmt: skip
        for stage in stages:
            launch(
                policy.policy_loss_kernel, plan.batch * programs, plan.cache, (device, stage, *constants.values()),
                tensors, {**numbers, "STAGE": stage}, shared,
            )  # fmt: skip


_TERMS = ("latents_ptr", "next_ptr", "ref_ptr")
_NUMBERS = ("a", "b", "sigma", "old_mean", "grad_output")
