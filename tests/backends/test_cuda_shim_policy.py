"""The CUDA kernels of policy_loss, run on the CPU through tests/cuda_shim, against the reference."""

import pytest
import torch

from diffdoctor.backends.cuda import policy_loss as cuda_policy
from diffdoctor.backends.native_call import native_plan, policy_arguments
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS
from diffdoctor.lowering.policy_loss import WRITE_LOG_PROB
from diffdoctor.ops import policy_call
from support import policy

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("case", policy.every_case(), ids=lambda case: case.id)
def test_policy_loss_equals_the_reference(cuda, case):
    policy_call.plans.clear()  # a plan holds its backend's form
    inputs = policy.build(case)
    problem = policy.lower(inputs)
    cuda_policy.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))
    problem = policy.lower(inputs | {"old_log_prob": None}, WRITE_LOG_PROB)
    cuda_policy.policy_loss(problem)
    want = policy.log_prob_of(problem, case.options.get("layout"))
    torch.testing.assert_close(problem.log_prob.double(), want, rtol=1e-5, atol=1e-6)
    policy_call.plans.clear()


@pytest.mark.parametrize("case", policy.lanes_cases(), ids=lambda case: case.id)
def test_the_fast_policy_loss_equals_the_reference_whatever_its_tiles(cuda, shim, case):
    policy_call.plans.clear()
    inputs = policy.build(case)
    want = policy.expected(inputs)
    for tiles in (170, 1):  # a group of pixels for each four lanes, as many as there ever are
        before = shim.set_tiles_per_vector(tiles)
        try:
            answers = []
            for seed, outputs in ((1, policy.ALL_OUTPUTS), (2, policy.ALL_OUTPUTS), (3, WRITE_LOSS), (4, WRITE_GRAD)):
                shim.seed(seed)
                problem = policy.lower(inputs, outputs)
                assert shim.policy_lanes_serve(native_plan(problem.plan, shim), policy_arguments(problem))
                cuda_policy.policy_loss(problem)
                policy.check(problem, want)
                answers.append(problem)
            for name in ("loss", "grad", "sums"):
                assert torch.equal(getattr(answers[0], name), getattr(answers[1], name))
            problem = policy.lower(inputs | {"old_log_prob": None}, WRITE_LOG_PROB)
            cuda_policy.policy_loss(problem)
            want_log_prob = policy.log_prob_of(problem, case.options.get("layout"))
            torch.testing.assert_close(problem.log_prob.double(), want_log_prob, rtol=1e-5, atol=1e-6)
        finally:
            shim.set_tiles_per_vector(before)
    policy_call.plans.clear()


def test_the_fast_policy_loss_selects_out_what_is_not_finite(cuda, shim):
    policy_call.plans.clear()
    inputs = policy.build(policy.Case("", shape=(2, 16, 8, 40), dtype=BF16, step_dtype=BF16, ref=BF16,
                                      mask=((2, 1, 8, 40), F32)))  # fmt: skip
    out = torch.zeros(2, 1, 8, 40, dtype=torch.bool)
    out[..., ::3] = True
    inputs["mask"].masked_fill_(out, 0.0)
    for name in ("model_pred", "next_latents", "ref_pred"):
        inputs[name].masked_fill_(out, float("nan"))
    problem = policy.lower(inputs)
    assert shim.policy_lanes_serve(native_plan(problem.plan, shim), policy_arguments(problem))
    cuda_policy.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))
    policy_call.plans.clear()
