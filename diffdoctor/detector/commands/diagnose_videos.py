"""Videos in `diffdoctor diagnose`: every frame is a picture, the video is flagged by the pixels of all of them.

The maps are a folder of PNG files, one a frame, since they are exact there, where the codecs that players know round
confidences, and since trainers read single frames of a folder without decoding those before. For people there are a
strip of frames and an animation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from diffdoctor.data.codec import UnreadablePicture
from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.sources import Source, caption_of
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.video import frame_name, open_video
from diffdoctor.detector.commands.diagnose_batches import picture_maps
from diffdoctor.detector.commands.diagnose_config import DiagnoseConfig
from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.predict import describe_map, size_check
from diffdoctor.measures.pixels import is_flagged
from diffdoctor.runs.errors import first_line
from diffdoctor.runs.files import NO_SUCH_NAME, atomic_dir, atomic_write_bytes, file_name
from diffdoctor.viz.draw import map_png, overlay, png_bytes
from diffdoctor.viz.video import Thumbnails

FAILED = "a video on which the detector failed"


def diagnose_video(detector: Detector, source: Source, config: DiagnoseConfig, counts: SkipCounts) -> dict | None:
    """Diagnose a video and write its maps and overlays.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        source: the video.
        config: the command's options.
        counts: filled with what was left out.

    Returns:
        Its record, as JSON values: name, height, width, frames, fps; max, mean, uncertainty, flagged_share and flagged
        of all frames' pixels together; worst_frame, and its components; frame_scores with the flagged_share, max and
        mean of each frame. None where it is left out.
    """
    output, name = Path(config.output), source.name
    check = size_check(detector, config.tile)
    rows, shown = [], Thumbnails()
    try:
        with open_video(source.path, check=check) as video, atomic_dir(output / "maps" / file_name(name, "")) as maps:
            for frame, confidence, more in _diagnosed(detector, video.frames, config):
                (maps / frame_name(len(rows))).write_bytes(map_png(confidence, config.bits))
                rows.append(describe_map(name, confidence) | more)
                if config.overlays:
                    shown.add(overlay(shrink_to(frame, shown.longest), _shrunk(confidence, shown.longest)))
        if config.overlays:
            atomic_write_bytes(output / "overlays" / file_name(name, ".png"), png_bytes(shown.film()))
            atomic_write_bytes(output / "overlays" / file_name(name, ".webp"), shown.animation(video.fps))
    except UnreadablePicture as error:
        counts.add(error.reason, str(source.path), config.strict, error.detail)
        return None
    except torch.AcceleratorError:
        raise  # what this process has on the GPU is lost, with any video
    except (MemoryError, RuntimeError) as error:
        counts.add(FAILED, name, config.strict, first_line(error))
        return None
    except OSError as error:
        if error.errno not in NO_SUCH_NAME:
            raise
        counts.add("a name that no file can have here", name, config.strict, error.strerror or "")
        return None
    known = {"category": source.category, "prompt": caption_of(source, config.strict, counts)}
    return _record(rows, video.fps) | {key: value for key, value in known.items() if value}


def _diagnosed(detector, frames: Iterator[np.ndarray], config) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
    size = config.frames_per_call or config.batch_size
    while chunk := list(itertools.islice(frames, size)):
        yield from zip(chunk, *picture_maps(detector, chunk, config), strict=True)


def _record(rows: list[dict], fps: float) -> dict:
    """What the frames' descriptions say of the video as a whole."""
    worst = max(range(len(rows)), key=lambda number: (rows[number]["flagged_share"], rows[number]["max"]))
    names = ("mean", "uncertainty", "flagged_share", *(["disagreement"] if "disagreement" in rows[0] else []))
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    scores = {name: [row[name] for row in rows] for name in ("flagged_share", "max", "mean")}
    return {
        **{name: rows[0][name] for name in ("name", "height", "width")},
        "frames": len(rows),
        "fps": fps,
        "max": max(row["max"] for row in rows),
        **means,
        "flagged": bool(is_flagged(means["flagged_share"])),
        "worst_frame": worst,
        "components": rows[worst]["components"],
        "frame_scores": scores,
    }


def _shrunk(confidence: np.ndarray, longest: int) -> np.ndarray:
    return shrink_to(np.rint(confidence * 255).astype(np.uint8), longest) / np.float32(255)
