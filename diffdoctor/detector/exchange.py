"""Masks from elsewhere as labelled samples, and labelled sets as COCO's files, for tools that know no shards."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.shards import read_shards
from diffdoctor.data.text import read_text
from diffdoctor.maps.files import read_map, read_picture
from diffdoctor.maps.sets import read_folder
from diffdoctor.measures.components import components, run_length
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.runs.files import atomic_dir, refuse_foreign

ANNOTATIONS, IMAGES = "annotations.json", "images"


def masked_pictures(
    pictures: str | Path, masks: str | Path, *, label: str = "human", unmasked: str = "refuse"
) -> Iterator[dict[str, Any]]:
    """Pictures with masks of one's own, as samples for `write_shards`.

    Args:
        pictures: a folder; captions as for `diffdoctor.maps.read_folder`.
        masks: a folder that mirrors it: `masks/a/cat.png` is the mask of `pictures/a/cat.jpg`, a grey PNG of the
            picture's size, 255 where the picture is broken and 0 where it is not.
        label: where the masks come from: human or pseudo.
        unmasked: what a picture without a mask is: refuse, skip, or clean.

    Yields:
        Samples with `picture`, `mask`, `key`, `label`, `prompt` and `file`, the picture's path below `pictures`.

    Raises:
        UserError: there is no picture; a file cannot be read; or a mask is missing or of another size.
    """
    if unmasked not in ("refuse", "skip", "clean"):
        raise UserError(expected("unmasked", "refuse, skip or clean", repr(unmasked)))
    for index, record in enumerate(read_folder(pictures, masks)):
        picture, name = np.asarray(read_picture(record.picture)), Path(record.picture).relative_to(pictures)
        if record.confidence is not None:
            mask = read_map(record.confidence)
        elif unmasked == "clean":
            mask = np.zeros(picture.shape[:2], np.float32)
        elif unmasked == "skip":
            continue
        else:
            what = f"a mask, such as {name.with_suffix('.png')} in {masks}, or unmasked='clean'"
            raise UserError(expected(record.picture, what, "none"))
        yield _sample(index, name.as_posix(), picture, mask, record.confidence, label, record.caption)


def coco_pictures(
    annotations: str | Path, pictures: str | Path, *, label: str = "human", confidence: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Pictures with the masks of a COCO file, as annotation tools export them, as samples for `write_shards`.

    Args:
        annotations: the JSON file; all annotations of a picture, of whichever category, are one mask, but for crowds
            (`iscrowd`), which are areas that nobody decided on; a picture without any is clean.
        pictures: the folder in which its file names are.
        label: where the masks come from: human or pseudo.
        confidence: of the annotated pixels, in (0, 1].

    Yields:
        Samples as `masked_pictures` does, with `ignore` where there are crowds.

    Raises:
        UserError: the file is no COCO file, or a picture cannot be read or has another size than the file says.
    """
    for index, (name, marked, ignore) in enumerate(coco_masks(annotations)):
        path = Path(pictures) / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(expected(f"{annotations}: file_name", f"a path below {pictures}", repr(name)))
        picture = np.asarray(read_picture(path))
        if picture.shape[:2] != marked.shape:
            height, width = marked.shape
            raise UserError(expected(path, f"{height} x {width} pixels, as {annotations} says", picture.shape[:2]))
        mask = np.where(marked, np.float32(confidence), np.float32(0))
        sample = _sample(index, name, picture, mask, annotations, label, "")
        yield sample | ({"ignore": ignore} if ignore.any() else {})


