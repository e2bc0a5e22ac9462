"""Detectors that are no network of ours: any function, boxes, a program behind a URL."""

from __future__ import annotations

import hashlib
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffdoctor.data.codec import UnreadablePicture, open_picture
from diffdoctor.detector.pixel_range import check_pixel_range
from diffdoctor.maps.files import read_map
from diffdoctor.runs.errors import UserError, expected, first_line
from diffdoctor.runs.functions import function_from_file, identity_of, name_of
from diffdoctor.training.devices import as_numbers
from diffdoctor.training.weights import weights_digest

Region = tuple[Sequence, float]
"""((x0, y0, x1, y1) or [(x, y), ...], score): a box or a polygon in pixels, and how sure the detector is, in [0, 1]."""

MAX_ANSWER = 64 * 2**20
"""Bytes of a server's answer that are read."""


class FunctionDetector(nn.Module):
    """A function of pictures as a detector, without a gradient.

    It serves wherever maps alone are needed: `diagnose`, `evaluate`, `guide` with strength 0, and the methods grpo, nft
    and weighted of `treat`.

    Args:
        function: pictures (B, 3, H, W) fp32 in [0, 1] to maps (B, 1, h, w) or (B, h, w) in [0, 1], tensors or arrays,
            or a list of one a picture; maps of another size are resized.
        name: for errors; None: the function's own.
        identity: what tells it from other detectors: a run is resumed only with the same one. None: the name, and
            without a name the function's source too, where there is one.
    """

    has_gradient = False
    _range_is_known = False

    def __init__(
        self, function: Callable[[torch.Tensor], Any], *, name: str | None = None, identity: str | None = None
    ):
        super().__init__()
        if not callable(function):
            raise TypeError(expected("function", "a function of pictures", type(function).__name__))
        self.function = function
        self.name = name_of(function) if name is None else name
        if identity is None:
            identity = identity_of(function) if name is None else name
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
        # a buffer, so that it is part of the digest of the detector's weights, and says which device pictures come from
        self.register_buffer("identity", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self, images: torch.Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
        """Refused: there are no logits.

        Raises:
            UserError: always.
        """
        raise UserError(expected(f"detector {self.name}", "one with a gradient", "a function of pictures"))

    def takes(self, height: int, width: int, tile: int | None = None) -> bool:
        """True: a function is given pictures of any size."""
        return True

    @torch.no_grad()
    def confidence(
        self,
        images: torch.Tensor,
        value_range: tuple[float, float] = (0.0, 1.0),
        tile: int | None = None,
        overlap: float = 0.25,
    ) -> torch.Tensor:
        """The maps of pictures.

        Args:
            images: (B, 3, H, W), floating point, in `value_range`.
            value_range: (low, high) of a black and a white pixel.
            tile: refused: the function sees pictures whole.
            overlap: without a tile without effect.

        Returns:
            (B, 1, H, W) fp32 in [0, 1].

        Raises:
            UserError: a `tile`; an answer that is not one map a picture.
            ValueError: the first pictures are plainly in another range than `value_range`.
        """
        if tile is not None and max(images.shape[2:]) > tile:
            raise UserError(expected("tile", f"none with detector {self.name}, which sees pictures whole", tile))
        if not self._range_is_known:
            check_pixel_range(images, value_range)
            self._range_is_known = True
        low, high = value_range
        pictures = ((images.float() - low) / (high - low)).clamp(0, 1)
        found = self.function(pictures)
        what = f"maps ({len(images)}, 1, h, w), one a picture"
        try:
            maps = _as_tensor(found).to(images.device, torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            got = f"{type(found).__name__} ({first_line(error)})"
            raise UserError(expected(f"detector {self.name}", what, got)) from error
        maps = maps[:, None] if maps.ndim == 3 else maps
        if maps.ndim != 4 or maps.shape[:2] != (len(images), 1):
            raise UserError(expected(f"detector {self.name}", what, tuple(maps.shape)))
        if maps.shape[2:] != images.shape[2:]:
            maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)
        return maps


def _as_tensor(found: Any) -> torch.Tensor:
    if isinstance(found, (list, tuple)) and found and all(isinstance(each, torch.Tensor) for each in found):
        return torch.stack(list(found))  # NumPy takes none from a GPU
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))


