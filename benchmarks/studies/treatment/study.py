"""The parts of the study: what all methods share, two pipelines, and each method on each pipeline."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.treatment.memory import PeakMemory
from diffdoctor.demo import data as demo_data
from diffdoctor.demo.config import DemoConfig
from diffdoctor.demo.run import EVALUATION_SEED, SAMPLING, Demo
from diffdoctor.demo.stages import Stages
from diffdoctor.evaluate.model import compare_pictures, sample_pictures
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.progress import progress
from diffdoctor.version import __version__

SHARED = "shared"
PIPELINES = ("sd", "flux", "cfg1", "cfg4")
# The U-Net trained on with dropped captions, drawn from at these guidance scales.
GUIDED = {"cfg1": 1.0, "cfg4": 4.0}
DROPPED_CAPTIONS = 0.15
METHODS = (
    "draft_k", "drtune", "leap", "draft_lv", "full", "nft", "weighted", "dpo", "guide",
    "nft-alone", "nft-uniform", "nft-shuffled", "nft-long", "grpo-alone",
)  # fmt: skip
# What stands behind a hyphen: without offline pairs, and the detector a function of pictures that has no gradient.
ALONE: dict[str, dict] = {"alone": {}, "uniform": {"map_source": "uniform"}, "shuffled": {"map_source": "shuffled"}}
ALONE["long"] = {"steps": 500}
# Where it is not TreatConfig's default. Methods without a gradient through the detector overshoot at the transformer's
# rate; a step of the denoising loss alone costs a third of one that samples.
BY_PIPELINE: dict[str, dict] = {"flux": {"learning_rate": 2e-3}}
BY_METHOD: dict[str, dict] = {"weighted": {"steps": 200}}
# Of one method on one pipeline, as on the signs: at the default rate it needs longer.
BY_BOTH: dict[str, dict] = {"flux/nft": {"learning_rate": 1e-3, "ema_decay": 0.9}}
# Pictures at a time while sampling; small, so that memory says something of the method.
BATCH = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the study's figures.

    Args:
        seed: of the damage, all trainings and the fresh noise of `guide`.
        pictures: how many each pipeline draws for the measures.
        flow_steps: training steps of the second pipeline (batch 64).
        guided_steps: training steps with dropped captions (batch 64), from the first pipeline on.
        demo: changes of `DemoConfig`; its own lengths when empty.
        treat: changes of every `TreatConfig`, for tests.
        guide: changes of `guide`'s options, for tests.
        dpo: changes of `region_dpo.train`'s options, for tests.
    """

    seed: int = 0
    pictures: int = 2000
    flow_steps: int = 1500
    guided_steps: int = 400
    demo: dict = dataclasses.field(default_factory=dict)
    treat: dict = dataclasses.field(default_factory=dict)
    guide: dict = dataclasses.field(default_factory=dict)
    dpo: dict = dataclasses.field(default_factory=dict)


