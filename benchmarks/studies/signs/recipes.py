"""What is done to an untreated pipeline, or to what it drew: a treatment, a control, guidance, repair, or several."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        treat: options of `TreatConfig`; None: no treatment.
        trained_on: the recipe whose treatment's CPU seconds the base pipeline is trained on for, on clean signs.
        rate: peak learning rate of that training.
        after: the recipe whose result is treated further, with a detector that was trained anew on labels of what that
            result draws.
        autoguide: options of `autoguide`, in whose context the pictures are drawn; None: in none.
        guide: options of `guide`, which then draws, `clean` as a number of clean signs; None: the pipeline draws by
            itself.
        repair: options of `RepairOptions`, by which the detector has what was drawn repaired; None: it stays as it is.
        steps: of the sampler that draws the row; None: as many as the treatment's own.
        before: the row that it is compared with, picture by picture.
    """

    treat: dict | None = None
    trained_on: str | None = None
    rate: float = 1e-3
    after: str | None = None
    autoguide: dict | None = None
    guide: dict | None = None
    repair: dict | None = None
    steps: int | None = None
    before: str = "before"

    @property
    def is_tuned(self) -> bool:
        """Whether the pipeline draws by itself, treated by the detector's own maps."""
        by_itself = (self.autoguide, self.guide, self.repair) == (None, None, None)
        return by_itself and self.treat is not None and "map_source" not in self.treat


# Chosen on the development seeds: what was tried stands in docs/signs.md.
NFT = {
    "method": "nft", "steps": 120, "batch_size": 64, "learning_rate": 1e-3, "rank": 32, "ema_decay": 0.9,
    "offline_weight": 0.13,
}  # fmt: skip
DRAFT = {"method": "draft_k", "steps": 50}
# The pictures are as small as what the detector marks on them: the whole of one is context.
REPAIR = {"method": "resume", "context": 16.0, "grow": 2, "threshold": 0.3, "tries": 8, "batch_size": 50}
# The pipelines' own ten steps are few, so that part of what is broken is the sampler's.
LONGER = 30


def _rows() -> dict[str, Recipe]:
    rows = {
        "before": Recipe(),
        "nft": Recipe(NFT),
        "trained on as long as nft": Recipe(trained_on="nft"),
        "nft, uniform map": Recipe(NFT | {"map_source": "uniform"}),
        "nft, shuffled maps": Recipe(NFT | {"map_source": "shuffled"}),
        "draft_k": Recipe(DRAFT),
        "guide": Recipe(guide={}),
        "guide, clean signs given": Recipe(guide={"clean": 200}),
        "nft, then guide": Recipe(NFT, guide={"clean": 200}),
        "nft, autoguided": Recipe(NFT, autoguide={}),
        "nft, autoguided by 3": Recipe(NFT, autoguide={"scale": 3.0}),
        "nft, autoguided, then guide": Recipe(NFT, autoguide={}, guide={"clean": 200}),
    }
    longer = {f"{name}, {LONGER} steps": _longer(recipe) for name, recipe in rows.items()}
    return rows | longer | {
        "draft_k, strong": Recipe(DRAFT | {"steps": 40, "grad_steps": 5, "learning_rate": 2e-3}),
        "draft_lv": Recipe({"method": "draft_lv", "steps": 50}),
        "drtune": Recipe({"method": "drtune", "steps": 50}),
        "full": Recipe({"method": "full", "steps": 50}),
        "leap": Recipe({"method": "leap", "steps": 50}),
        "grpo": Recipe({"method": "grpo", "steps": 100}),
        "weighted": Recipe({"method": "weighted", "steps": 200}),
        "nft, second round": Recipe(NFT, after="nft"),
        "nft, second round, then guide": Recipe(NFT, after="nft", guide={"clean": 200}),
        "repair": Recipe(repair=REPAIR),
        "nft, then repair": Recipe(NFT, repair=REPAIR),
    }  # fmt: skip


def _longer(recipe: Recipe) -> Recipe:
    """The same drawn in `LONGER` steps, beside the untreated pipeline in as many."""
    named = {name: getattr(recipe, name) for name in ("before", "trained_on")}
    named = {name: f"{row}, {LONGER} steps" for name, row in named.items() if row is not None}
    return dataclasses.replace(recipe, steps=LONGER, **named)


RECIPES = _rows()
"""The rows of the table, by name."""
QUICK = ("before", "nft", "trained on as long as nft")
"""Those of `--quick`."""
