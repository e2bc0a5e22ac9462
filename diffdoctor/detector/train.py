"""Training a detector: Accelerate, deterministic samples, EMA, checkpoints that resume to the same bits on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from diffdoctor.data.pictures import to_images
from diffdoctor.data.stream import ShardStream
from diffdoctor.detector.block_plan import WeightedBlocks
from diffdoctor.detector.config import DetectorTrainingConfig
from diffdoctor.detector.loading import PlannedSamples, ResampledSamples, StepPlan, collate
from diffdoctor.detector.losses import detector_loss
from diffdoctor.detector.models.load import new_detector
from diffdoctor.detector.run_folder import identity_of, training_folder
from diffdoctor.detector.samples import DetectorData, JoinedData
from diffdoctor.detector.validate import quick_measures
from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError, expected, missing_extra
from diffdoctor.runs.progress import progress as progress_bar
from diffdoctor.runs.signals import deferred_signals, leave_signals_to_the_parent
from diffdoctor.training.devices import open_device
from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.processes import largest, process_state
from diffdoctor.training.schedule import warmup_cosine
from diffdoctor.training.seeds import seed_device

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass
class TrainedDetector:
    """What `train_detector` returns.

    Attributes:
        detector: the trained network, in evaluation mode.
        history: one dict a step: step, loss, learning_rate, grad_norm.
        validations: one dict a validation: step and the measures of `validate.quick_measures`.
        broken: {where: reason} of the pictures that could not be read; of a stream, one example of each reason.
    """

    detector: nn.Module
    history: list[dict]
    validations: list[dict]
    broken: dict[str, str] = dataclasses.field(default_factory=dict)


def train_detector(
    config: DetectorTrainingConfig,
    data: DetectorData | ShardStream,
    *,
    detector: nn.Module | None = None,
    validation: DetectorData | None = None,
    output_dir: str | Path | None = None,
    progress: bool = True,
    name: str = "detector",
    device: str | None = None,
) -> TrainedDetector:
    """Train a detector on labelled pictures; clean ones are damaged at random by `config.augment`.

    Started with `accelerate launch` it runs in several processes, which share each batch. With fp32 and without dropout
    the losses do not depend on the number of processes. Run again with the same output folder, it resumes from the last
    complete checkpoint, on the CPU to the same bits as without the interruption. SIGINT and SIGTERM take effect when
    the step is finished and a checkpoint written.

    Args:
        config: the options.
        data: the labelled pictures, see `DetectorData` (`ArrayData`, `ShardData`, `JoinedData` of several, each with
            its share); or a resampled `ShardStream`, for
            sets of any size: then another number of processes or workers sees other pictures, so that the losses are
            alike only on average. It resumes to the same bits too.
        detector: the network to train in place: any module from images (B, 3, H, W) in [0, 1] to logits (B, 1, h, w).
            None: a fresh `ArtifactDetector.tiny()`, its weights drawn from `config.seed`.
        validation: labelled pictures that are measured during training.
        output_dir: where checkpoints, `detector` and `best` go; None writes nothing.
        progress: show a progress bar.
        name: label of the progress bar.
        device: such as cpu or cuda:1, for a single process; None: the fastest there is.

    Returns:
        The detector with the measures of its training.

    Raises:
        UserError: the loss is not finite; the output folder holds another run's checkpoints or results, or `detector`
            or `best` there holds files that are no detector's.
    """
    options = {"detector": detector, "validation": validation, "output_dir": output_dir, "device": device}
    with prepared_run(config, data, **options) as run:
        return run.train(progress, name)


@contextlib.contextmanager
def prepared_run(
    config: DetectorTrainingConfig,
    data: DetectorData | ShardStream,
    *,
    detector: nn.Module | None,
    validation: DetectorData | None,
    output_dir: str | Path | None,
    identity: dict | None = None,
    device: str | None = None,
) -> Iterator[TrainingRun]:
    """A training that is checked, loaded from its last checkpoint and about to take its next step.

    No other process may work in its output folder until the block ends.

    Args:
        config: see `train_detector`.
        data: see `train_detector`.
        detector: see `train_detector`.
        validation: see `train_detector`.
        output_dir: see `train_detector`.
        identity: what else the result depends on, by name.
        device: see `train_detector`.

    Raises:
        UserError: see `train_detector`; then nothing was written.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise missing_extra("accelerate", "stages") from None
    # The processes' state, which is one for all, says whether they use the CPU.
    accelerator = Accelerator(cpu=process_state(device).device.type == "cpu")
    micro_batches = accelerator.num_processes * config.accumulate
    if config.batch_size % micro_batches:
        what = f"a multiple of processes x accumulate = {micro_batches}"
        raise UserError(expected("batch_size", what, config.batch_size))
    if device is not None and accelerator.num_processes > 1:
        raise UserError(expected("device", "none with several processes, each of which has its own", repr(device)))
    place = open_device(device, accelerator.device)
    if output_dir is not None and detector is not None and not hasattr(detector, "save_pretrained"):
        what = "a network with save_pretrained, which an output folder needs"
        raise UserError(expected("detector", what, type(detector).__name__))
    is_gpu = place.type == "cuda"
    # A loader pins memory for the current GPU. Nothing here may depend on, or disturb, the caller's random state.
    with (
        torch.cuda.device(place) if is_gpu else contextlib.nullcontext(),
        torch.random.fork_rng(devices=[place] if is_gpu else []),
    ):
        seed_device(config.seed, place)
        if detector is None:
            detector = new_detector("tiny")
        run = TrainingRun(config, data, detector, validation, accelerator, place)
        try:
            if output_dir is not None:
                run.open(Path(output_dir), identity or {})
            yield run
        finally:
            if run.folder is not None:
                run.folder.close()


