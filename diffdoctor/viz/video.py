"""Videos for people: some frames side by side, and an animation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from diffdoctor.viz.draw import GAP

FILM_FRAMES = 5


def film_indices(frames: int, count: int = FILM_FRAMES) -> list[int]:
    """At most `count` evenly spaced indices of so many frames, the first and the last among them."""
    return np.unique(np.linspace(0, frames - 1, min(count, frames)).round().astype(int)).tolist()


def film(frames: Sequence[np.ndarray], count: int = FILM_FRAMES) -> np.ndarray:
    """Evenly spaced frames of a video side by side.

    Args:
        frames: T arrays (H, W, ...) of one size.
        count: how many are shown at most.

    Returns:
        (H, W', ...): with gaps between them, of the largest value of the dtype, 1 for floats.
    """
    shown = [frames[index] for index in film_indices(len(frames), count)]
    white = 1 if np.issubdtype(shown[0].dtype, np.floating) else np.iinfo(shown[0].dtype).max
    gap = np.full((len(shown[0]), GAP, *shown[0].shape[2:]), white, shown[0].dtype)
    return np.concatenate([part for frame in shown for part in (gap, frame)][1:], axis=1)


def animation(frames: Sequence[np.ndarray], fps: float = 16.0) -> bytes:
    """An animated WebP, repeated for ever, for people to look at: it is not exact.

    Args:
        frames: uint8 (H, W, 3) of one size.
        fps: frames a second.
    """
    from PIL import Image

    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    options = {"duration": round(1000 / fps), "loop": 0, "quality": 85, "method": 4}
    first.save(buffer, format="WEBP", save_all=True, append_images=rest, **options)
    return buffer.getvalue()