def as_detector(detector: nn.Module | Callable) -> nn.Module:
    """A detector as it is, or any other function of pictures as a `FunctionDetector`.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(detector, nn.Module) and hasattr(detector, "confidence"):
        return detector
    if callable(detector):
        return FunctionDetector(detector)
    what = "a detector, or a function from pictures (B, 3, H, W) in [0, 1] to maps (B, 1, h, w)"
    raise TypeError(expected("detector", what, type(detector).__name__))


def has_gradient(detector: nn.Module) -> bool:
    """Whether a gradient passes through a detector."""
    return getattr(detector, "has_gradient", True)


def from_boxes(
    function: Callable[[torch.Tensor], Iterable[Iterable[Region]]], *, edge: float = 0.0, name: str | None = None
) -> FunctionDetector:
    """A detector from one that answers with boxes or polygons, as vision-language models and YOLO's kin do.

    A pixel's confidence is the largest score of the regions that hold it; outside of a region its score falls off
    linearly.

    Args:
        function: pictures (B, 3, H, W) in [0, 1] to one list a picture of (region, score): a region is a box
            (x0, y0, x1, y1) or a polygon [(x, y), ...] in pixels, a score is in [0, 1].
        edge: over how many pixels the score falls off; 0: at once.
        name: see `FunctionDetector`.

    Raises:
        ValueError: `edge` is negative.
    """
    if not 0 <= edge < math.inf:
        raise ValueError(expected("edge", "a number of pixels, at least 0", edge))

    def maps(pictures: torch.Tensor) -> torch.Tensor:
        found = [list(regions) for regions in function(pictures)]
        if len(found) != len(pictures):
            raise UserError(expected(detector.name, f"regions of {len(pictures)} pictures", f"{len(found)}"))
        size = tuple(pictures.shape[2:])
        return torch.stack([torch.from_numpy(regions_to_map(regions, size, edge=edge)) for regions in found])

    named = {"name": name_of(function), "identity": identity_of(function)} if name is None else {"name": name}
    detector = FunctionDetector(maps, **named)
    return detector


def regions_to_map(regions: Iterable[Region], size: tuple[int, int], *, edge: float = 0.0) -> np.ndarray:
    """(H, W) float32: the largest score of the regions that hold a pixel; see `from_boxes`.

    Args:
        regions: (region, score) each.
        size: (H, W) in pixels.
        edge: see `from_boxes`.

    Raises:
        UserError: a region that is neither a box nor a polygon, or within the first pixel, as shares of the sides in
            place of pixels are; a score outside [0, 1].
    """
    result = np.zeros(size, np.float32)
    for region, score in regions:
        points, score = _points(region), float(score)
        if not 0 <= score <= 1:
            raise UserError(expected("score", "a number in [0, 1]", score))
        low, high = points.min(axis=0), points.max(axis=0)
        if low.min() >= 0 and high.max() <= 1 and (high > low).all() and max(size) > 1:
            what = "pixels, such as shares of the sides times width and height"
            raise UserError(expected("region", what, f"coordinates in [0, 1]: {points.tolist()}"))
        inside = _inside(points, size)
        level = inside.astype(np.float32)
        if edge and inside.any():
            from scipy.ndimage import distance_transform_edt

            level = np.clip(1 - distance_transform_edt(~inside) / edge, 0, 1).astype(np.float32)
        result = np.maximum(result, score * level)
    return result


class HttpDetector(FunctionDetector):
    """A detector behind a URL, in any language: each picture is posted as a PNG.

    The answer is `image/png`, the map as a grey picture of 8 or 16 bits, or `application/json`,
    `{"regions": [{"box": [x0, y0, x1, y1], "score": s}, {"polygon": [[x, y], ...], "score": s}]}` in pixels.
    `diffdoctor serve-detector` is such a server.

    Args:
        url: http:// or https://.
        timeout: seconds to wait for an answer.
        retries: how often a picture is posted again after an error of the connection or of the server (5xx).
        edge: of regions, see `from_boxes`.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 2, edge: float = 0.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(expected("url", "http://… or https://…", repr(url)))
        super().__init__(self._maps, name=url)
        self.url, self.timeout, self.retries, self.edge = url, timeout, retries, edge

    def _maps(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.from_numpy(self._map(picture)) for picture in pictures])

    def _map(self, picture: torch.Tensor) -> np.ndarray:
        from diffdoctor.viz.draw import png_bytes

        array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        kind, body = self._post(png_bytes(array))
        size = tuple(picture.shape[1:])
        try:
            if kind == "image/png":
                return _grey(body, size)
            if kind == "application/json":
                return regions_to_map(_regions(json.loads(body)), size, edge=self.edge)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from error
        except Exception as error:  # a stranger's answer may hold anything
            what = "a PNG or regions as JSON"
            raise UserError(expected(self.url, what, f"{type(error).__name__}: {first_line(error)}")) from error
        raise UserError(expected(self.url, "an answer of type image/png or application/json", repr(kind)))

    def _post(self, body: bytes) -> tuple[str, bytes]:
        headers = {"Content-Type": "image/png", "Accept": "image/png, application/json"}
        request = urllib.request.Request(self.url, body, headers)
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    found = answer.read(MAX_ANSWER + 1)
                    if len(found) > MAX_ANSWER:
                        what = f"an answer of at most {MAX_ANSWER:,} bytes"
                        raise UserError(expected(self.url, what, "a larger one"))
                    return answer.headers.get_content_type(), found
            except urllib.error.HTTPError as error:
                if last or error.code < 500:
                    said = error.read(300).decode("utf-8", "replace").strip()
                    raise UserError(f"{self.url}: answered {error.code}{': ' + said if said else ''}") from error
            except (OSError, ValueError) as error:
                if last:
                    reason = getattr(error, "reason", None) or first_line(error)
                    raise UserError(f"{self.url}: no answer ({reason})") from error
        raise AssertionError("unreachable")


