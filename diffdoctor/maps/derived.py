"""Maps that no detector made: where an edit changed a picture; and a stamp by which a cache notices another map."""

from __future__ import annotations

import hashlib

import numpy as np

from diffdoctor.maps.files import MapLike, PictureLike, read_map, read_picture
from diffdoctor.runs.errors import expected


def edit_map(
    before: PictureLike, after: PictureLike, *, floor: float = 0.04, full: float = 0.2, spread: int = 2
) -> np.ndarray:
    """Where an edit changed a picture, for editing models whose loss should heed what is edited.

    A pixel's confidence rises linearly from 0 where the largest difference of its channels is `floor` to 1 where it is
    `full`; each pixel then takes the largest confidence within `spread` pixels.

    Args:
        before: the picture that is edited.
        after: the edited one, of the same size.
        floor: difference that is still none, of [0, 1]; JPEG's errors are mostly below 0.04.
        full: difference from which the confidence is 1.
        spread: in pixels.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        ValueError: pictures of two sizes, or an option out of range.
        UserError: a file that is no picture or is broken.
    """
    if not 0 <= floor < full <= 1:
        raise ValueError(expected("floor, full", "0 <= floor < full <= 1", f"{floor}, {full}"))
    if spread < 0:
        raise ValueError(expected("spread", ">= 0 pixels", spread))
    one, other = (np.asarray(read_picture(picture), np.int16) for picture in (before, after))
    if one.shape != other.shape:
        raise ValueError(expected("after", f"a picture of {one.shape[0]} x {one.shape[1]}", other.shape[:2]))
    difference = np.abs(one - other).max(axis=2).astype(np.float32) / 255
    confidence = np.clip((difference - floor) / (full - floor), 0, 1)
    if spread:
        import torch

        window = torch.from_numpy(confidence)[None, None]
        confidence = torch.nn.functional.max_pool2d(window, 2 * spread + 1, 1, spread)[0, 0].numpy()
    return confidence.astype(np.float32)


def map_stamp(confidence: MapLike | None) -> str:
    """A text that differs where a map does, to be kept beside latents that were cached with it.

    Args:
        confidence: a map, see `read_map`; None: the picture has none.

    Returns:
        32 hexadecimal digits of the values in 1/255 and the size, whatever file they came from.
    """
    digest = hashlib.sha256()
    if confidence is not None:
        levels = np.rint(255 * np.asarray(read_map(confidence), np.float64)).astype(np.uint8)
        digest.update(f"{levels.shape}".encode() + levels.tobytes())
    return digest.hexdigest()[:32]
