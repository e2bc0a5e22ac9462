"""Videos for people: some frames side by side, and an animation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from diffdoctor.viz.draw import GAP

FILM_FRAMES = 5
# Of an animation, so that a long video fits into memory and onto a page.
_LONGEST_SIDE, _MOST_FRAMES = 384, 240
_LONGEST_FRAME = 60_000  # milliseconds


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
    milliseconds = min(max(round(1000 / fps), 1), _LONGEST_FRAME)
    options = {"duration": milliseconds, "loop": 0, "quality": 85, "method": 4}
    first.save(buffer, format="WEBP", save_all=True, append_images=rest, **options)
    return buffer.getvalue()


class Thumbnails:
    """Small frames of a video of any length, for an animation and a strip: where there are too many, every second goes.

    Attributes:
        longest: side in pixels that frames are to have at most.
    """

    longest = _LONGEST_SIDE

    def __init__(self):
        self._frames: list[np.ndarray] = []
        self._seen, self._stride = 0, 1

    def add(self, frame: np.ndarray) -> None:
        """Take the next frame, uint8 (H, W, 3)."""
        if self._seen % self._stride == 0:
            self._frames.append(frame)
        self._seen += 1
        if len(self._frames) > _MOST_FRAMES:
            self._frames, self._stride = self._frames[::2], 2 * self._stride

    def film(self) -> np.ndarray:
        """Some of the frames side by side."""
        return film(self._frames)

    def animation(self, fps: float) -> bytes:
        """An animated WebP of a video of so many frames a second, as long as the video."""
        return animation(self._frames, fps / self._stride)
