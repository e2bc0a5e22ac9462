"""Artifacts as objects: the components of a confidence map, and mAP@0.5 over them by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffdoctor.measures.pixels import maps_pair
from diffdoctor.runs.errors import expected, missing_extra

if TYPE_CHECKING:
    import torch

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

    The closing does not erode a component at the picture's border.

    Args:
        confidence: (H, W) in [0, 1], a detector's map or a mask.
        threshold: the confidence from which a pixel belongs to an artifact.

    Returns:
        `Component`s, the most confident first.

    Raises:
        ValueError: another shape.
    """
    confidence = np.asarray(confidence)
    if confidence.ndim != 2:
        raise ValueError(expected("confidence", "shape (H, W)", confidence.shape))
    found = confidence >= threshold
    if not found.any():
        return []
    from scipy import ndimage

    labels, _ = ndimage.label(_closed(found), np.ones((3, 3), bool))
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


def _closed(found: np.ndarray) -> np.ndarray:
    """A 3x3 closing of (H, W) bool, nothing of which is eroded at the border."""
    wide = np.zeros((found.shape[0] + 4, found.shape[1] + 4), bool)
    wide[2:-2, 2:-2] = found
    wide = wide[:-2] | wide[1:-1] | wide[2:]
    wide = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    wide = wide[:-2] & wide[1:-1] & wide[2:]
    return wide[:, :-2] & wide[:, 1:-1] & wide[:, 2:]


def run_length(mask: np.ndarray) -> dict:
    """COCO's run lengths of a mask (H, W): `size`, and `counts` in bytes."""
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@dataclasses.dataclass(frozen=True)
class Matches:
    """Which components of N pictures were found, for the average precision of any resampling of the set.

    Attributes:
        scores: (K,) of the detector's components, picture by picture, the most confident first, without those that lie
            where it is not decided what is broken.
        hits: (K,) bool, whether a component matches one of the truth.
        lengths: (N,) number of the detector's components in each picture.
        truths: (N,) number of the truth's components in each picture.
    """

    scores: np.ndarray
    hits: np.ndarray
    lengths: np.ndarray
    truths: np.ndarray

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def joined(cls, parts: Sequence[Matches]) -> Matches:
        """The matches of all pictures of several parts, in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def average_precision(self, pictures: np.ndarray) -> float:
        """mAP@0.5 of some of the pictures; NaN without a truth.

        One class, 101 recall points, the same arithmetic as pycocotools' `COCOeval.accumulate`.

        Args:
            pictures: (n,) indices; repeats are allowed, as in a bootstrap draw.
        """
        total = int(self.truths[pictures].sum())
        if not total:
            return float("nan")
        lengths = self.lengths[pictures]
        # The index of component k of a chosen picture is the picture's first index plus k.
        indices = np.repeat(self._begins[pictures] - (np.cumsum(lengths) - lengths), lengths)
        indices += np.arange(indices.size)
        order = np.argsort(-self.scores[indices], kind="mergesort")
        found = np.cumsum(self.hits[indices][order])
        recall = found / total
        precision = found / (np.arange(1, found.size + 1) + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        index = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        return float(np.append(precision, 0.0)[np.minimum(index, found.size)].mean())


def match_components(
    confidence: np.ndarray | torch.Tensor, mask: np.ndarray | torch.Tensor, ignore: np.ndarray | None = None
) -> Matches:
    """COCO matching at IoU >= 0.5, by pycocotools, of the components of confidence maps with those of masks.

    One class, at most 100 components a picture. Where it is not decided what is broken is a crowd: a component that
    matches none of the truth, and of whose pixels at least half lie there, is neither right nor wrong.

    Args:
        confidence: (N, H, W) or (N, 1, H, W) in [0, 1], the detector's maps.
        mask: the truth, same shape; its components are found in the same way.
        ignore: (N, H, W) bool, where it is not decided; None: nowhere.

    Raises:
        ValueError: shapes or values are not as described.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise missing_extra("pycocotools", "stages") from None
    confidence, mask = maps_pair(confidence, mask)
    if ignore is not None and (np.shape(ignore) != mask.shape or np.asarray(ignore).dtype != bool):
        got = f"{np.shape(ignore)} {np.asarray(ignore).dtype}"
        raise ValueError(expected("ignore", f"{mask.shape} bool", got))
    images, truths, found = [], [], []
    for index, (prediction, truth) in enumerate(zip(confidence, mask, strict=True), start=1):
        images.append({"id": index, "height": truth.shape[0], "width": truth.shape[1]})
        for component in components(truth):
            truths.append({**_annotation(index, component), "id": len(truths) + 1, "iscrowd": 0})
        if ignore is not None and ignore[index - 1].any():
            truths.append({**_annotation(index, _whole(ignore[index - 1])), "id": len(truths) + 1, "iscrowd": 1})
        for component in components(prediction)[:100]:
            found.append({**_annotation(index, component), "id": len(found) + 1, "score": component.score})
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
    scores, hits, truths = [np.zeros(0)], [np.zeros(0, bool)], []
    # An entry is None where a picture has no component at all.
    for entry in evaluation.evalImgs:
        decided = ~np.asarray(entry["dtIgnore"], bool)[0] if entry else np.zeros(0, bool)
        scores.append(np.asarray(entry["dtScores"] if entry else (), float)[decided])
        hits.append(np.asarray(entry["dtMatches"])[0][decided] > 0 if entry else decided)
        truths.append(int(np.sum(np.asarray(entry["gtIgnore"]) == 0)) if entry else 0)
    lengths = np.array([len(s) for s in scores[1:]], np.int64)
    return Matches(np.concatenate(scores), np.concatenate(hits), lengths, np.array(truths, np.int64))


def _whole(mask: np.ndarray) -> Component:
    """Everything in a mask (H, W) bool that is not empty, as one component."""
    (top, left), (bottom, right) = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0)
    box = (int(left), int(top), int(right - left) + 1, int(bottom - top) + 1)
    return Component(mask, box, int(mask.sum()), 1.0)


def _annotation(image_id: int, component: Component) -> dict:
    return {
        "image_id": image_id,
        "category_id": 1,
        "segmentation": run_length(component.mask),
        "bbox": list(component.box),
        "area": component.area,
    }


def mean_average_precision(
    confidence: np.ndarray | torch.Tensor, mask: np.ndarray | torch.Tensor, ignore: np.ndarray | None = None
) -> float:
    """mAP@0.5 of the confidence maps' components against the masks'; NaN without damage.

    Args:
        confidence: (N, H, W) or (N, 1, H, W) in [0, 1], the detector's maps.
        mask: the truth, of the same shape.
        ignore: see `match_components`.
    """
    matches = match_components(confidence, mask, ignore)
    return matches.average_precision(np.arange(len(matches.truths)))
