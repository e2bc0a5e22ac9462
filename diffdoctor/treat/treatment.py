"""One treatment from its first measurement to its last step."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.progress import progress as show_progress
from diffdoctor.runs.signals import deferred_signals
from diffdoctor.training.ema import RunningAverage, put
from diffdoctor.training.processes import Processes, seed_of
from diffdoctor.treat.checks import check_detectors, check_even_batches, check_finite, check_pipeline
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import family_of
from diffdoctor.treat.files import digests_of, treatment_folder, with_version, writing
from diffdoctor.treat.lora import add_lora, load_lora_state, lora_state, merged_lora
from diffdoctor.treat.methods import kept_steps
from diffdoctor.treat.monitor import Monitor, measure
from diffdoctor.treat.prepare import memory_options, place, release_text_encoders, restore_text_encoders
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.rollout import Guidance, Rollout, initial_latents, picture_generators, roll_out
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.sharding import shard_denoiser, wants_sharding
from diffdoctor.treat.terms import artifact_term, diagnose, offline_term, pairs_of, prepare_offline
from diffdoctor.treat.tracking import Tracking

logger = logging.getLogger(__name__)

# what the random numbers of a treatment are for; part of every seed
_PICTURES, _METHOD, _PAIRS, _FIXED, _ORDER, _LORA = range(6)


class Treatment:
    """The state of a treatment and its steps; the arguments are those of `diffdoctor.treat.treat`.

    Making one checks what it was given, and reads all weights once where there is an output folder; `run` does the
    work.
    """

    def __init__(self, pipeline, detector, prompts, config: TreatConfig, offline, second, output_dir, settings):
        self.started, self.seconds_before = time.perf_counter(), 0.0
        self.config = config
        self.family = family = family_of(pipeline)
        check_pipeline(family)
        check_detectors(detector, second)
        self.processes = Processes()
        self.device = device = self.processes.device
        self.detector = detector.to(device).eval().requires_grad_(False)
        self.second = None if second is None else second.to(device).eval().requires_grad_(False)
        family.max_sequence_length = config.max_sequence_length or None
        self.prompts = check_prompts(
            pipeline, prompts, strict=config.strict, max_sequence_length=family.max_sequence_length
        )
        self.height, self.width = family.picture_size(config.height, config.width)
        self.guidance = Guidance(config.guidance_scale, config.cfg_grad)
        options = family.timestep_options(config.sampling_steps, self.height, self.width)
        self.sampler = Sampler(pipeline.scheduler, device=device, timestep_options=options)
        self.chunk = math.ceil(config.batch_size / self.processes.count)
        if config.micro_batch_size:
            self.chunk = min(self.chunk, config.micro_batch_size)
        self.offline = self._checked_offline(offline)
        self.monitor = Monitor(config)
        self.history: list[dict] = []
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.stopped: str | None = None
        # the step of the last checkpoint
        self.saved: int | None = None
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.settings = {**asdict(config), **(settings or {})}
        self.folder = self.checkpoints = None
        if self.output_dir is not None:
            # the main process alone reads and writes there
            inputs = (family, self.detector, self.second, self.prompts, self.offline)
            digests = digests_of(*inputs) if self.processes.is_main else {}
            self.folder = treatment_folder(self.output_dir, config, digests)
            self.checkpoints = Checkpoints(self.output_dir / "checkpoints")
            self.processes.from_main(self.folder.check)

    def _checked_offline(self, offline):
        """(pictures, prompts), or None where the method has no use for them."""
        if self.config.offline_weight == 0 and self.config.method != "weighted":
            return None
        if offline is None:
            raise UserError("offline: (pictures, prompts) pairs were expected, since offline_weight > 0; got None")
        return pairs_of(offline)

    @property
    def seconds(self) -> float:
        """Wall time so far, that of interrupted calls up to their last checkpoint included."""
        return self.seconds_before + time.perf_counter() - self.started

    def _prepare(self) -> None:
        """Everything that takes time or memory: encode prompts and pairs, place the denoiser, add the LoRA."""
        config, family, device = self.config, self.family, self.device
        # the denoiser comes only when the text encoders have gone: the largest two are never there together
        place(family.pipeline, device, without=family.denoiser_name)
        self.conditioning = family.encode_prompts(
            self.prompts, guidance_scale=config.guidance_scale, height=self.height, width=self.width, device=device
        )
        self.pairs = None
        if self.offline is not None:
            self.pairs = prepare_offline(
                family, self.detector, self.offline, config, self.height, self.width, device, self.chunk
            )
            check_finite(family, self.pairs.latents, "encodes the offline pictures")
        self.offline = None
        release_text_encoders(family, config.text_encoders)
        sharded = wants_sharding(self.processes)
        if not sharded:
            family.denoiser.to(device)
        self.parameters = add_lora(
            family,
            rank=config.rank,
            alpha=config.alpha or config.rank,
            groups=[group for group in config.lora_targets if group in family.lora_targets] or config.lora_targets,
            seed=seed_of(config.seed, _LORA),
        )
        if sharded:
            check_even_batches(config, self.processes)
            shard_denoiser(family, self.parameters, self.processes)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            eps=config.adam_epsilon,
        )
        # the scaler's skipping and halving for fp16; for other precisions its scale is 1 and it changes nothing
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = RunningAverage(self.parameters, config.ema_decay)

    def run(self, progress: bool) -> str | None:
        """Take all steps that are still to take; returns why it ended before the last one, or None.

        Ends with the best weights in the pipeline, and the rest of the pipeline as it was.
        """
        progress = progress and self.processes.is_main
        with memory_options(self.family, self.config):
            try:
                self._prepare()
                if self.folder is not None:
                    self.processes.from_main(self.folder.open)
                self._resume()
                if self.step and progress:
                    what = "was done" if self._is_over() else "goes on"
                    print(
                        f"treatment: {what} after step {self.step} of {self.config.steps}", file=sys.stderr, flush=True
                    )
                # nothing is written before the untreated model has drawn its first pictures
                first = None if self.monitor.measurements else self._draw(self.config.evaluate_pictures)
                if self.folder is not None:
                    self.processes.from_main(self._begin)
                self.tracking = Tracking(self.config, self.output_dir, self.step, is_main=self.processes.is_main)
                try:
                    # a held back signal is delivered when the loop ends, so what follows runs only without one
                    self._loop(progress, first)
                finally:
                    self.tracking.close()
            finally:
                if self.config.text_encoders == "offload":
                    restore_text_encoders(self.family, self.device)
        if self.monitor.best_state is not None:
            load_lora_state(self.family, self.monitor.best_state)
        return self.stopped

    def _begin(self) -> None:
        with writing(self.output_dir):
            self.folder.begin(with_version(self.settings))

    def _loop(self, progress: bool, first) -> None:
        with (
            deferred_signals(self.checkpoints is not None) as interruption,
            show_progress(self.config.steps, desc="treatment", enabled=progress) as bar,
        ):
            bar.update(self.step)
            if first is not None:
                self.stopped = self._measure(*first)
            while self.step < self.config.steps and self.stopped is None:
                self._take_step()
                bar.set_postfix(loss=self.history[-1]["loss"], flagged_area=self.monitor.measurements[-1].flagged_area)
                bar.update()
                if self._is_due(self.config.evaluate_every) or self.step == self.config.steps:
                    self.stopped = self._measure(*self._draw(self.config.evaluate_pictures))
                elif self._is_due(self.config.sample_every) and self.config.sample_pictures:
                    self.tracking.sheet(self.step, *self._draw(self.config.sample_pictures))
                # processes are told to stop at different moments, and must do so after the same step
                interruption.signal = self.processes.largest(interruption.signal or 0) or None
                due = self._is_due(self.config.checkpoint_every) and not self._is_over()
                if interruption.signal is not None or due:
                    self._checkpoint()
                if interruption.signal is not None:
                    if progress and self.checkpoints is not None:
                        print(f"treatment: stopped after step {self.step}, and can go on from there", file=sys.stderr)
                    return
            if self.saved != self.step:
                self._checkpoint()

    def _is_over(self) -> bool:
        return self.step == self.config.steps or self.stopped is not None

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _take_step(self) -> None:
        config, step = self.config, self.step
        self.optimizer.zero_grad(set_to_none=True)
        # also makes the scaler's state, which it does on first use
        scale = self.scaler.scale(torch.ones((), device=self.device))
        self.family.gradient_scale = scale if self.scaler.is_enabled() else None
        artifact, replayed = 0.0, 0
        if config.method != "weighted" and config.map_source != "uniform":
            artifact, replayed = self._online(step)
        offline = self._offline(step) if self.pairs is not None else 0.0
        self.processes.sum_gradients(self.parameters)
        artifact, replayed, offline = self.processes.sum_values(artifact, replayed, offline)
        self.scaler.unscale_(self.optimizer)
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        weight = 1.0 if config.method == "weighted" else config.offline_weight
        loss = artifact + weight * offline
        rate = config.learning_rate * self._rate_factor(step)
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(self.optimizer)
            self.average.update(step)
        else:
            self._skip(loss, norm)
        self.scaler.update()
        self.step += 1
        self.history.append(
            {
                "step": self.step,
                "loss": _or_none(loss),
                "artifact_loss": _or_none(artifact),
                "offline_loss": _or_none(offline),
                "replayed": int(replayed),
                "grad_norm": _or_none(norm),
                "learning_rate": rate,
            }
        )
        row = {f"train/{name}": value for name, value in self.history[-1].items() if name != "step"}
        self.tracking.curves(self.step, **row, **{"train/skipped": self.skipped})

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning("step %d skipped: loss %s, gradient norm %s", self.step + 1, loss, norm)
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that was not finite: "
                "lower learning_rate, or use precision fp32 and a VAE that is safe in its dtype"
            )

    def _rate_factor(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        position = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * position))
        return config.final_learning_rate + (1 - config.final_learning_rate) * cosine

    def _online(self, step: int) -> tuple[float, int]:
        config = self.config
        loss, replayed = 0.0, 0
        for numbers in _parts(self.processes.share(config.batch_size), self.chunk):
            seeds = [seed_of(config.seed, _PICTURES, step, i) for i in numbers]
            rows = torch.tensor([self._prompt_row(step * config.batch_size + i) for i in numbers], dtype=torch.long)
            rollout = self._sample(rows, seeds, kept_steps(config.method, config.grad_steps, len(self.sampler)))
            _, confidence = diagnose(self.family, self.detector, rollout.final, 1 if config.vae_slicing else 0)
            # the method's choices are those of the step, whatever the part of the batch
            generator = torch.Generator().manual_seed(seed_of(config.seed, _METHOD, step))
            part, count = artifact_term(
                self.family,
                self.sampler,
                rollout,
                confidence,
                self.detector,
                self.guidance,
                config,
                total=config.batch_size,
                generator=generator,
                seeds=seeds,
            )
            loss, replayed = loss + part, replayed + count
        return loss, replayed

    def _offline(self, step: int) -> float:
        config = self.config
        total = config.offline_batch_size or config.batch_size
        value = 0.0
        for numbers in _parts(self.processes.share(total), config.micro_batch_size or total):
            draws = [seed_of(config.seed, _PAIRS, step, i) for i in numbers]
            loss = offline_term(self.family, self.sampler, self.pairs, config, draws=draws, total=total)
            (loss if config.method == "weighted" else config.offline_weight * loss).backward()
            value += float(loss.detach())
        return value

    def _sample(self, rows: torch.Tensor, seeds: Sequence[int], keep: Sequence[int]) -> Rollout:
        generators = picture_generators(seeds)
        dtype = next(self.family.denoiser.parameters()).dtype
        latents = initial_latents(self.family, self.sampler, generators, self.height, self.width, self.device, dtype)
        merge = self.config.merge_rollout and not self.family.is_sharded
        with merged_lora(self.family) if merge else nullcontext():
            return roll_out(
                self.family,
                self.sampler,
                self.conditioning.rows(rows),
                latents,
                generators,
                self.guidance,
                keep=keep,
            )

    def _prompt_row(self, count: int) -> int:
        # every prompt once before any comes again, in an order of its own each time round
        number = len(self.prompts)
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, _ORDER, count // number))
        return int(torch.randperm(number, generator=generator)[count % number])

    def _measure(self, pictures: torch.Tensor, confidence: torch.Tensor) -> str | None:
        """Judge what `_draw` drew; returns why to stop, or None."""
        config = self.config
        rows = torch.arange(config.evaluate_pictures) % len(self.prompts)
        second = None
        if self.second is not None:
            with torch.no_grad():
                maps = [self.second.confidence(part.to(self.device)).cpu() for part in pictures.split(self.chunk)]
            second = torch.cat(maps)
        measurement = measure(pictures, confidence, rows.tolist(), self.step, second)
        # one process decides, lest rounding on another machine make it decide otherwise
        measurement = self.processes.from_main(lambda: measurement)
        with self.average.in_place():
            stopped = self.monitor.add(measurement, lambda: lora_state(self.family))
        measures = {f"pictures/{name}": value for name, value in asdict(measurement).items() if name != "step"}
        self.tracking.curves(self.step, **measures)
        shown = min(config.sample_pictures, len(pictures))
        if shown and (self._is_due(config.sample_every) or not config.sample_every or self.step == 0):
            self.tracking.sheet(self.step, pictures[:shown], confidence[:shown])
        return stopped

    def _draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first fixed pictures (count, 3, H, W) and their maps, on the CPU, drawn by all processes together."""
        numbers = self.processes.even_share(count)
        pictures, maps = [], []
        with self.average.in_place():
            for part in _parts(numbers, self.chunk):
                rows = torch.tensor([i % len(self.prompts) for i in part])
                final = self._sample(rows, [seed_of(self.config.seed, _FIXED, i) for i in part], ()).final
                drawn, confidence = diagnose(self.family, self.detector, final, 1 if self.config.vae_slicing else 0)
                if not self.monitor.measurements:
                    check_finite(self.family, drawn, "decodes pictures", final)
                pictures.append(self.processes.gather(drawn, len(part) * self.processes.count))
                maps.append(self.processes.gather(confidence, len(part) * self.processes.count))
        return torch.cat(pictures)[:count], torch.cat(maps)[:count]

    def _checkpoint(self) -> None:
        if self.checkpoints is None:
            return
        if self.processes.is_main:
            state = {
                "step": self.step,
                "lora": [p.detach() for p in self.parameters],
                "average": self.average.values,
                # the last one only says that all is done, and what came of it
                "optimizer": None if self._is_over() else self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "monitor": self.monitor.state_dict(),
                "history": self.history,
                "skipped": [self.skipped, self.skipped_in_a_row],
                "stopped": self.stopped,
                "seconds": self.seconds,
            }
            with writing(self.output_dir):
                self.checkpoints.save(self.step, state)
        self.saved = self.step
        self.processes.wait()

    def _resume(self) -> None:
        found = None if self.checkpoints is None else self.processes.from_main(self.checkpoints.load)
        if found is None:
            return
        self.stopped = found["stopped"]
        self.step, self.history, self.seconds_before = found["step"], found["history"], found["seconds"]
        self.saved = self.step
        self.skipped, self.skipped_in_a_row = found["skipped"]
        put(found["lora"], self.parameters)
        self.average.load(found["average"])
        if found["optimizer"] is not None:
            self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.monitor.load_state_dict(found["monitor"])


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parts(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
