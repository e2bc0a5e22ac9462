"""The benchmark cases that the fast kernels of csrc/cuda serve, and how many instructions each may spend.

`tools.gpu.budget` prints what they spend, and a test holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.ops.machine import ROOT

SOURCES = tuple(ROOT / "csrc" / "cuda" / name for name in ("l2.cu", "l2_odd.cu", "tokens.cu", "policy_lanes.cu"))
ODD = 1


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
