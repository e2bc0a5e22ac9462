"""Pictures as people have them, paths, PIL's and NumPy's, as what a detector takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from diffdoctor.data.codec import UnreadablePicture, as_array, decode
from diffdoctor.data.pictures import to_images
from diffdoctor.runs.errors import UserError, expected

if TYPE_CHECKING:
    from PIL import Image

    Picture: TypeAlias = str | os.PathLike | Image.Image | np.ndarray

_KINDS = "a float tensor (B, 3, H, W), or pictures: paths, PIL images or uint8 arrays (H, W, 3)"


def as_images(pictures: Picture | Sequence[Picture], device: torch.device) -> torch.Tensor:
    """One picture or several of one size as (B, 3, H, W) float32 in [0, 1].

    Args:
        pictures: a path, a PIL image or a uint8 array (H, W, 3), a list of these, or a uint8 array (B, H, W, 3).
        device: of the result.

    Raises:
        TypeError: something else.
        ValueError: there is none, or they differ in size.
        UserError: a file is no picture that can be read.
    """
    is_one = not isinstance(pictures, (list, tuple)) and not (isinstance(pictures, np.ndarray) and pictures.ndim == 4)
    arrays = [_as_array(picture) for picture in ([pictures] if is_one else pictures)]
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) != 1:
        got = f"sizes {sizes[0]} and {sizes[1]}; give them one by one" if sizes else "none"
        raise ValueError(expected("images", "at least one picture, and all of one size (height, width)", got))
    return to_images(arrays, device)


def _as_array(picture: Picture) -> np.ndarray:
    if isinstance(picture, (str, os.PathLike)):
        try:
            return decode(picture, "RGB")
        except UnreadablePicture as error:
            raise UserError(expected(picture, "a picture that can be read", error.detail or error)) from error
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise TypeError(expected("images", _KINDS, f"an array of {picture.dtype} {picture.shape}"))
        return picture
    if hasattr(picture, "convert"):
        return as_array(picture, "RGB")
    raise TypeError(expected("images", _KINDS, type(picture).__name__))
