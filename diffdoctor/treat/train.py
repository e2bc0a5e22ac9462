"""`treat`: tune a LoRA of a pipeline so that a detector finds fewer artifacts in what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from diffdoctor.maps.ranking import write_ranking
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Family, family_of
from diffdoctor.treat.files import writing
from diffdoctor.treat.lora import save_lora
from diffdoctor.treat.monitor import Measurement, doubts
from diffdoctor.treat.treatment import Treatment
from diffdoctor.treat.webui import WEBUI_NAME, save_for_webui


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
        seconds: wall time, that of interrupted calls up to their last checkpoint included.
        doubts: what says that nothing was treated, a sentence each.
        lora_dir: where the LoRA was written, or None.
        denoiser: which of two denoisers was tuned, high or low; None where there is one alone.
    """

    pipeline: object
    history: list[dict]
    measurements: list[Measurement]
    best_step: int
    stopped: str | None
    skipped: int
    seconds: float
    doubts: list[str] = field(default_factory=list)
    lora_dir: Path | None = field(default=None)
    denoiser: str | None = None

    def save_lora(self, folder: str | Path) -> Path:
        """Write the LoRA for `pipeline.load_lora_weights(folder)`."""
        return save_lora(self._family(), folder)

    def save_for_webui(self, path: str | Path) -> Path:
        """Write the LoRA as one .safetensors file for ComfyUI and A1111."""
        return save_for_webui(self._family(), path)

    def _family(self) -> Family:
        family = family_of(self.pipeline)
        family.choose_denoiser(self.denoiser)
        return family


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
    settings: dict | None = None,
    lora: str | Path | None = None,
    reward: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None,
    quality: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None,
    webui: bool = False,
    device: str | None = None,
) -> TreatResult:
    """Tune a LoRA of `pipeline` with what `detector` finds in its pictures.

    Each step samples pictures without a graph, diagnoses them, and replays the last denoising steps of the flagged ones
    with a graph; the artifact loss of the decoded picture flows back through them, modulated by the confidence map at
    the denoiser's output. A denoising loss on the pipeline's own training pairs, flagged pixels masked out, holds the
    rest of the model in place.

    Args:
        pipeline: a loaded diffusers text-to-image pipeline of a known family; LoRA is added to its denoiser.
        detector: pictures (B, 3, H, W) in [0, 1] to logits (B, 1, h, w), with `.confidence`; see `diffdoctor.detector`.
            For methods without a gradient through it (grpo, nft, weighted) any function from pictures to maps
            (B, 1, h, w) in [0, 1].
        prompts: what to draw during the treatment.
        config: options; defaults when None.
        offline: the pipeline's own training pairs: (pictures uint8 (N, H, W, 3), prompts), or a sequence of dicts with
            "picture", uint8 (H, W, 3), and "prompt"; of videos (T, H, W, 3) of one length. Needed unless
            offline_weight is 0 or left open with method nft or grpo, and always with method weighted.
        monitor: a second detector, never the one that judges the result: when it finds more artifacts than before while
            `detector` finds fewer, the treatment stops.
        output_dir: for `lora/`, `treat.json`, `config.yaml`, `samples/`, `logs/`, checkpoints, `ranking.parquet` and
            `ranking.html`: the offline pictures by loss and artifact share. The same call resumes there after an
            interruption; after the last step it gives the finished treatment.
        progress: show a bar, or plain lines where there is no terminal.
        settings: what else `config.yaml` is to hold, beside the options.
        lora: folder, file or hub id of a LoRA to begin with: it is tuned on, with its own rank, alpha and modules, and
            the result contains it. None: a new one, which changes nothing at first. (A LoRA that the pipeline carries
            and that is active stays so, frozen, and is no part of the result.)
        reward: for method grpo a further reward of whole pictures, which counts `reward_weight` times beside the maps:
            a function from pictures (B, 3, H, W) in [0, 1], on the treatment's device, and their prompts to B numbers,
            higher for better pictures. None: the maps alone.
        quality: a measure beside the detector, by which the best weights and patience are decided instead of by its
            maps: labels of a person, a rule, a classifier; a function as `reward`, asked at each measurement about the
            fixed pictures, which are on the CPU. None: the detector's maps decide.
        webui: write the LoRA for ComfyUI and A1111 too, to `lora-webui.safetensors` in the output folder.
        device: such as cpu or cuda:1; None: the fastest there is.

    Returns:
        A `TreatResult`.

    Raises:
        UserError: a pipeline or scheduler that is not served, no prompts, missing offline pairs, a detector or monitor
            that gives NaN, a monitor that is the detector, a VAE that gives NaN, a pipeline inside `with
            autoguide(...)`, checkpoints of a treatment with other options, weights, prompts or pairs, an output folder
            that cannot be written, holds a `lora` of another origin or where another process is at work, or
            `max_skipped` steps in a row whose loss or gradient was not finite.
    """
    treatment = Treatment(
        pipeline,
        detector,
        prompts,
        config or TreatConfig(),
        offline,
        monitor,
        output_dir,
        settings,
        lora=lora,
        reward=reward,
        quality=quality,
        device=device,
    )
    try:
        stopped = treatment.run(progress)
        best = treatment.early_stopping.best
        result = TreatResult(
            pipeline=pipeline,
            history=treatment.history,
            measurements=treatment.early_stopping.measurements,
            best_step=0 if best is None else best.step,
            stopped=stopped,
            skipped=treatment.training.skipped,
            seconds=treatment.seconds,
            denoiser=treatment.config.denoiser,
            doubts=doubts(treatment.early_stopping.measurements, treatment.history, treatment.config),
        )
        if output_dir is not None:
            _write(result, treatment, Path(output_dir), webui)
    finally:
        if treatment.folder is not None:
            treatment.folder.close()
    return result


def _write(result: TreatResult, treatment: Treatment, output_dir: Path, webui: bool) -> None:
    if treatment.processes.is_main:
        with writing(output_dir):
            save_lora(treatment.sampling.family, output_dir / "lora")
            if webui:
                save_for_webui(treatment.sampling.family, output_dir / WEBUI_NAME)
            if len(treatment.ranking):
                write_ranking(output_dir, treatment.ranking, treatment.offline.named)
            atomic_write_json(output_dir / "treat.json", _summary(result, treatment.config))
        treatment.checkpoints.keep_last()
    treatment.processes.wait()
    result.lora_dir = output_dir / "lora"


def _summary(result: TreatResult, config: TreatConfig) -> dict:
    return {
        "config": asdict(config),
        "best_step": result.best_step,
        "stopped": result.stopped,
        "skipped": result.skipped,
        "seconds": result.seconds,
        "doubts": result.doubts,
        "measurements": [asdict(measurement) for measurement in result.measurements],
        "history": result.history,
    }
