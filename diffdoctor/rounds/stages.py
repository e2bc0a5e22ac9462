"""The stages of a round, each one of the other commands; what they leave is what the ledger holds of them."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from typing import Any

from diffdoctor.annotate.add import run_annotate_add
from diffdoctor.annotate.config import AnnotateAddConfig, AnnotateExportConfig
from diffdoctor.annotate.export import run_annotate_export, sample_of
from diffdoctor.annotate.pool import Diagnosis, find_candidates
from diffdoctor.annotate.simulated_people import KnownMasks, answer_tasks
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.balance import category_statistics
from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose
from diffdoctor.detector.commands.train import TrainDetectorConfig, run_train_detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.evaluate.detector.command import EvaluateDetectorConfig, run_evaluate_detector
from diffdoctor.evaluate.detector.compare import compare_detectors
from diffdoctor.rounds.accept import audit_labels, precisions, pseudo_labels
from diffdoctor.rounds.config import ADD, SIMULATED
from diffdoctor.rounds.state import DETECTOR, LABELS, STAGES, Round, Waits
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_dir, atomic_write_text, clear_leftovers, delete_dir
from diffdoctor.runs.strict_json import nan_to_none
from diffdoctor.training.processes import Processes

PROMPTS = "prompts-wanted.jsonl"


def diagnose(this: Round) -> dict[str, Any]:
    """The round's detector on the pool."""
    config = this.config
    options = {name: getattr(config, name) for name in ("batch_size", "tile", "mirrored", "device")}
    output = str(this.path("diagnosis"))
    metrics = run_diagnose(DiagnoseConfig(config.pool, this.detector, output, overlays=False, **options))
    found = {name: metrics[name] for name in ("pictures", "flagged")}
    return found | {"line": f"{found['flagged']:,} of {found['pictures']:,} pictures are flagged"}


def select(this: Round) -> dict[str, Any]:
    """The tasks of the round, and of which categories more pictures are wanted."""
    config, diagnosis, previous = this.config, str(this.path("diagnosis")), None
    if this.number > 1 and this.rounds.detector(this.number - 1) != this.detector:
        previous = str(this.path("diagnosis", this.number - 1))
    options = {name: getattr(config, name) for name in ADD}
    project = str(this.rounds.output / LABELS)
    run_annotate_add(
        AnnotateAddConfig(project, config.pool, diagnosis, previous, round=this.number, seed=config.seed, **options)
    )
    rows = this.project.store.all("SELECT kind, count(*) FROM task WHERE round = ? GROUP BY kind", this.number)
    tasks = {row[0]: row[1] for row in rows}
    records = list(Diagnosis(diagnosis).records.values())
    statistics = category_statistics(
        [str(each.get("category") or "") for each in records],
        [each["mean"] for each in records],
        [each["flagged"] for each in records],
    )
    abnormal = {each.category: each for each in statistics if each.verdict}
    known = {(str(each.get("prompt") or ""), str(each.get("category") or "")) for each in records}
    prompts = sorted((prompt, category) for prompt, category in known if prompt and category in abnormal)
    lines = [strict_json.dumps({"prompt": prompt, "category": category}) + "\n" for prompt, category in prompts]
    atomic_write_text(this.path(PROMPTS), "".join(lines))
    words = [f"{each.category or '(none)'} {each.verdict}" for each in abnormal.values()]
    line = ", ".join(f"{count:,} {kind}" for kind, count in tasks.items()) + (f"; {', '.join(words)}" if words else "")
    categories = [dataclasses.asdict(each) for each in abnormal.values()]
    return {"tasks": tasks, "categories": categories, "prompts_wanted": len(prompts), "line": line}


def has_tasks(this: Round) -> bool:
    """Whether tasks of the round were drawn."""
    if not (this.rounds.output / LABELS).is_dir():
        return False
    return this.project.store.one("SELECT 1 FROM task WHERE round = ?", this.number) is not None


