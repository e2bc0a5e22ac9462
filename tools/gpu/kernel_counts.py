"""Warp instructions that a case of `tools.gpu.kernel_cases` takes, counted in a kernel's machine code.

A count is that of a warp along the path that a case takes, loss and gradient included: the cheapest way through the
kernel's basic blocks that makes the case's loads, stores and multiply-adds. What stands around the main loop is spread
over the vectors of a thread, at full size. A kernel for tokens, which visits a token's channels in one round, is
counted from its first instruction to the one that counts its block as done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tools.gpu import sass
from tools.gpu.kernel_cases import CASES, ODD, Case
from tools.gpu.machine_code import Code

THREADS = 256
_MEAN_POSITIONS = 16  # of a thread, at full size
_CONFIG = re.compile(
    r"l2_(?:odd)?_?kernelI.*?ConfigILi(\d)ELi(\d)ELb(\d)ELb(\d)ELb(\d)E|tokens_kernelI.*?ConfigILi(\d)ELi(\d)E"
    r"|policy_lanes_kernelI.*?ConfigILi(\d)ELi(\d)ELi(\d)ELb(\d)E"
)


@dataclass(frozen=True)
class Count:
    """What a case costs on an architecture, per 8 elements."""

    case: Case
    arch: int
    loop: float
    around: float
    registers: int
    loads_under_way: int  # bytes of a multiprocessor

    @classmethod
    def of(cls, fields: dict) -> Count:
        """From `dataclasses.asdict`, which may have been JSON since."""
        name = fields["case"]["name"]
        return cls(**fields | {"case": next(case for case in CASES if case.name == name)})

    @property
    def instructions(self) -> float:
        return self.loop + self.around


@dataclass(frozen=True)
class LogitCount:
    """What artifact_loss costs on an architecture where the map is four times as large as the logits.

    Args:
        pixel: instructions for a pixel of the map, each of its branches counted.
        row: for the eight pixels of a row that a logit gathers.
        around: for what is left of a block, by one thread.
    """

    arch: int
    pixel: float
    row: int
    around: int
    registers: int

    @property
    def instructions(self) -> float:
        """For a logit: a block of 16 x 16 visits 68 x 68 pixels, and each logit eight rows."""
        return 68 * 68 / 256 * self.pixel + 8 * self.row + self.around


def count(case: Case, arch: int, listing: str, registers: int) -> Count:
    """What the case costs, from the machine code of its kernel."""
    if len(case.kernel) == 2:
        return _count_tokens(case, arch, listing, registers)
    if len(case.kernel) == 4:
        return _count_policy(case, arch, listing, registers)
    if len(case.kernel) == 6:
        return _count_odd(case, arch, listing, registers)
    code = Code(listing)
    head, body = code.main_loop
    width = 4 if case.kernel[0] == 0 else 8
    loads, stores, loop = _count_loop(case, code, width)
    first = min(stores, case.visits) * loads + (width // 4 if case.kernel[3] else 0), 0, 0
    exits = {b for block in body for b in code.next[block] if b not in body}
    around = code.shortest([0], lambda b: b == head, first)
    around += code.shortest(exits, lambda b: code.count(b, "ATOM") > 0, within=set(code.blocks) - {head})
    if case.steps > 1:
        around += (case.steps - 1) * code.shortest(exits, lambda b: b == head, first)
    return _spread(case, arch, loop, around, registers, stores * loads, stores)


def _count_odd(case: Case, arch: int, listing: str, registers: int) -> Count:
    """Where the maps go through shared memory: a thread works out 8 positions, or 4, for each look at them, and one
    warp of eight those that the last column's vectors reach into."""
    code = Code(listing)
    head, body = code.main_loop
    width = 4 if case.kernel[0] == 0 else 8
    positions = 4 if width == 4 or case.kernel[4] else 8
    loads, stores, loop = _count_loop(case, code, width)

    def done(block: int) -> tuple[int, int, int]:
        narrow = code.count(block, "LDG", "CONSTANT") - code.count(block, "LDG", "128")
        return code.count(block, "LDG", "128"), narrow, code.count(block, "STS")

    look = (min(stores, case.visits) * loads, positions, 2 * positions)
    exits = {b for block in body for b in code.next[block] if b not in body}
    around = code.shortest([0], lambda b: b == head, look, done=done)
    around += code.shortest(exits, lambda b: code.count(b, "ATOM") > 0, within=set(code.blocks) - {head})
    if case.steps > 1:
        around += (case.steps - 1) * code.shortest(exits, lambda b: b == head, look, done=done)
    rounds = [
        code.shortest([head], lambda b, head=head: b == head, (0, 4, 8), body, done)
        for head, body in code.loops
        if sum(code.count(b, "STS") for b in body) >= 8 and not any(any(code.done(b)[:2]) for b in body)
    ]
    around += case.steps * min(rounds) / 8
    return _spread(case, arch, loop, around, registers, stores * loads, stores)


