"""Videos as frames: mp4, webm and their kin by PyAV (extra `video`), animated GIF and WebP by Pillow.

Frames are read one after another and never held as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from diffdoctor.data.codec import MAX_PIXELS, SizeCheck, UnreadablePicture, as_array, open_picture
from diffdoctor.runs.errors import first_line, missing_extra

if TYPE_CHECKING:
    from PIL import Image

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
ANIMATION_SUFFIXES = (".gif", ".webp")
BROKEN = "a broken video"
# What is opened, whatever the file is called: no playlists, which lead to other files and addresses.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
_FPS = 10.0  # where a file says nothing
_MATROSKA, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
_MOST_BOXES = 2**16  # of an mp4 file that are looked at


@dataclasses.dataclass(frozen=True)
class Video:
    """An opened video.

    Attributes:
        frames: its frames, uint8 (H, W, 3), upright, to be read once.
        fps: frames a second.
    """

    frames: Iterator[np.ndarray]
    fps: float


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is a video: by its name, or a GIF or WebP picture of several frames."""
    suffix = Path(path).suffix.lower()
    if suffix not in ANIMATION_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    try:
        with open_picture(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except UnreadablePicture:
        return False


def frame_name(number: int) -> str:
    """The file of a frame's map in the folder of its video's maps."""
    return f"{number:06d}.png"


@contextmanager
def open_video(path: str | os.PathLike, *, check: SizeCheck | None = None) -> Iterator[Video]:
    """A context with a video to be read.

    Args:
        path: an mp4, webm, mov or mkv file, or an animated GIF or WebP picture.
        check: refuses videos by the size of a frame, before any is decoded; see `codec.decode`.

    Raises:
        UnreadablePicture: it cannot be read, also while its frames are.
        UserError: PyAV is not installed.
    """
    opened = _by_pillow if Path(path).suffix.lower() in ANIMATION_SUFFIXES else _by_pyav
    context = opened(path, check or (lambda height, width: None))
    frames, fps = context.__enter__()
    try:
        yield Video(_checked(frames), fps if fps > 0 else _FPS)
    finally:
        # an error of the block is none of the file, which the context would make of it
        context.__exit__(None, None, None)


def sampled(frames: Iterator[np.ndarray], start: int = 0, stride: int = 1, count: int | None = None) -> Iterator:
    """Every `stride`-th of the frames from `start` on, `count` of them at most; None: all."""
    return itertools.islice(frames, start, None if count is None else start + (count - 1) * stride + 1, stride)


@contextmanager
def _by_pillow(path, check) -> Iterator[tuple[Iterator[np.ndarray], float]]:
    with open_picture(path) as image:
        _check_size(image.height, image.width, check)
        image.load()  # a WebP file says its frames' duration when one is decoded
        milliseconds = image.info.get("duration") or 0
        yield _pillow_frames(image), 1000 / milliseconds if milliseconds > 0 else 0.0


def _pillow_frames(image: Image.Image) -> Iterator[np.ndarray]:
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        yield as_array(image, "RGB")


@contextmanager
def _by_pyav(path, check) -> Iterator[tuple[Iterator[np.ndarray], float]]:
    try:
        import av
    except ImportError:
        raise missing_extra("av", "video") from None
    try:
        with open(path, "rb") as file:
            if _ends_early(file):
                raise UnreadablePicture(BROKEN, "it breaks off")
        with open(path, "rb") as file, av.open(file, options={"format_whitelist": _DEMUXERS}) as container:
            if not container.streams.video:
                raise UnreadablePicture("a file without a video")
            stream = container.streams.video[0]
            _check_size(stream.height, stream.width, check)
            stream.thread_type = "AUTO"
            yield _pyav_frames(container, stream), float(stream.average_rate or stream.guessed_rate or 0)
    except (UnreadablePicture, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, av.error.FFmpegError):
            raise UnreadablePicture("a file that cannot be read", error.strerror or str(error)) from error
        raise _broken(error) from error  # a stream whose codec is not known has no height, for one


def _ends_early(file: BinaryIO) -> bool:
    """Whether an mp4 or Matroska file says that more bytes belong to it than it has: FFmpeg reads on without a word."""
    total = os.fstat(file.fileno()).st_size
    if file.read(4) == _MATROSKA:
        file.seek(_variable_int(file) or 0, os.SEEK_CUR)
        size = _variable_int(file) if file.read(4) == _SEGMENT else None
        return size is not None and file.tell() + size > total
    place = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        if size < 8:  # it goes to the end, or is no box
            return False
        place += size
        if place > total:
            return kind == b"mdat"
    return False


def _variable_int(file: BinaryIO) -> int | None:
    """A size as Matroska writes it; None where it is left open."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    most = (1 << 7 * length) - 1
    value = int.from_bytes(first + file.read(length - 1), "big") & most
    return None if value == most else value


def _pyav_frames(container, stream) -> Iterator[np.ndarray]:
    frame = None
    for frame in container.decode(stream):
        # the angle is counter-clockwise, in degrees
        yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    if frame is None:
        raise UnreadablePicture("a video without frames")


def _check_size(height: int, width: int, check: Callable[[int, int], str | None]) -> None:
    if height * width > MAX_PIXELS:
        raise UnreadablePicture(f"a video of more than {MAX_PIXELS:,} pixels a frame")
    if reason := check(height, width):
        raise UnreadablePicture(reason)


def _checked(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames; whatever a decoder raises becomes `UnreadablePicture`, as a frame of another size."""
    shape = None
    while True:
        try:
            frame = next(frames, None)
        except (UnreadablePicture, MemoryError):
            raise
        except Exception as error:  # decoders of hostile bytes raise whatever comes
            raise _broken(error) from error
        if frame is None:
            return
        shape = shape or frame.shape
        if frame.shape != shape:
            raise UnreadablePicture("a video whose frames differ in size")
        yield frame


def _broken(error: Exception) -> UnreadablePicture:
    return UnreadablePicture(BROKEN, getattr(error, "strerror", None) or first_line(error))
