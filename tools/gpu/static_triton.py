"""Compile what Triton launches, without a GPU: `python -m tools.gpu.static_triton ARCH [CASE/DTYPE…]` prints JSON.

A driver that only names a target stands in for the GPU's, every launch is turned into a compilation, and the cases are
run on CPU tensors through the backend's own glue: what is described is what a GPU would run, launch by launch. This
changes Triton for the whole process, so it has a process of its own.
"""

import json
import sys
import warnings
from unittest import mock

import torch

from benchmarks.ops.implementations import Call, Implementation, backend_module
from benchmarks.ops.named_target import NamedTarget
from benchmarks.ops.registry import Case, cases, dtype_name, least_bytes
from diffdoctor.ops import OPS
from tools.gpu import sass

#: What is compiled: both regimes, each map, tokens, video, mixtures, the kept-nothing dtype, and the other operations.
NAMES = (
    "pixel-2048/bf16", "latents/fp32", "latents/fp16", "sd15/bf16", "sdxl-min-snr/bf16", "flux-tokens-map/bf16",
    "wan-720p/bf16", "onetrainer/bf16", "detector-512/fp32", "modulate-flux/bf16",
)  # fmt: skip


def record(arch: int) -> list:
    """From now on Triton launches compile for `arch` and are appended to the returned list as (name, grid, kernel)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from diffdoctor.backends.triton import launch as triton_launch

    driver.set_active(NamedTarget(arch))
    launches, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launches.append((self.__name__, grid, kernel))
        return kernel

    JITFunction.run = compile_only
    triton_launch._direct = False
    return launches


def launched(case: Case, launches: list) -> list:
    """(part, name, grid, kernel) for every launch of the case's forward and backward."""
    launches.clear()
    chosen = {("cpu", OPS[op]): backend_module("triton", op) for op in OPS}
    impl = Implementation("triton", lambda **tensors: case.fused(tensors, None), True)
    with mock.patch.dict("diffdoctor.backends.select._chosen", chosen):
        call = Call(case, case.inputs(case, torch.device("cpu")), impl)
        launches.clear()  # Call has run one forward
        result = call.forward()
        forward = [("forward", *launch) for launch in launches]
        launches.clear()
        call.backward(result)
    return forward + [("backward", *launch) for launch in launches]


def report(arch: int, names: tuple[str, ...] = NAMES) -> list[dict]:
    """One row per launch of each named case."""
    launches = record(arch)
    described, rows = {}, []
    for case in (case for case in cases("cpu") if case.key in names):
        tensors = case.inputs(case, torch.device("cpu"))
        elements = tensors[case.grad_of].numel()
        for part, name, grid, kernel in launched(case, launches):
            cubin = kernel.asm["cubin"]
            if cubin not in described:
                described[cubin] = next(iter(sass.describe(cubin).values()))
            rows.append(
                {
                    "backend": "triton",
                    "arch": arch,
                    "op": case.op,
                    "case": case.name,
                    "dtype": dtype_name(case.dtype),
                    "part": part,
                    "kernel": name,
                    "programs": int(grid[0]),
                    "warps": kernel.metadata.num_warps,
                    "least_bytes_per_element": round(least_bytes(case, tensors) / elements, 3),
                    "spills": described[cubin]["access"].get("STL.32", 0),
                    **described[cubin],
                }
            )
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    rows = report(int(sys.argv[1]), tuple(sys.argv[2:]) or NAMES)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