def detector_from_file(source: str) -> FunctionDetector:
    """The detector of FILE.py:FUNCTION, whose code is run: only give files that you trust.

    Raises:
        UserError: there is no such file or function, or the file cannot be run.
    """
    function, identity = function_from_file(source)
    if isinstance(function, FunctionDetector):  # made by from_boxes, or an HttpDetector
        return function
    return FunctionDetector(function, name=source, identity=identity)


def same_detector(one: nn.Module, other: nn.Module) -> bool:
    """Whether two functions are one."""
    return not has_gradient(one) and not has_gradient(other) and weights_digest(one) == weights_digest(other)


def _inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels whose centre lies in a polygon (N, 2), by the even-odd rule."""
    height, width = size
    rows = np.arange(height)[:, None] + 0.5
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, 0).T
    row, edge = np.nonzero((y0 <= rows) != (y1 <= rows))
    crossing = x0[edge] + (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge]) * (x1[edge] - x0[edge])
    toggles = np.zeros((height, width + 1), np.int64)
    np.add.at(toggles, (row, np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)), 1)
    return np.cumsum(toggles, 1)[:, :width] % 2 == 1


def _points(region: Sequence | torch.Tensor) -> np.ndarray:
    values = np.asarray(as_numbers(region), dtype=np.float64)
    if values.shape == (4,):
        x0, y0, x1, y1 = values
        values = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    if values.ndim != 2 or values.shape[1] != 2 or len(values) < 3 or not np.isfinite(values).all():
        what = "a box (x0, y0, x1, y1) or a polygon of three points (x, y) at least"
        raise UserError(expected("region", what, f"shape {values.shape}"))
    return values


def _regions(answer: Any) -> list[Region]:
    return [(entry["box"] if "box" in entry else entry["polygon"], entry["score"]) for entry in answer["regions"]]


def _grey(body: bytes, size: tuple[int, int]) -> np.ndarray:
    try:
        with open_picture(body) as image:
            width, height = image.size
            opened = image.copy() if width * height <= 4 * size[0] * size[1] else None
    except UnreadablePicture as error:
        raise UserError(expected("answer", "a PNG", error)) from error
    if opened is None:
        what = f"a map of about the picture's size, {size[1]} x {size[0]}"
        raise UserError(expected("map", what, f"{width} x {height}"))
    try:
        values = read_map(opened)
    except ValueError as error:
        raise UserError(str(error)) from error
    if values.shape != size:
        maps = torch.from_numpy(values)[None, None]
        values = F.interpolate(maps, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return values