class Study:
    """The parts, each stored when it is done.

    Args:
        output: the study's folder.
        settings: a folder with other settings is refused, unless `overwrite`.
        demo: folder of a `diffdoctor demo` with the same seed, whose data, detector, judge, classifier and pipeline
            serve here; what it lacks is made there. None: `output`/demo.
        overwrite: start again where the folder holds another study.
        alone: see `Stages`.
    """

    def __init__(self, output, settings: Settings, *, demo=None, overwrite: bool = False, alone: bool = True):
        self.output, self.settings = Path(output), settings
        stored = {"diffdoctor": __version__, **dataclasses.asdict(settings)}
        stored |= {"by_pipeline": BY_PIPELINE, "by_method": BY_METHOD, "by_both": BY_BOTH}
        self.stages = Stages(output, stored, kind="treatment study", overwrite=overwrite, alone=alone)
        folder = Path(demo) if demo else self.output / "demo"
        config = DemoConfig(output=str(folder), seed=settings.seed, overwrite=overwrite, **settings.demo)
        self.demo = Demo(config, alone=alone)

    def done(self, part: str) -> bool:
        """Whether a part, "shared" or "<pipeline>/<pipeline, before or method>", is finished."""
        kind, _, name = part.partition("/")
        if part == SHARED:
            return all(self.demo.stages.done(stage) for stage in ("data", "classifier", "detector", "judge"))
        if name == "pipeline":
            own = self.stages.done("guided-pipeline" if kind in GUIDED else f"{kind}-pipeline")
            return self.demo.stages.done("pipeline") if kind == "sd" else own
        return self.stages.done(f"{kind}-{name}")

    def run(self, part: str) -> None:
        """Make a part, and what it needs, unless it is done."""
        kind, _, name = part.partition("/")
        if part == SHARED:
            self.prepare()
        elif name == "pipeline":
            self.pipeline(kind)
        elif name == "before":
            self.before(kind)
        else:
            self.method(kind, name)

    def prepare(self) -> None:
        """Data, classifier, detector and judge."""
        data = self.demo.data()
        self.demo.classifier(data)
        self.detector(data)
        self.judge(data)

    def detector(self, data):
        """The detector that steers every method."""
        config = demo_data.detector_training_config(self.settings.seed, steps=self.demo.config.detector_steps)
        return self.demo.trained("detector", demo_data.train_demo_detector, data, config)[0]

    def judge(self, data):
        """The detector that only measures."""
        config = demo_data.judge_training_config(self.settings.seed, steps=self.demo.config.judge_steps)
        return self.demo.trained("judge", demo_data.train_demo_judge, data, config)[0]

    def pipeline(self, kind: str) -> Path:
        """The folder of an untreated pipeline, of `PIPELINES`."""
        data = self.demo.data()
        if kind in GUIDED:
            return self._guided_pipeline(data)
        return self.demo.base(data) if kind == "sd" else self._flow_pipeline(data)

    def _guided_pipeline(self, data) -> Path:
        from diffusers import DiffusionPipeline

        from diffdoctor.demo.pipeline import train_base

        base = self.demo.base(data)

        def make(folder):
            known, rng = data.training, np.random.default_rng(self.settings.seed)
            dropped = rng.random(len(known.digits)) < DROPPED_CAPTIONS
            prompts = [
                "" if drop else demo_data.prompt_of(int(d)) for d, drop in zip(known.digits, dropped, strict=True)
            ]
            pipeline = DiffusionPipeline.from_pretrained(base)
            with progress(self.settings.guided_steps, desc="guided pipeline") as bar:
                trained = train_base(
                    pipeline, known.pictures, prompts, steps=self.settings.guided_steps, seed=self.settings.seed + 1,
                    on_step=lambda _, loss: (bar.set_postfix(loss=loss), bar.update()),
                )  # fmt: skip
            pipeline.save_pretrained(folder / "pipeline")
            atomic_write_json(folder / "losses.json", trained.losses)

        return self.stages.run("guided-pipeline", make) / "pipeline"

    def _flow_pipeline(self, data) -> Path:
        from diffusers import AutoencoderKL

        from diffdoctor.demo.flow_pipeline import build_flow_pipeline, train_flow

        autoencoder = self.demo.base(data) / "vae"

        def make(folder):
            known = data.training
            prompts = [demo_data.prompt_of(int(digit)) for digit in known.digits]
            vae = AutoencoderKL.from_pretrained(autoencoder)
            pipeline = build_flow_pipeline(prompts, vae, seed=self.settings.seed)
            with progress(self.settings.flow_steps, desc="flux pipeline") as bar:
                trained = train_flow(
                    pipeline, known.pictures, prompts, steps=self.settings.flow_steps, seed=self.settings.seed,
                    on_step=lambda _, loss: (bar.set_postfix(loss=loss), bar.update()),
                )  # fmt: skip
            pipeline.save_pretrained(folder / "pipeline")
            atomic_write_json(folder / "losses.json", trained.losses)

        return self.stages.run("flux-pipeline", make) / "pipeline"

    def before(self, kind: str) -> dict:
        """Draw with the untreated pipeline; {"seconds", "peak_mib"}."""

        def draw(pipeline, folder):
            return {}, *self._draw(pipeline, kind, f"{kind} before")

        return self._drawn(f"{kind}-before", kind, draw)

    def method(self, kind: str, method: str) -> dict:
        """Treat (or guide) and draw; {"seconds", "peak_mib", …}: of the treatment, for `guide` of the drawing."""

        def draw(pipeline, folder):
            if method == "guide":
                return self._guide(pipeline, kind)
            if method == "dpo":
                return self._dpo(pipeline, kind, folder)
            return self._treat(pipeline, kind, method, folder)

        return self._drawn(f"{kind}-{method}", kind, draw)

    def _drawn(self, name, kind, draw) -> dict:
        from diffusers import DiffusionPipeline
        from safetensors.torch import save_file

        base = self.pipeline(kind)

        def make(folder):
            record, pictures, cost = draw(DiffusionPipeline.from_pretrained(base), folder)
            save_file({"pictures": pictures}, folder / "pictures.safetensors")
            atomic_write_json(folder / "record.json", {**record, **cost})

        return json.loads((self.stages.run(name, make) / "record.json").read_text())

    def _draw(self, pipeline, kind, name):
        with PeakMemory() as memory:
            started = time.perf_counter()
            prompts = [demo_data.prompt_of(digit) for digit in self.labels.tolist()]
            seeds = range(EVALUATION_SEED, EVALUATION_SEED + len(prompts))
            pictures = sample_pictures(pipeline, prompts, seeds, batch_size=BATCH, desc=name, **call_options(kind))
            seconds = time.perf_counter() - started
        return pictures, {"seconds": seconds, "peak_mib": memory.mib}

    def _guide(self, pipeline, kind):
        from diffdoctor import guide

        detector = self.detector(self.demo.data())
        side = demo_data.SIDE
        options = {"height": side, "width": side, "seed": self.settings.seed, **self.settings.guide}
        with guide(pipeline, detector, **options) as log:
            pictures, cost = self._draw(pipeline, kind, f"{kind} guide")
        return {"rewound": log.rewound}, pictures, cost

    def _dpo(self, pipeline, kind, folder):
        from benchmarks.studies.treatment.region_dpo import train

        known, call = self.demo.data().training, call_options(kind)
        options = {
            "sampling_steps": call["num_inference_steps"],
            "max_sequence_length": call.get("max_sequence_length"),
        }
        with PeakMemory() as memory:
            record = train(pipeline, known, folder / "lora", seed=self.settings.seed, **options, **self.settings.dpo)
        pictures, _ = self._draw(pipeline, kind, f"{kind} dpo")
        return record, pictures, {"seconds": record["seconds"], "peak_mib": memory.mib}

    def _treat(self, pipeline, kind, method, folder):
        from diffdoctor.treat import TreatConfig, treat

        data = self.demo.data()
        detector, pairs = self.detector(data), data.training
        offline = (pairs.pictures, [demo_data.prompt_of(int(digit)) for digit in pairs.digits])
        if "-" in method:
            detector, offline = detector.confidence, None
        config = TreatConfig(**treat_options(kind, method, self.settings))
        with PeakMemory() as memory:
            result = treat(
                pipeline, detector, [demo_data.prompt_of(digit) for digit in range(10)], config, offline=offline
            )
        result.save_lora(folder / "lora")
        record = {
            "history": result.history,
            "measurements": [dataclasses.asdict(measurement) for measurement in result.measurements],
            "best_step": result.best_step,
            "stopped": result.stopped,
            "options": dataclasses.asdict(config),
        }
        pictures, _ = self._draw(pipeline, kind, f"{kind} {method}")
        return record, pictures, {"seconds": result.seconds, "peak_mib": memory.mib}

    @property
    def labels(self) -> torch.Tensor:
        """(N,) the digits that are asked for, each as often as any other."""
        return torch.arange(self.settings.pictures) % 10

    def measure(self, kind: str, method: str) -> dict:
        """What a method did to a pipeline: the figures of `compare_pictures`, and its record's cost."""
        data = self.demo.data()
        classifier = self.demo.classifier(data)
        clean, _ = demo_data.clean_digits()
        compared = compare_pictures(
            self._pictures(f"{kind}-before"), self._pictures(f"{kind}-{method}"), self.labels,
            detector=self.detector(data), judge=self.judge(data), features=classifier.features, classify=classifier,
            real=_as_tensor(clean), damaged=_as_tensor(data.pictures[data.damaged]), seed=self.settings.seed,
        ).metrics  # fmt: skip
        record, before = self.method(kind, method), self.before(kind)
        cost = {name: record[name] for name in ("seconds", "peak_mib")}
        return {"pipeline": kind, "method": method, **cost, "sampling_seconds": before["seconds"], **compared}

    def _pictures(self, stage) -> torch.Tensor:
        from safetensors.torch import load_file

        return load_file(self.stages.path(stage) / "pictures.safetensors")["pictures"]


