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
from diffdoctor.maps.files import read_folder, read_map, read_picture
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
        annotations: the JSON file; all annotations of a picture, of whichever category, are one mask, and a picture
            without any is clean.
        pictures: the folder in which its file names are.
        label: where the masks come from: human or pseudo.
        confidence: of the annotated pixels, in (0, 1].

    Yields:
        Samples as `masked_pictures` does.

    Raises:
        UserError: the file is no COCO file, or a picture cannot be read or has another size than the file says.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise missing_extra("pycocotools", "stages") from None
    try:
        coco = COCO()
        coco.dataset = {"annotations": []} | json.loads(read_text(annotations, limit=2**30))
        coco.dataset.pop("categories", None)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        images = [(int(i), str(e["file_name"]), int(e["height"]), int(e["width"])) for i, e in coco.imgs.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "a COCO file with `images` and `annotations`"
        raise UserError(expected(annotations, what, f"{type(error).__name__}: {first_line(error)}")) from error
    for index, (image, name, height, width) in enumerate(images):
        path = Path(pictures) / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(expected(f"{annotations}: file_name", f"a path below {pictures}", repr(name)))
        picture = np.asarray(read_picture(path))
        if picture.shape[:2] != (height, width):
            raise UserError(expected(path, f"{height} x {width} pixels, as {annotations} says", picture.shape[:2]))
        mask = np.zeros((height, width), np.float32)
        for annotation in coco.imgToAnns[image]:
            try:
                mask[coco.annToMask(annotation) > 0] = confidence
            except Exception as error:  # of the decoder, which is written in C
                where = f"{annotations}: annotation {annotation.get('id')}"
                raise UserError(expected(where, "a polygon or run lengths", first_line(error))) from error
        yield _sample(index, name, picture, mask, annotations, label, "")


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

    Each connected region of a mask is an annotation with run lengths, of the one category "artifact".

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
            for component in components(sample["mask"], threshold):
                coded = run_length(component.mask)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": 1,
                        "segmentation": {"size": list(coded["size"]), "counts": coded["counts"].decode("ascii")},
                        "bbox": list(component.box),
                        "area": component.area,
                        "iscrowd": 0,
                    }
                )
        dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "artifact"}]}
        (temporary / ANNOTATIONS).write_text(strict_json.dumps(dataset), encoding="utf-8")
    return len(images)
