"""Exchange with Label Studio: its run lengths, its tasks, its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import read_text
from diffdoctor.runs.errors import UserError, expected

FROM_NAME, TO_NAME, LABEL = "tag", "image", "artifact"
CONFIG = f"""<View>
  <Image name="{TO_NAME}" value="$image" zoom="true" zoomControl="true"/>
  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">
    <Label value="{LABEL}" background="#d33"/>
  </BrushLabels>
</View>
"""
# Bits of a run's length, by the two bits that choose among them.
_SIZES = (3, 4, 8, 16)
_LONGEST = 2**16
_MOST_JSON = 2**31


def encode_rle(mask: np.ndarray) -> list[int]:
    """A mask (H, W) uint8 as Label Studio's run lengths: of RGBA pixels that all hold the mask's value.

    A stream of bits, of which the highest of a byte comes first: the number of values (32 bits), bits a value less one
    (5), four sizes less one (4 each), then for each run a bit (1: a run, 0: single values), the index of a size (2),
    the length less one in so many bits, and the value (8). Source: the format of @thi.ng/rle-pack, by what
    label-studio-sdk 2.1.2 writes.

    Returns:
        Bytes as whole numbers.
    """
    flat = np.ascontiguousarray(mask, np.uint8).ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[:1] + np.uint8(1)))
    lengths, values = 4 * np.diff(starts, append=len(flat)), flat[starts].astype(np.int64)
    # A run has at most 65,536 values; longer ones are several.
    pieces = -(-lengths // _LONGEST)
    values = np.repeat(values, pieces)
    last = np.cumsum(pieces) - 1
    parts = np.full(len(values), _LONGEST, np.int64)
    parts[last] = lengths - (pieces - 1) * _LONGEST
    index = np.searchsorted([8, 16, 256], parts, side="left")
    size = np.array(_SIZES)[index]
    codes = ((((4 | index) << size) | (parts - 1)) << 8) | values
    return _packed([(4 * len(flat), 32), (7, 5), *((each - 1, 4) for each in _SIZES)], codes, 3 + size + 8)


def _packed(head: list[tuple[int, int]], codes: np.ndarray, widths: np.ndarray) -> list[int]:
    codes = np.concatenate([[value for value, _ in head], codes])
    widths = np.concatenate([[width for _, width in head], widths])
    ends = np.cumsum(widths)
    # The SDK fills the last byte, and where that is full adds one.
    bits = np.zeros(8 * (int(ends[-1]) // 8 + 1), np.uint8)
    for bit in range(int(widths.max())):
        has = widths > bit
        bits[ends[has] - 1 - bit] = (codes[has] >> bit) & 1
    return np.packbits(bits).tolist()


def decode_rle(rle: list[int], height: int, width: int) -> np.ndarray:
    """The mask (H, W) uint8 in Label Studio's run lengths: the alpha channel, of values 0..255.

    Args:
        rle: bytes as whole numbers.
        height, width: of the picture.

    Raises:
        UserError: they are broken, or of another size.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise UserError(expected("rle", "a list of bytes", error)) from None
    bits = _Bits(data)
    count, word = bits.take(32), bits.take(5) + 1
    sizes = [bits.take(4) + 1 for _ in _SIZES]
    if count != 4 * height * width or word != 8:
        raise UserError(expected("rle", f"{4 * height * width} values of 8 bits", f"{count} of {word}"))
    out, at = np.zeros(count, np.uint8), 0
    while at < count:
        is_run = bits.take(1)
        length = bits.take(sizes[bits.take(2)]) + 1
        if at + length > count:
            raise UserError(expected("rle", f"runs of {count} values", "more"))
        if is_run:
            out[at : at + length] = bits.take(8)
        else:
            out[at : at + length] = [bits.take(8) for _ in range(length)]
        at += length
    return out.reshape(height, width, 4)[..., 3]


class _Bits:
    """Reads numbers from a stream of bits."""

    def __init__(self, data: bytes):
        self.data, self.at, self.end = data, 0, 8 * len(data)

    def take(self, count: int) -> int:
        """The next `count` bits, at most 32."""
        stop = self.at + count
        if stop > self.end:
            raise UserError(expected("rle", "whole run lengths", "some that end early"))
        first, last = self.at >> 3, (stop + 7) >> 3
        self.at = stop
        return (int.from_bytes(self.data[first:last], "big") >> (8 * last - stop)) & ((1 << count) - 1)


