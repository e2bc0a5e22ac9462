"""Small videos: a square that moves over a dark ground, and its map."""

import numpy as np
from PIL import Image


def moving_square(frames=12, height=20, width=30, side=6):
    """uint8 frames (T, H, W, 3) and their map (T, H, W) in {0, 1}: 1 in the square, one pixel further every frame."""
    maps = np.zeros((frames, height, width), np.float32)
    for number in range(frames):
        maps[number, 4 : 4 + side, 2 + number : 2 + number + side] = 1
    return np.repeat((maps * 255).astype(np.uint8)[..., None], 3, -1), maps


def write_mp4(path, frames, fps=8, options=None):
    import av

    with av.open(str(path), "w", container_options=options or {}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_animation(path, frames, fps=8):
    """A GIF, or an exact WebP."""
    first, *rest = map(Image.fromarray, frames)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **options)
