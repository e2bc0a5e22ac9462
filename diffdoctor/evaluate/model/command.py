"""`diffdoctor evaluate model`: generate pictures before and after, measure both, report; resumable."""

from __future__ import annotations

import collections
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdoctor.data.columns import pyarrow_modules
from diffdoctor.data.pictures import as_batch
from diffdoctor.data.prompts import Prompt, read_prompt_file
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.confidence import check_detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.engine.scratch import is_shared_out, remove_scratch, share_out
from diffdoctor.engine.units import Plan
from diffdoctor.evaluate.model import draw as pipelines
from diffdoctor.evaluate.model import measure as measuring
from diffdoctor.evaluate.model.config import EvaluateModelConfig, completed, read_settings
from diffdoctor.evaluate.model.networks import Classifier, Clip, Preference, load_features
from diffdoctor.evaluate.model.questions import Questioner, read_questions
from diffdoctor.evaluate.model.report import doubts, print_measures, write_report
from diffdoctor.evaluate.model.store import EvaluationFolder
from diffdoctor.evaluate.model.summary import NEIGHBOURS, summarise, summarise_groups
from diffdoctor.evaluate.model.table import write_table
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_json, stamp
from diffdoctor.runs.progress import progress, quiet_loaders
from diffdoctor.runs.record import METRICS, versions
from diffdoctor.runs.strict_json import nan_to_none
from diffdoctor.runs.summary import print_doubts, skipped_in_words
from diffdoctor.training.devices import open_device
from diffdoctor.training.processes import process_state
from diffdoctor.training.weights import same_weights, weights_digest
from diffdoctor.treat.loading import load_lora
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.text_to_image import call_options, open_pipeline

SIDES = ("before", "after")
UNIT_BATCHES = 8  # in a unit of an engine


def run_evaluate_model(config: EvaluateModelConfig) -> dict:
    """Run `diffdoctor evaluate model`; returns what metrics.json holds.

    Raises:
        UserError: an option or a file is missing, does not fit or cannot be read; then nothing was written.
        DoubtfulResult: with `strict`, the judge or the detector is blind.
    """
    return Evaluation(completed(config)).run()


@dataclass
class PromptPlan:
    """The prompt of each generated picture, by the picture's index; the prompts take turns.

    Attributes:
        prompts: the prompts.
        class_indices: index of the classifier's logit for each prompt's label; None without a classifier.
    """

    prompts: list[Prompt]
    class_indices: list[int] | None

    def prompt(self, index: int) -> Prompt:
        """The prompt of the picture of this index."""
        return self.prompts[index % len(self.prompts)]

    def class_index(self, index: int) -> int:
        """Index of the classifier's logit that should be the largest for the picture of this index."""
        return self.class_indices[index % len(self.prompts)]

    def class_ids(self, count: int) -> torch.Tensor:
        """(count,) integers: the class of each picture, its label where all prompts have one, else its prompt."""
        labelled = all(prompt.label for prompt in self.prompts)
        names = [prompt.label if labelled else prompt.text for prompt in self.prompts]
        ids = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([ids[names[index % len(names)]] for index in range(count)])


