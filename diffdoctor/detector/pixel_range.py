"""Whether pictures are in the range that they are said to be in."""

from __future__ import annotations

import torch

from diffdoctor.runs.errors import expected


def check_pixel_range(images: torch.Tensor, value_range: tuple[float, float]) -> None:
    """Refuse pictures that are plainly in another range than the one given; waits for the device.

    What a VAE decodes exceeds its range a little, which is accepted up to half of the range's width.

    Args:
        images: floating point, of any shape.
        value_range: (low, high) of a black and a white pixel.

    Raises:
        ValueError: a value is farther outside.
    """
    if not images.numel() or not images.is_floating_point() or images.is_meta or torch.compiler.is_compiling():
        return
    (low, high), (least, most) = value_range, (float(value) for value in images.detach().aminmax())
    reach = (high - low) / 2
    if least < low - reach or most > high + reach:
        hint = "; for pictures in [-1, 1] pass value_range=(-1, 1)" if low == 0 and -2 <= least < 0 else ""
        raise ValueError(expected("images", f"values in [{low:g}, {high:g}]", f"{least:.3g} to {most:.3g}{hint}"))
