"""`treat`: tune a LoRA of a pipeline so that a detector finds fewer artifacts in what it draws."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from diffdoctor._checkpoints import Checkpoints
from diffdoctor._errors import UserError
from diffdoctor._io import atomic_write_json
from diffdoctor._progress import progress as show_progress
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora, load_lora_state, lora_state, merged_lora, save_lora
from diffdoctor.treat.methods import kept_steps
from diffdoctor.treat.monitor import Measurement, Monitor, measure
from diffdoctor.treat.processes import Processes, seed_of
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.rollout import Guidance, Rollout, initial_latents, picture_generators, roll_out
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.signals import deferred_signals
from diffdoctor.treat.terms import artifact_term, diagnose, offline_term, prepare_offline

logger = logging.getLogger(__name__)

# what the random numbers of a treatment are for; part of every seed
_PICTURES, _METHOD, _PAIRS, _FIXED, _ORDER, _LORA = range(6)


@dataclass
class TreatResult:
    """A finished treatment; the pipeline given to `treat` carries the best weights.

    Attributes:
        pipeline: the treated pipeline.
        history: a dict per step: step, loss, artifact_loss, offline_loss, replayed, grad_norm, learning_rate.
        measurements: of the fixed pictures, the first before any step.
        best_step: the step whose weights were kept.
        stopped: why it ended before the last step, or None.
        skipped: steps left out because a loss or gradient was not finite.
        seconds: wall time.
        lora_dir: where the LoRA was written, or None.
    """

    pipeline: object
    history: list[dict]
    measurements: list[Measurement]
    best_step: int
    stopped: str | None
    skipped: int
    seconds: float
    lora_dir: Path | None = field(default=None)

    def save_lora(self, folder: str | Path) -> Path:
        """Write the LoRA for `pipeline.load_lora_weights(folder)`."""
        return save_lora(family_of(self.pipeline), folder)


def treat(
    pipeline,
    detector: torch.nn.Module,
    prompts: Sequence[str],
    config: TreatConfig | None = None,
    *,
    offline=None,
    monitor: torch.nn.Module | None = None,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> TreatResult:
    """Tune a LoRA of `pipeline` with what `detector` finds in its pictures.

    Each step samples pictures without a graph, diagnoses them, and replays the last denoising steps of the flagged ones
    with a graph; the artifact loss of the decoded picture flows back through them, modulated by the confidence map at
    the denoiser's output. A denoising loss on the pipeline's own training pairs, flagged pixels masked out, holds the
    rest of the model in place.

    Args:
        pipeline: a loaded diffusers text-to-image pipeline of a known family; LoRA is added to its denoiser.
        detector: pictures (B, 3, H, W) in [0, 1] to logits (B, 1, h, w), with `.confidence`; see `diffdoctor.detector`.
        prompts: what to draw during the treatment.
        config: options; defaults when None.
        offline: (pictures uint8 (N, H, W, 3), prompts), or a sequence of dicts with "picture" and "prompt"; needed when
            offline_weight > 0 or method is "weighted".
        monitor: a second detector, never the one that judges the result: when it finds more artifacts than before while
            `detector` finds fewer, the treatment stops.
        output_dir: for `lora/`, `treat.json` and checkpoints, from which the same call goes on after an interruption.
        progress: show a bar, or plain lines where there is no terminal.

    Returns:
        A `TreatResult`.

    Raises:
        UserError: a pipeline or scheduler that is not served, no prompts, missing offline pairs, checkpoints of another
            treatment, or `max_skipped` steps in a row whose loss or gradient was not finite.
    """
    treatment = _Treatment(pipeline, detector, prompts, config or TreatConfig(), offline, monitor, output_dir)
    return treatment.run(progress)


class _Treatment:
    def __init__(self, pipeline, detector, prompts, config: TreatConfig, offline, second, output_dir):
        self.config = config
        self.family = family = family_of(pipeline)
        self.processes = Processes()
        self.device = device = self.processes.device
        pipeline.to(device)
        self.detector = detector.to(device).eval().requires_grad_(False)
        self.second = None if second is None else second.to(device).eval().requires_grad_(False)
        self.prompts = check_prompts(pipeline, prompts, strict=config.strict)
        family.max_sequence_length = config.max_sequence_length or None
        self.height, self.width = family.picture_size(config.height, config.width)
        self.guidance = Guidance(config.guidance_scale, config.cfg_grad)
        options = family.timestep_options(config.sampling_steps, self.height, self.width)
        self.sampler = Sampler(pipeline.scheduler, device=device, timestep_options=options)
        self.chunk = max(1, math.ceil(config.batch_size / self.processes.count))
        self.conditioning = family.encode_prompts(
            self.prompts, guidance_scale=config.guidance_scale, height=self.height, width=self.width, device=device
        )
        self.pairs = None
        if config.offline_weight > 0 or config.method == "weighted":
            if offline is None:
                raise UserError("offline: (pictures, prompts) pairs were expected, since offline_weight > 0; got None")
            self.pairs = prepare_offline(
                family, self.detector, offline, config, self.height, self.width, device, self.chunk
            )
        if config.attention_backend:
            family.denoiser.set_attention_backend(config.attention_backend)
        self.parameters = add_lora(
            family,
            rank=config.rank,
            alpha=config.alpha or config.rank,
            groups=[group for group in config.lora_targets if group in family.lora_targets] or config.lora_targets,
            seed=seed_of(config.seed, _LORA),
        )
        if config.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
            family.vae.enable_gradient_checkpointing()
        if config.precision == "bf16":
            family.autocast_dtype = torch.bfloat16
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            eps=config.adam_epsilon,
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay else []
        self.monitor = Monitor(config)
        self.history: list[dict] = []
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.checkpoints = None
        if self.output_dir is not None:
            settings = {**asdict(config), "prompts": seed_of(*_bytes(self.prompts))}
            self.checkpoints = Checkpoints(
                self.output_dir / "checkpoints",
                settings,
                refusal="holds checkpoints of a treatment with another {}: choose another output folder or remove them",
            )

    def run(self, progress: bool) -> TreatResult:
        started = time.perf_counter()
        self._resume()
        stopped = None
        enabled = progress and self.processes.is_main
        with (
            deferred_signals(self.checkpoints is not None) as interruption,
            show_progress(self.config.steps, desc="treatment", enabled=enabled) as bar,
        ):
            bar.update(self.step)
            if not self.monitor.measurements:
                stopped = self._measure()
            while self.step < self.config.steps and stopped is None:
                self._take_step()
                if self._is_due(self.config.evaluate_every) or self.step == self.config.steps:
                    stopped = self._measure()
                bar.set_postfix(loss=self.history[-1]["loss"], flagged_area=self.monitor.measurements[-1].flagged_area)
                bar.update()
                if interruption.signal is not None or self._is_due(self.config.checkpoint_every):
                    self._checkpoint()
                if interruption.signal is not None:
                    break
        # a signal that was held back is delivered when the block above ends, so what follows runs only without one
        return self._finish(stopped, time.perf_counter() - started)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _take_step(self) -> None:
        config, step = self.config, self.step
        self.optimizer.zero_grad(set_to_none=True)
        artifact, replayed = 0.0, 0
        if config.method != "weighted" and config.map_source != "uniform":
            artifact, replayed = self._online(step)
        offline = self._offline(step) if self.pairs is not None else 0.0
        self.processes.sum_gradients(self.parameters)
        artifact, replayed, offline = self.processes.sum_values(artifact, replayed, offline)
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        weight = 1.0 if config.method == "weighted" else config.offline_weight
        loss = artifact + weight * offline
        rate = config.learning_rate * self._rate_factor(step)
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            if self.average:
                decay = min(config.ema_decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        else:
            self._skip(loss, norm)
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
        mine = self.processes.share(config.batch_size)
        seeds = [seed_of(config.seed, _PICTURES, step, i) for i in mine]
        rows = torch.tensor([self._prompt_row(step * config.batch_size + i) for i in mine], dtype=torch.long)
        if not mine:
            return 0.0, 0
        rollout = self._sample(rows, seeds, kept_steps(config.method, config.grad_steps, len(self.sampler)))
        _, confidence = diagnose(self.family, self.detector, rollout.final, self.chunk)
        generator = torch.Generator().manual_seed(seed_of(config.seed, _METHOD, step))
        return artifact_term(
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

    def _offline(self, step: int) -> float:
        config = self.config
        total = config.offline_batch_size or config.batch_size
        draws = [seed_of(config.seed, _PAIRS, step, i) for i in self.processes.share(total)]
        if not draws:
            return 0.0
        loss = offline_term(self.family, self.sampler, self.pairs, config, draws=draws, total=total)
        (loss if config.method == "weighted" else config.offline_weight * loss).backward()
        return float(loss.detach())

    def _sample(self, rows: torch.Tensor, seeds: Sequence[int], keep: Sequence[int]) -> Rollout:
        generators = picture_generators(seeds)
        dtype = next(self.family.denoiser.parameters()).dtype
        latents = initial_latents(self.family, self.sampler, generators, self.height, self.width, self.device, dtype)
        with merged_lora(self.family) if self.config.merge_rollout else nullcontext():
            return roll_out(
                self.family,
                self.sampler,
                self.conditioning.rows(rows),
                latents,
                generators,
                self.guidance,
                keep=keep,
                chunk=self.chunk,
            )

    def _prompt_row(self, count: int) -> int:
        # every prompt once before any comes again, in an order of its own each time round
        number = len(self.prompts)
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, _ORDER, count // number))
        return int(torch.randperm(number, generator=generator)[count % number])

    def _measure(self) -> str | None:
        config = self.config
        rows = torch.arange(config.evaluate_pictures) % len(self.prompts)
        seeds = [seed_of(config.seed, _FIXED, i) for i in range(config.evaluate_pictures)]
        trained = [p.detach().clone() for p in self.parameters] if self.average else []
        self._put(self.average)
        finals = [
            self._sample(rows[places], [seeds[i] for i in places.tolist()], ()).final
            for places in torch.arange(len(rows)).split(self.chunk)
        ]
        pictures, confidence = diagnose(self.family, self.detector, torch.cat(finals), self.chunk)
        second = None
        if self.second is not None:
            with torch.no_grad():
                second = torch.cat([self.second.confidence(part) for part in pictures.split(self.chunk)])
        measurement = measure(pictures, confidence, rows.tolist(), self.step, second)
        stopped = self.monitor.add(measurement, lambda: lora_state(self.family))
        self._put(trained)
        return stopped

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=bool(values)):
                parameter.copy_(value)

    def _checkpoint(self) -> None:
        if self.checkpoints is None:
            return
        if self.processes.is_main:
            state = {
                "step": self.step,
                "lora": [p.detach() for p in self.parameters],
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "monitor": self.monitor.state_dict(),
                "history": self.history,
                "skipped": [self.skipped, self.skipped_in_a_row],
            }
            self.checkpoints.save(self.step, state)
        self.processes.wait()

    def _resume(self) -> None:
        found = None if self.checkpoints is None else self.checkpoints.load()
        if found is None:
            return
        state, _ = found
        self.step, self.history = state["step"], state["history"]
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self._put(state["lora"])
        self.average = [value.to(self.device) for value in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["monitor"])

    def _finish(self, stopped: str | None, seconds: float) -> TreatResult:
        best = self.monitor.best
        if best is not None and self.monitor.best_state is not None:
            load_lora_state(self.family, self.monitor.best_state)
        self.family.autocast_dtype = None
        result = TreatResult(
            pipeline=self.family.pipeline,
            history=self.history,
            measurements=self.monitor.measurements,
            best_step=0 if best is None else best.step,
            stopped=stopped,
            skipped=self.skipped,
            seconds=seconds,
        )
        if self.output_dir is not None:
            if self.processes.is_main:
                save_lora(self.family, self.output_dir / "lora")
                atomic_write_json(self.output_dir / "treat.json", _summary(result, self.config))
                self.checkpoints.remove()
            self.processes.wait()
            result.lora_dir = self.output_dir / "lora"
        return result


def _summary(result: TreatResult, config: TreatConfig) -> dict:
    return {
        "config": asdict(config),
        "best_step": result.best_step,
        "stopped": result.stopped,
        "skipped": result.skipped,
        "seconds": result.seconds,
        "measurements": [asdict(measurement) for measurement in result.measurements],
        "history": result.history,
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bytes(prompts: Sequence[str]) -> list[int]:
    data = "\n".join(prompts).encode("utf-8")
    return [len(data), *(int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8))]
