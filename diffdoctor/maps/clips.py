"""Clips of videos with their moving maps: the same frames of both, and one placement for all of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from diffdoctor.data.captions import captions_of, own_caption
from diffdoctor.data.codec import UnreadablePicture
from diffdoctor.data.folders import find_files, names_of
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.video import ANIMATION_SUFFIXES, VIDEO_SUFFIXES, is_video, open_video, sampled
from diffdoctor.maps.files import MapLike, Record, read_array, read_map, require_maps
from diffdoctor.maps.geometry import PairedTransform, check_proportions, placed_map, placed_picture
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import file_name

# A file, or uint8 frames (T, H, W, 3).
ClipLike: TypeAlias = "str | os.PathLike | np.ndarray"

_MAP_ENDINGS = (".mask", *(f".mask{suffix}" for suffix in (".npy", ".png", *VIDEO_SUFFIXES, *ANIMATION_SUFFIXES)))


def read_clip(clip: ClipLike, start: int = 0, stride: int = 1, count: int | None = None) -> np.ndarray:
    """Frames of a video.

    Args:
        clip: an mp4, webm, mov or mkv file (extra `video`), an animated GIF or WebP, or uint8 (T, H, W, 3).
        start: the first frame.
        stride: every so many frames one is taken.
        count: how many are taken; None: all there are.

    Returns:
        uint8 (T, H, W, 3).

    Raises:
        ValueError: an array of another shape or dtype, a number out of range, or fewer frames than that.
        UserError: a file that is no video or is broken, which is named.
    """
    for option, value, least in (("start", start, 0), ("stride", stride, 1), ("count", count, 1)):
        if value is not None and value < least:
            raise ValueError(expected(option, f"at least {least}", value))
    if isinstance(clip, np.ndarray):
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8:
            raise ValueError(expected("clip", "(T, H, W, 3) uint8", f"{clip.shape} {clip.dtype}"))
        frames = list(sampled(iter(clip), start, stride, count))
    else:
        frames = _frames_of(clip, start, stride, count)
    if not frames or (count is not None and len(frames) < count):
        name = "clip" if isinstance(clip, np.ndarray) else os.fspath(clip)
        wanted = "at least one frame" if count is None else f"{count} frames"
        raise ValueError(expected(name, f"{wanted} from {start} on, every {stride}", len(frames)))
    return np.stack(frames)


def clip_size(clip: ClipLike) -> tuple[int, int, int]:
    """(frames, height, width) of a video, in frames and pixels; a file is decoded to count them.

    Raises:
        UserError: see `read_clip`.
    """
    if isinstance(clip, np.ndarray):
        return read_clip(clip).shape[:3]
    try:
        stat = os.stat(clip)
    except OSError:
        return _counted(clip, 0, 0)  # which says why it cannot be read
    return _counted(os.fspath(clip), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _counted(clip: str | os.PathLike, size: int, changed: int) -> tuple[int, int, int]:
    """`clip_size` of a file, for which a training asks at each visit; size and time tell a file that changed."""
    try:
        with open_video(clip) as video:
            first = next(video.frames)
            return 1 + sum(1 for _ in video.frames), *first.shape[:2]
    except UnreadablePicture as error:
        raise UserError(expected(clip, "a video", error)) from error


def read_clip_map(confidence: MapLike, indices: Sequence[int] | None = None) -> np.ndarray:
    """The moving map of a video, at all of its frames or some.

    Args:
        confidence: the folder that `diagnose` writes for a video (a PNG a frame, in their order); a video whose
            brightness is the map, as other trainers take it (its codec rounds, mostly by 1/255); an `.npy` file, array
            or tensor (T, H, W), (T, H, W, 1) or (1, T, H, W); or one map (H, W) that holds for every frame.
        indices: of the frames; None: all.

    Returns:
        (T, H, W) float32 in [0, 1]; one frame where one map holds for all and no indices are given.

    Raises:
        TypeError: see `read_map`.
        ValueError: see `read_map`; no frame, or an index beyond the last one.
        UserError: a file that cannot be read, which is named.
    """
    name, parts = "confidence", None
    if isinstance(confidence, (str, os.PathLike)):
        path = Path(confidence)
        name = str(path)
        if path.is_dir():
            parts = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".png")
            if not parts:
                raise UserError(expected(path, "a folder of maps as PNG files, one a frame", "none"))
        elif path.suffix.lower() == ".npy":
            confidence = read_array(path, mmap_mode="r")
        elif is_video(path):
            parts = [frame[:, :, 0] for frame in _frames_of(path, 0, 1, None)]
    if parts is None and not isinstance(confidence, (str, os.PathLike)) and not hasattr(confidence, "getbands"):
        values = confidence
        if values.ndim == 4 and 1 in (values.shape[0], values.shape[3]):
            values = values[0] if values.shape[0] == 1 else values[..., 0]
        parts = list(values) if values.ndim == 3 else None
    if parts is None:
        one = read_map(confidence)[None]
        return one if indices is None else np.repeat(one, len(indices), axis=0)
    chosen = range(len(parts)) if indices is None else indices
    if not len(chosen):
        raise ValueError(expected(name, "a map for one frame at least", "none"))
    if max(chosen) >= len(parts):
        raise ValueError(expected(name, f"a map for frame {max(chosen)}", f"{len(parts)} frames"))
    return np.stack([read_map(parts[index]) for index in chosen])


def find_clip_map(
    clip: str | os.PathLike, maps: str | os.PathLike | None = None, name: str | None = None
) -> Path | None:
    """The moving map of a video, or None.

    Args:
        clip: the video's file, such as `set/cat.mp4`.
        maps: folder of the maps; None searches beside the video.
        name: of the video as `diagnose` calls it, its path below the set without suffix; None: the file's stem.

    Returns:
        The first that exists of `cat` (a folder, in a folder of maps alone) and `cat.mask` with nothing, `.npy`, `.png`
        or a video's suffix behind it.

    Raises:
        UserError: there is no such folder of maps.
    """
    clip = Path(clip)
    if maps is not None:
        require_maps(maps)
    name = clip.stem if name is None else name
    folder, endings = (clip.parent, _MAP_ENDINGS) if maps is None else (Path(maps), ("", *_MAP_ENDINGS))
    found = (folder / file_name(name, ending) for ending in endings)
    return next((path for path in found if path.is_dir() or (path.suffix and path.is_file())), None)


def read_clips(folder: str | os.PathLike, maps: str | os.PathLike | None = None, *, caption: str = "") -> list[Record]:
    """The videos of a folder and its subfolders, each with its caption and its moving map.

    Args:
        folder: of videos; captions as in `read_folder`.
        maps: folder of the maps, mirroring `folder`, as `diagnose` writes it; None searches beside each video.
        caption: for videos that have none.

    Returns:
        Records in the order of their paths, whose `picture` is the video's file; for a `ClipTransform`.

    Raises:
        UserError: no folder, or no video in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(expected(folder, "a folder of videos", "none"))
    counts = SkipCounts()
    files = find_files(folder, counts, without=[] if maps is None else [Path(maps)], videos=True)
    captions = captions_of(folder, (path.relative_to(folder).as_posix() for path in files), counts)
    records = []
    for path, name in zip(files, names_of(files, folder), strict=True):
        if not is_video(path):
            continue
        text = own_caption(path, folder, captions)
        found = find_clip_map(path, maps, name if maps is not None else None)
        records.append(Record(path, found, caption if text is None else text))
    if not records:
        raise UserError(expected(folder, f"videos ({', '.join((*VIDEO_SUFFIXES, *ANIMATION_SUFFIXES))})", "none"))
    return records


