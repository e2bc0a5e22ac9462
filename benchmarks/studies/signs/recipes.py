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
    def is_plain(self) -> bool:
        """Whether the pipeline draws by itself, as it was treated."""
        return (self.autoguide, self.guide, self.repair, self.steps) == (None, None, None, None)


# The pictures are as small as what the detector marks on them: the whole of one is context.
REPAIR = {"method": "resume", "context": 16.0, "grow": 2, "threshold": 0.3, "tries": 8, "batch_size": 50}


def _rows() -> dict[str, Recipe]:
    nft = {"method": "nft", "steps": 200}
    draft = {"method": "draft_k", "steps": 50}
    rows = {
        "before": Recipe(),
        "nft": Recipe(nft),
        "trained on as long as nft": Recipe(trained_on="nft"),
        "nft, uniform map": Recipe(nft | {"map_source": "uniform"}),
        "nft, shuffled maps": Recipe(nft | {"map_source": "shuffled"}),
        "draft_k": Recipe(draft),
        "draft_k, strong": Recipe(draft | {"steps": 40, "grad_steps": 5, "learning_rate": 2e-3}),
        "guide": Recipe(guide={}),
        "guide, clean signs given": Recipe(guide={"clean": 200}),
        "nft, second round": Recipe(nft, after="nft"),
        "nft, then guide": Recipe(nft, guide={"clean": 200}),
        "nft, second round, then guide": Recipe(nft, after="nft", guide={"clean": 200}),
        "repair": Recipe(repair=REPAIR),
        "nft, then repair": Recipe(nft, repair=REPAIR),
    }
    # The pipelines' own ten steps are few, so that part of what is broken is the sampler's.
    longer = {"steps": 30, "before": "before, 30 steps"}
    return rows | _faster() | {"before, 30 steps": Recipe(**longer)} | _faster(", 30 steps", **longer)


def _faster(suffix: str = "", **options) -> dict[str, Recipe]:
    """As much by twice the rate in fewer steps, and taken further in drawing; by names that end in `suffix`."""
    nft = {"method": "nft", "steps": 120, "learning_rate": 1e-3, "ema_decay": 0.9}
    rows = {
        "nft, rate 1e-3": Recipe(nft, **options),
        "trained on as long as that": Recipe(trained_on=f"nft, rate 1e-3{suffix}", **options),
        "nft, autoguided": Recipe(nft, autoguide={}, **options),
        "nft, autoguided by 3": Recipe(nft, autoguide={"scale": 3.0}, **options),
        "nft, autoguided, then guide": Recipe(nft, autoguide={}, guide={"clean": 200}, **options),
    }
    return {name + suffix: recipe for name, recipe in rows.items()}


RECIPES = _rows()
"""The rows of the table, by name."""
QUICK = ("before", "nft", "trained on as long as nft")
"""Those of `--quick`."""
