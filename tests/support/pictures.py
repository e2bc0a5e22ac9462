"""Small pictures, as arrays and as files, and what a folder holds."""

import numpy as np


def picture(height=24, width=32, seed=0):
    """A picture (H, W, 3) uint8 of blocks in a few colours."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def write_pictures(folder, count, seed=0):
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(picture(seed=seed + index)).save(folder / f"{index:02d}.png")


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