def region(mask: np.ndarray, score: float | None = None) -> dict[str, Any]:
    """A mask (H, W) uint8 of 0 and 255 as a result of the brush."""
    result = {
        "id": hashlib.sha256(mask.tobytes()).hexdigest()[:10],
        "type": "brushlabels",
        "from_name": FROM_NAME,
        "to_name": TO_NAME,
        "original_width": mask.shape[1],
        "original_height": mask.shape[0],
        "image_rotation": 0,
        "value": {"format": "rle", "rle": encode_rle(mask), "brushlabels": [LABEL]},
    }
    return result if score is None else {**result, "score": score}


def task_of(
    key: str, image: str, *, proposal: np.ndarray | None, label: np.ndarray | None, meta: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """A task with the detector's proposal as its prediction, and a label as its annotation.

    Args:
        key: the picture's name.
        image: address of the picture, as Label Studio finds it.
        proposal: (H, W) uint8 of 0 and 255; None: no prediction.
        label: likewise; None: not labelled.
        meta: further values of the task's data.
        seconds: of work on the label.
    """
    task: dict[str, Any] = {"data": {"image": image, "key": key, **meta}}
    if proposal is not None:
        task["predictions"] = [{"model_version": "diffdoctor", "result": [region(proposal)] if proposal.any() else []}]
    if label is not None:
        task["annotations"] = [{"result": [region(label)] if label.any() else [], "lead_time": seconds}]
    return task


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """The tasks of a JSON export.

    Raises:
        UserError: it is none.
    """
    try:
        tasks = json.loads(read_text(path, limit=_MOST_JSON))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(expected(path, "a JSON export of Label Studio", error)) from None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise UserError(expected(path, "a JSON export of Label Studio, a list of tasks", type(tasks).__name__))
    return tasks


def name_of(task: dict[str, Any]) -> str:
    """What a task's picture is called: its key, or its address without folders and ending."""
    data = task.get("data") if isinstance(task.get("data"), dict) else {}
    if isinstance(data.get("key"), str):
        return data["key"]
    address = next((value for value in data.values() if isinstance(value, str) and "." in value), "")
    # An upload has eight digits of its own before the name.
    return Path(address.partition("?d=")[2] or address.partition("?")[0]).stem


def brushed(
    annotation: dict[str, Any], height: int, width: int, label: str | None, counts: SkipCounts, where: str
) -> np.ndarray:
    """The mask (H, W) uint8 of 0 and 255 of an annotation: all its brush regions together.

    Args:
        annotation: of a task.
        height, width: of the picture.
        label: the one that counts; None: all.
        counts: filled with results that are no brush regions, or of another label.
        where: the task, for messages.

    Raises:
        UserError: a region does not fit the picture.
    """
    mask = np.zeros((height, width), np.uint8)
    for result in annotation.get("result") or []:
        value = result.get("value") or {}
        if str(result.get("type", "")).lower() != "brushlabels" or value.get("format") != "rle":
            counts.add("a result that is not of the brush", where)
            continue
        if label is not None and label not in (value.get("brushlabels") or []):
            counts.add("a region of another label", where)
            continue
        size = result.get("original_height"), result.get("original_width")
        if size != (height, width) or result.get("image_rotation"):
            got = f"{size[1]} x {size[0]}, turned by {result.get('image_rotation')}"
            raise UserError(expected(where, f"a picture of {width} x {height} that is not turned", got))
        mask[decode_rle(value["rle"], height, width) > 0] = 255
    return mask


def check_config(path: Path, tasks: Iterable[dict[str, Any]]) -> None:
    """Refuse labels that a labelling configuration does not know, which Label Studio would silently not show.

    Raises:
        UserError: names the first such label, or says that there is no brush.
    """
    try:
        root = ElementTree.fromstring(read_text(path, limit=2**20))
    except ElementTree.ParseError as error:
        raise UserError(expected(path, "a labelling configuration in XML", error)) from None
    known = {
        (brush.get("name"), brush.get("toName")): {label.get("value") for label in brush.iter("Label")}
        for brush in root.iter("BrushLabels")
    }
    if not known:
        raise UserError(expected(path, "a BrushLabels tag", "none"))
    for task in tasks:
        for result in _results(task):
            names = result.get("from_name"), result.get("to_name")
            labels = set((result.get("value") or {}).get("brushlabels") or [])
            if str(result.get("type", "")).lower() == "brushlabels" and not labels <= known.get(names, set()):
                what = " or ".join(
                    f"{a}, {b}: {', '.join(sorted(map(str, values)))}" for (a, b), values in known.items()
                )
                raise UserError(expected(f"{path}: {name_of(task)}", what, f"{names[0]}, {names[1]}: {sorted(labels)}"))


def _results(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for annotation in task.get("annotations") or []:
        yield from annotation.get("result") or []
