"""Exchange with COCO files, by pycocotools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.text import read_text
from diffdoctor.measures.components import components, run_length
from diffdoctor.runs.errors import UserError, expected

CATEGORY = {"id": 1, "name": "artifact"}
_MOST_JSON = 2**31


class CocoWriter:
    """Collects labels as one COCO file: an annotation a component, and a crowd where nothing was decided."""

    def __init__(self):
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, file: str, mask: np.ndarray, ignore: np.ndarray | None, values: dict[str, Any]) -> None:
        """Add a picture.

        Args:
            file: its name.
            mask: (H, W) in [0, 1]; a component where it is at least a half.
            ignore: (H, W) bool, or None.
            values: of the image's entry.
        """
        image = {"id": len(self.images) + 1, "file_name": file, "height": mask.shape[0], "width": mask.shape[1]}
        self.images.append({**image, **values})
        for found in components(mask):
            # components() closes gaps of a pixel; what is written is what was marked.
            self._add(image["id"], found.mask & (mask >= 0.5), crowd=0)
        if ignore is not None:
            self._add(image["id"], ignore, crowd=1)

    def _add(self, image: int, mask: np.ndarray, crowd: int) -> None:
        from pycocotools import mask as coco_mask

        rle = run_length(mask)
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image,
                "category_id": CATEGORY["id"],
                "iscrowd": crowd,
                "area": int(mask.sum()),
                "bbox": coco_mask.toBbox(rle).tolist(),
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            }
        )

    def value(self) -> dict[str, Any]:
        """The file's content."""
        return {"images": self.images, "annotations": self.annotations, "categories": [CATEGORY]}


def read_coco(path: Path, label: str | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The pictures of a COCO file with their masks.

    Args:
        path: of the file.
        label: name of the category that counts; None: all.

    Yields:
        (file name, mask, ignore), both (H, W) uint8 of 0 and 255; crowds are ignored areas.

    Raises:
        UserError: the file is none, or a segmentation does not fit its picture.
    """
    try:
        content = json.loads(read_text(path, limit=_MOST_JSON))
        images = {image["id"]: image for image in content["images"]}
        names = {each["id"]: each["name"] for each in content.get("categories", [])}
        by_image: dict[Any, list[dict]] = {image: [] for image in images}
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            expected(path, "a COCO file of images and annotations", f"{type(error).__name__}: {error}")
        ) from None
    if label is not None and label not in names.values():
        raise UserError(expected("label", f"one of {', '.join(map(str, names.values()))}", repr(label)))
    for number, image in images.items():
        height, width = image["height"], image["width"]
        planes = np.zeros((2, height, width), np.uint8)
        for annotation in by_image[number]:
            if label is None or names.get(annotation.get("category_id")) == label:
                planes[1 if annotation.get("iscrowd") else 0][_decoded(annotation, height, width, path)] = 255
        yield str(image["file_name"]), planes[0], planes[1]


def _decoded(annotation: dict, height: int, width: int, path: Path) -> np.ndarray:
    from pycocotools import mask as coco_mask

    shape = annotation.get("segmentation")
    where = f"{path}: annotation {annotation.get('id')}"
    try:
        if isinstance(shape, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
        elif list(shape["size"]) != [height, width]:
            raise UserError(expected(where, f"a segmentation of {height} x {width}", shape["size"]))
        elif isinstance(shape["counts"], list):
            if sum(shape["counts"]) != height * width:
                raise UserError(expected(where, f"runs of {height * width} pixels", sum(shape["counts"])))
            rle = coco_mask.frPyObjects(shape, height, width)
        else:
            rle = shape
        return coco_mask.decode(rle) > 0
    except UserError:
        raise
    except Exception as error:  # pycocotools raises whatever comes
        raise UserError(expected(where, "polygons or run lengths", f"{type(error).__name__}: {error}")) from None