def _count_loop(case: Case, code: Code, width: int) -> tuple[int, int, int]:
    """Wide loads of a vector, vectors of a round of the main loop, and what a round costs."""
    head, body = code.main_loop
    loads = 1 + case.terms * (1 if case.kernel[1] or width == 4 else 2)
    stores = sum(code.count(b, "STG", "128") for b in body)
    need = (stores * loads, stores, stores * width * (case.terms + 1))
    return loads, stores, code.shortest([head], lambda b: b == head, need, body)


def _spread(case: Case, arch: int, loop: int, around: float, registers: int, loads: int, stores: int) -> Count:
    per_8 = (2 if case.kernel[0] == 0 else 1) * case.passes
    under_way = _threads(registers) * 16 * loads
    return Count(case, arch, per_8 * loop / stores, per_8 * around / (case.visits * case.steps), registers, under_way)


def _threads(registers: int) -> int:
    """Threads of a multiprocessor that its registers allow."""
    return 65536 // (THREADS * -(-registers // 8) * 8) * THREADS


def _count_tokens(case: Case, arch: int, listing: str, registers: int) -> Count:
    """Of a token's channels, `case.visits` times 8 elements, read and written 4 elements at a time."""
    code, pieces = Code(listing, "64"), 2 * case.visits
    need = (pieces, pieces, pieces * 4 * (case.terms + 1))
    whole = code.shortest([0], lambda b: code.count(b, "ATOM") > 0, need)
    loop = code.shortest([code.main_loop[0]], lambda b: b not in code.main_loop[1], (0, *need[1:]))
    under_way = _threads(registers) * pieces * 8 * (1 + case.terms)
    return Count(case, arch, loop / case.visits, (whole - loop) / case.visits, registers, under_way)


@lru_cache(maxsize=8)  # a way is asked for its cost and for what stands on it
def _policy_way(case: Case, listing: str) -> tuple[int, list[int]]:
    """What a lane's way through policy_loss costs, and its instructions by index; not that of the thread that works out
    a sample's numbers. A pixel's ratio is an exponential."""
    code = Code(listing)
    width = 4 if case.kernel[0] == 0 else 8
    own = case.kernel[2] // 4
    odd = ("FCHK", "LDG.E.U", "LDG.E.64", "LD.E")  # a division; maps of other dtypes
    within = {b for b in code.blocks if not any(code.opcodes[i].startswith(odd) for i in range(b, code.blocks[b]))}
    again = case.visits - 2 if case.kernel[3] and width == 8 else 0  # vectors that do not fit, and are read twice
    for _, body in code.loops if not again else ():
        if any(code.count(b, "LDG", "128") for b in body) and not any(code.count(b, "SHFL") for b in body):
            within -= body

    def done(block: int) -> tuple[int, ...]:
        narrow = sum(code.opcodes[i] in ("LDG.E", "LDG.E.CONSTANT") for i in range(block, code.blocks[block]))
        adds = code.count(block, "FFMA") + 2 * code.count(block, "FFMA2")
        stores = code.count(block, "STG", "128")
        return code.count(block, "LDG", "128"), narrow, stores, code.count(block, "MUFU", "EX2"), adds // (2 * width)

    computed = case.visits + again
    need = (computed * (1 + case.terms), own * case.maps, case.visits, own, computed)
    cost, blocks = code.way([0], lambda b: code.count(b, "ATOM") > 0, need, within, done)
    return cost, [i for b in blocks for i in range(b, code.blocks[b])]


