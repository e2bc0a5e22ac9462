"""Warp instructions that the fast kernels of csrc/cuda spend on 8 elements, counted in machine code: what they may
spend is a table here, and a test holds it. `python -m tools.gpu.budget --arch 90 ...` prints counts and predictions.

A count is that of a warp along the path that a case takes, loss and gradient included: the cheapest way through the
kernel's basic blocks that makes the case's loads, stores and multiply-adds. What stands around the main loop is spread
over the vectors of a thread, at full size. A kernel for tokens, which visits a token's channels in one round, is
counted from its first instruction to the one that counts its block as done.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache

from benchmarks.ops.machine import ROOT
from benchmarks.ops.table import aligned
from tools.gpu import sass
from tools.gpu.machine_code import Code

SOURCES = tuple(ROOT / "csrc" / "cuda" / name for name in ("l2.cu", "l2_odd.cu", "tokens.cu", "policy_lanes.cu"))
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
THREADS = 256
ODD = 1
_CONFIG = re.compile(
    r"l2_(?:odd)?_?kernelI.*?ConfigILi(\d)ELi(\d)ELb(\d)ELb(\d)ELb(\d)E|tokens_kernelI.*?ConfigILi(\d)ELi(\d)E"
    r"|policy_lanes_kernelI.*?ConfigILi(\d)ELi(\d)ELi(\d)ELb(\d)E"
)


@dataclass(frozen=True)
class Case:
    """A benchmark case that the fast kernels serve.

    Args:
        name: of the case, with its dtype.
        kernel: (dtype of model_pred, of the terms, more than one term, maps, coefficients that change with u), with
            `ODD` behind them that of l2_odd.cu; for tokens (dtype of model_pred, of the terms); for policy_loss (both,
            pixels of a vector, a ref_pred).
        visits: vectors that a thread computes on between two looks at the maps, at full size.
        steps: such looks, or 1.
        bytes: least bytes that 8 elements move.
        terms: that are subtracted.
        budget: instructions for 8 elements, at most.
        passes: over the inputs; fp16 takes two, and each is counted as if it gave loss and gradient.
        maps: of fp32 at the grid's size that policy_loss reads for each pixel.
    """

    name: str
    kernel: tuple[int, ...]
    visits: int
    steps: int
    bytes: float
    budget: int
    terms: int = 1
    passes: int = 1
    maps: int = 0


CASES = (
    Case("pixel-2048 bf16", (1, 1, 0, 0, 0), 14, 1, 48, 90),
    Case("pixel-2048 fp32", (0, 0, 0, 0, 0), 14, 1, 96, 110),
    Case("pixel-2048 fp16", (2, 2, 0, 0, 0), 14, 1, 80, 190, passes=2),
    Case("pixel-2048-map bf16", (1, 1, 0, 1, 0), 3, 5, 58.7, 150),
    Case("wan-720p-batch bf16", (1, 1, 1, 1, 0), 14, 1, 64, 200, terms=2),
    Case("bf16 against fp32, with a map", (1, 0, 0, 1, 0), 3, 5, 74.7, 150),
    Case("contrastive bf16", (1, 1, 1, 1, 1), 2, 1, 66, 300, terms=2),
    Case("flux-tokens-map bf16", (1, 1), 2, 1, 66, 350, terms=2),
    Case("166 x 166 with a map, bf16", (1, 1, 0, 1, 0, ODD), 8, 1, 50, 200),
    Case("1023 x 1023 pictures with a map, bf16", (1, 1, 0, 1, 0, ODD), 3, 5, 58.7, 225),
    Case("166 x 166 with a map, fp32", (0, 0, 0, 1, 0, ODD), 8, 1, 98, 260),
    Case("166 x 166 with a map, flow, bf16", (1, 1, 1, 1, 0, ODD), 8, 1, 66, 230, terms=2),
    Case("166 x 166 contrastive, bf16", (1, 1, 1, 1, 1, ODD), 8, 1, 66, 260, terms=2),
    # 16 channels: SD3's latents and Wan's, then FLUX's tokens. A ratio for each pixel, and an advantage.
    Case("policy bf16", (1, 1, 8, 0), 4, 1, 68, 195, terms=2, maps=2),
    Case("policy bf16, an advantage for each sample", (1, 1, 8, 0), 4, 1, 64, 190, terms=2, maps=1),
    Case("policy fp32", (0, 0, 4, 0), 4, 1, 132, 250, terms=2, maps=2),
    Case("policy fp16", (2, 2, 8, 0), 4, 1, 120, 385, terms=2, passes=2, maps=2),
    Case("policy-flux-tokens bf16", (1, 1, 4, 0), 2, 1, 68, 285, terms=2, maps=2),
    Case("policy bf16 with a ref_pred", (1, 1, 8, 1), 4, 1, 84, 300, terms=3, maps=2),
)


ARTIFACT_SOURCE = ROOT / "csrc" / "cuda" / "artifact_loss.cu"
#: Instructions of a thread for a logit of detector-512 (4 x 128^2 -> 512^2, fp32, loss and gradient), at most.
LOGIT_BUDGET = 2700


MEAN_SOURCE = ROOT / "csrc" / "cuda" / "weight_mean.cu"
#: Instructions for 8 positions of an fp32 map of the grid's size, whose mean weight is wanted, at most: where four
#: positions are loaded at once, and at odd sizes.
MEAN_BUDGETS = {4: 120, 1: 170}
_MEAN_POSITIONS = 16  # of a thread, at full size


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


@dataclass(frozen=True)
class Card:
    """What a prediction takes of a GPU: multiprocessors, clock in Hz, measured copy speed in bytes per second."""

    name: str
    arch: int
    processors: int
    clock: float
    copy: float


CARDS = (
    Card("A100-80", 80, 108, 1.41e9, 1.75e12),
    Card("RTX 3090", 86, 82, 1.70e9, 0.86e12),
    Card("RTX 4090", 89, 128, 2.52e9, 0.93e12),
    Card("H100", 90, 132, 1.98e9, 3.0e12),
    Card("H200", 90, 132, 1.98e9, 4.3e12),
    Card("B200", 100, 148, 1.97e9, 6.8e12),
)
# A kernel of one kind of block keeps about so much of its issue slots busy before it, and not memory, is the limit; and
# so much of a copy's speed is left by the ends of its blocks. Both are assumptions of the prediction.
ISSUE_LIMIT, END_SHARE = 0.6, 0.95


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

    def issue_load(self, card: Card) -> float:
        """The share of all issue slots that is filled at a copy's speed."""
        return self.instructions / 32 * card.copy / self.case.bytes / (card.processors * 4 * card.clock)

    def predicted_share(self, card: Card) -> float:
        return END_SHARE * min(1.0, ISSUE_LIMIT / self.issue_load(card))


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


