"""Instructions that Triton's kernels may spend, by the calls of tests/programs/triton_compiled.py, and how they are
counted in machine code."""

from __future__ import annotations

from tools.gpu.machine_code import Code

#: Instructions for 8 elements in the main loop of what the Triton backend launches, by the calls of
#: tests/programs/triton_compiled.py: no map, a map, a map with statistics, and the gradient alone.
LOOP = {"plain-bf16": 110, "map-bf16": 120, "map-fp32": 260, "fp16-backward": 85}
#: For 8 positions of a map whose weights are worked out before that loop, by a program that visits several tiles.
TILE = {"map-bf16": 140}
#: In the innermost loop that has the instruction, for each of them: a pixel of artifact_loss's up-sampled map takes one
#: exponential, a value of a uint8 map in an area's window one conversion.
INNER = {"artifact-threshold": ("MUFU.EX2", 68), "area-latents": ("I2F", 15)}
#: Elements of model_pred, and instructions for 8 of them from a program's first one to the one that counts it as done,
#: loops left out: policy_loss goes through a tile once.
PASS = {"policy": (2 * 16 * 64 * 64, 540), "policy-large": (2 * 16 * 128 * 128, 370)}


def count_loop(listing: str, width: int) -> float | None:
    """Instructions for 8 elements in the loop of a kernel that moves `width` elements in 16 bytes; None for no loop."""
    code = Code(listing)
    if not any(code.done(b)[0] and code.done(b)[1] for _, body in code.loops for b in body):
        return None
    head, body = code.main_loop
    loads, stores = (sum(code.done(b)[k] for b in body) for k in (0, 1))
    return code.shortest([head], lambda b: b == head, (loads, stores, 0), body) / stores * 8 / width


def count_tile(listing: str) -> int:
    """Instructions for a thread's positions, 8 in a two-byte type, in the loop around the main loop of a kernel; the
    branch that raises the map's values to a power is not taken."""
    code = Code(listing)
    inner = code.main_loop
    outer = min((loop for loop in code.loops if loop[1] > inner[1]), key=lambda loop: sum(map(code.cost, loop[1])))
    stores = sum(code.done(b)[1] for b in inner[1])

    def once(head, body):
        return code.shortest([head], lambda b: b == head, (stores,), body, lambda b: (code.done(b)[1],))

    return once(*outer) - once(*inner)


def count_inner(listing: str, instruction: str) -> float:
    """Instructions for each `instruction` of the loop that has the fewest."""
    code, name = Code(listing), instruction.split(".")
    costs = []
    for _, body in code.loops:
        found = sum(code.count(b, name[0], ".".join(name[1:])) for b in body)
        if found:
            costs.append(sum(map(code.cost, body)) / found)
    return min(costs)


def count_pass(listing: str, elements_per_thread: float) -> float:
    """Instructions for 8 elements of a kernel that visits its elements once, up to where it counts as done."""
    code = Code(listing)
    return code.shortest([0], lambda b: code.count(b, "ATOM") > 0) / elements_per_thread * 8
