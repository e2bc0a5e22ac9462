"""`diffdoctor evaluate model`: draw before and after, measure both, report; several processes, resumable."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffdoctor.data.pictures import as_batch
from diffdoctor.data.prompts import Prompt, read_prompt_file
from diffdoctor.data.sources import finite
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.models.load import open_detector
from diffdoctor.evaluate.model import draw as pipelines
from diffdoctor.evaluate.model import measure as measuring
from diffdoctor.evaluate.model.config import EvaluateModelConfig, completed, read_settings
from diffdoctor.evaluate.model.networks import Classifier, Clip, load_features
from diffdoctor.evaluate.model.store import EvaluationFolder
from diffdoctor.evaluate.model.summary import summarise, summarise_groups
from diffdoctor.runs.errors import UserError, missing_extra
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.progress import progress, quiet_loaders
from diffdoctor.runs.record import METRICS, versions
from diffdoctor.training.devices import open_device
from diffdoctor.training.weights import same_weights, weights_digest
from diffdoctor.treat.prompts import check_prompts

SIDES = ("before", "after")


def run_evaluate_model(config: EvaluateModelConfig) -> dict:
    """Run `diffdoctor evaluate model`; returns what metrics.json holds.

    Raises:
        UserError: what is missing, does not fit or cannot be read, in one line, before anything is written.
    """
    return Evaluation(completed(config)).run()


@dataclass
class Drawn:
    """What each drawn picture was asked for: prompt, and the classifier's logit for it; by the picture's number."""

    prompts: list[Prompt]
    places: list[int] | None

    def prompt(self, number: int) -> Prompt:
        return self.prompts[number % len(self.prompts)]

    def place(self, number: int) -> int:
        return self.places[number % len(self.prompts)]

    def classes(self, count: int) -> torch.Tensor:
        """(N,) integers: the class of each picture, its label where all have one, else its prompt."""
        labelled = all(prompt.label for prompt in self.prompts)
        names = [prompt.label if labelled else prompt.text for prompt in self.prompts]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[names[number % len(names)]] for number in range(count)])


class Evaluation:
    """One evaluation. Everything that can be refused is refused while this is made; nothing is written until `run`.

    Args:
        config: from `completed`.
    """

    def __init__(self, config: EvaluateModelConfig):
        try:
            from accelerate import PartialState
        except ImportError:
            raise missing_extra("accelerate", "stages") from None
        quiet_loaders()
        self.config = config
        prompts = read_prompt_file(config.prompts)
        self.measurer = _networks(config)
        self.drawn = Drawn(prompts, _places(self.measurer.classifier, prompts))
        self.real = measuring.real_units(config.real) if config.real else []
        self.damaged = measuring.real_units(config.damaged) if config.damaged else []
        self._refuse_too_few(measuring.count_real(self.real), "real pictures")
        identity = pipelines.picture_identity(
            config, [prompt.text for prompt in prompts], weights_digest(self.measurer.detector)
        )
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        main = self.state.is_main_process
        self.folder = EvaluationFolder(Path(config.output), identity, config.picture_type, main=main)
        self.folder.check(overwrite=config.overwrite)
        self.pipeline = self._checked_pipeline()
        self.device = open_device(config.device, self.state.device)
        self.skipped = SkipCounts()

    def _refuse_too_few(self, count: int | None, what: str) -> None:
        """FID needs full covariances on both sides."""
        if not self.real or self.measurer.features is None or count is None:
            return
        size = self.measurer.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]
        for number, name in ((count, what), (self.config.pictures, "drawn pictures")):
            if number <= size:
                raise UserError(
                    f"--real: a distance of {size} features ({self.measurer.features.name}) needs more than {size} "
                    f"{name}, got {number}: give more, --features with fewer (pixels has 192), or no --real"
                )

    def _checked_pipeline(self):
        """The untreated pipeline; that it can be treated as asked was tried."""
        config = self.config
        if config.treated:
            # Loaded again when it is its turn: two pipelines at a time may not fit.
            pipelines.open_pipeline("treated", config.treated, config)
        pipeline = pipelines.open_pipeline("pipeline", config.pipeline, config)
        texts = [prompt.text for prompt in self.drawn.prompts]
        check_prompts(pipeline, texts, max_sequence_length=config.max_sequence_length or None)
        if config.lora:
            pipelines.add_lora(pipeline, config.lora)
            pipelines.remove_lora(pipeline)
        with pipelines.guided(pipeline, self.measurer.detector, config):
            return pipeline

    def run(self) -> dict:
        """Draw, measure, report."""
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
        for side in SIDES:
            self._draw(side)
        self.pipeline = None
        self.state.wait_for_everyone()
        self.measurer.to(self.device)
        for side in SIDES:
            self._measure_drawn(side)
        size = tuple(self.folder.pictures("before").load([0]).shape[2:])
        self._measure_real(size)
        self.state.wait_for_everyone()
        metrics: dict = {}
        if main:
            metrics = self._finish()
        self.state.wait_for_everyone()
        return metrics

    def _measure_identity(self) -> dict:
        """All that the measures depend on beside the pictures, by name."""
        config, files = self.config, {}
        for name, units in (("real", self.real), ("damaged", self.damaged)):
            files[name] = [[str(s.path), pipelines.stamp(str(s.path))] for unit in units for s in unit.sources]
        return {
            "judge": weights_digest(self.measurer.judge),
            "detector": weights_digest(self.measurer.detector),
            "features": [getattr(self.measurer.features, "name", ""), pipelines.stamp(config.features)],
            "clip": [config.clip, pipelines.stamp(config.clip)],
            "classifier": [config.classifier, pipelines.stamp(config.classifier), self.drawn.places],
            "seed": config.seed,
            **files,
        }

    def _mine(self, items: Sequence) -> list:
        """This process's part; fixed, so that what another one has done meanwhile does not change it."""
        return list(items[self.state.process_index :: self.state.num_processes])

    def _draw(self, side: str) -> None:
        config, files = self.config, self.folder.pictures(side)
        mine = self._mine(range(config.pictures))
        missing = files.missing(mine)
        if not missing:
            return
        pipeline = self._pipeline_of(side)
        pipeline.to(self.device)
        detector = self.measurer.detector.to(self.device) if config.guide and side == "after" else None
        options = replace(config, guide=detector is not None)
        prompts = [self.drawn.prompt(number).text for number in missing]
        seeds = [config.seed + number for number in missing]
        numbers = iter(missing)
        batches = pipelines.draw_pictures(
            pipeline, prompts, seeds, batch_size=config.batch_size, **pipelines.call_options(config)
        )
        with (
            pipelines.guided(pipeline, detector, options),
            progress(len(mine), desc=side, unit="picture", enabled=self.state.is_main_process) as bar,
        ):
            bar.update(len(mine) - len(missing))
            try:
                for batch in batches:
                    for number, picture in zip(itertools.islice(numbers, len(batch)), batch, strict=True):
                        files.save(number, picture)
                    bar.update(len(batch))
            except torch.OutOfMemoryError as error:
                raise UserError(f"out of memory: give a smaller --batch_size than {config.batch_size}") from error
            except ValueError as error:
                # What the pipeline itself refuses: a size that it cannot draw, most often.
                self.folder.discard_if_empty()
                raise error if isinstance(error, UserError) else UserError(str(error)) from error

    def _pipeline_of(self, side: str):
        """The pipeline of a side; "after" comes last, and what it does to the loaded one stays."""
        if side == "after" and self.config.treated:
            self.pipeline = None
            self.pipeline = pipelines.open_pipeline("treated", self.config.treated, self.config)
        elif side == "after" and self.config.lora:
            pipelines.add_lora(self.pipeline, self.config.lora)
        return self.pipeline

    def _drawn_units(self) -> list[tuple[str, range]]:
        count = self.config.pictures
        ranges = [range(start, min(start + measuring.UNIT, count)) for start in range(0, count, measuring.UNIT)]
        return [(f"{numbers.start:08d}-{numbers.stop:08d}", numbers) for numbers in ranges]

    def _measure_drawn(self, side: str) -> None:
        pictures, store = self.folder.pictures(side), self.folder.measures(side)
        todo = [(name, numbers) for name, numbers in self._mine(self._drawn_units()) if not store.is_done(name)]
        total = sum(len(numbers) for _, numbers in todo)
        enabled = self.state.is_main_process and bool(todo)
        with progress(total, desc=f"measure {side}", unit="picture", enabled=enabled) as bar:
            for name, numbers in todo:
                parts = []
                for start in range(0, len(numbers), self.config.batch_size):
                    part = numbers[start : start + self.config.batch_size]
                    prompts = [self.drawn.prompt(number).text for number in part]
                    places = self.drawn.places and torch.tensor([self.drawn.place(number) for number in part])
                    parts.append(self.measurer.measure(pictures.load(part), prompts, places))
                    bar.update(len(part))
                store.save(name, measuring.joined(parts))

    def _measure_real(self, size: tuple[int, int]) -> None:
        spoils = bool(self.real) and not self.damaged
        jobs = [("real", place, unit) for place, unit in enumerate(self.real)]
        jobs += [("damaged", place, unit) for place, unit in enumerate(self.damaged)]
        todo = [job for job in self._mine(jobs) if not self.folder.measures(job[0]).is_done(job[2].name)]
        enabled = self.state.is_main_process and bool(todo)
        with progress(None, desc="measure real", unit="picture", enabled=enabled) as bar:
            for side, place, unit in todo:
                of_unit, of_spoilt = [], []
                start = 0
                for batch in _in_batches(
                    measuring.read_unit(unit, size, self.skipped, damaged=side == "damaged"), self.config.batch_size
                ):
                    of_unit.append(self.measurer.measure(as_batch(batch)))
                    spoilt = measuring.spoil(batch, self.config.seed, place, start) if spoils else []
                    if spoilt:
                        of_spoilt.append(self.measurer.measure(as_batch(spoilt)))
                    start += len(batch)
                    bar.update(len(batch))
                # The unit that says "done" comes last.
                if of_spoilt:
                    self.folder.measures("damaged").save(unit.name, measuring.joined(of_spoilt))
                self.folder.measures(side).save(unit.name, measuring.joined(of_unit))

    def _finish(self) -> dict:
        from diffdoctor.evaluate.model.report import print_summary, write_report

        names = [name for name, _ in self._drawn_units()]
        before, after = (self.folder.measures(side).load(names) for side in SIDES)
        real, damaged = (self.folder.measures(side).load_all() for side in ("real", "damaged"))
        self._refuse_too_few(None if real is None else len(real.judge), "real pictures")
        count = self.config.pictures
        metrics = summarise(before, after, self.drawn.classes(count), real=real, damaged=damaged, seed=self.config.seed)
        categories = [self.drawn.prompt(number).category for number in range(count)]
        if any(categories):
            metrics["per_category"] = summarise_groups(before, after, categories)
        features = self.measurer.features
        metrics["features"] = {"name": getattr(features, "name", "none"), "note": getattr(features, "note", "")}
        metrics["real_pictures"] = 0 if real is None else len(real.judge)
        metrics["sampling"] = {**pipelines.call_options(self.config), "scheduler": self.config.scheduler}
        metrics |= {"skipped": self.skipped.reasons, "versions": versions()}
        metrics = finite(metrics)
        write_report(self, metrics, before, after)
        # Last: its presence says that the evaluation is complete.
        atomic_write_json(self.folder.path / METRICS, metrics)
        print_summary(metrics, self.folder.path)
        return metrics


def _networks(config: EvaluateModelConfig) -> measuring.Measurer:
    detector, judge = open_detector(config.detector), open_detector(config.judge)
    if same_weights(judge, detector):
        raise UserError("--judge: has the detector's weights; a judge is a detector that had no part in the treatment")
    monitor = (read_settings(Path(config.treatment)) or {}).get("monitor") if config.treatment else None
    if monitor and same_weights(judge, open_detector(monitor)):
        raise UserError("--judge: has the weights of the monitor that watched the treatment; give an independent one")
    clip = Clip(config.clip) if config.clip else None
    features = load_features(config.features, clip)
    if features is not None and features.note and config.features == "auto":
        print(f"notice: {features.note}", file=sys.stderr)
    classifier = Classifier(config.classifier) if config.classifier else None
    return measuring.Measurer(judge, detector, features, clip, classifier)


def _places(classifier: Classifier | None, prompts: list[Prompt]) -> list[int] | None:
    if classifier is None:
        return None
    if not all(prompt.label for prompt in prompts):
        raise UserError("--classifier: needs a `label` with every prompt, in a .jsonl or .parquet file")
    return [classifier.place(prompt.label) for prompt in prompts]


def _in_batches(items, size: int):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
