"""The options of `diffdoctor round`; light to import, so that its `--help` is quick."""

from __future__ import annotations

import dataclasses

from diffdoctor.annotate.config import MERGES, AnnotateAddConfig
from diffdoctor.annotate.simulated import Annotator
from diffdoctor.detector.config import DetectorTrainingConfig
from diffdoctor.detector.models.files import ARCHITECTURES
from diffdoctor.runs.errors import UserError, check_least, expected

PEOPLE, SIMULATED = "people", "simulated"
# Those of `annotate add` that a round takes under their names.
ADD = tuple(
    field.name
    for field in dataclasses.fields(AnnotateAddConfig)
    if field.name not in ("project", "pool", "diagnosis", "previous", "round", "seed")
)


@dataclasses.dataclass
class RoundConfig:
    """Options of `diffdoctor round`.

    Attributes:
        pool: files, folders, patterns, shards to choose from; it may grow between rounds.
        detector: the detector that the first round begins with, as `diffdoctor diagnose` takes it.
        output: the folder of all rounds: ledger.jsonl, the annotation project `labels`, a folder `round-01` … of each
            round, `detector` (the best so far) and status.html. Run again, it resumes.
        test: folders of labelled shards, never trained on, on which detectors are compared; none: the audit tasks are.
        data: folders of labelled shards to train on beside the labels, as `diffdoctor inject` makes them.
        rounds: how many rounds to make, those that are done included.
        patience: rounds in a row without a better detector after which no other one is begun.
        annotator: people (who work on the page; the command stops until they are done), or simulated.
        truth: with annotator simulated, folders of labelled shards that hold every picture of the pool.
        raters: simulated raters.
        rater: how simulated raters mark.
        budget: tasks of each round, see `diffdoctor annotate add`.
        strategy: see `diffdoctor annotate add`.
        gold: folders of shards with exact masks, for tasks of known truth.
        audit_share: of the budget, drawn evenly from the whole pool, and never trained on: what a detector's own labels
            are worth is measured on them.
        gold_share: of the budget, tasks of known truth that raters cannot tell from others.
        new_share: of the budget, pictures that look clean to the detector, of generators not labelled before.
        double_share: of the tasks, for two raters.
        blind_share: of the tasks, without the detector's proposal.
        per_prompt: largest number of selected pictures of one prompt.
        generator_share: largest share of the selected pictures that one generator may have.
        per_look: largest number of selected pictures that look alike.
        look_distance: bits of the 64 of a perceptual hash in which pictures that look alike differ at most.
        merge: where several raters answered and no reviewer decided: mean (a soft mask), majority or reviewed.
        precision: what the 95 % interval of a category's precision on audit tasks must lie above for the detector's own
            maps to be labels of further pictures of that category.
        most_pseudo: largest number of such pictures in a round; 0: none.
        human_share: of the pictures of a training step, those that people labelled.
        pseudo_share: likewise, those with the detector's own labels; `data` has the rest.
        architecture: of a new detector in each round, see `diffdoctor train-detector`; null: the training goes on from
            the round's detector.
        training: the training of each round, see `DetectorTrainingConfig`.
        mirrored: see `diffdoctor diagnose`.
        tile: see `diffdoctor diagnose`.
        batch_size: pictures that are diagnosed together.
        bootstrap: number of resamples for the intervals.
        seed: of all draws but the training's.
        device: such as cpu or cuda:1; null: the fastest there is.
    """

    pool: list[str]
    detector: str
    output: str
    test: list[str] = dataclasses.field(default_factory=list)
    data: list[str] = dataclasses.field(default_factory=list)
    rounds: int = 1
    patience: int = 2
    annotator: str = PEOPLE
    truth: list[str] = dataclasses.field(default_factory=list)
    raters: int = 2
    rater: Annotator = dataclasses.field(default_factory=Annotator)
    budget: int = AnnotateAddConfig.budget
    strategy: str = AnnotateAddConfig.strategy
    gold: list[str] | None = None
    audit_share: float = AnnotateAddConfig.audit_share
    gold_share: float = AnnotateAddConfig.gold_share
    new_share: float = AnnotateAddConfig.new_share
    double_share: float = AnnotateAddConfig.double_share
    blind_share: float = AnnotateAddConfig.blind_share
    per_prompt: int = AnnotateAddConfig.per_prompt
    generator_share: float = AnnotateAddConfig.generator_share
    per_look: int = AnnotateAddConfig.per_look
    look_distance: int = AnnotateAddConfig.look_distance
    merge: str = "mean"
    precision: float = 0.9
    most_pseudo: int = 10000
    human_share: float = 0.5
    pseudo_share: float = 0.2
    architecture: str | None = None
    training: DetectorTrainingConfig = dataclasses.field(
        default_factory=lambda: DetectorTrainingConfig(checkpoint_every=100)
    )
    mirrored: bool = False
    tile: int | None = None
    batch_size: int = 16
    bootstrap: int = 1000
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        check_least(self, rounds=1, patience=1, raters=1, most_pseudo=0, batch_size=1, bootstrap=40, seed=0)
        AnnotateAddConfig("labels", self.pool, "diagnosis", **{name: getattr(self, name) for name in ADD})
        if self.annotator not in (PEOPLE, SIMULATED):
            raise UserError(expected("annotator", f"{PEOPLE} or {SIMULATED}", repr(self.annotator)))
        if self.annotator == SIMULATED and not self.truth:
            raise UserError(expected("truth", "labelled shards of the pool's pictures, for simulated raters", "none"))
        if self.annotator == SIMULATED and self.double_share and self.raters < 2:
            raise UserError(expected("raters", "at least 2 for tasks of two raters (double_share)", self.raters))
        if self.merge not in MERGES:
            raise UserError(expected("merge", f"one of {', '.join(MERGES)}", repr(self.merge)))
        if not self.test and not self.audit_share:
            raise UserError(expected("test", "labelled shards, or an audit_share to compare detectors on", "neither"))
        if not 0 < self.precision < 1:
            raise UserError(expected("precision", "a share in (0, 1)", self.precision))
        if not (self.human_share > 0 and self.pseudo_share >= 0 and self.human_share + self.pseudo_share <= 1):
            got = f"{self.human_share} and {self.pseudo_share}"
            raise UserError(expected("human_share, pseudo_share", "shares > 0 and >= 0, of at most 1 together", got))
        if self.data and self.human_share + self.pseudo_share == 1:
            raise UserError(expected("human_share, pseudo_share", "less than 1 together with data", "1"))
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise UserError(expected("architecture", f"one of {', '.join(ARCHITECTURES)}", repr(self.architecture)))