def _count_policy(case: Case, arch: int, listing: str, registers: int) -> Count:
    """Of a lane's pixels with `case.visits` vectors of their channels, from its first instruction on."""
    whole, _ = _policy_way(case, listing)
    per_8 = (2 if case.kernel[0] == 0 else 1) * case.passes / case.visits
    under_way = _threads(registers) * 16 * (1 + case.terms) * (1 if case.kernel[0] == 0 else 2)
    return Count(case, arch, per_8 * whole, 0, registers, under_way)


def count_logit(arch: int, cubin: bytes) -> LogitCount:
    """What artifact_loss in fp32 costs, from the machine code of its file."""
    listings, registers = sass.listings(cubin)
    name = next(name for name in listings if re.search(r"artifact_loss_kernelILi0E", name))
    code = Code(listings[name])

    def total(body, opcode: str, what: str = "") -> int:
        return sum(code.count(b, opcode, what) for b in body)

    # By what only they do: an exponential and a store of a slope; loads of slopes and multiply-adds alone. The slow way
    # of a reciprocal is no part of a pixel.
    pixels = [body for _, body in code.loops if total(body, "MUFU", "EX2") and not total(body, "BAR")]
    pixel = max(sum(code.cost(b) for b in body if not code.count(b, "CALL")) / total(body, "STS") for body in pixels)
    inner = [(head, body) for head, body in code.loops if not any(total(body, name) for name in ("STS", "MUFU", "BAR"))]
    rows = [(head, body) for head, body in inner if total(body, "FFMA") > 16 and len(body) > 1]
    row = max(code.shortest([head], lambda b, head=head: b == head, (0, 0, 9), body) for head, body in rows)
    around = code.shortest([0], lambda b: code.count(b, "ATOM") > 0)
    return LogitCount(arch, pixel, row, around, registers[name])


def count_mean(listing: str, together: int) -> float:
    """What the mean weight costs for 8 positions of one fp32 map, from a kernel that loads so many `together`."""
    code = Code(listing)

    def done(block: int) -> tuple[int, int, int]:
        loads = code.count(block, "LDG", "128") if together == 4 else code.count(block, "LDG.E.CONSTANT")
        return loads, 0, code.count(block, "FFMA")

    need = (_MEAN_POSITIONS // together, 0, _MEAN_POSITIONS)
    whole = code.shortest([0], lambda b: code.count(b, "ATOM") > 0, need, done=done)
    return whole * 8 / _MEAN_POSITIONS


def means_of(listings: dict[str, str]) -> dict[str, tuple[int, float]]:
    """{kernel: (positions that it loads together, what 8 of them cost)} of weight_mean.cu."""
    return {
        name: (int(found[1]), count_mean(listing, int(found[1])))
        for name, listing in listings.items()
        if (found := re.search(r"weight_rows_kernelILi(\d)E", name))
    }


def fast_kernels(cubin: bytes) -> dict[tuple, tuple[str, str, int]]:
    """{Config's arguments: (name, listing, registers)} of a file's fast kernels."""
    listings, registers = sass.listings(cubin)
    return {
        tuple(int(digit) for digit in found.groups() if digit is not None) + ((ODD,) if "odd_kernel" in name else ()): (
            name,
            listing,
            registers[name],
        )
        for name, listing in listings.items()
        if (found := _CONFIG.search(name))
    }


def counts(arch: int, found: dict[tuple, tuple[str, str, int]]) -> list[Count]:
    """Of the cases whose kernels were found."""
    return [count(case, arch, *found[case.kernel][1:]) for case in CASES if case.kernel in found]


def forbidden(kernel: tuple, listing: str) -> list[str]:
    """What may not stand in a kernel's main loop, or on a case's way through policy_loss: doubles, divisions and
    conversions of integers, local memory."""
    code = Code(listing, "64" if len(kernel) == 2 and kernel[0] else "128")
    names = r"^(D(ADD|MUL|FMA|SETP|MNMX)|F2F\.|F2I|I2F(?!P)|MUFU|LDL|STL|CALL(?!\.REL))"
    if len(kernel) == 4:
        names = names.replace("MUFU", r"MUFU(?!\.EX2)")
        case = next((case for case in CASES if case.kernel == kernel), None)
        there = [] if case is None else _policy_way(case, listing)[1]
    else:
        there = [i for b in code.main_loop[1] for i in range(b, code.blocks[b])]
    return [code.text[i] for i in there if re.match(names, code.opcodes[i])]
