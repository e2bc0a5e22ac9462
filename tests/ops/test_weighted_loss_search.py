"""Random search over shapes, strides, dtypes, maps and options: each backend against the reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from diffdoctor.backends.select import why_not
from support import cases, search

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason="no compiled module")


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
