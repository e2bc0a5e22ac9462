"""The road: draw, label, train a detector, treat or guide, and let the oracle say what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.signs import calibration, pipelines, rater, world
from benchmarks.studies.signs.measures import letters_auroc, repair_figures
from benchmarks.studies.signs.oracle import Reading, read_signs
from benchmarks.studies.signs.parts import Parts, cpu_seconds, record_of
from benchmarks.studies.signs.recipes import RECIPES, Recipe

SEEDS = {
    "labels": 0,
    "second round": 1_000_000,
    "development": 2_000_000,
    "test": 3_000_000,
    "held out": 4_000_000,
    "pool": 5_000_000,
}
"""The first seed of what is drawn for each purpose; no two purposes share a picture."""
OBSERVER = "observer"
"""A second detector, of other labels and another seed, that steers nothing."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the study's figures.

    Args:
        seed: of everything.
        pictures: drawn for each row.
        split: whose seeds those are: "development", by which options may be chosen, or "test".
        labels: pictures that the simulated rater marks for the detector.
        further_labels: of the treated model, for a second round.
        held_out: labelled exactly, by which detectors are measured.
        calibration: clean signs by which the oracle is tried; a third as many are broken in each way.
        clean_signs: to which the detector's injected damage is added.
        label_share: of the labelled pictures in the detector's batches.
        detector_steps: of 32 pictures.
        base: changes of `BaseSettings`.
        treat: changes of every treatment's options, for short runs.
    """

    seed: int = 0
    pictures: int = 2000
    split: str = "development"
    labels: int = 400
    further_labels: int = 100
    held_out: int = 500
    calibration: int = 1000
    clean_signs: int = 3000
    label_share: float = 0.5
    detector_steps: int = 400
    base: dict = dataclasses.field(default_factory=dict)
    treat: dict = dataclasses.field(default_factory=dict)


class Study:
    """The parts of one seed, each made when it is asked for and stored.

    Args:
        output: the study's folder.
        settings: of the study; parts of other settings may stand beside each other.
        recipes: by name; those of `recipes.RECIPES`, or others.
    """

    def __init__(self, output: str | Path, settings: Settings, recipes: dict[str, Recipe] = RECIPES):
        self.output, self.settings, self.recipes = Path(output), settings, recipes
        self.parts = Parts(self.output / "parts")
        self.base_settings = pipelines.BaseSettings(**{"seed": settings.seed, **settings.base})
        self.rater = rater.Rater()

    def base(self, kind: str) -> Path:
        """The folder of the untreated pipeline."""
        return pipelines.base_pipeline(self.parts, self.base_settings, kind)

    def calibration(self) -> dict:
        """Whether the oracle can be trusted: see `calibration`; clean signs as drawn, and after the autoencoder."""
        vae = pipelines.autoencoder(self.parts, self.base_settings)
        count, seed = self.settings.calibration, 900 + self.settings.seed

        def make(folder):
            clean = world.draw_signs(count, seed)
            truth = (clean.words, clean.colours)
            back = calibration.round_trip(pipelines.untrained(self.base_settings, vae), clean.pictures)
            return {
                "clean": calibration.false_alarms(clean.pictures, *truth),
                "autoencoder": calibration.false_alarms(back, *truth),
                "misses": calibration.misses(max(1, count // 3)),
            }

        needs = {"autoencoder": vae.parent.name, "count": count, "seed": seed}
        return record_of(self.parts.made("calibration", needs, make))

    # labels and detectors

    def labels(self, kind: str, after: str | None = None, *, observer: bool = False) -> Path:
        """The folder of shards with the rater's marks of what a pipeline draws, untreated or by the recipe `after`."""
        settings = self.settings
        purpose = "labels" if after is None else "second round"
        count = settings.labels if after is None else settings.further_labels
        first = SEEDS[purpose] + self._offset + (count if observer else 0)
        seed = settings.seed + (100 if observer else 0)
        needs = {"model": self._model_name(kind, after), "count": count, "first": first, "seed": seed}
        needs |= {"rater": dataclasses.asdict(self.rater)}

        def make(folder):
            from diffdoctor.detector import write_shards

            drawn = pipelines.draw(self._pipeline(kind, after), kind, count, first, f"{kind} labels")
            masks, seconds = self.rater.marks(read_signs(drawn), seed)
            pictures = drawn.permute(0, 2, 3, 1).numpy()
            options = {"key": f"{kind}{seed}", "round": int(after is not None), "generator": kind}
            write_shards(rater.samples(pictures, masks, pipelines.prompts_of(count), **options), folder / "shards")
            return {"rater_seconds": seconds, "marked": float(masks.any((1, 2)).mean())}

        return self.parts.made(f"{kind}-labels", needs, make)

    def clean_shards(self) -> Path:
        """The folder of shards with clean signs, into which the detector's training injects damage."""
        count, seed = self.settings.clean_signs, 500 + self.settings.seed

        def make(folder):
            from diffdoctor.detector import write_shards

            write_shards(rater.clean_samples(world.draw_signs(count, seed)), folder / "shards")

        return self.parts.made("clean", {"count": count, "seed": seed}, make)

    def detector(self, kind: str, after: str | None = None, *, observer: bool = False) -> Path:
        """The folder of a detector trained on the rater's labels and on injected damage.

        Args:
            kind: of the pipeline that it is for.
            after: a recipe: the labels of what that draws are added.
            observer: the one that steers nothing.
        """
        settings = self.settings
        sets = [self.labels(kind, observer=observer), *([] if after is None else [self.labels(kind, after)])]
        clean, seed = self.clean_shards(), settings.seed + (100 if observer else 0)
        needs = {"sets": [path.name for path in (*sets, clean)], "share": settings.label_share}
        needs |= {"steps": settings.detector_steps, "seed": seed}

        def make(folder):
            from diffdoctor.detector import (
                AugmentConfig,
                ConvDetector,
                DetectorTrainingConfig,
                JoinedData,
                ShardData,
                train_detector,
            )

            labelled = JoinedData([ShardData(path / "shards") for path in sets])
            share = settings.label_share
            data = JoinedData([labelled, ShardData(clean / "shards")], shares=(share, 1 - share))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = ConvDetector((16, 32, 64))
            config = DetectorTrainingConfig(
                steps=settings.detector_steps, batch_size=32, mse=0.0, bce=1.0, seed=seed, augment=AugmentConfig()
            )
            result = train_detector(config, data, detector=network, name=f"{kind} detector")
            result.detector.save_pretrained(folder / "detector")

        name = f"{kind}-{OBSERVER}" if observer else f"{kind}-detector"
        return self.parts.made(name, needs, make)

    def detector_measures(self, kind: str, detector: Path) -> dict:
        """A detector against exact marks of other pictures of the untreated pipeline."""
        held_out = self._held_out(kind)

        def make(folder):
            from diffdoctor.detector.predict import diagnose_pictures
            from diffdoctor.evaluate.detector.measure import evaluate_maps
            from diffdoctor.runs.strict_json import nan_to_none

            pictures = _pictures(held_out)
            reading = read_signs(pictures)
            confidence = diagnose_pictures(_detector(detector), pictures)[:, 0].numpy()
            measured = evaluate_maps(confidence, reading.marked().astype(np.float32), bootstrap=0)
            letters = letters_auroc(confidence, reading)
            names = ("map50", "iou", "auroc", "false_positive_rate", "hit_rate")
            return nan_to_none({**{name: measured[name] for name in names}, "letters_auroc": letters})

        needs = {"detector": detector.name, "pictures": held_out.name}
        return record_of(self.parts.made(f"{kind}-detector-measures", needs, make))

    # treatments

    def treated(self, kind: str, name: str) -> Path | None:
        """The folder of a recipe's result: `lora` of a treatment, `pipeline` of one trained on; None: untreated."""
        recipe = self.recipes[name]
        if recipe.trained_on is not None:
            return self._trained_on(kind, recipe)
        if recipe.treat is None:
            return None
        base, detector = self.base(kind), self.detector(kind, recipe.after)
        before = None if recipe.after is None else self.treated(kind, recipe.after)
        options = self.treat_options(kind, recipe)
        needs = {"base": base.parent.name, "detector": detector.name, "options": options}
        needs |= {"after": None if before is None else before.name}

        def make(folder):
            from diffdoctor.treat import TreatConfig, treat

            clean = self.base_settings.clean()
            result = treat(
                pipelines.loaded(base), _detector(detector), world.PROMPTS, TreatConfig(**options),
                offline=(clean.pictures, clean.prompts), lora=None if before is None else before / "lora",
            )  # fmt: skip
            result.save_lora(folder / "lora")
            measured = [dataclasses.asdict(measurement) for measurement in result.measurements]
            found = {"history": result.history[:: max(1, len(result.history) // 50)], "measurements": measured}
            return found | {"best_step": result.best_step, "stopped": result.stopped}

        return self.parts.made(f"{kind}-treated", needs, make)

    def treat_options(self, kind: str, recipe: Recipe) -> dict:
        """The options of `TreatConfig` for a recipe: its defaults where nothing else is said."""
        options = pipelines.call_options(kind)
        options["sampling_steps"] = options.pop("num_inference_steps")
        options |= {"seed": self.settings.seed, "checkpoint_every": 0, "log_with": "none", "sample_pictures": 0}
        options |= (recipe.treat or {}) | self.settings.treat
        if recipe.after is not None:
            # of the LoRA that is tuned on
            options.pop("rank", None)
        return {"evaluate_every": max(1, options["steps"] // 4), **options}

    def _trained_on(self, kind, recipe) -> Path:
        base = self.base(kind)
        budget = record_of(self.treated(kind, recipe.trained_on))["cpu_seconds"]
        steps = max(1, round(budget / pipelines.step_seconds(base)))
        needs = {"base": base.parent.name, "steps": steps, "rate": recipe.rate, "seed": self.settings.seed}

        def make(folder):
            pipeline = pipelines.loaded(base)
            options = {"learning_rate": recipe.rate, "seed": 50_000 + self.settings.seed}
            training = pipelines.train_on(pipeline, kind, self.base_settings.clean(), steps, **options)
            pipeline.save_pretrained(folder / "pipeline")
            return training

        return self.parts.made(f"{kind}-trained-on", needs, make)

    def effort(self, kind: str, name: str) -> float:
        """CPU seconds of a recipe's treatments, without drawing and detectors."""
        recipe, seconds = self.recipes[name], 0.0
        path = self.treated(kind, name)
        if path is not None:
            seconds += record_of(path)["cpu_seconds"]
        return seconds + (0.0 if recipe.after is None else self.effort(kind, recipe.after))

    # pictures

    def pool(self, kind: str, count: int) -> torch.Tensor:
        """Further pictures of the untreated pipeline, for people to choose from: (count, 3, 16, 40) uint8."""
        return _pictures(self._drawn(kind, "before", count, SEEDS["pool"] + self._offset))

    def held_out(self, kind: str) -> torch.Tensor:
        """Those by which detectors are measured: (N, 3, 16, 40) uint8."""
        return _pictures(self._held_out(kind))

    def _held_out(self, kind) -> Path:
        return self._drawn(kind, "before", self.settings.held_out, SEEDS["held out"] + self._offset)

    def drawn(self, kind: str, name: str) -> Path:
        """The folder of a row's pictures, for the study's seeds."""
        return self._drawn(kind, name, self.settings.pictures, SEEDS[self.settings.split] + self._offset)

    def _drawn(self, kind, name, count, first, *, repaired: bool = True) -> Path:
        recipe = self.recipes[name]
        if repaired and recipe.repair is not None:
            return self._repaired(kind, name, self._drawn(kind, name, count, first, repaired=False))
        needs = {"model": self._model_name(kind, name), "count": count, "first": first}
        # absent where they are not given, so that what was drawn before there were such options is found again
        options = {"steps": recipe.steps, "autoguide": recipe.autoguide}
        needs |= {name: value for name, value in options.items() if value is not None}
        detector = None
        if recipe.guide is not None:
            detector = self.detector(kind, recipe.after)
            needs |= {"guide": recipe.guide, "detector": detector.name}

        def make(folder):
            from safetensors.torch import save_file

            from diffdoctor import autoguide, guide

            pipeline, found = self._pipeline(kind, name), {}
            with cpu_seconds() as cost, contextlib.ExitStack() as contexts:
                if recipe.autoguide is not None:
                    contexts.enter_context(autoguide(pipeline, **recipe.autoguide))
                if recipe.guide is not None:
                    options = {"height": world.HEIGHT, "width": world.WIDTH, "seed": self.settings.seed}
                    options |= recipe.guide
                    if "clean" in options:
                        options["clean"] = self.base_settings.clean().pictures[: options["clean"]]
                    log = contexts.enter_context(guide(pipeline, _detector(detector), **options))
                    # of which the first grows while pictures are drawn
                    found = {"rewound": log.rewound, "rewind_confidence": log.rewind_confidence}
                pictures = pipelines.draw(pipeline, kind, count, first, f"{kind} {name}", steps=recipe.steps)
            save_file({"pictures": pictures}, folder / "pictures.safetensors")
            return {"drawing_cpu_seconds": cost["cpu_seconds"], **found}

        return self.parts.made(f"{kind}-pictures", needs, make)

    def _repaired(self, kind, name, drawn: Path) -> Path:
        """The folder of a row's pictures after `repair`, steered by the detector, with the row's own pipeline."""
        recipe = self.recipes[name]
        detector, options = self.detector(kind, recipe.after), pipelines.call_options(kind)
        options["sampling_steps"] = options.pop("num_inference_steps")
        options |= {"seed": self.settings.seed, **recipe.repair}

        def make(folder):
            from safetensors.torch import save_file

            from diffdoctor.repairs import RepairOptions, repair

            pictures = _pictures(drawn)
            arrays, prompts = list(pictures.permute(0, 2, 3, 1).numpy()), pipelines.prompts_of(len(pictures))
            pipeline = self._pipeline(kind, name)
            with cpu_seconds() as cost:
                done = repair(arrays, pipeline, _detector(detector), RepairOptions(**options), prompts=prompts)
            after = torch.from_numpy(np.stack([each.pixels for each in done])).permute(0, 3, 1, 2).contiguous()
            save_file({"pictures": after}, folder / "pictures.safetensors")
            seconds = record_of(drawn)["drawing_cpu_seconds"] + cost["cpu_seconds"]
            return {"drawing_cpu_seconds": seconds, "repair": repair_figures(done, arrays)}

        needs = {"pictures": drawn.name, "model": self._model_name(kind, name), "detector": detector.name}
        return self.parts.made(f"{kind}-repaired", needs | {"options": options}, make)

    def pictures(self, kind: str, name: str) -> torch.Tensor:
        """A row's pictures: (N, 3, 16, 40) uint8."""
        return _pictures(self.drawn(kind, name))

    def reading(self, kind: str, name: str) -> Reading:
        """What the oracle reads in them."""
        return read_signs(self.pictures(kind, name))

    def flags(self, kind: str, name: str, *, observer: bool = False) -> np.ndarray:
        """(N,) bool: which of them the detector that steers, or the observer, flags."""
        from diffdoctor.detector.predict import diagnose_pictures
        from diffdoctor.measures.pixels import flagged_share, is_flagged

        detector, drawn = self.detector(kind, observer=observer), self.drawn(kind, name)

        def make(folder):
            confidence = diagnose_pictures(_detector(detector), _pictures(drawn))
            return {"flags": is_flagged(flagged_share(confidence)).flatten().tolist()}

        needs = {"detector": detector.name, "pictures": drawn.name}
        return np.array(record_of(self.parts.made(f"{kind}-flags", needs, make))["flags"])

    def repair(self, kind: str, name: str) -> dict | None:
        """What `repair` did to a row's pictures, see `measures.repair_figures`; None: nothing."""
        return record_of(self.drawn(kind, name)).get("repair")

    def drawing_seconds(self, kind: str, name: str) -> float:
        """CPU seconds that drawing a row's pictures took."""
        return record_of(self.drawn(kind, name))["drawing_cpu_seconds"]

    @property
    def _offset(self) -> int:
        return 10_000_000 * self.settings.seed

    def _model_name(self, kind, name) -> str:
        treated = None if name is None else self.treated(kind, name)
        return self.base(kind).parent.name if treated is None else treated.name

    def _pipeline(self, kind, name):
        treated = None if name is None else self.treated(kind, name)
        if treated is not None and (treated / "pipeline").is_dir():
            return pipelines.loaded(treated / "pipeline")
        pipeline = pipelines.loaded(self.base(kind))
        if treated is not None:
            pipeline.load_lora_weights(treated / "lora")
        return pipeline


def _detector(folder: Path):
    from diffdoctor.detector import load_detector

    return load_detector(folder / "detector").eval()


def _pictures(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "pictures.safetensors")["pictures"]
