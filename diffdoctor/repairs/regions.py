"""What is redrawn: regions of a confidence map, the part of the picture around each, and the masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffdoctor.measures.components import components


@dataclass(frozen=True)
class Region:
    """A part of a picture that is redrawn as one.

    Attributes:
        mask: (H, W) bool, what may change: the flagged pixels and those within `grow` of them.
        area: number of flagged pixels.
        score: mean confidence over the mask, in [0, 1].
    """

    mask: np.ndarray
    area: int
    score: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) of the mask, in pixels."""
        return box_of(self.mask)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x, y, width, height) of what is True in a mask (H, W) that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def find_regions(
    confidence: np.ndarray,
    *,
    threshold: float = 0.5,
    grow: int = 8,
    count: int = 8,
    min_area: float = 0.0,
    max_area: float = 1.0,
) -> list[Region]:
    """The regions of a map that are to be redrawn, the largest first.

    The components of the map are grown by `grow` pixels, and those that then touch become one.

    Args:
        confidence: (H, W) in [0, 1].
        threshold: the confidence from which a pixel is flagged.
        grow: pixels.
        count: of regions at most.
        min_area: share of the picture's pixels; regions with fewer flagged ones are left as they are.
        max_area: likewise, regions with more.
    """
    from scipy import ndimage

    flagged = np.zeros(confidence.shape, bool)
    for component in components(confidence, threshold):
        flagged |= component.mask
    if not flagged.any():
        return []
    grown = ndimage.distance_transform_edt(~flagged) <= grow
    labels, _ = ndimage.label(grown, np.ones((3, 3), bool))
    areas = np.bincount(labels[flagged])
    allowed = [label for label, area in enumerate(areas) if label and min_area <= area / confidence.size <= max_area]
    found = []
    for label in sorted(allowed, key=lambda label: -areas[label])[:count]:
        mask = labels == label
        found.append(Region(mask, int(areas[label]), float(confidence[mask].mean())))
    return found


def feathered(mask: np.ndarray, feather: int) -> np.ndarray:
    """The weight of what is redrawn, (H, W) float32: 0 outside a mask, rising smoothly to 1 over `feather` pixels.

    At the picture's border the mask does not end.

    Args:
        mask: (H, W) bool.
        feather: pixels; 0: at once.
    """
    from scipy import ndimage

    if mask.all():
        return np.ones(mask.shape, np.float32)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1]
    # a flagged pixel is deeper than `grow`, by less than a pixel in the corners: with feather <= grow it is replaced
    share = np.where(depth > feather, 1, depth / (feather + 1))
    return (share * share * (3 - 2 * share)).astype(np.float32)


@dataclass(frozen=True)
class Crop:
    """The part of a picture that a model is shown, and the size at which it is.

    Attributes:
        top: row of the first pixel.
        left: column of the first pixel.
        height: rows.
        width: columns.
        size: (height, width) that the model works at.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the picture."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def crop_around(
    box: tuple[int, int, int, int],
    picture: tuple[int, int],
    *,
    context: float,
    size: tuple[int, int],
    multiple: int,
) -> Crop:
    """The crop around a region: `context` times its box, of the proportions of the model's size where they fit.

    At the picture's border it is moved inwards. Where the picture is too small for it, it has other proportions, and
    the model works at a size of the same area, to the nearest multiple.

    Args:
        box: (x, y, width, height) in pixels.
        picture: (height, width) in pixels.
        context: times the box's sides, at least 1.
        size: (height, width) of the model's pictures.
        multiple: of pixels, which the model's sides must be.
    """
    x, y, box_width, box_height = box
    # the smallest rectangle of the model's proportions that holds `context` times the box
    scale = max(context * box_height / size[0], context * box_width / size[1])
    height, width = (min(math.ceil(scale * model), whole) for model, whole in zip(size, picture, strict=True))
    top = min(max(0, round(y + box_height / 2 - height / 2)), picture[0] - height)
    left = min(max(0, round(x + box_width / 2 - width / 2)), picture[1] - width)
    area = math.sqrt(size[0] * size[1] / (height * width))
    fitted = tuple(max(multiple, round(area * side / multiple) * multiple) for side in (height, width))
    # a rounded side may be off by a pixel where the proportions are the model's own
    own = abs(height / width - size[0] / size[1]) <= 1.5 / min(height, width) * max(1.0, size[0] / size[1])
    return Crop(top, left, height, width, size if own else fitted)