def annotate(this: Round) -> dict[str, Any]:
    """People's answers, or simulated ones."""
    config = this.config
    if config.annotator == SIMULATED:
        truth = KnownMasks(config.truth)
        answer_tasks(this.project, truth, config.rater, raters=config.raters, seed=config.seed)
    wanted, done, open_, conflicts = progress_of(this)
    if open_ or conflicts:
        missing = [f"{done:,} of {wanted:,} labels are there"]
        missing += [f"{conflicts:,} conflicts wait for a reviewer"] if conflicts else []
        serve = f"diffdoctor annotate serve {this.rounds.output / LABELS}"
        what = f"run `{serve}` for people, and this command again when they are done"
        raise Waits(f"round {this.number}: {', '.join(missing)}; {what}")
    seconds = this.project.store.one(
        "SELECT coalesce(sum(active_ms), 0) / 1000.0 FROM annotation JOIN task ON task.id = task WHERE round = ?",
        this.number,
    )[0]
    return {"labels": done, "seconds": seconds, "line": f"{done:,} labels in {seconds / 60:,.1f} minutes of work"}


def progress_of(this: Round) -> tuple[int, int, int, int]:
    """Of the round: labels that are wanted, labels that are there, open tasks, tasks in conflict."""
    row = this.project.store.one(
        "SELECT coalesce(sum(needed), 0), coalesce(sum(min(done, needed)), 0), coalesce(sum(state = 'open'), 0), "
        "coalesce(sum(state = 'conflict'), 0) FROM task WHERE round = ? AND kind IN ('normal', 'audit')",
        this.number,
    )
    return tuple(row)


def export(this: Round) -> dict[str, Any]:
    """Selected tasks' labels of all rounds, to train on; and audit tasks' labels, to measure with."""
    config, project = this.config, this.project
    folder, merge = str(this.rounds.output / LABELS), config.merge
    run_annotate_export(AnnotateExportConfig(folder, str(this.path("human")), merge=merge, kinds=["normal"]))
    audit = audit_labels(project, merge)
    if audit:
        write_shards((sample_of(project, label) for label in audit), this.path("audit"))
    human = len(ShardData(this.path("human")))
    line = f"{human:,} labels to train on, {len(audit):,} to measure with"
    return {"human": human, "audit": len(audit), "line": line}


def accept(this: Round) -> dict[str, Any]:
    """The detector's own maps as labels, of the categories about which it is right often enough."""
    config, project, counts = this.config, this.project, SkipCounts()
    diagnosis = Diagnosis(this.path("diagnosis"))
    candidates = find_candidates(config.pool, diagnosis, counts)
    measured = precisions(project, diagnosis, candidates, config.merge)
    options = {"least": config.precision, "most": config.most_pseudo, "round": this.number, "seed": config.seed}
    samples = pseudo_labels(project, diagnosis, candidates, measured, **options, counts=counts)
    # what a killed run wrote may be more than there is now
    clear_leftovers(this.path("pseudo").parent, "pseudo")
    if this.path("pseudo").is_dir():
        delete_dir(this.path("pseudo"))
    first = next(samples, None)
    pseudo = 0 if first is None else write_shards(itertools.chain([first], samples), this.path("pseudo"))
    accepted = {
        name: [each.category for each in measured if each.accepts(is_damaged, config.precision)]
        for name, is_damaged in (("damaged", True), ("clean", False))
    }
    words = [f"{name} in {', '.join(c or '(none)' for c in found)}" for name, found in accepted.items() if found]
    line = (
        f"{pseudo:,} maps of the detector's own are labels ({'; '.join(words) or 'no category is right often enough'})"
    )
    measures = [each.as_json() for each in measured]
    return {"pseudo": pseudo, "categories": measures, "skipped": dict(counts.reasons), "line": line}