class Evaluation:
    """One evaluation; all checks are made on construction, and nothing is written until `run`.

    Args:
        config: from `completed`.

    Raises:
        UserError: see `run_evaluate_model`.
    """

    def __init__(self, config: EvaluateModelConfig):
        quiet_loaders()
        pyarrow_modules()
        self.config = config
        prompts = read_prompt_file(config.prompts)
        self.measurer = _networks(config, [prompt.text for prompt in prompts])
        self.plan = PromptPlan(prompts, _class_indices(self.measurer.classifier, prompts))
        self.not_read = SkipCounts()
        self.real = measuring.real_units(config.real, self.not_read, config.output)
        self.damaged = measuring.real_units(config.damaged, self.not_read, config.output)
        self._too_few_for_fid(measuring.count_real(self.real))
        identity = pipelines.picture_identity(
            config, [prompt.text for prompt in prompts], weights_digest(self.measurer.detector)
        )
        self.state = process_state(config.device)
        main = self.state.is_main_process
        self.folder = EvaluationFolder(Path(config.output), identity, config.picture_type, main=main)
        self.folder.check(overwrite=config.overwrite)
        self.device = open_device(config.device, self.state.device)
        self.pipeline = self._checked_pipeline()

    def _too_few_for_fid(self, real_count: int | None) -> str:
        """Why there is no FID: the sets are too small for a covariance of full rank; empty: nothing is against it.

        Args:
            real_count: of real pictures; None: not known yet.

        Raises:
            UserError: too few for any comparison with real pictures.
        """
        features = self.measurer.features
        if not self.real or features is None:
            return ""
        counts = {"real pictures": real_count, "generated pictures": self.config.pictures}
        counts = {name: count for name, count in counts.items() if count is not None}
        for name, count in counts.items():
            if count <= NEIGHBOURS:
                raise UserError(expected("--real", f"more than {NEIGHBOURS} {name} for a comparison", count))
        size = features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]
        few = [f"{count:,} {name}" for name, count in counts.items() if count <= size]
        if not few:
            return ""
        return f"no FID: {size} features ({features.name}) need more than {' and '.join(few)}; KID and MMD do not"

    def _checked_pipeline(self):
        """The untreated pipeline, after trying that it can be treated as the options say."""
        config = self.config
        if config.treated:
            # Checked only, and loaded again when it is needed: two pipelines at a time may not fit into memory.
            open_pipeline("treated", config.treated, config, self.device)
        pipeline = open_pipeline("pipeline", config.pipeline, config, self.device)
        texts = [prompt.text for prompt in self.plan.prompts]
        check_prompts(pipeline, texts, max_sequence_length=config.max_sequence_length)
        if config.lora:
            load_lora(pipeline, config.lora)
            pipelines.remove_lora(pipeline)
        with pipelines.guided(pipeline, self.measurer.detector, config):
            return pipeline

    def run(self) -> dict:
        """Generate, measure and report; returns what metrics.json holds (nothing on other than the main process)."""
        with self.folder:
            return self._run()

    def _run(self) -> dict:
        config, main = self.config, self.state.is_main_process
        # All have looked at the folder before one changes it.
        self.state.wait_for_everyone()
        if main:
            self.folder.begin(config, overwrite=config.overwrite)
            self.folder.begin_measures(self._measure_identity())
        self.state.wait_for_everyone()
        if is_shared_out(config.engine, self.state.num_processes):
            self.pipeline = None
            self._share_out()
        else:
            for side in SIDES:
                if main:
                    remove_scratch(self._scratch(side))  # of a run with an engine that was killed
                self._generate(side)
        self.pipeline = None
        self.state.wait_for_everyone()
        self.measurer.to(self.device)
        for side in SIDES:
            self._measure_generated(side)
        size = tuple(self.folder.pictures("before").load([0]).shape[-2:])
        self._measure_real(size)
        self.state.wait_for_everyone()
        metrics: dict = {}
        if main:
            metrics = self._finish()
        self.state.wait_for_everyone()
        if main:
            print_doubts(metrics["doubts"], strict=config.strict)
        return metrics

    def _measure_identity(self) -> dict:
        """All that the measures depend on beside the pictures, by name."""
        config, files = self.config, {}
        for name, units in (("real", self.real), ("damaged", self.damaged)):
            files[name] = [[str(s.path), stamp(str(s.path))] for unit in units for s in unit.sources]
        return {
            "judge": weights_digest(self.measurer.judge),
            "detector": weights_digest(self.measurer.detector),
            "features": [getattr(self.measurer.features, "name", ""), stamp(config.features)],
            "clip": [config.clip, stamp(config.clip)],
            "preference": [config.preference, stamp(config.preference), config.preference_processor],
            "vqa": [config.vqa, stamp(config.vqa), self._questions()],
            "classifier": [config.classifier, stamp(config.classifier), self.plan.class_indices],
            "seed": config.seed,
            **files,
        }

    def _questions(self) -> str | None:
        """A digest of what is asked about the prompts."""
        questioner = self.measurer.questioner
        if questioner is None:
            return None
        asked = [questioner.asked(prompt.text) for prompt in self.plan.prompts]
        return hashlib.sha256(strict_json.dumps(asked).encode()).hexdigest()

    def _mine(self, items: Sequence) -> list:
        """This process's items; which these are does not depend on what other processes have finished."""
        return list(items[self.state.process_index :: self.state.num_processes])

    def _generate(self, side: str) -> None:
        config, files = self.config, self.folder.pictures(side)
        mine = self._mine(range(config.pictures))
        missing = files.missing(mine)
        if not missing:
            return
        pipeline = self._pipeline_of(side)
        pipeline.to(self.device)
        detector = self.measurer.detector.to(self.device) if config.guide and side == "after" else None
        with progress(len(mine), desc=side, unit="picture", enabled=self.state.is_main_process) as bar:
            bar.update(len(mine) - len(missing))
            try:
                texts = [self.plan.prompt(index).text for index in missing]
                options = {"treated": side == "after"}
                for count in pipelines.draw_into(files, pipeline, detector, config, missing, texts, **options):
                    bar.update(count)
            except UserError:
                self.folder.discard_if_empty()
                raise

    def _share_out(self) -> None:
        """Let an engine draw what is missing, side by side."""
        config, size = self.config, UNIT_BATCHES * self.config.batch_size
        texts = [prompt.text for prompt in self.plan.prompts]
        for side in SIDES:
            files = self.folder.pictures(side)
            units = Plan.of_ranges(config.pictures, size)
            plan = Plan([unit for unit in units if files.missing(range(unit.first, unit.first + unit.count))])
            spec = pipelines.DrawWorkerSpec(config, side, str(files.folder.absolute()), pipelines.prompts_digest(texts))
            try:
                share_out(plan, spec, self._scratch(side), config.engine, desc=side)
            except UserError:
                self.folder.discard_if_empty()
                raise

    def _scratch(self, side: str) -> Path:
        return self.folder.path / f".{side}-engine"

    def _pipeline_of(self, side: str):
        """The pipeline of a side; "after" must come last, since it changes the loaded pipeline."""
        if side == "after" and self.config.treated:
            self.pipeline = None
            self.pipeline = open_pipeline("treated", self.config.treated, self.config, self.device)
        elif side == "after" and self.config.lora:
            load_lora(self.pipeline, self.config.lora)
        return self.pipeline

    def _generated_units(self) -> list[tuple[str, range]]:
        count = self.config.pictures
        ranges = [range(start, min(start + measuring.UNIT, count)) for start in range(0, count, measuring.UNIT)]
        return [(f"{indices.start:08d}-{indices.stop:08d}", indices) for indices in ranges]

    def _measure_generated(self, side: str) -> None:
        pictures, store = self.folder.pictures(side), self.folder.measures(side)
        todo = [(name, indices) for name, indices in self._mine(self._generated_units()) if not store.is_done(name)]
        total = sum(len(indices) for _, indices in todo)
        enabled = self.state.is_main_process and bool(todo)
        with progress(total, desc=f"measure {side}", unit="picture", enabled=enabled) as bar:
            for name, indices in todo:
                measured = []
                for start in range(0, len(indices), self.config.batch_size):
                    chosen = indices[start : start + self.config.batch_size]
                    prompts = [self.plan.prompt(index).text for index in chosen]
                    labels = self.plan.class_indices and torch.tensor([self.plan.class_index(i) for i in chosen])
                    measured.append(self.measurer.measure(pictures.load(chosen), prompts, labels))
                    bar.update(len(chosen))
                store.save(name, measuring.joined(measured))

    def _measure_real(self, size: tuple[int, int]) -> None:
        damages = bool(self.real) and not self.damaged
        jobs = [("real", number, unit) for number, unit in enumerate(self.real)]
        jobs += [("damaged", number, unit) for number, unit in enumerate(self.damaged)]
        todo = [job for job in self._mine(jobs) if not self._is_measured(job[0], job[2].name)]
        enabled = self.state.is_main_process and bool(todo)
        with progress(None, desc="measure real", unit="picture", enabled=enabled) as bar:
            for side, number, unit in todo:
                measured, measured_damaged = [], []
                start, skipped = 0, SkipCounts()
                options = {"damaged": side == "damaged", "strict": self.config.strict}
                pictures = measuring.read_unit(unit, size, skipped, **options)
                for batch in _in_batches(pictures, self.config.batch_size):
                    measured.append(self.measurer.measure(as_batch(batch)))
                    damaged = measuring.damage_pictures(batch, self.config.seed, number, start) if damages else []
                    if damaged:
                        measured_damaged.append(self.measurer.measure(as_batch(damaged)))
                    start += len(batch)
                    bar.update(len(batch))
                if damages:
                    self.folder.measures("damaged").save(unit.name, measuring.joined(measured_damaged))
                if skipped.total:
                    print(f"--{side}: left out: {skipped.sentence()}", file=sys.stderr)
                # Last: its presence says that the unit is done.
                self.folder.measures(side).save(unit.name, measuring.joined(measured), skipped.reasons)

    def _is_measured(self, side: str, unit: str) -> bool:
        """Whether a unit of real pictures is done, and so is what was made of it."""
        sides = ("real", "damaged") if side == "real" and not self.damaged else (side,)
        return all(self.folder.measures(name).is_done(unit) for name in sides)

    def _finish(self) -> dict:
        names = [name for name, _ in self._generated_units()]
        before, after = (self.folder.measures(side).load(names) for side in SIDES)
        real, damaged = (self.folder.measures(side).load_all() for side in ("real", "damaged"))
        skipped: collections.Counter[str] = collections.Counter(self.not_read.reasons)
        for side in ("real", "damaged"):
            skipped.update(self.folder.measures(side).skipped())
        if self.real and real is None:
            left_out = f" (left out: {skipped_in_words(skipped, {})})" if skipped else ""
            raise UserError(expected("--real", "clean pictures that can be read", f"none{left_out}"))
        no_fid = self._too_few_for_fid(None if real is None else len(real.judge))
        if no_fid:
            print(f"notice: {no_fid}", file=sys.stderr)
        count = self.config.pictures
        class_ids = self.plan.class_ids(count)
        options = {"fid": not no_fid, "seed": self.config.seed}
        metrics = summarise(before, after, class_ids, real=real, damaged=damaged, **options)
        if no_fid:
            metrics["no_fid"] = no_fid
        categories = [self.plan.prompt(index).category for index in range(count)]
        if any(categories):
            metrics["per_category"] = summarise_groups(before, after, categories)
        features = self.measurer.features
        metrics["features"] = {"name": getattr(features, "name", "none"), "note": getattr(features, "note", "")}
        metrics["real_pictures"] = 0 if real is None else len(real.judge)
        metrics["sampling"] = {**call_options(self.config), "scheduler": self.config.scheduler}
        metrics |= {"skipped": dict(sorted(skipped.items())), "versions": versions()}
        metrics = nan_to_none(metrics)
        metrics["doubts"] = doubts(metrics)
        questioner = self.measurer.questioner
        asked = None if questioner is None else questioner.asked
        drawn = (self.config.seed, before, after, self.config.picture_type)
        write_table(self.folder.path, self.plan.prompt, *drawn, asked)
        write_report(self.config, self.folder, self.measurer.judge, self.plan.prompt, metrics, before, after)
        # Last: its presence says that the evaluation is complete.
        atomic_write_json(self.folder.path / METRICS, metrics)
        print_measures(metrics, self.folder.path)
        return metrics


