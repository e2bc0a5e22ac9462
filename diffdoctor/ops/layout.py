"""Packed tokens: what transformers such as FLUX predict instead of an image-shaped latent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffdoctor.ops.words import WORDS
from diffdoctor.runs.errors import expected, in_our_words

__all__ = ["Packed"]

ORDERS = ("c ph pw", "ph pw c")


@dataclass(frozen=True)
class Packed:
    """Says that a (B, N, D) tensor holds patches of a (B, C, height, width) latent.

    Attributes:
        height: of the latent, in latent pixels before packing.
        width: likewise.
        patch_size: side p of a patch; height and width are multiples of it.
        order: how a token's D = C p p channels are laid out, "c ph pw" (FLUX, Qwen-Image, Chroma) or "ph pw c"
            (Ideogram, HiDream-O1). Tokens run over the picture row by row: "b (h w) (...)".

    Raises:
        TypeError: a size that is not an int, an order that is not a str.
        ValueError: a size that is not positive or not a multiple of patch_size, an unknown order.
    """

    height: int
    width: int
    patch_size: int = 2
    order: str = "c ph pw"

    def __post_init__(self):
        for name in ("patch_size", "height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(expected(name, "an int", type(value).__name__))
            if value < 1:
                raise ValueError(expected(name, "a positive int", value))
            if value % self.patch_size:
                raise ValueError(expected(name, f"a positive multiple of patch_size {self.patch_size}", value))
        if not isinstance(self.order, str):
            raise TypeError(expected("order", f"one of {ORDERS}", type(self.order).__name__))
        if self.order not in ORDERS:
            raise ValueError(expected("order", f"one of {ORDERS}", in_our_words(self.order, WORDS["order"])))

    @property
    def tokens(self) -> int:
        """N, the number of tokens of a sample."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    def unpack(self, tokens: Tensor) -> Tensor:
        """(B, N, D) tokens as (B, C, height, width)."""
        p, h, w = self.patch_size, self.height // self.patch_size, self.width // self.patch_size
        batch, channels = tokens.shape[0], tokens.shape[2] // (p * p)
        if self.order == "c ph pw":
            grid = tokens.reshape(batch, h, w, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        else:
            grid = tokens.reshape(batch, h, w, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(batch, channels, self.height, self.width)

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, height, width) latents as (B, N, D) tokens."""
        p, h, w = self.patch_size, self.height // self.patch_size, self.width // self.patch_size
        batch, channels = latents.shape[:2]
        patches = latents.reshape(batch, channels, h, p, w, p)
        order = (0, 2, 4, 1, 3, 5) if self.order == "c ph pw" else (0, 2, 4, 3, 5, 1)
        return patches.permute(order).reshape(batch, h * w, channels * p * p)
