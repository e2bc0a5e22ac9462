"""What can be watched while a treatment runs: curves, and pictures on fixed prompts and seeds."""

from __future__ import annotations

import importlib.util
import math
import uuid
from pathlib import Path

import numpy as np
import torch

from diffdoctor.runs.errors import UserError, first_line, missing_extra
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_text
from diffdoctor.training.devices import accelerator_count
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.files import writing

PROJECT = "diffdoctor-treat"
# pictures smaller than this are enlarged on a sheet, pixel for pixel
_LEAST_SIDE = 64
# Of an animation: WebP ends at 16,383 pixels, and all of its frames are held at once.
_MOVING_SIDE = 2048


class Tracking:
    """Curves through Accelerate's trackers, sample sheets as PNG files; nothing without an output folder.

    Made on every process; the main one alone writes.

    Args:
        config: its log_with names the tracker.
        output_dir: for `logs/` (TensorBoard) and `samples/`; None: nothing is kept.
        step: steps done, when a run resumes: TensorBoard's curves are cut off there.
        is_main: whether this is the main process.

    Raises:
        UserError: if the tracker is not installed.
    """

    def __init__(self, config: TreatConfig, output_dir: Path | None, step: int = 0, *, is_main: bool = True):
        self.output_dir, self.is_main = output_dir, is_main
        self.accelerator = None
        kind = config.log_with
        if output_dir is None or kind == "none":
            return
        if importlib.util.find_spec(kind) is None:
            if kind == "tensorboard":
                raise missing_extra(kind, "stages")
            raise UserError(f"log_with: {kind} is not installed: run `pip install {kind}`, or use another tracker")
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=not accelerator_count(), log_with=kind, project_dir=str(output_dir))
        try:
            if kind == "tensorboard":
                self.accelerator.init_trackers("logs", init_kwargs={kind: {"purge_step": step + 1}})
            elif is_main:
                options = {"dir": str(output_dir), "id": _run_id(output_dir), "resume": "allow"}
                self.accelerator.init_trackers(PROJECT, init_kwargs={kind: options})
        except Exception as error:
            # the trackers' own errors: no account, no network, an installation that is not whole
            raise UserError(f"log_with: {kind} cannot start ({first_line(error)})") from error

    def curves(self, step: int, **values: float | None) -> None:
        """Note values at a step under their names; None and what is not finite is left out."""
        if self.accelerator is not None:
            finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
            with writing(self.output_dir):
                self.accelerator.log(finite, step=step)

    def sheet(self, step: int, pictures: torch.Tensor, confidence: torch.Tensor) -> None:
        """Write pictures and, below each, the same with its diagnosis in red: samples/step-00000020.png.

        Args:
            step: steps done.
            pictures: (B, 3, H, W) in [0, 1]; of videos (B, 3, T, H, W) some frames are shown, and all in
                samples/step-00000020.webp.
            confidence: (B, 1, H, W), (B, 1, T, H, W) of videos.
        """
        if self.output_dir is None or not self.is_main:
            return
        from diffdoctor.data.pictures import shrink_to
        from diffdoctor.viz.draw import png_bytes
        from diffdoctor.viz.video import animation

        picture, moving = sample_sheet(pictures, confidence), None
        if pictures.ndim == 5:
            frames = zip(pictures.unbind(2), confidence.unbind(2), strict=True)
            moving = animation([shrink_to(sample_sheet(*frame), _MOVING_SIDE) for frame in frames])
        with writing(self.output_dir):
            atomic_write_bytes(self.output_dir / "samples" / f"step-{step:08d}.png", png_bytes(picture))
            if moving is not None:
                atomic_write_bytes(self.output_dir / "samples" / f"step-{step:08d}.webp", moving)
            for tracker in self.accelerator.trackers if self.accelerator else ():
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": picture[None]}, step=step, **layout)

    def close(self) -> None:
        """Finish what is being written."""
        if self.accelerator is not None:
            accelerator, self.accelerator = self.accelerator, None
            with writing(self.output_dir):
                for tracker in accelerator.trackers:
                    tracker.finish()


def sample_sheet(pictures: torch.Tensor, confidence: torch.Tensor) -> np.ndarray:
    """uint8 (H', W', 3): rows of pictures (B, 3, H, W) in [0, 1], each above a row of their diagnoses (B, 1, H, W).

    Of videos (B, 3, T, H, W) some frames side by side.
    """
    from diffdoctor.viz.draw import enlarge, grid, overlay
    from diffdoctor.viz.video import film, film_indices

    if is_video := pictures.ndim == 5:
        shown = film_indices(pictures.shape[2])
        pictures, confidence = (frames[:, :, shown] for frames in (pictures, confidence))
    plain = (pictures.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    maps = confidence[:, 0].float().nan_to_num().cpu().numpy()
    scale = max(1, -(-_LEAST_SIDE // min(plain.shape[-3:-1])))
    columns = min(len(plain), max(1, 8 // len(plain[0])) if is_video else 8)

    def drawn(i, draw):
        if not is_video:
            return enlarge(draw(plain[i], maps[i]), scale)
        return film([enlarge(draw(*frame), scale) for frame in zip(plain[i], maps[i], strict=True)])

    rows = []
    for start in range(0, len(plain), columns):
        part = range(start, min(start + columns, len(plain)))
        rows.append([drawn(i, lambda picture, _: picture) for i in part])
        rows.append([drawn(i, overlay) for i in part])
    return grid(rows)


def _run_id(output_dir: Path) -> str:
    # so that a run that resumes does so in W&B too
    path = output_dir / "wandb-run-id.txt"
    if not path.is_file():
        atomic_write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
