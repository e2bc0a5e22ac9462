"""Random search over shapes, strides, dtypes, maps and options: each backend against the reference."""

import torch
from hypothesis import HealthCheck, given, settings

from support import cases, search
from support.backends import needs_cpu

pytestmark = needs_cpu


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(case=search.cases())
def test_cpu_agrees_with_the_reference(case):
    from diffdoctor.backends.cpu import weighted_loss as _cpu

    inputs = cases.build(case)
    want = cases.expected(inputs)
    problem = cases.lower(inputs, weight_mean=_cpu.weight_mean)
    _cpu.weighted_loss(problem)
    cases.check(problem, want)
    again = cases.lower(inputs, weight_mean=_cpu.weight_mean)
    _cpu.weighted_loss(again)
    assert torch.equal(problem.loss, again.loss)
    assert torch.equal(problem.grad, again.grad)
    assert torch.equal(problem.sums, again.sums)