class TrainingRun:
    """One training run: the state that a checkpoint holds, and the loop over it. Made by `prepared_run`."""

    def __init__(
        self,
        config: DetectorTrainingConfig,
        data: DetectorData | ShardStream,
        detector: nn.Module,
        validation: DetectorData | None,
        accelerator: Accelerator,
        device: torch.device,
    ):
        self.config, self.detector, self.validation, self.accelerator = config, detector, validation, accelerator
        self.device = device
        detector.to(device).train()
        if not any(parameter.requires_grad for parameter in detector.parameters()):
            detector.requires_grad_(True)  # as `load_detector` gives it; of one that is frozen in part, the part stays
        groups = _parameter_groups(detector, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate, config.betas)
        self.model = accelerator.prepare(detector) if accelerator.num_processes > 1 else detector
        self.average = RunningAverage(detector.parameters(), config.ema_decay)
        self.step = 0
        # the step of the last checkpoint
        self.saved: int | None = None
        self.history: list[dict] = []
        self.validations: list[dict] = []
        self.broken: dict[str, str] = {}
        self.data, self.weights, self.blocks = data, None, None
        if isinstance(data, ShardStream):
            if not data.resampled or config.balance or config.order != "shuffled":
                got = "balance=True" if config.balance else f"order={config.order!r}"
                got = got if data.resampled else "a stream that is not resampled"
                raise UserError(expected("data", "a resampled stream, with balance=False and order='shuffled'", got))
        else:
            from diffdoctor.detector.balance import training_weights

            self.weights = training_weights(data, balance=config.balance, damaged_share=config.damaged_share)
            if config.order == "blocks":
                shards = (data if isinstance(data, JoinedData) else JoinedData([data])).shard_numbers
                self.blocks, self.weights = WeightedBlocks(shards, self.weights, config.seed), None
        self.output_dir = self.folder = self.checkpoints = self.writer = None

    def open(self, output_dir: Path, identity: dict) -> None:
        """Check the output folder, and load its last checkpoint."""
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        identity = identity_of(self.config, self.data, self.detector, self.validation, processes) | identity
        self.output_dir = output_dir
        self.folder = training_folder(output_dir, identity, main=accelerator.is_main_process)
        self.checkpoints = Checkpoints(output_dir / "checkpoints", keep=self.config.keep_checkpoints)
        self.folder.open()
        self.folder.check()
        if (state := self.checkpoints.load()) is not None:
            self._resume(state)
        # All processes have looked before anything changes.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.folder.begin()
            self.checkpoints.tidy()

    def train(self, progress: bool, name: str) -> TrainedDetector:
        """Take all steps that are still to take; see `train_detector`."""
        config = self.config
        if config.tensorboard and self.output_dir is not None and self.accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.output_dir / "logs", purge_step=self.step + 1)
        enabled = progress and self.accelerator.is_main_process
        # A signal that was held back is delivered when the loop ends, so what follows runs only without one.
        with (
            deferred_signals(self.checkpoints is not None) as interruption,
            progress_bar(config.steps, desc=name, unit="step", enabled=enabled) as bar,
        ):
            bar.update(self.step)
            for batch in self._batches():
                self._train_step(batch)
                self._after_step()
                measures = self.validations[-1] if self.validations else {}
                bar.set_postfix(loss=self.history[-1]["loss"], **{k: v for k, v in measures.items() if k != "step"})
                bar.update(1)
                # Processes are told to stop at different moments, and must do so after the same step.
                interruption.signal = largest(interruption.signal or 0, self.device) or None
                if interruption.signal is not None:
                    self._checkpoint()
                    if enabled:
                        print(f"{name}: stopped after step {self.step}; the same call resumes there", file=sys.stderr)
                    break
        if self.validation is not None and (not self.validations or self.validations[-1]["step"] != self.step):
            self._validate()
        self.average.keep()
        self.detector.eval()
        if self.output_dir is not None and self.accelerator.is_main_process:
            self.detector.save_pretrained(self.output_dir / "detector")
        if self.writer is not None:
            self.writer.close()
        self.accelerator.wait_for_everyone()
        return TrainedDetector(self.detector, self.history, self.validations, self.broken)

    def _batches(self):
        """Lists of (pictures, masks) micro-batches, one list a step, of this process's slots of the batch."""
        config, accelerator = self.config, self.accelerator
        slots = config.batch_size // accelerator.num_processes
        every = config.checkpoint_every
        plan = StepPlan(self.step, config.steps, accelerator.process_index, slots, config.accumulate, every)
        options = {
            "num_workers": config.workers,
            "pin_memory": self.device.type == "cuda",
            "generator": torch.Generator().manual_seed(0),
            "worker_init_fn": leave_signals_to_the_parent,
        }
        if isinstance(self.data, ShardStream):
            samples = ResampledSamples(self.data, plan, config.augment, config.size)
            loader = torch.utils.data.DataLoader(samples, batch_size=None, **options)
        else:
            samples = PlannedSamples(
                self.data,
                config.strict,
                batch_size=config.batch_size,
                seed=config.seed,
                config=config.augment,
                weights=self.weights,
                size=config.size,
                blocks=self.blocks,
            )
            loader = torch.utils.data.DataLoader(samples, batch_sampler=plan, collate_fn=collate, **options)
        micro_batches = []
        for loaded in loader:
            if isinstance(loaded, UserError):
                raise loaded
            pictures, masks, broken = loaded
            self.broken |= broken
            micro_batches.append((pictures, masks))
            if len(micro_batches) == config.accumulate:
                yield micro_batches
                micro_batches = []

    def _train_step(self, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        config, accelerator = self.config, self.accelerator
        device = self.device
        rate = config.learning_rate * warmup_cosine(self.step, config.warmup_steps, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout draws from the step's own seed, so that a resumed run draws the same.
        key = np.random.SeedSequence([config.seed, 4, self.step, accelerator.process_index])
        seed_device(int(key.generate_state(1)[0]), device)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for index, (pictures, masks) in enumerate(micro_batches):
            images = to_images(pictures, device)
            masks = masks.to(device, non_blocking=True)
            last = index == len(micro_batches) - 1
            sync = self.model.no_sync() if accelerator.num_processes > 1 and not last else contextlib.nullcontext()
            with sync:
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = self.model(images)
                loss = detector_loss(logits, masks, mse=config.mse, bce=config.bce, dice=config.dice)
                loss = loss / len(micro_batches)
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.detector.parameters(), config.max_grad_norm or math.inf)
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "mean")
        loss = total.item()
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {self.step}: lower learning_rate = {config.learning_rate}")
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        self.history.append({"step": self.step, "loss": loss, "learning_rate": rate, "grad_norm": norm.item()})

    def _after_step(self) -> None:
        config = self.config
        if self.writer is not None:
            for name in ("loss", "learning_rate", "grad_norm"):
                self.writer.add_scalar(f"train/{name}", self.history[-1][name], self.step)
        if self.validation is not None and config.validate_every and self.step % config.validate_every == 0:
            self._validate()
        if config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Write what resumes here, where there is an output folder and it is not there yet."""
        if self.checkpoints is not None and self.saved != self.step:
            if self.accelerator.is_main_process:
                if self.writer is not None:
                    # What is before a checkpoint is not logged again.
                    self.writer.flush()
                state = {
                    "model": self.detector.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "ema": self.average.values,
                }
                record = {"step": self.step, "history": self.history, "validations": self.validations}
                self.checkpoints.save(self.step, state, record | {"broken": self.broken})
            self.saved = self.step
            self.accelerator.wait_for_everyone()

    def _resume(self, state: dict) -> None:
        self.detector.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["ema"])
        self.step, self.broken = state["step"], state["broken"]
        self.saved = self.step
        # JSON has no NaN: what was not finite is null there.
        self.history, self.validations = (
            [{name: math.nan if value is None else value for name, value in row.items()} for row in state[rows]]
            for rows in ("history", "validations")
        )

    def _validate(self) -> None:
        self.detector.eval()
        with self.average.in_place():
            measures = {"step": self.step, **self._measures()}
            best = max((v["map50"] for v in self.validations), default=-math.inf)
            self.validations.append(measures)
            main = self.accelerator.is_main_process
            if main and self.output_dir is not None and measures["map50"] > best:
                self.detector.save_pretrained(self.output_dir / "best")
        if self.writer is not None:
            for name, value in measures.items():
                if name != "step":
                    self.writer.add_scalar(f"validation/{name}", value, self.step)
        self.detector.train()

    def _measures(self) -> dict[str, float]:
        return quick_measures(self.detector, self.validation, size=self.config.size, strict=self.config.strict)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
