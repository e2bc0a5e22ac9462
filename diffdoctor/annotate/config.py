"""The options of the `diffdoctor annotate` commands."""

from __future__ import annotations

import dataclasses

from diffdoctor.annotate.schema import ROLES
from diffdoctor.annotate.select import STRATEGIES
from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.web.serve import check_address

MERGES = ("mean", "majority", "reviewed")
FORMATS = ("shards", "label-studio", "coco")
IMPORTED = ("label-studio", "coco", "masks")


@dataclasses.dataclass
class AnnotateAddConfig:
    """Options of `diffdoctor annotate add`.

    Attributes:
        project: the project's folder; made where there is none, with its config.yaml and guidelines.md.
        pool: files, folders, patterns, shards to choose from, as they were given to `diffdoctor diagnose`.
        diagnosis: output folder of `diffdoctor diagnose` on the pool, whose maps are proposed; null: nothing is.
        previous: the same by the last round's detector, for the disagreement of the two; null: none.
        gold: folders of shards with exact masks, as `diffdoctor inject` makes them, for tasks of known truth.
        budget: tasks to add; those that teach a new rater come on top.
        round: of labelling.
        strategy: paper (abnormal categories first, then what the detector is undecided about), uncertainty, random, or
            mixed (the most uncertain and random ones in turn).
        audit_share: of the budget, drawn evenly from the whole pool, for unbiased figures.
        gold_share: of the budget, tasks of known truth that raters cannot tell from others.
        new_share: of the budget, pictures that look clean to the detector, of generators not labelled before.
        double_share: of the tasks, for two raters.
        blind_share: of the tasks, without the detector's proposal.
        per_prompt: largest number of selected pictures of one prompt.
        generator_share: largest share of the selected pictures that one generator may have.
        per_look: largest number of selected pictures that look alike.
        look_distance: bits of the 64 of a perceptual hash in which pictures that look alike differ at most.
        seed: of all draws.
    """

    project: str
    pool: list[str]
    diagnosis: str | None = None
    previous: str | None = None
    gold: list[str] | None = None
    budget: int = 1000
    round: int = 1
    strategy: str = "paper"
    audit_share: float = 0.15
    gold_share: float = 0.05
    new_share: float = 0.1
    double_share: float = 0.1
    blind_share: float = 0.1
    per_prompt: int = 4
    generator_share: float = 1.0
    per_look: int = 1
    look_distance: int = 4
    seed: int = 0

    def __post_init__(self):
        check_least(self, budget=1, round=0, per_prompt=1, per_look=1, look_distance=0, seed=0)
        if self.strategy not in STRATEGIES:
            raise UserError(expected("strategy", f"one of {', '.join(STRATEGIES)}", repr(self.strategy)))
        for name in ("audit", "gold", "new", "double", "blind", "generator"):
            if not 0 <= getattr(self, f"{name}_share") <= 1:
                raise UserError(expected(f"{name}_share", "a share in [0, 1]", getattr(self, f"{name}_share")))
        if self.audit_share + self.gold_share + self.new_share > 1:
            total = self.audit_share + self.gold_share + self.new_share
            raise UserError(expected("audit_share + gold_share + new_share", "at most 1", f"{total:g}"))
        if self.diagnosis is None and self.strategy != "random":
            raise UserError(expected("diagnosis", f"a folder for the strategy {self.strategy}", "none"))


@dataclasses.dataclass
class AnnotateServeConfig:
    """Options of `diffdoctor annotate serve`.

    Attributes:
        project: the project's folder.
        host: address to listen at.
        port: to listen at; 0: any that is free.
        open: open the page in a browser here.
        allow_remote: let other machines reach the server, at a host that is not this machine's own loopback.
        names: further names by which browsers reach it, such as labels.example.org.
        certificate: file of a TLS certificate; null: plain HTTP, over which tokens can be read on the way.
        key: file of its key.
        assist: FILE.py:FUNCTION from a picture (H, W, 3) uint8 and a point x, y to a mask (H, W), for one click.
    """

    project: str
    host: str = "127.0.0.1"
    port: int = 8642
    open: bool = False
    allow_remote: bool = False
    names: list[str] | None = None
    certificate: str | None = None
    key: str | None = None
    assist: str | None = None

    def __post_init__(self):
        check_address(self)