def coco_masks(annotations: str | Path, category: str | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The masks in a COCO file, without the pictures.

    Args:
        annotations: the JSON file.
        category: name of the one whose annotations count; None: all.

    Yields:
        (file name, what is marked, crowds) of each picture, both (H, W) bool.

    Raises:
        UserError: the file is no COCO file, has no such category, or an annotation does not fit its picture.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise missing_extra("pycocotools", "stages") from None
    try:
        coco = COCO()
        coco.dataset = {"annotations": []} | json.loads(read_text(annotations, limit=2**30))
        named = {str(each["name"]): each["id"] for each in coco.dataset.pop("categories", None) or []}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        images = [(int(i), str(e["file_name"]), int(e["height"]), int(e["width"])) for i, e in coco.imgs.items()]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "a COCO file with `images` and `annotations`"
        raise UserError(expected(annotations, what, f"{type(error).__name__}: {first_line(error)}")) from error
    if category is not None and category not in named:
        raise UserError(expected(f"{annotations}: category", f"one of {', '.join(named)}", repr(category)))
    for image, name, height, width in images:
        marked, crowds = np.zeros((2, height, width), bool)
        for annotation in coco.imgToAnns[image]:
            if category is not None and annotation.get("category_id") != named[category]:
                continue
            try:
                _check_runs(annotation["segmentation"], height * width)
                (crowds if annotation.get("iscrowd") else marked)[coco.annToMask(annotation) > 0] = True
            except Exception as error:  # of the decoder, which is written in C
                where = f"{annotations}: annotation {annotation.get('id')}"
                raise UserError(expected(where, "a polygon or run lengths", first_line(error))) from error
        yield name, marked, crowds


def _check_runs(segmentation: Any, pixels: int) -> None:
    """Refuse run lengths of fewer or more pixels than the picture has, which the decoder takes for zeros.

    Raises:
        ValueError: they are.
    """
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if isinstance(counts, list) and sum(counts) != pixels:
        raise ValueError(f"run lengths of {sum(counts)} pixels, of {pixels}")


def _sample(
    index: int, name: str, picture: np.ndarray, mask: np.ndarray, source: object, label: str, prompt: str
) -> dict[str, Any]:
    if mask.shape != picture.shape[:2]:
        raise UserError(expected(source, f"a mask of {picture.shape[:2]}, as the picture {name}", mask.shape))
    key = f"{index:06d}_{_file_safe(name.rpartition('.')[0])}"
    return {"key": key, "picture": picture, "mask": mask, "label": label, "prompt": prompt, "file": name}


def _file_safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]


def write_coco(shards: str | Path, folder: str | Path, *, threshold: float = 0.5) -> int:
    """Write a labelled set as COCO's files: `annotations.json`, and the pictures in `images`.

    Each connected region of a mask is an annotation with run lengths, of the one category "artifact"; what nobody
    decided on is a crowd.

    Args:
        shards: a folder of shards, as `inject` and `write_shards` make them, or a shard.
        folder: the folder to make; one that this function made is replaced.
        threshold: the mask's value from which a pixel belongs to an artifact.

    Returns:
        The number of pictures.

    Raises:
        UserError: there are no shards, or the folder holds something else.
    """
    from PIL import Image

    folder = Path(folder)
    if (folder / IMAGES).is_dir():
        refuse_foreign(folder / IMAGES, ("*.png",))
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {ANNOTATIONS, IMAGES}:
        raise UserError(expected(folder, "no folder, or one that was written before", "one that holds something else"))
    images, annotations = [], []
    with atomic_dir(folder) as temporary:
        (temporary / IMAGES).mkdir()
        for number, sample in enumerate(read_shards(shards), start=1):
            name = f"{IMAGES}/{number:06d}_{_file_safe(sample['key'])}.png"
            Image.fromarray(sample["picture"]).save(temporary / name)
            height, width = sample["picture"].shape[:2]
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            regions = [(component.mask, 0) for component in components(sample["mask"], threshold)]
            if "ignore" in sample:
                regions.append((sample["ignore"], 1))
            for mask, crowd in regions:
                annotations.append(_annotation(len(annotations) + 1, number, mask, crowd))
        dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "artifact"}]}
        (temporary / ANNOTATIONS).write_text(strict_json.dumps(dataset), encoding="utf-8")
    return len(images)


def _annotation(number: int, image: int, mask: np.ndarray, crowd: int) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    coded = run_length(mask)
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "segmentation": {"size": list(coded["size"]), "counts": coded["counts"].decode("ascii")},
        "bbox": [int(side) for side in coco_mask.toBbox(coded)],
        "area": int(mask.sum()),
        "iscrowd": crowd,
    }
