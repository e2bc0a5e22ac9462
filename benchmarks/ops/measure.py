"""One case, measured: correctness, memory, then the implementations interleaved with a copy of as many bytes."""

import torch

from benchmarks.ops import correctness, launches, memory, timing
from benchmarks.ops.implementations import Call, backend_module, captured, implementations_of, kernel_of
from benchmarks.ops.registry import Case, dtype_name, gradient_bytes, least_bytes, passes_bytes

COPY = "copy"
#: Cases whose kernel is also timed by itself.
KERNEL_TAGS = {"acceptance", "large", "sweep"}


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def measure(
    case: Case,
    device: torch.device,
    seconds: float = 4.0,
    compiled: bool = True,
    graphs: bool = False,
    backends: tuple[str, ...] | None = None,
) -> list[dict]:
    """Rows for every implementation of the case, and one for the copy.

    An implementation that raises or gives a wrong result has a `reason` and no speed; the others go on.

    Args:
        case: from the registry.
        device: where to run.
        seconds: how long to time, all implementations together.
        compiled: with `torch.compile` of the formula.
        graphs: with CUDA-graph replays of every implementation (a CUDA device only).
        backends: names of our own; by default those of the device.
    """
    torch._dynamo.reset()
    tensors = case.inputs(case, device)
    rows, calls = _checked(case, tensors, device, implementations_of(case, device, backends, compiled))
    _add_kernels(case, rows, calls)
    if graphs:
        _add_graphs(rows, calls)
    least = least_bytes(case, tensors)
    calls[COPY] = timing.copy_of(least, device)
    rows[COPY] = {"ours": False, "reason": None}
    samples = timing.interleaved(calls, timing.clock_for(device), seconds)
    copied = timing.percentile(samples[COPY], 0.2)
    moved = passes_bytes(case, tensors)
    for name, taken in samples.items():
        p20 = timing.percentile(taken, 0.2)
        rows[name].update(timing.percentiles_us(taken))
        rows[name].update(rounds=len(taken), gb_per_s=round(least / p20 / 1e9, 3), copy_share=round(copied / p20, 4))
        if rows[name]["ours"] and moved != least:
            rows[name]["copy_share_of_passes"] = round(copied * moved / least / p20, 4)
    sizes = {"least_bytes": least, "gradient_bytes": gradient_bytes(case, tensors)}
    return [_describe(case, device, name) | sizes | row for name, row in rows.items()]


def failed(case: Case, device: torch.device, error: BaseException) -> dict:
    """The row of a case that could not be set up at all."""
    return _describe(case, device, "any") | {"ours": True, "reason": first_line(error)}


def _checked(case, tensors, device, implementations):
    """({name: row}, {name: call}): errors and memory of every implementation, calls of those that may be timed."""
    want = correctness.expected(case, tensors)
    rows, calls = {}, {}
    for impl in implementations:
        row = rows[impl.name] = {"ours": impl.ours}
        try:
            row.update(correctness.check(case, correctness.run(case, tensors, impl.function), want, impl.ours))
            if row["reason"] is None:
                call = Call(case, tensors, impl)
                call()
                row.update(_beside("memory", memory.forward_and_backward, call.forward, call.backward, device))
                row.update(_beside("operations", _operations, case, call, device))
                calls[impl.name] = call
        except Exception as error:
            row["reason"] = first_line(error)
    return rows, calls


def _beside(what, describe, *arguments) -> dict:
    """What stands beside the speed; where it cannot be had the row has no such figure, but keeps its speed."""
    try:
        return describe(*arguments)
    except Exception as error:
        return {f"{what}_error": first_line(error)}


def _operations(case, call, device):
    """What the call launches. Compiled code cannot be counted on the CPU, where it is one C++ function per graph."""
    if device.type == "cuda":
        return launches.of_call(case.key, call)
    if call.implementation.name == "compile":
        return {}
    if not call.implementation.ours or call.implementation.name == "reference":
        return launches.counted(call)
    with launches.own_calls(backend_module(call.implementation.name, case.op)) as names:
        found = launches.counted(call)
    return found | {"ops": found["ops"] + len(names)}


def _add_kernels(case, rows, calls):
    if case.op != "weighted_loss" or not KERNEL_TAGS & case.tags:
        return
    for name, call in list(calls.items()):
        if not rows[name]["ours"] or name == "reference":
            continue
        row = rows[f"{name}-kernel"] = {"ours": True, "reason": None}
        try:
            calls[f"{name}-kernel"] = kernel_of(call)
        except Exception as error:
            row["reason"] = first_line(error)


def _add_graphs(rows, calls):
    for name, call in list(calls.items()):
        if name.endswith("-kernel"):
            continue
        row = rows[f"{name}+graph"] = {"ours": rows[name]["ours"], "reason": None}
        if rows[name].get("waits"):
            # An attempt would leave the allocator in the state of a capture that never ended.
            row["reason"] = f"cannot be captured: it waits for the device {rows[name]['waits']} times"
            continue
        try:
            calls[f"{name}+graph"] = captured(call)
        except Exception as error:
            row["reason"] = first_line(error)
            torch.cuda.synchronize()


def _describe(case: Case, device: torch.device, backend: str) -> dict:
    return {
        "device": device.type,
        "op": case.op,
        "case": case.name,
        "backend": backend,
        "dtype": dtype_name(case.dtype),
        "shape": list(case.shape),
        "map": case.map,
        "peer": case.peer,
        "tags": sorted(case.tags),
    }