@dataclasses.dataclass
class AnnotateTokenConfig:
    """Options of `diffdoctor annotate token`.

    Attributes:
        project: the project's folder.
        name: of the person.
        role: annotator, reviewer (settles conflicts) or admin (sees everything).
        disable: shut the person out instead.
    """

    project: str
    name: str
    role: str = "annotator"
    disable: bool = False

    def __post_init__(self):
        if self.role not in ROLES:
            raise UserError(expected("role", f"one of {', '.join(ROLES)}", repr(self.role)))


@dataclasses.dataclass
class AnnotateStatusConfig:
    """Options of `diffdoctor annotate status`.

    Attributes:
        project: the project's folder, in which status.html is written.
        strict: end with exit code 3 where the record has been tampered with.
    """

    project: str
    strict: bool = False


@dataclasses.dataclass
class AnnotateAgreementConfig:
    """Options of `diffdoctor annotate agreement`.

    Attributes:
        project: the project's folder, in which agreement.html and agreement.json are written.
        bootstrap: number of resamples of the pictures for the intervals; 0: none.
        seed: of the resampling.
    """

    project: str
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self):
        check_least(self, bootstrap=0, seed=0)


@dataclasses.dataclass
class AnnotateExportConfig:
    """Options of `diffdoctor annotate export`.

    Attributes:
        project: the project's folder.
        output: the folder to make: shards with their manifest; or tasks.json or coco.json and the pictures.
        merge: where several raters answered and no reviewer decided: mean (a soft mask), majority; or reviewed, which
            leaves out what no reviewer has decided and several raters answered.
        format: shards, label-studio or coco.
        round: only this round's tasks; null: all.
        kinds: kinds of tasks to export, of normal and audit.
        image_prefix: what stands before a picture's name in Label Studio's tasks.
        conflicts: export tasks in conflict too, merged.
        shard_size: pictures in a shard.
        picture_type: of the pictures in shards: png, webp or jpg.
    """

    project: str
    output: str
    merge: str = "mean"
    format: str = "shards"
    round: int | None = None
    kinds: list[str] = dataclasses.field(default_factory=lambda: ["normal", "audit"])
    image_prefix: str = "/data/local-files/?d="
    conflicts: bool = False
    shard_size: int = 1000
    picture_type: str = "png"

    def __post_init__(self):
        check_least(self, shard_size=1)
        for name, value, known in (("merge", self.merge, MERGES), ("format", self.format, FORMATS)):
            if value not in known:
                raise UserError(expected(name, f"one of {', '.join(known)}", repr(value)))
        for kind in self.kinds:
            if kind not in ("normal", "audit"):
                raise UserError(expected("kinds", "normal, audit or both", repr(kind)))


@dataclasses.dataclass
class AnnotateImportConfig:
    """Options of `diffdoctor annotate import`.

    Attributes:
        project: the project's folder; its tasks are labelled, by the pictures' names.
        source: a JSON export of Label Studio, a COCO file, or a folder of masks named as the pictures.
        format: label-studio, coco or masks.
        rater: to whom the labels belong; null: with label-studio whoever completed each, else the format's name.
        label: of several labels in the source, the one that means an artifact; null: all do.
        labelling: Label Studio's labelling configuration, checked against the labels before anything is imported.
    """

    project: str
    source: str
    format: str = "label-studio"
    rater: str | None = None
    label: str | None = None
    labelling: str | None = None

    def __post_init__(self):
        if self.format not in IMPORTED:
            raise UserError(expected("format", f"one of {', '.join(IMPORTED)}", repr(self.format)))
