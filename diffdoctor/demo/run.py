"""`diffdoctor demo`: data, detector, judge, pipeline, treatment, control, measures, report; stored stage by stage."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from diffdoctor.demo import data as demo_data
from diffdoctor.demo.acceptance import acceptance_checks, judge_is_calibrated
from diffdoctor.demo.classifier import DigitClassifier, train_classifier
from diffdoctor.demo.config import DemoConfig
from diffdoctor.demo.report import write_pictures, write_report
from diffdoctor.demo.stages import Stages
from diffdoctor.detector import load_detector
from diffdoctor.evaluate.model import artifact_rates, compare_pictures, diagnose_pictures, sample_pictures
from diffdoctor.measures.components import mean_average_precision
from diffdoctor.measures.pixels import flagged, pixel_measures
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.progress import progress, quiet_loaders
from diffdoctor.training.cpu_settings import cpu_settings
from diffdoctor.version import __version__

SAMPLING = {"num_inference_steps": 10, "guidance_scale": 1.0}
# The seeds of the measured pictures' first latents; the treatment draws its own from the run's seed.
EVALUATION_SEED = 1_000_000
# Of a treatment: enough that the choice of the best weights is not a coin toss between good ones.
FIXED_PICTURES = 200


class Demo:
    """The stages of one run, each a method that gives its result, made or read from the run's folder.

    Args:
        config: the run's options.
        alone: see `Stages`.
    """

    def __init__(self, config: DemoConfig, *, alone: bool = True):
        self.config = config
        settings = dataclasses.asdict(config)
        # What does not change a stored stage may differ between the runs of one folder.
        for name in ("output", "overwrite", "strict", "threads", "device", "shuffled_control"):
            del settings[name]
        self.settings = {"diffdoctor": __version__, **settings}
        self.output = Path(config.output)
        self.stages = Stages(config.output, self.settings, overwrite=config.overwrite, alone=alone)

    def data(self):
        """The labelled digits, from their shards."""

        def make(folder):
            demo_data.write_demo_data(demo_data.make_demo_data(self.config.seed), folder / "shards")

        return demo_data.read_demo_data(self.stages.run("data", make) / "shards")

    def classifier(self, data):
        """The digit classifier, trained on the first four fifths: all digits clean, and as they were damaged."""
        from safetensors.torch import load_file, save_file

        def make(folder):
            clean, digits = demo_data.clean_digits()
            known = torch.from_numpy(data.splits != "heldout")
            pictures = torch.cat([_as_tensor(clean)[known], _as_tensor(data.pictures)[known]])
            with progress(self.config.classifier_steps, desc="classifier") as bar:
                trained = train_classifier(
                    pictures,
                    torch.from_numpy(digits)[known].repeat(2),
                    steps=self.config.classifier_steps,
                    seed=self.config.seed,
                    on_step=_reporter(bar),
                )
            save_file(trained.state_dict(), folder / "classifier.safetensors")

        path = self.stages.run("classifier", make) / "classifier.safetensors"
        classifier = DigitClassifier()
        classifier.load_state_dict(load_file(path))
        return classifier.eval().requires_grad_(False)

    def base(self, data):
        """The folder of the untreated pipeline, trained on the half-damaged set alone."""
        from diffdoctor.demo.pipeline import build_pipeline, train_autoencoder, train_base

        def make(folder):
            known = data.training
            prompts = [demo_data.prompt_of(int(digit)) for digit in known.digits]
            pipeline = build_pipeline(prompts, seed=self.config.seed)
            with progress(self.config.autoencoder_steps, desc="autoencoder") as bar:
                first = train_autoencoder(
                    pipeline,
                    known.pictures,
                    steps=self.config.autoencoder_steps,
                    seed=self.config.seed,
                    on_step=_reporter(bar),
                )
            with progress(self.config.base_steps, desc="pipeline") as bar:
                second = train_base(
                    pipeline, known.pictures, prompts,
                    steps=self.config.base_steps, seed=self.config.seed, on_step=_reporter(bar),
                )  # fmt: skip
            pipeline.save_pretrained(folder / "pipeline")
            atomic_write_json(folder / "losses.json", {"autoencoder": first.losses, "pipeline": second.losses})

        return self.stages.run("pipeline", make) / "pipeline"

    def trained(self, name, train, data, config):
        """A detector that `train(data, config, device=)` makes, and its training's history."""

        def make(folder):
            result = train(data, config, device=self.config.device)
            result.detector.save_pretrained(folder / "detector")
            atomic_write_json(folder / "history.json", result.history)

        folder = self.stages.run(name, make)
        return load_detector(folder / "detector").eval(), json.loads((folder / "history.json").read_text())

    def treated(self, name, base, detector, data, map_source="detector"):
        """A treatment's LoRA folder and its history; another `map_source` makes a control."""
        from diffusers import DiffusionPipeline

        from diffdoctor.treat import TreatConfig, treat

        def make(folder):
            prompts = [demo_data.prompt_of(digit) for digit in range(10)]
            pairs = data.training
            config = TreatConfig(
                steps=self.config.treat_steps,
                learning_rate=self.config.treat_learning_rate,
                evaluate_every=max(1, self.config.treat_steps // 4),
                evaluate_pictures=FIXED_PICTURES,
                seed=self.config.seed,
                map_source=map_source,
                sampling_steps=SAMPLING["num_inference_steps"],
                guidance_scale=SAMPLING["guidance_scale"],
                checkpoint_every=0,
            )
            result = treat(
                DiffusionPipeline.from_pretrained(base, local_files_only=True), detector, prompts, config,
                offline=(pairs.pictures, [demo_data.prompt_of(int(digit)) for digit in pairs.digits]),
                device=self.config.device,
            )  # fmt: skip
            result.save_lora(folder / "lora")
            measured = [dataclasses.asdict(measurement) for measurement in result.measurements]
            record = {"history": result.history, "measurements": measured, "best_step": result.best_step}
            atomic_write_json(folder / "treatment.json", record)

        folder = self.stages.run(name, make)
        return folder / "lora", json.loads((folder / "treatment.json").read_text())

    def pictures(self, name, base, lora=None):
        """What the pipeline, with a LoRA or without, draws of the measured prompts and seeds: uint8 (N, 3, 16, 16)."""
        from diffusers import DiffusionPipeline
        from safetensors.torch import load_file, save_file

        def make(folder):
            pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
            if lora is not None:
                pipeline.load_lora_weights(lora)
            count = self.config.pictures
            prompts = [demo_data.prompt_of(digit) for digit in self.asked_for().tolist()]
            seeds = range(EVALUATION_SEED, EVALUATION_SEED + count)
            drawn = sample_pictures(pipeline, prompts, seeds, desc=name, **SAMPLING)
            save_file({"pictures": drawn}, folder / "pictures.safetensors")

        return load_file(self.stages.run(name, make) / "pictures.safetensors")["pictures"]

    def asked_for(self):
        """The digits of the measured prompts, (N,): each as often as any other."""
        return torch.arange(self.config.pictures) % 10


def measure_detectors(detector, judge, heldout) -> dict:
    """The detector's and the judge's measures on the held-out fifth, under the names of metrics.json."""
    pictures, masks = _as_tensor(heldout.pictures), torch.from_numpy(heldout.masks)
    damaged = torch.from_numpy(heldout.damaged)
    by_detector = diagnose_pictures(detector, pictures)
    by_judge = diagnose_pictures(judge, pictures)
    seen = torch.from_numpy(heldout.kinds != demo_data.HIDDEN_KIND)
    return {
        "detector": {
            "map50": mean_average_precision(by_detector, masks),
            "map50_known_kinds": mean_average_precision(by_detector[seen], masks[seen]),
            **pixel_measures(by_detector, masks),
            "false_positive_rate": float(flagged(by_detector)[~damaged].float().mean()),
            "hit_rate": float(flagged(by_detector)[damaged].float().mean()),
        },
        "judge": {
            "map50": mean_average_precision(by_judge, masks),
            "false_positive_rate": float(flagged(by_judge)[~damaged].float().mean()),
            "hit_rate": float(flagged(by_judge)[damaged].float().mean()),
        },
    }


def run_demo(config: DemoConfig) -> int:
    """Run what is not done yet, then measure and write `metrics.json`, `report.html` and the pictures.

    Returns:
        0; 1 when the judge fails its calibration, or, with `strict`, when an acceptance check fails.

    Raises:
        UserError: if the folder cannot be written, holds a run with other settings, or another process is at work
            there.
    """
    quiet_loaders()
    with cpu_settings(config.threads), locked_folder(config.output):
        return _run(config)


def _run(config: DemoConfig) -> int:
    demo = Demo(config)
    data = demo.data()
    classifier = demo.classifier(data)
    options = demo_data.detector_training_config(config.seed, steps=config.detector_steps)
    detector, detector_history = demo.trained("detector", demo_data.train_demo_detector, data, options)
    options = demo_data.judge_training_config(config.seed, steps=config.judge_steps)
    judge, _ = demo.trained("judge", demo_data.train_demo_judge, data, options)
    metrics = measure_detectors(detector, judge, data.split("heldout"))
    failed = [check for check in judge_is_calibrated(metrics) if not check.holds]
    if failed:
        for check in failed:
            print(f"{check.name}: {check.value}, must be {check.limit}", file=sys.stderr)
        print("The judge cannot be trusted with this seed, so nothing is measured by it.", file=sys.stderr)
        return 1
    base = demo.base(data)
    lora, record = demo.treated("treatment", base, detector, data)
    control, _ = demo.treated("control", base, detector, data, map_source="uniform")
    before, after = demo.pictures("before", base), demo.pictures("after", base, lora)
    controls = {"uniform_map": demo.pictures("after_control", base, control)}
    if config.shuffled_control:
        shuffled, _ = demo.treated("control_shuffled", base, detector, data, map_source="shuffled")
        controls["shuffled_maps"] = demo.pictures("after_control_shuffled", base, shuffled)

    started = time.perf_counter()
    clean, _ = demo_data.clean_digits()
    comparison = compare_pictures(
        before, after, demo.asked_for(),
        detector=detector, judge=judge, features=classifier.features, classify=classifier,
        real=_as_tensor(clean), damaged=_as_tensor(data.pictures[data.damaged]), seed=config.seed,
    )  # fmt: skip
    metrics |= comparison.metrics
    metrics["digit_accuracy"] = metrics.pop("accuracy")
    flags_before = flagged(comparison.judge_before)
    metrics["control"] = {
        name: artifact_rates(flags_before, flagged(diagnose_pictures(judge, pictures)))
        for name, pictures in controls.items()
    }
    sheet = write_pictures(demo.output / "pictures", before, after, comparison)
    metrics["stage_seconds"] = {**demo.stages.seconds, "measures": time.perf_counter() - started}
    metrics["seconds"] = sum(metrics["stage_seconds"].values())
    write_report(
        demo.output / "report.html",
        metrics=metrics, settings=demo.settings, comparison=comparison, before=before, after=after, sheet=sheet,
        detector_history=_columns(detector_history), treat_history=_columns(record["history"]),
        measurements=_columns(record["measurements"]),
    )  # fmt: skip
    atomic_write_json(demo.output / "metrics.json", metrics)
    return _summary(demo.output, metrics, config.strict)


def _summary(output, metrics, strict):
    checks = acceptance_checks(metrics)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.name:<{width}}  {check.value:>14}  {check.limit:<16}  {'holds' if check.holds else 'MISSED'}")
    print(f"{metrics['seconds']:.0f} s in all; look at {output / 'report.html'}")
    return 1 if strict and not all(check.holds for check in checks) else 0


def _columns(history):
    """A list of one dict a step as {name: values}, of the names that every step has as a number."""
    if not history:
        return {}
    names = [name for name in history[0] if all(isinstance(row.get(name), (int, float)) for row in history)]
    return {name: [row[name] for row in history] for name in names}


def _as_tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _reporter(bar):
    def on_step(_, loss):
        bar.set_postfix(loss=float(loss))
        bar.update()

    return on_step
