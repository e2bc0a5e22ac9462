"""Small programs that `tools.gpu` runs on a GPU, each in a process of its own; each prints one JSON object.

`describe`: the GPU by name. `limits`: copy bandwidth and launch costs. `small [BACKEND]`: every case at a tiny size,
checked; for compute-sanitizer. `warm K/N`: every implementation of every Nth case once, a line of JSON for each.
`once CASE/DTYPE,… BACKEND`: a forward and backward of each between cudaProfilerStart and Stop; for ncu.
"""

import json
import sys

import torch

from benchmarks.ops import correctness, launches, machine, timing
from benchmarks.ops.implementations import Call, Implementation, implementations_of, own_backends
from benchmarks.ops.registry import cases, shrunken

DEVICE = torch.device("cuda")


def describe() -> dict:
    """The GPU and the versions. Raises RuntimeError where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
    return {"machine": machine.machine(DEVICE), "versions": machine.versions()}


def limits() -> dict:
    """What this GPU can do at best: GB/s of a copy by size, microseconds of a launch, eager and in a graph."""
    clock = timing.CudaClock()
    copies = {2**power: timing.copy_of(2**power, DEVICE) for power in (20, 24, 27, 30, 32)}
    samples = timing.interleaved(copies, clock, seconds=3.0)
    found = {"copy_gb_per_s": {str(n): n / timing.percentile(taken, 0.2) / 1e9 for n, taken in samples.items()}}
    one = torch.zeros(1, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        one.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(20):
            one.add_(1)
    launches = {"eager": lambda: one.add_(1), "graph of 20": graph.replay}
    samples = timing.interleaved(launches, clock, seconds=1.0)
    found["launch_us"] = {
        "eager": timing.percentile(samples["eager"], 0.2) * 1e6,
        "in a graph": timing.percentile(samples["graph of 20"], 0.2) * 1e6 / 20,
    }
    return found


def small(backend: str | None = None) -> dict:
    """Every case, tiny, on each of our backends: {"checked": how many, "wrong": [what and why]}."""
    checked, wrong = 0, []
    for case in map(shrunken, cases("cuda")):
        tensors = case.inputs(case, DEVICE)
        # On the CPU: under compute-sanitizer every kernel costs, and these are not what is looked at.
        want = correctness.expected(case, {name: x.cpu() for name, x in tensors.items()})
        for name in own_backends(case.op, DEVICE):
            if backend not in (None, name):
                continue
            try:
                got = correctness.run(case, tensors, lambda case=case, name=name, **given: case.fused(given, name))
                reason = correctness.check(case, [x.cpu() for x in got], want, ours=True)["reason"]
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            checked += 1
            if reason is not None:
                wrong.append(f"{case.key} {name}: {reason}")
    torch.cuda.synchronize()
    return {"checked": checked, "wrong": wrong}


def warm(shard: str = "0/1") -> dict:
    """Call every implementation of cases K, K + N, … and count its launches; what is compiled stays cached on disk."""
    part, parts = map(int, shard.split("/"))
    mine = cases("cuda")[part::parts]
    for case in mine:
        torch._dynamo.reset()
        tensors = case.inputs(case, DEVICE)
        found = {}
        for impl in implementations_of(case, DEVICE):
            try:
                found[impl.name] = launches.of_call(case.key, Call(case, tensors, impl))
            except Exception as error:
                found[impl.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps({"case": case.key, "implementations": found}), flush=True)
        del tensors
        torch.cuda.empty_cache()
    return {"cases": len(mine)}


def once(keys: str, backend: str) -> dict:
    """The named cases, each warm and then one time under the profiler's eye."""
    by_key = {case.key: case for case in cases("cuda")}
    for case in (by_key[key] for key in keys.split(",")):
        impl = Implementation(backend, lambda case=case, **tensors: case.fused(tensors, backend), True)
        call = Call(case, case.inputs(case, DEVICE), impl)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        del call
        torch.cuda.empty_cache()
    return {"cases": keys, "backend": backend}


def main() -> int:
    programs = {"describe": describe, "limits": limits, "small": small, "warm": warm, "once": once}
    found = programs[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(found))
    return int(bool(found.get("wrong")))


if __name__ == "__main__":
    sys.exit(main())
