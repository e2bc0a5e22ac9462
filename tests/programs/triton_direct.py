"""Launches that go straight to compiled kernels hand over what Triton's binder does: `python …/triton_direct.py`.

With the driver of `benchmarks.ops.host` in a GPU's place. Prints one JSON object: launches compared, and whether the
inputs of one are still held.
"""

import gc
import json
import sys
import weakref
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.ops.host import stub_triton
from diffdoctor.backends.triton import artifact_loss as triton_artifact
from diffdoctor.backends.triton import weighted_loss as _triton
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS
from support import artifact as artifact_cases
from support import cases

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
    }
    launches = 0
    for name, work in works.items():
        bound, direct = launched(work), launched(work)
        assert bound, name
        assert len(bound) == len(direct), name
        for one, other in zip(bound, direct, strict=True):
            assert one[0] == other[0], name
            assert same(one[1], other[1]), name
        launches += len(direct)
    alive = weakref.ref(weighted["model_pred"])
    seen.clear()
    del problem.pred, problem.terms
    weighted.clear()
    shifted.clear()
    gc.collect()
    print(json.dumps({"launches": launches, "kept": alive() is not None}))


if __name__ == "__main__":
    main()