class ClipTransform(PairedTransform):
    """Frames of a video and of its map: the same ones, resized, cropped and flipped by one placement.

    Args:
        size: side in pixels of a square, or (height, width).
        frames: how many are taken, such as 1 + 4 k for Wan.
        stride: every so many frames one is taken.
        start: the first frame, or "random".
        **options: `buckets`, `crop`, `flip` and `resample` of `PairedTransform`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 512,
        *,
        frames: int,
        stride: int = 1,
        start: int | str = "random",
        **options,
    ):
        super().__init__(size, **options)
        for name, value in (("frames", frames), ("stride", stride)):
            if value < 1:
                raise ValueError(expected(name, "at least 1", value))
        if start != "random" and (isinstance(start, str) or start < 0):
            raise ValueError(expected("start", "'random' or a frame from 0", repr(start)))
        self.frames, self.stride, self.start = frames, stride, start

    def size_of(self, picture: ClipLike) -> tuple[int, int]:
        """(height, width) in pixels of a video's frames."""
        if isinstance(picture, np.ndarray):
            return picture.shape[1:3]
        return _frames_of(picture, 0, 1, 1)[0].shape[:2]

    def read_map(self, confidence: MapLike) -> np.ndarray:
        """A video's map (T, H, W) in [0, 1]."""
        return read_clip_map(confidence)

    def __call__(
        self, clip: ClipLike, confidence: MapLike | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, torch.Tensor | bool]:
        """Transform one pair.

        Args:
            clip: see `read_clip`.
            confidence: see `read_clip_map`; any size in the frames' proportions, with a map for every frame of the
                clip or one for all. None is a map of zeros: clean.
            rng: of the first frame, the crop and the flip; None: a new, unseeded generator.

        Returns:
            `pixel_values` (3, T, h, w) fp32 in [-1, 1]; `confidence` (1, T, h, w) fp32 in [0, 1]; `frame_indices` (T,)
            int64; and `has_map`, `original_size`, `crop_top_left` and `target_size` as `PairedTransform`.

        Raises:
            ValueError: too few frames, a map of another number of frames, or one that is not in their proportions.
        """
        rng = np.random.default_rng() if rng is None else rng
        total, *picture_size = clip_size(clip)
        placement, span = self.place(*picture_size, rng), (self.frames - 1) * self.stride + 1
        place = rng.uniform()
        first = int(place * (total - span + 1)) if self.start == "random" else self.start
        if first + span > total or total < span:
            name = "clip" if isinstance(clip, np.ndarray) else os.fspath(clip)
            raise ValueError(expected(name, f"at least {max(first, 0) + span} frames", total))
        indices = range(first, first + span, self.stride)
        frames = read_clip(clip, first, self.stride, self.frames)
        values = torch.stack([placed_picture(frame, placement, self.resample) for frame in frames], 1)
        maps = torch.zeros(1, self.frames, *placement.size)
        if confidence is not None:
            moving = read_clip_map(confidence)
            if len(moving) not in (1, total):
                raise ValueError(expected("confidence", f"a map for each of the {total} frames", len(moving)))
            check_proportions(moving.shape[1:], tuple(picture_size), confidence)
            shown = [moving[index if len(moving) > 1 else 0] for index in indices]
            maps = torch.stack([placed_map(each, placement, tuple(picture_size)) for each in shown], 1)
        return {
            "pixel_values": values.contiguous(),
            "confidence": maps,
            "has_map": confidence is not None,
            "frame_indices": torch.tensor(indices),
            **placement.conditions(tuple(picture_size)),
        }


def _frames_of(path: str | os.PathLike, start: int, stride: int, count: int | None) -> list[np.ndarray]:
    try:
        with open_video(path) as video:
            return list(sampled(video.frames, start, stride, count))
    except UnreadablePicture as error:
        raise UserError(expected(path, "a video", error)) from error


def middle_map(values: np.ndarray) -> np.ndarray:
    """The map of the middle frame of (T, H, W), or (H, W) as it is."""
    return values if values.ndim == 2 else values[len(values) // 2]
