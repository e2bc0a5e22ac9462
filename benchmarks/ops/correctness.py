"""Correctness before speed: an implementation whose result is wrong is not timed.

Expected values are the case's formula on the same inputs in fp64. The error of the gradient is its relative L2
distance; that of the loss is relative.
"""

import torch

from benchmarks.ops.registry import Case, Tensors

#: Largest errors of diffdoctor's own implementations: fp32 sums over up to 2^26 elements, a gradient rounded once.
GRADIENT_BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 5e-4, torch.float64: 1e-12}
LOSS_BOUND = 1e-5
#: A trainer's formula may round its target and its products to bf16 or fp16 on the way: four roundings of 2^-9.
PEER_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-11}
PEER_LOSS_BOUND = 1e-3


def expected(case: Case, tensors: Tensors):
    """(result, gradient) of the formula in fp64."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    return run(case, exact, case.formula)


def run(case: Case, tensors: Tensors, impl):
    """(detached result, gradient of `grad_of` without the scale) of a call with the tensors by name."""
    x = tensors[case.grad_of].detach().requires_grad_()
    result = impl(**(tensors | {case.grad_of: x}))
    if result.ndim:
        (gradient,) = torch.autograd.grad(result, x, cotangent(result))
        return result.detach(), gradient
    start = torch.full_like(result, case.scale)
    (gradient,) = torch.autograd.grad(result, x, start)
    return result.detach(), gradient.double() / case.scale


def cotangent(result):
    """What backward starts from where the result is a tensor: the same values for every implementation and device."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(result.shape, generator=generator).to(result.device, result.dtype)


def relative(got, want) -> float:
    distance = torch.linalg.vector_norm(got.double() - want.double())
    return (distance / torch.linalg.vector_norm(want.double()).clamp_min(1e-300)).item()


def check(case: Case, got, want, ours: bool) -> dict:
    """The two errors, and under `reason` why the implementation may not be timed (None when it may)."""
    errors = {"loss_error": relative(got[0], want[0]), "grad_error": relative(got[1], want[1])}
    bound = LOSS_BOUND if ours else PEER_LOSS_BOUND  # of a loss; a result that is a tensor is rounded to its dtype
    limits = {
        "loss_error": max(bound, (GRADIENT_BOUND if ours else PEER_BOUND)[got[0].dtype]),
        "grad_error": (GRADIENT_BOUND if ours else PEER_BOUND)[case.dtype],
    }
    # `not <=` so that NaN is an error too.
    wrong = [
        f"{name} {errors[name]:.1e} over {limits[name]:.0e}" for name in errors if not errors[name] <= limits[name]
    ]
    return {**errors, "reason": f"wrong result: {', '.join(wrong)}" if wrong else None}
