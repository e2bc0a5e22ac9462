"""How pictures of any size are resized for a network."""

from __future__ import annotations

import dataclasses

from diffdoctor.runs.errors import expected

MAX_SIDE = 16384  # pixels
# The most that a network is given of one picture at a time: 4096 x 4096 pixels.
MAX_NETWORK_PIXELS = 2**24
# Pictures that are longer, measured by their short side, are enlarged less: 1 x 3000 would become 64 x 192,000 pixels.
_MAX_ASPECT = 64


@dataclasses.dataclass
class PreprocessConfig:
    """How pictures of any size are resized for the network.

    Attributes:
        input_size: side in pixels of the square that every picture is resized to, whatever its aspect; None keeps the
            picture's size and aspect within the next two.
        min_side: pictures whose short side is smaller are enlarged to it, in pixels, or as far as the area of a
            picture that is 64 times as long as this. Logits come at a quarter of the network's size, so this decides
            how fine the map of a small picture is.
        max_side: pictures whose long side is larger are shrunk to it, in pixels; None: never.
        multiple: the network's height and width are rounded to multiples of this, in pixels.

    Raises:
        TypeError: a field is no int.
        ValueError: a field is out of range.
    """

    input_size: int | None = None
    min_side: int = 64
    max_side: int | None = None
    multiple: int = 32

    def __post_init__(self):
        for name in ("input_size", "min_side", "max_side", "multiple"):
            value = getattr(self, name)
            if value is None and name in ("input_size", "max_side"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(expected(name, "an int", repr(value)))
            if value < 1:
                raise ValueError(expected(name, ">= 1 pixels", value))
            if value > MAX_SIDE:
                raise ValueError(expected(name, f"<= {MAX_SIDE} pixels", value))
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(expected("max_side", f">= min_side = {self.min_side}", self.max_side))

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in pixels to which a picture of height x width pixels is resized."""
        if self.input_size is not None:
            return self.input_size, self.input_size
        scale = max(1.0, min(self.min_side / min(height, width), _largest_scale(self.min_side, height * width)))
        if self.max_side is not None:
            scale = min(scale, self.max_side / max(height, width))
        return tuple(max(1, round(side * scale / self.multiple)) * self.multiple for side in (height, width))


def _largest_scale(min_side: int, area: int) -> float:
    return (_MAX_ASPECT * min_side**2 / area) ** 0.5
