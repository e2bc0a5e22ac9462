"""Compile what the Triton backend launches and print it as JSON: `python tests/programs/triton_compiled.py ARCH [few]`.

`tools.gpu.static_triton.record` turns every launch into a compilation, so that the glue is called with CPU tensors and
what it would hand to a GPU of that kind is looked at.
"""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from diffdoctor import Packed
from diffdoctor.backends import triton_tiles
from diffdoctor.backends.triton import artifact_loss as triton_artifact
from diffdoctor.backends.triton import policy_loss as triton_policy
from diffdoctor.backends.triton import weighted_loss as _triton
from diffdoctor.lowering.plan import LOSS_KINDS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from support import artifact as artifact_cases
from support import cases
from support import policy as policy_cases
from tools.gpu import sass, triton_budget
from tools.gpu.static_triton import record

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TRAIN = WRITE_LOSS | WRITE_GRAD


def describe(cubin, name, threads):
    """Registers, bytes of stack (spills), wide global accesses and the costs that have a budget, from the machine code
    of a launch of so many threads."""
    (found,) = sass.describe(cubin).values()
    access = found["access"]
    (listing,) = sass.listings(cubin)[0].values()
    inner, elements = (table.get(name, (None,))[0] for table in (triton_budget.INNER, triton_budget.PASS))
    has = inner is not None and re.search(rf"\b{re.escape(inner)}", listing)
    return {
        "inner": triton_budget.count_inner(listing, inner) if has else None,
        "pass": triton_budget.count_pass(listing, elements / threads) if elements is not None else None,
        "loop": triton_budget.count_loop(listing, 4 if "fp32" in name else 8) if name in triton_budget.LOOP else None,
        "tile": triton_budget.count_tile(listing) if name in triton_budget.TILE else None,
        "registers": found["registers"],
        "stack": found["stack"],
        "local": sum(count for name, count in access.items() if name.startswith(("LDL", "STL"))),
        "wide_loads": access.get("LDG.128", 0),
        "wide_stores": access.get("STG.128", 0),
    }


def weighted(case, work=TRAIN):
    """The launches of one call of the shared cases' kind."""
    inputs = cases.build(case)
    _triton.weighted_loss(cases.lower(inputs, work, weight_mean=_triton.weight_mean))


def weighted_in_turn(case):
    """The launches of one call whose programs visit several tiles, as they do in tensors too large for a test."""
    with mock.patch.object(triton_tiles, "MANY_PROGRAMS", 4):
        weighted(case)


def losses(few):
    """{name: call} of the weighted losses that are compiled."""
    shape, latents, tokens = (2, 16, 128, 128), (2, 4, 64, 64), (2, 1024, 64)
    big, pixels = ((2, 128, 128), F32), ((2, 512, 512), torch.uint8)
    flux = {"layout": Packed(64, 64, 2)}
    mixture = {kind: 1.0 if kind == "l2" else 0.5 for kind in LOSS_KINDS}
    calls = {
        "plain-bf16": lambda: weighted(cases.Case("", shape=shape, dtype=BF16, target_dtype=BF16)),
        "map-bf16": lambda: weighted_in_turn(
            cases.Case("", shape=shape, dtype=BF16, target_dtype=BF16, confidence=big)
        ),
        "map-fp32": lambda: weighted(cases.Case("", shape=shape, confidence=big), TRAIN | WRITE_SUMS),
        "tokens-bf16": lambda: weighted(
            cases.Case("", shape=tokens, dtype=BF16, target_dtype=BF16, confidence=((2, 64, 64), F32), options=flux)
        ),
        "area-latents": lambda: weighted(
            cases.Case("", shape=latents, dtype=BF16, confidence=pixels, options={"normalize": "sample"})
        ),
    }
    if few:
        return calls
    return {
        **calls,
        "fp16-forward": lambda: weighted(cases.Case("", shape=shape, dtype=F16, target_dtype=F16), WRITE_LOSS),
        "fp16-backward": lambda: weighted(cases.Case("", shape=shape, dtype=F16, target_dtype=F16), WRITE_GRAD),
        "mixture-fp64": lambda: weighted(
            cases.Case("", shape=latents, dtype=F64, target="velocity", options={"loss_type": mixture})
        ),
        "mixture-bf16": lambda: weighted(
            cases.Case("", shape=shape, dtype=BF16, confidence=big, huber_c="tensor", options={"loss_type": mixture})
        ),
        "channels-last": lambda: weighted(
            cases.Case("", shape=shape, pred_view="channels_last", target_view="channels_last", confidence=big,
                       mask=((1, 32, 32), torch.bool), weighting=((2, 16, 128, 128), BF16))
        ),
        "video": lambda: weighted(
            cases.Case("", shape=(1, 16, 5, 24, 32), dtype=BF16, target="preconditioned",
                       confidence=((1, 1, 9, 48, 64), F16), options={"interpolation": "bilinear", "gamma": 2.0})
        ),
    }  # fmt: skip


def others(few):
    """{name: call} of the smaller launches."""

    def artifact(method, dtype=F32):
        case = artifact_cases.Case(method, shape=(2, 64, 64), size=(256, 256), method=method, dtype=dtype)
        logits = artifact_cases.build(case)
        problem = artifact_cases.lower(case, logits)
        triton_artifact.artifact_loss(problem)
        triton_artifact.artifact_loss_backward(
            problem.unit_grad, problem.factor, torch.ones(()), torch.empty_like(logits)
        )

    def scale(dtype):
        grad = torch.zeros(1 << 16, dtype=dtype)
        _triton.scale_gradient(grad, torch.ones(()), grad, 1, grad.numel())

    def policy(level, dtype=BF16, shape=(2, 16, 64, 64)):
        case = policy_cases.Case("", shape=shape, dtype=dtype, step_dtype=dtype, ref=dtype, options={"level": level},
                                 advantage=((2, 1, 128, 128), F32))  # fmt: skip
        triton_policy.policy_loss(policy_cases.lower(policy_cases.build(case)))

    calls = {
        "artifact-threshold": lambda: artifact("threshold"), "policy": lambda: policy("pixel"),
        "scale-bf16": lambda: scale(BF16),
    }  # fmt: skip
    if not few:
        calls.update({"policy-sample": lambda: policy("sample", F32), "policy-fp64": lambda: policy("pixel", F64)})
        calls["policy-large"] = lambda: policy("pixel", BF16, (2, 16, 128, 128))
        calls.update({"artifact-max-bf16": lambda: artifact("max", BF16), "scale-fp64": lambda: scale(F64)})
    return calls


def main():
    arch, few = int(sys.argv[1]), "few" in sys.argv[2:]
    launches, rows, seen = record(arch), [], {}
    for name, call in {**losses(few), **others(few)}.items():
        launches.clear()
        call()
        for kernel, grid, compiled in launches:
            cubin = compiled.asm["cubin"]
            if cubin not in seen:
                seen[cubin] = describe(cubin, name, grid[0] * 32 * compiled.metadata.num_warps)
            rows.append({"call": name, "kernel": kernel, **seen[cubin]})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