def _networks(config: EvaluateModelConfig, prompts: list[str]) -> measuring.Measurer:
    detector, judge = open_detector(config.detector), open_detector(config.judge)
    for name, network in (("--detector", detector), ("--judge", judge)):
        # The pictures are drawn before the first map is made of one.
        check_detector(network, name=name)
    if same_weights(judge, detector):
        what = "a detector that had no part in the treatment"
        raise UserError(expected("--judge", what, "the detector's own weights"))
    monitor = (read_settings(Path(config.treatment)) or {}).get("monitor") if config.treatment else None
    if monitor and same_weights(judge, open_detector(monitor)):
        what = "a detector that had no part in the treatment"
        raise UserError(expected("--judge", what, "the weights of the treatment's monitor"))
    clip = Clip(config.clip) if config.clip else None
    features = load_features(config.features, clip)
    if features is not None and features.note and config.features == "auto":
        print(f"notice: {features.note}", file=sys.stderr)
    classifier = Classifier(config.classifier) if config.classifier else None
    preference = Preference(config.preference, config.preference_processor) if config.preference else None
    questioner, most = None, 0
    if config.vqa:
        questioner = Questioner(config.vqa, read_questions(config.questions, prompts) if config.questions else {})
        most = max(len(questioner.asked(prompt)) for prompt in prompts)
    networks = (judge, detector, features, clip, preference, classifier, config.frames_per_call)
    return measuring.Measurer(*networks, questioner, most)


def _class_indices(classifier: Classifier | None, prompts: list[Prompt]) -> list[int] | None:
    if classifier is None:
        return None
    if not all(prompt.label for prompt in prompts):
        what = "a `label` with every prompt, in a .jsonl or .parquet file"
        raise UserError(expected("--classifier", what, "prompts without"))
    return [classifier.class_index(prompt.label) for prompt in prompts]


def _in_batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
