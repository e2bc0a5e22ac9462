"""Artifacts as objects: the components of a confidence map, and mAP@0.5 over them by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import numpy as np

from diffdoctor._errors import missing_extra
from diffdoctor.evaluate.pixel import maps_pair

MIN_SHARE = 0.0002
MIN_PIXELS = 4


@dataclasses.dataclass(frozen=True)
class Component:
    """One connected artifact.

    Attributes:
        mask: (H, W) bool.
        box: (x, y, width, height) in pixels.
        area: pixels.
        score: mean confidence over the component, in [0, 1].
    """

    mask: np.ndarray
    box: tuple[int, int, int, int]
    area: int
    score: float


def components(confidence: np.ndarray, threshold: float = 0.5) -> list[Component]:
    """The artifacts of one map: confidence >= threshold, a 3x3 closing, 8-connected, at least max(0.02 %, 4 pixels).

    The closing holds the border: a component at the picture's edge is not eaten by it.

    Args:
        confidence: (H, W) in [0, 1], a detector's map or a mask.

    Returns:
        `Component`s, the most confident first.
    """
    from scipy import ndimage

    confidence = np.asarray(confidence)
    if confidence.ndim != 2:
        raise ValueError(f"confidence: expected shape (H, W), got {confidence.shape}")
    square = np.ones((3, 3), bool)
    found = np.pad(confidence >= threshold, 2)
    closed = ndimage.binary_closing(found, square)[2:-2, 2:-2]
    labels, _ = ndimage.label(closed, square)
    smallest = max(MIN_SHARE * confidence.size, MIN_PIXELS)
    result = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == index
        area = int(inside.sum())
        if area < smallest:
            continue
        mask = np.zeros(confidence.shape, bool)
        mask[rows, columns] = inside
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        result.append(Component(mask, box, area, float(confidence[rows, columns][inside].mean())))
    return sorted(result, key=lambda c: -c.score)


def _run_length(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


class ComponentAP:
    """Average precision of components over a set of pictures, kept ready for many resamplings of the set.

    COCO matching at IoU >= 0.5 by pycocotools, one class, 101 recall points, at most 100 components a picture; the
    components of a clean picture are false positives.

    Args:
        confidence: (N, H, W) or (N, 1, H, W) in [0, 1], the detector's maps.
        mask: the truth, same shape; its components are found in the same way.
    """

    def __init__(self, confidence, mask):
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError:
            raise missing_extra("pycocotools", "stages") from None
        confidence, mask = maps_pair(confidence, mask)
        images, truths, found = [], [], []
        for index, (prediction, truth) in enumerate(zip(confidence, mask, strict=True), start=1):
            images.append({"id": index, "height": truth.shape[0], "width": truth.shape[1]})
            for component in components(truth):
                truths.append({**_annotation(index, component), "id": len(truths) + 1, "iscrowd": 0})
            for component in components(prediction)[:100]:
                found.append({**_annotation(index, component), "id": len(found) + 1, "score": component.score})
        self.matches: list[tuple[np.ndarray, np.ndarray, int]] = []
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = {"images": images, "annotations": truths, "categories": [{"id": 1, "name": "artifact"}]}
            coco.createIndex()
            results = COCO()
            results.dataset = {"images": images, "annotations": found, "categories": coco.dataset["categories"]}
            results.createIndex()
            evaluation = COCOeval(coco, results, "segm")
            evaluation.params.iouThrs = np.array([0.5])
            evaluation.params.areaRng = [[0, 1e10]]
            evaluation.params.areaRngLbl = ["all"]
            evaluation.params.maxDets = [100]
            evaluation.evaluate()
            evaluation.accumulate()
        self.map50 = float(evaluation.eval["precision"].mean()) if truths else float("nan")
        for entry in evaluation.evalImgs:
            if entry is None:
                self.matches.append((np.zeros(0), np.zeros(0, bool), 0))
            else:
                hit = np.asarray(entry["dtMatches"])[0] > 0
                self.matches.append((np.asarray(entry["dtScores"], float), hit, len(entry["gtIds"])))

    def of(self, pictures: np.ndarray) -> float:
        """mAP@0.5 of the pictures with these indices (repeats allowed: a bootstrap sample); NaN without a truth."""
        chosen = [self.matches[i] for i in pictures]
        total = sum(count for _, _, count in chosen)
        if not total:
            return float("nan")
        scores = np.concatenate([s for s, _, _ in chosen])
        hits = np.concatenate([h for _, h, _ in chosen])
        order = np.argsort(-scores, kind="mergesort")
        hits = hits[order]
        recall = np.cumsum(hits) / total
        precision = np.cumsum(hits) / np.arange(1, hits.size + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        index = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        return float(np.append(precision, 0.0)[np.minimum(index, hits.size)].mean())


def _annotation(image_id: int, component: Component) -> dict:
    return {
        "image_id": image_id,
        "category_id": 1,
        "segmentation": _run_length(component.mask),
        "bbox": list(component.box),
        "area": component.area,
    }


def mean_average_precision(confidence, mask) -> float:
    """mAP@0.5 of the confidence maps' components against the masks' (see `ComponentAP`); NaN without damage."""
    return ComponentAP(confidence, mask).map50