def kernels(arch: int, nvcc: str, source: pathlib.Path) -> dict[tuple, tuple[str, str, int]]:
    """{Config's arguments: (name, listing, registers)} of a file's fast kernels, compiled for `arch`."""
    return of_cubin(compile_to_cubin(arch, nvcc, source))


def compile_to_cubin(arch: int, nvcc: str, source: pathlib.Path) -> bytes:
    """A file's machine code for `arch`. Raises RuntimeError with the end of what nvcc says."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-I", str(ROOT / "csrc"), str(source), "-o",
             str(cubin)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-400:])
        return cubin.read_bytes()


def of_cubin(cubin: bytes) -> dict[tuple, tuple[str, str, int]]:
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


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m tools.gpu.budget", description=__doc__)
    command.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    command.add_argument("--markdown", action="store_true")
    options = command.parse_args(arguments)
    nvcc = sass.find_nvcc()
    if nvcc is None:
        print("nvcc was found neither on PATH nor in /usr/local/cuda", file=sys.stderr)
        return 1
    rows = [row for arch in options.arch for source in SOURCES for row in counts(arch, kernels(arch, nvcc, source))]
    logits = [count_logit(arch, compile_to_cubin(arch, nvcc, ARTIFACT_SOURCE)) for arch in options.arch]
    means = {
        arch: [*means_of(sass.listings(compile_to_cubin(arch, nvcc, MEAN_SOURCE))[0]).values()] for arch in options.arch
    }
    print(text(rows, options.markdown))
    print("\n" + logit_text(logits))
    print("\n" + mean_text(means))
    over = any(row.instructions > row.case.budget for row in rows)
    over = over or any(cost > MEAN_BUDGETS[together] for found in means.values() for together, cost in found)
    return int(over or any(count.instructions > LOGIT_BUDGET for count in logits))


def logit_text(counts: list[LogitCount]) -> str:
    """artifact_loss by architecture."""
    figures = (f"sm_{count.arch} {count.instructions:.0f}" for count in counts)
    return f"artifact_loss, instructions for a logit of detector-512 (budget {LOGIT_BUDGET}): " + ", ".join(figures)


def mean_text(means: dict[int, list[tuple[int, float]]]) -> str:
    """weight_mean by architecture."""
    lines = []
    for together, budget in MEAN_BUDGETS.items():
        figures = (f"sm_{arch} {dict(found)[together]:.0f}" for arch, found in means.items())
        lines.append(f"weight_mean, 8 positions, {together} loaded together (budget {budget}): " + ", ".join(figures))
    return "\n".join(lines)


def text(rows: list[Count], markdown: bool = False) -> str:
    """Counts by architecture, and the predictions that follow from them."""
    architectures = sorted({row.arch for row in rows})
    by = {(row.case, row.arch): row for row in rows}
    cases = [case for case in CASES if (case, architectures[0]) in by]
    cells = [("instructions per 8 elements", "budget", *(f"sm_{arch}" for arch in architectures), "registers")]
    for case in cases:
        here = [by[case, arch] for arch in architectures]
        figures = (f"{row.loop:.0f}" + (f" + {row.around:.0f}" if row.around else "") for row in here)
        cells.append((case.name, str(case.budget), *figures, str(max(row.registers for row in here))))
    cards = [card for card in CARDS if card.arch in architectures]
    predicted = [
        ("PREDICTED, not measured: issue slots filled at a copy's speed → share of a copy", *(c.name for c in cards))
    ]
    for case in cases:
        here = [(by[case, card.arch], card) for card in cards]
        predicted.append((case.name, *(f"{r.issue_load(c):.0%} → {r.predicted_share(c):.0%}" for r, c in here)))
    if not markdown:
        return f"{aligned(cells, left=1)}\n\n{aligned(predicted, left=1)}"
    return "\n\n".join(
        "\n".join("| " + " | ".join(row) + " |" for row in (table[0], ["---"] * len(table[0]), *table[1:]))
        for table in (cells, predicted)
    )


if __name__ == "__main__":
    sys.exit(main())
