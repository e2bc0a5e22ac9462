"""Launches that go straight to compiled kernels hand over what Triton's binder does: `python …/triton_direct.py`.

With the driver of `benchmarks.ops.host` in a GPU's place. Prints one JSON object: launches compared, whether the
inputs of one are still held, and what `benchmarks.ops.host` counts of calls.
"""

import gc
import json
import sys
import weakref
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import diffdoctor
from benchmarks.ops.host import count, served_by, stub_triton
from diffdoctor.backends.triton import artifact_loss as triton_artifact
from diffdoctor.backends.triton import policy_loss as triton_policy
from diffdoctor.backends.triton import weighted_loss as _triton
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS
from support import artifact as artifact_cases
from support import cases
from support import policy as policy_cases

seen = []
stub_triton(lambda grid, arguments: seen.append((grid, arguments)))


def launched(work) -> list:
    seen.clear()
    work()
    return list(seen)


def same(one, other) -> bool:
    """Equal numbers, and tensors of one kind and alignment: buffers of a call are new each time."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.dtype, one.shape, one.data_ptr() & 15) == (other.dtype, other.shape, other.data_ptr() & 15)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def compare(name: str, bound: list, direct: list) -> int:
    """The number of launches, which are the same."""
    assert bound, name
    assert len(bound) == len(direct), name
    for one, other in zip(bound, direct, strict=True):
        assert one[0] == other[0], name
        assert same(one[1], other[1]), name
    return len(direct)


def policy(case):
    """A launch of each of its kernels, by plans of its own."""
    inputs = policy_cases.build(case)
    plan = policy_cases.lower(inputs).plan

    def work():
        problem = policy_cases.lower(inputs)
        problem.plan = plan
        triton_policy.policy_loss(problem)

    return work


def later_calls() -> dict:
    """Public calls whose third goes straight to what the second compiled: forward and backward."""
    target, confidence = torch.randn(2, 3, 16, 32), torch.rand(2, 16, 32)
    weights = torch.rand(2, 2)[:, 1]  # not contiguous, and one of 4 bytes in 16

    def work(pred, **options):
        def forward_and_backward():
            diffdoctor.weighted_loss(pred, target, confidence, artifact_weight=2.0, **options).backward()

        return forward_and_backward

    def policy_work(pred, **options):
        old, advantage, sigma = torch.randn(2, 1, 16, 32), torch.randn(2, 16, 32), torch.rand(2, 2)[:, 1]

        def forward_and_backward():
            diffdoctor.policy_loss(pred, target, target, old, advantage, coefs=(0.9, -0.2, sigma), **options).backward()

        return forward_and_backward

    pred = torch.randn(2, 3, 16, 32)
    shifted = cases.shifted(pred, 1)
    return {
        "call": work(pred.clone().requires_grad_()),
        "shifted call": work(shifted.requires_grad_()),
        "normalized call": work(pred.clone().requires_grad_(), normalize="sample", weighting=weights),
        "fp16 call": work(pred.half().requires_grad_()),
        "policy call": policy_work(pred.clone().requires_grad_()),
        "policy call by sample": policy_work(pred.clone().requires_grad_(), level="sample"),
    }


def main() -> None:
    f32 = torch.float32
    case = cases.Case("", shape=(2, 3, 16, 32), confidence=((2, 16, 32), f32), weighting=((2,), f32))
    weighted = cases.build(case)
    shifted = weighted | {"model_pred": cases.shifted(weighted["model_pred"], 1)}
    artifact = artifact_cases.Case("", shape=(2, 8, 8), size=(32, 32), method="max")
    grad = torch.randn(2, 64)
    problem = cases.lower(weighted, WRITE_LOSS | WRITE_GRAD, weight_mean=_triton.weight_mean)

    def loss(inputs):
        again = cases.lower(inputs, WRITE_LOSS | WRITE_GRAD, weight_mean=_triton.weight_mean)
        again.plan = problem.plan
        _triton.weighted_loss(again)

    works = {
        "weighted": lambda: loss(weighted),
        "shifted": lambda: loss(shifted),
        "artifact": lambda: triton_artifact.artifact_loss(
            artifact_cases.lower(artifact, artifact_cases.build(artifact))
        ),
        "scale": lambda: _triton.scale_gradient(grad, torch.ones(()), grad, 1, 128),
        "policy": policy(policy_cases.Case("", ref=f32, sigma="tensor", options={"level": "sample"})),
    }
    launches = 0
    for name, work in works.items():
        bound, direct = launched(work), launched(work)
        launches += compare(name, bound, direct)
    with served_by("triton"):
        for name, work in later_calls().items():
            bound, _, direct = (launched(work) for _ in range(3))
            launches += compare(name, bound, direct)
        counted = count()
    alive = weakref.ref(weighted["model_pred"])
    seen.clear()
    del problem.pred, problem.terms
    weighted.clear()
    shifted.clear()
    gc.collect()
    print(json.dumps({"launches": launches, "kept": alive() is not None, "calls": counted}))


if __name__ == "__main__":
    main()
