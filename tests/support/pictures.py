"""Small pictures, as arrays and as files, and what a folder holds."""

import numpy as np


def picture(height=24, width=32, seed=0):
    """A picture (H, W, 3) uint8 of blocks in a few colours."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def write_pictures(folder, count, seed=0):
    """PNG files of `picture`, numbered."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(picture(seed=seed + index)).save(folder / f"{index:02d}.png")


def write_shapes(folder, count=8, size=(40, 56), seed=0):
    """PNG files of coloured shapes in `folder`/cats and `folder`/dogs."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0 : size[0], 0 : size[1]]
    for index in range(count):
        picture = np.full((*size, 3), rng.integers(20, 90, 3))
        for _ in range(4):
            y, x, r = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(4, 12)
            picture[np.hypot(ys - y, xs - x) < r] = rng.integers(100, 255, 3)
        subfolder = folder / ("cats", "dogs")[index % 2]
        subfolder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(subfolder / f"{index:02d}.png")


def tree(folder):
    """{path below the folder: bytes} of its files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
