"""What tells pictures apart, and nearly equal ones together, whatever their files are."""

from __future__ import annotations

import hashlib

import numpy as np


def picture_uid(picture: np.ndarray) -> str:
    """A picture's identity: sha256 of its size and pixels (H, W, 3) uint8, as 64 hexadecimal digits."""
    head = f"{picture.shape[0]}x{picture.shape[1]}:".encode()
    return hashlib.sha256(head + np.ascontiguousarray(picture).tobytes()).hexdigest()


def picture_hash(picture: np.ndarray) -> int:
    """A perceptual hash of 64 bits, signed: of near-duplicates it differs in a few bits.

    A bit for each of the 8 x 8 lowest frequencies (cosine transform of the grey picture at 32 x 32) that lies above
    their median; source: the common "pHash".

    Args:
        picture: (H, W, 3) uint8.
    """
    from PIL import Image
    from scipy.fft import dctn

    small = np.asarray(Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = dctn(small, norm="ortho")[:8, :8].ravel()
    # The median of an odd number of values, without the many checks of `np.median`.
    middle = np.partition(low[1:], 31)[31]
    bits = np.packbits(low > middle)
    return int.from_bytes(bits.tobytes(), "big", signed=True)