def train(this: Round) -> dict[str, Any]:
    """A detector that learns from the labels, the accepted maps and the other data."""
    config = this.config
    shares = {str(this.path("human")): config.human_share}
    if this.outputs("accept")["pseudo"] and config.pseudo_share:
        shares[str(this.path("pseudo"))] = config.pseudo_share
    sizes = {folder: len(ShardData(folder)) for folder in config.data}
    rest = 1 - config.human_share - config.pseudo_share
    shares |= {folder: rest * size / sum(sizes.values()) for folder, size in sizes.items() if size}
    options: dict[str, Any] = {"initial": this.detector}
    if config.architecture is not None:
        options = {"architecture": config.architecture}
    output, sets = str(this.path(DETECTOR)), {"data": list(shares), "shares": list(shares.values())}
    metrics = run_train_detector(
        TrainDetectorConfig(
            **sets, output=output, validation_share=0.0, training=config.training, device=config.device, **options
        )
    )
    line = f"{metrics['steps']:,} steps on {metrics['pictures']:,} pictures, loss {metrics['loss']:.4f}"
    return {"steps": metrics["steps"], "pictures": metrics["pictures"], "loss": metrics["loss"], "line": line}


def evaluate(this: Round) -> dict[str, Any]:
    """Both detectors on the test set and on the audit tasks, and a page on the new one."""
    config, new = this.config, str(this.path(DETECTOR) / "detector")
    sets = {"test": list(config.test), "audit": [str(this.path("audit"))] if this.outputs("export")["audit"] else []}
    device = Processes(config.device).device
    detectors = [open_detector(source).to(device) for source in (this.detector, new)]
    options = {"size": config.training.size, "bootstrap": config.bootstrap, "seed": config.seed}
    found = {
        name: compare_detectors(*detectors, [ShardData(folder) for folder in folders], **options)
        for name, folders in sets.items()
        if folders
    }
    if not found:
        raise UserError(f"{this.rounds.output}: nothing to compare detectors on: give --test")
    decides = next(name for name in sets if name in found)
    output, folders = str(this.path("evaluation")), sets[decides]
    run_evaluate_detector(EvaluateDetectorConfig(new, folders, output, device=config.device, **options))
    line = "; ".join(f"{name}: {words_of(measures)}" for name, measures in found.items())
    return nan_to_none({**found, "decides": decides, "line": line})


def words_of(measures: dict[str, Any]) -> str:
    """What `compare_detectors` found of mAP, in words."""
    value = measures["map50"]
    if value["difference"] is None or value["difference"] != value["difference"]:
        return "mAP@0.5 not defined without damaged pictures"
    low, high = value["difference_interval"]
    change = f"{value['difference']:+.3f}, {low:+.3f} … {high:+.3f}"
    return f"mAP@0.5 {value['before']:.3f} → {value['after']:.3f} ({change}) on {measures['pictures']:,} pictures"


def decide(this: Round) -> dict[str, Any]:
    """Adopt the new detector if it is better by more than its interval."""
    found = this.outputs("evaluate")
    value = found[found["decides"]]["map50"]
    low = value["difference_interval"][0] if value["difference"] is not None else None
    adopted = low is not None and low > 0
    new = (this.path(DETECTOR) / "detector").absolute()
    if adopted:
        clear_leftovers(this.rounds.output, DETECTOR)
        with atomic_dir(this.rounds.output / DETECTOR) as folder:
            shutil.copytree(new, folder, dirs_exist_ok=True)
        line = f"the new detector is better on the {found['decides']} set: adopted, {this.rounds.output / DETECTOR}"
    else:
        line = (
            f"the new detector is not better by more than its interval on the {found['decides']} set: the old one stays"
        )
    return {"adopted": adopted, "detector": str(new) if adopted else this.detector, "line": line}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        run: does it and returns what it leaves.
        inputs: the options on which it depends.
        is_bound: whether it left something that holds for these alone, and does not see it itself; other commands'
            output folders refuse other options, and what is written as a whole is written anew.
    """

    run: Callable[[Round], dict[str, Any]]
    inputs: tuple[str, ...] = ()
    is_bound: Callable[[Round], bool] = lambda this: False


STAGE = dict(
    zip(
        STAGES,
        (
            Stage(diagnose, ("pool", "tile", "mirrored")),
            Stage(select, ("pool", *ADD, "seed"), has_tasks),
            Stage(annotate),
            Stage(export, ("merge",)),
            Stage(accept, ("pool", "merge", "precision", "most_pseudo", "seed")),
            Stage(train, ("data", "human_share", "pseudo_share", "architecture", "training")),
            Stage(evaluate, ("test", "bootstrap", "seed")),
            Stage(decide),
        ),
        strict=True,
    )
)
