"""Warp instructions that the fast kernels of csrc/cuda spend on 8 elements, beside what they may spend, and what that
means for a GPU's speed: `python -m tools.gpu.budget --arch 90 ...` compiles, counts, predicts and prints.

The budgets stand in `tools.gpu.kernel_cases`; `tools.gpu.kernel_counts` says what is counted.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from benchmarks.ops.table import aligned
from tools.gpu import sass
from tools.gpu.cards import CARDS, Card
from tools.gpu.kernel_cases import ARTIFACT_SOURCE, CASES, LOGIT_BUDGET, MEAN_BUDGETS, MEAN_SOURCE, SOURCES
from tools.gpu.kernel_counts import Count, LogitCount, count_logit, counts, fast_kernels, means_of

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m tools.gpu.budget", description=__doc__)
    command.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    command.add_argument("--markdown", action="store_true")
    options = command.parse_args(arguments)
    nvcc = sass.find_nvcc()
    if nvcc is None:
        print("nvcc was found neither on PATH nor in /usr/local/cuda", file=sys.stderr)
        return 1

    def cubin(arch: int, source: pathlib.Path) -> bytes:
        return sass.compile_cubin(arch, source, nvcc)[0]

    rows = [
        row for arch in options.arch for source in SOURCES for row in counts(arch, fast_kernels(cubin(arch, source)))
    ]
    logits = [count_logit(arch, cubin(arch, ARTIFACT_SOURCE)) for arch in options.arch]
    means = {arch: [*means_of(sass.listings(cubin(arch, MEAN_SOURCE))[0]).values()] for arch in options.arch}
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
        predicted.append((case.name, *(_predicted(count, card) for count, card in here)))
    if not markdown:
        return f"{aligned(cells, left=1)}\n\n{aligned(predicted, left=1)}"
    return "\n\n".join(
        "\n".join("| " + " | ".join(row) + " |" for row in (table[0], ["---"] * len(table[0]), *table[1:]))
        for table in (cells, predicted)
    )


def _predicted(count: Count, card: Card) -> str:
    what = count.instructions, count.case.bytes
    return f"{card.issue_load(*what):.0%} → {card.predicted_share(*what):.0%}"


if __name__ == "__main__":
    sys.exit(main())
