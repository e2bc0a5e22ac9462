"""The pictures, the same at every measurement, by which a treatment is judged and shown."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffdoctor.detector.confidence import confidence_of
from diffdoctor.treat.checks import check_finite
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.drawing import Drawing
from diffdoctor.treat.monitor import Measurement, measure, scores_of


class FixedPictures:
    """Draws them with the weights that are in the denoiser, and measures them.

    Args:
        drawing: draws and diagnoses.
        config: says how many there are.
        monitor: a second detector on the drawing's device, or None.
        quality: pictures (B, 3, H, W) in [0, 1] and their prompts to numbers (B,), or None.
    """

    def __init__(
        self,
        drawing: Drawing,
        config: TreatConfig,
        monitor: torch.nn.Module | None,
        quality: Callable[[torch.Tensor, list[str]], torch.Tensor] | None,
    ):
        self.drawing, self.config = drawing, config
        self.monitor, self.quality = monitor, quality

    def draw(self, count: int, *, checked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` pictures (count, 3, H, W) and their maps, on the CPU.

        Args:
            count: how many.
            checked: look at the first ones as soon as they are there, so that a pipeline that cannot draw is refused
                before all are drawn.

        Raises:
            UserError: pictures that are not finite, if checked.
        """

        def check(pictures, latents):
            check_finite(self.drawing.sampling.family, pictures, "decodes pictures", latents)

        return self.drawing.fixed(count, check if checked else None)

    def measured(self, pictures: torch.Tensor, confidence: torch.Tensor, step: int) -> tuple[Measurement, torch.Tensor]:
        """What detector, monitor and quality say of the pictures and maps that `draw` gave after a step.

        One process decides, lest rounding on another machine make it decide otherwise.

        Returns:
            The measurement, and (B,) scores of the pictures by the quality or, without one, the maps; lower is better.
        """
        prompt_count = len(self.drawing.prompts)
        groups = [i % prompt_count for i in range(len(pictures))]
        by_monitor = None if self.monitor is None else self.by_monitor(pictures)

        def decide():
            quality = self._quality(pictures, groups)
            scores = scores_of(confidence) if quality is None else -quality
            mean = None if quality is None else float(quality.mean())
            return measure(pictures, confidence, groups, step, by_monitor, mean), scores

        return self.drawing.processes.from_main(decide)

    def by_monitor(self, pictures: torch.Tensor) -> torch.Tensor:
        """The monitor's maps (B, 1, H, W) of pictures (B, 3, H, W), on the CPU."""
        parts = (part.to(self.drawing.processes.device) for part in pictures.split(self.drawing.chunk))
        options = {"name": "monitor", "frames_per_call": self.config.frames_per_call}
        return torch.cat([confidence_of(self.monitor, part, **options).cpu() for part in parts])

    def _quality(self, pictures, groups) -> torch.Tensor | None:
        if self.quality is None:
            return None
        return self.quality(pictures, [self.drawing.prompts[group] for group in groups])