def call_options(kind: str) -> dict:
    """How a pipeline is called: ten steps, its guidance scale; FLUX's classes know neither size nor prompt length."""
    if kind != "flux":
        return SAMPLING | {"guidance_scale": GUIDED.get(kind, SAMPLING["guidance_scale"])}
    from diffdoctor.demo.flow_pipeline import MAX_SEQUENCE_LENGTH

    size = {"height": demo_data.SIDE, "width": demo_data.SIDE}
    return {**SAMPLING, **size, "max_sequence_length": MAX_SEQUENCE_LENGTH}


def treat_options(kind: str, method: str, settings: Settings) -> dict:
    """The options of `TreatConfig` for a method on a pipeline: its defaults where they can be."""
    options = call_options(kind)
    options["sampling_steps"] = options.pop("num_inference_steps")
    own = BY_BOTH.get(f"{kind}/{method}", {})
    method, _, variant = method.partition("-")
    options |= {
        "method": method,
        "seed": settings.seed,
        "evaluate_pictures": 200,
        "checkpoint_every": 0,
    }
    if method not in ("nft", "grpo"):
        options |= BY_PIPELINE.get(kind, {})
    options |= BY_METHOD.get(method, {}) | ALONE.get(variant, {}) | own
    steps = {**options, **settings.treat}.get("steps", 100)
    return options | {"evaluate_every": max(1, steps // 4)} | settings.treat


def _as_tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
