"""One treatment from its first measurement to its last step."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from diffdoctor.detector.external import as_detector
from diffdoctor.maps.ranking import PictureRanking
from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.progress import progress as show_progress
from diffdoctor.runs.signals import deferred_signals
from diffdoctor.training.processes import Processes, seed_of
from diffdoctor.treat.adapters import check_adapters
from diffdoctor.treat.autoguidance import refuse_autoguided
from diffdoctor.treat.checks import (
    check_detectors,
    check_even_batches,
    check_negative_prompt,
    check_own_steps,
    check_partners,
    check_pipeline,
    check_resident_blocks,
    check_reward,
    check_second_scale,
    check_start,
    warn_of_idle_options,
)
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.drawing import Drawing, Purpose
from diffdoctor.treat.families import family_of
from diffdoctor.treat.files import ENCODED, digests_of, encoded_folder, treatment_folder, with_version, writing
from diffdoctor.treat.fixed_pictures import FixedPictures
from diffdoctor.treat.group_policy import GroupPolicy
from diffdoctor.treat.lora import ADAPTER, load_lora_state, lora_digest, lora_state, treatment_lora
from diffdoctor.treat.lora_training import LoraTraining
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.monitor import EarlyStopping
from diffdoctor.treat.offline import checked_pairs, offline_weight, prepare_offline, with_anchor
from diffdoctor.treat.offload import resident_blocks
from diffdoctor.treat.prepare import memory_options, move_modules, release_text_encoders, restore_text_encoders
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.reward import checked_reward
from diffdoctor.treat.rows import RowStore
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.sharding import shard_denoiser, wants_sharding
from diffdoctor.treat.terms import paired_term, sampled_term
from diffdoctor.treat.tracking import Tracking


class Treatment:
    """The state of a treatment and its steps.

    Making one checks what it was given, and reads all weights once where there is an output folder; `run` does the
    work.

    The arguments are those of `diffdoctor.treat.treat`, whose `monitor` is `monitor_detector` here.

    Attributes:
        step: steps done.
        history: a dict per step.
        ranking: of the offline pairs that this process has seen; on the main process, after a checkpoint, of all.
        stopped: why the treatment ends before its last step, or None.
    """

    def __init__(
        self,
        pipeline,
        detector,
        prompts,
        config: TreatConfig,
        offline,
        monitor_detector,
        output_dir,
        settings,
        *,
        lora=None,
        reward=None,
        quality=None,
        device=None,
    ):
        self.started, self.seconds_before = time.perf_counter(), 0.0
        self.method = METHODS[config.method]
        refuse_autoguided(pipeline, "treat")
        family = family_of(pipeline)
        check_pipeline(family)
        family.choose_denoiser(config.denoiser)
        check_adapters(family, ADAPTER)
        detector = as_detector(detector)
        monitor_detector = None if monitor_detector is None else as_detector(monitor_detector)
        check_detectors(detector, monitor_detector, config)
        check_negative_prompt(family, config.negative_prompt, config.guidance_scale)
        check_second_scale(family, config.guidance_scale_2)
        check_start(lora, config)
        check_reward(reward, config)
        warn_of_idle_options(config)
        self.offline = checked_pairs(offline, config)
        # what was asked: config.yaml, given again with other pairs, leaves open what was left open
        self.settings = {**asdict(config), **(settings or {})}
        self.config = config = with_anchor(config, self.offline)
        self.lora, start = lora, None if lora is None else lora_digest(family, lora)
        self.reward = None if reward is None else checked_reward(reward)
        quality_reward = None if quality is None else checked_reward(quality, "quality")
        self.processes = Processes(device)
        self.device = self.processes.device
        check_resident_blocks(family, config, wants_sharding(self.processes))
        detector = self._frozen(detector)
        monitor_detector = None if monitor_detector is None else self._frozen(monitor_detector)
        family.max_sequence_length = config.max_sequence_length
        family.negative_prompt, family.guidance_scale_2 = config.negative_prompt, config.guidance_scale_2
        if config.negative_prompt:
            limits = {"strict": config.strict, "max_sequence_length": family.max_sequence_length}
            check_prompts(pipeline, [config.negative_prompt], **limits)
        prompts = check_prompts(pipeline, prompts, strict=config.strict, max_sequence_length=family.max_sequence_length)
        family.num_frames = family.frame_count(config.num_frames)
        size = family.picture_size(config.height, config.width)
        options = family.timestep_options(config.sampling_steps, *size)
        sampler = Sampler(pipeline.scheduler, device=self.device, timestep_options=options)
        guidance = Guidance(config.guidance_scale, config.cfg_grad)
        self.sampling = Sampling(family, sampler, guidance, detector, config.frames_per_call)
        check_own_steps(self.sampling, config)
        self.drawing = Drawing(self.sampling, prompts, config, self.processes, size)
        check_partners(config, self.processes, self.drawing.chunk)
        self.fixed = FixedPictures(self.drawing, config, monitor_detector, quality_reward)
        self.early_stopping = EarlyStopping(config)
        self.history: list[dict] = []
        self.ranking = PictureRanking()
        self.step = 0
        self.stopped: str | None = None
        # before the last measurement, where more steps would not have measured there
        self.unmeasured: dict | None = None
        # the step of the last checkpoint
        self.saved: int | None = None
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.folder = self.checkpoints = None
        if self.output_dir is not None:
            # the main process alone reads and writes there
            inputs = (family, detector, monitor_detector, prompts, self.offline, start, reward, quality)
            digests = digests_of(*inputs) if self.processes.is_main else {}
            self.folder = treatment_folder(self.output_dir, config, digests)
            self.checkpoints = Checkpoints(self.output_dir / "checkpoints")
            self.processes.from_main(self.folder.check)

    def _frozen(self, detector: torch.nn.Module) -> torch.nn.Module:
        return detector.to(self.device).eval().requires_grad_(False)

    @property
    def seconds(self) -> float:
        """Wall time so far, that of interrupted calls up to their last checkpoint included."""
        return self.seconds_before + time.perf_counter() - self.started

    def _prepare(self, show: bool, until_done: ExitStack) -> None:
        """Everything that takes time or memory: encode prompts and pairs, move the denoiser, add the LoRA.

        Args:
            show: bars.
            until_done: for what is to be undone when the treatment is over.
        """
        config, family, device = self.config, self.sampling.family, self.device
        # the denoiser comes only when the text encoders have gone: the largest two are never there together
        move_modules(family.pipeline, device, without=family.denoisers)
        drawing, store = self.drawing, self._row_stores()
        drawing.encode(store("prompts"), show=show)
        self.pairs = None
        if self.offline is not None:
            options = {"height": drawing.height, "width": drawing.width, "device": device, "chunk": drawing.chunk}
            self.pairs = prepare_offline(self.sampling, self.offline, config, store=store, show=show, **options)
        # each has written its part of what did not fit into memory
        self.processes.wait()
        release_text_encoders(family, config.text_encoders)
        sharded = wants_sharding(self.processes)
        if not sharded and config.resident_blocks is None:
            for denoiser in family.denoisers:
                denoiser.to(device)
        parameters = treatment_lora(family, config, self.lora, seed_of(config.seed, Purpose.LORA))
        if config.resident_blocks is not None:
            # a LoRA is made for layers that are there
            for denoiser in family.denoisers:
                until_done.enter_context(resident_blocks(denoiser, config.resident_blocks, device))
        if sharded:
            check_even_batches(family, config, self.processes)
            shard_denoiser(family, parameters, self.processes)
        self.training = LoraTraining(parameters, config, device)

    def _row_stores(self) -> Callable[[str], RowStore]:
        """Makes stores of encoded prompts and pairs, in the output folder for this very treatment to find again."""
        folder = None if self.folder is None else self.processes.from_main(lambda: encoded_folder(self.folder))
        limit, part = self.config.embedding_cache * 2**30, self.processes.on_this_machine
        return lambda name: RowStore(name, limit, folder, part)

    def run(self, progress: bool) -> str | None:
        """Take all steps that are still to take.

        Ends with the best weights in the pipeline, and the rest of the pipeline as it was.

        Args:
            progress: show a bar on the main process.

        Returns:
            Why it ended before the last step, or None.
        """
        family, progress = self.sampling.family, progress and self.processes.is_main
        detector = self.sampling.detector if self.method.needs_gradient else None
        with memory_options(family, self.config, detector), ExitStack() as until_done:
            try:
                self._prepare(progress, until_done)
                if self.folder is not None:
                    self.processes.from_main(self.folder.open)
                self._resume()
                if self.step and progress:
                    what = "was done" if self._is_over() else "resumes"
                    _say(f"{what} after step {self.step} of {self.config.steps}")
                # nothing is written before the untreated model's first pictures are drawn and diagnosed
                first = None if self.early_stopping.measurements else self._draw(self.config.evaluate_pictures)
                if first is not None and self.fixed.monitor is not None:
                    self.fixed.by_monitor(first[0][:1])
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
                    restore_text_encoders(family, self.device)
        if self.output_dir is not None and self._is_over() and self.processes.on_this_machine[0] == 0:
            shutil.rmtree(self.output_dir / ENCODED, ignore_errors=True)
        if self.early_stopping.best_state is not None:
            load_lora_state(family, self.early_stopping.best_state)
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
                measured = self.early_stopping.measurements[-1]
                bar.set_postfix(loss=self.history[-1]["loss"], flagged_area=measured.flagged_area)
                bar.update()
                self._look()
                # processes are told to stop at different moments, and must do so after the same step
                interruption.signal = self.processes.largest(interruption.signal or 0) or None
                due = self._is_due(self.config.checkpoint_every) and not self._is_over()
                if interruption.signal is not None or due:
                    self._checkpoint()
                if interruption.signal is not None:
                    if progress and self.checkpoints is not None:
                        _say(f"stopped after step {self.step}; the same call resumes there")
                    return
            if self.saved != self.step:
                self._checkpoint()

    def _is_over(self) -> bool:
        return self.step == self.config.steps or self.stopped is not None

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _take_step(self) -> None:
        config, training, step = self.config, self.training, self.step
        policy, updates = None, 1
        if self.method.draws_groups:
            groups = (self.sampling, self.drawing, config, self.processes, step, self.reward, training.initial)
            policy, updates = GroupPolicy(*groups), config.grpo_updates
        for _ in range(updates):
            self.sampling.family.gradient_scale = training.begin()
            artifact, replayed = 0.0, 0
            if policy is not None:
                artifact, replayed = policy.backward(), policy.replayed
            # an artifact loss of a map that is the same everywhere has no gradient
            elif self.method.samples and not (self.method.needs_gradient and config.map_source == "uniform"):
                artifact, replayed = sampled_term(self.drawing, training, step)
            offline = 0.0 if self.pairs is None else paired_term(self.drawing, self.pairs, step, self._seen)
            self.processes.sum_gradients(training.parameters)
            artifact, replayed, offline = self.processes.sum_values(artifact, replayed, offline)
            loss = artifact + offline_weight(config) * offline
            norm, rate = training.update(step, loss)
        self.step += 1
        self.history.append(
            {
                "step": self.step,
                "loss": _finite_or_none(loss),
                "artifact_loss": _finite_or_none(artifact),
                "offline_loss": _finite_or_none(offline),
                "replayed": int(replayed),
                "grad_norm": _finite_or_none(norm),
                "learning_rate": rate,
            }
        )
        row = {f"train/{name}": value for name, value in self.history[-1].items() if name != "step"}
        self.tracking.curves(self.step, **row, **{"train/skipped": training.skipped})

    def _seen(self, index: list[int], losses: torch.Tensor, shares: torch.Tensor, levels: torch.Tensor) -> None:
        self.ranking.update([self.offline.name(number) for number in index], losses, shares, levels)

    def _gather_ranking(self) -> None:
        """Give the main process what all have seen; the others begin anew."""
        if self.pairs is None:
            return
        states = self.processes.gathered(self.ranking.state_dict())
        self.ranking = PictureRanking.merged(states if self.processes.is_main else ())

    def _look(self) -> None:
        """Draw the fixed pictures after a step where they are due: all of them to be measured, or some to be seen."""
        config = self.config
        due = self._is_due(config.evaluate_every)
        if due or self.step == config.steps:
            self.unmeasured = None if due or not config.can_be_longer else self.early_stopping.state_dict()
            self.stopped = self._measure(*self._draw(config.evaluate_pictures))
        elif self._is_due(config.sample_every) and config.sample_pictures:
            self.tracking.sheet(self.step, *self._draw(config.sample_pictures))

    def _measure(self, pictures: torch.Tensor, confidence: torch.Tensor) -> str | None:
        """Judge what `_draw` drew; returns why to stop, or None."""
        config = self.config
        measurement, scores = self.fixed.measured(pictures, confidence, self.step)
        with self.training.average.in_place():
            stopped = self.early_stopping.add(measurement, scores, lambda: lora_state(self.sampling.family))
        measures = {f"pictures/{name}": value for name, value in asdict(measurement).items() if name != "step"}
        self.tracking.curves(self.step, **measures)
        shown = min(config.sample_pictures, len(pictures))
        if shown and (self._is_due(config.sample_every) or not config.sample_every or self.step == 0):
            self.tracking.sheet(self.step, pictures[:shown], confidence[:shown])
        return stopped

    def _draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first fixed pictures (count, 3, H, W) and their maps, on the CPU, drawn with the average's weights."""
        with self.training.average.in_place():
            return self.fixed.draw(count, checked=not self.early_stopping.measurements)

    def _checkpoint(self) -> None:
        if self.checkpoints is None:
            return
        self._gather_ranking()
        if self.processes.is_main:
            state = {
                "step": self.step,
                "steps": self.config.steps,
                # the last one only says that all is done, and what came of it, unless more steps may follow
                "training": self.training.state_dict(is_over=self._is_over() and not self.config.can_be_longer),
                "early_stopping": self.early_stopping.state_dict(),
                "unmeasured": self.unmeasured,
                "history": self.history,
                "ranking": self.ranking.state_dict(),
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
        if found["step"] > self.config.steps:
            what = f"at least {found['step']}, which are done in {self.output_dir}"
            raise UserError(expected("steps", what, self.config.steps))
        if self.config.steps > found.get("steps", 0) == found["step"] and found.get("unmeasured") is not None:
            found |= {"stopped": None, "early_stopping": found["unmeasured"]}
        self.stopped = found["stopped"]
        self.step, self.history, self.seconds_before = found["step"], found["history"], found["seconds"]
        self.saved = self.step
        if self.processes.is_main and "ranking" in found:
            self.ranking.load_state_dict(found["ranking"])
        self.training.load_state_dict(found["training"])
        self.early_stopping.load_state_dict(found["early_stopping"])


def _say(what: str) -> None:
    print(f"treatment: {what}", file=sys.stderr, flush=True)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
