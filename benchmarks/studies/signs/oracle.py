"""The oracle: which letters of a sign are broken, by a rule and not by a network.

Ground and ink are read from the picture. Each letter's ten columns are compared with every letter of the font at every
half-pixel place; the best four are rendered, and what is left of the picture beside them, as a share of the contrast
between ink and ground and averaged over 3 x 3 pixels, is the residual. A letter is broken when at least `LEAST` pixels
of its columns have a residual above tau.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.studies.signs import world

TAU = 0.25
TAUS = (0.20, 0.25, 0.30, 0.35)
LEAST = 3
# The brightest of the ink's pixels, whose median is its colour; a sign has 60 to 90 that are covered in full.
_INK_PIXELS = 40
# Below this contrast, in the length of an RGB difference, nothing is written there.
_LEAST_CONTRAST = 60.0
_CELL = world.PITCH // 2
# A half pixel beyond the places where clean letters can be.
_PLACES_X = range(min(world.CORNER_X) - 1, max(world.CORNER_X) + 2)
_PLACES_Y = range(min(world.CORNER_Y) - 1, max(world.CORNER_Y) + 2)


@dataclasses.dataclass
class Reading:
    """What the oracle reads in N signs.

    Attributes:
        severity: (N, 4) float32, the `LEAST`-th largest residual of a letter's columns: a letter is broken above tau.
        words: (N,) the best matching letters, broken or not.
        colours: (N,) names of the colour nearest to the ink.
        colour_distance: (N,) float32, from the ink to that colour, in the length of an RGB difference.
        residual: (N, 16, 40) float32.
        columns: (N, 4, 2) int, the columns [first, end) that each letter answers for.
        boxes: (N, 4, 4) int, the best matching letter's left, top, right and bottom in pixels, right and bottom
            excluded, within the picture.
    """

    severity: np.ndarray
    words: np.ndarray
    colours: np.ndarray
    colour_distance: np.ndarray
    residual: np.ndarray
    columns: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.severity)

    def broken_letters(self, tau: float = TAU) -> np.ndarray:
        """(N, 4) bool."""
        return self.severity > tau

    def broken(self, tau: float = TAU) -> np.ndarray:
        """(N,) bool: at least one letter is."""
        return self.broken_letters(tau).any(1)

    def rate(self, tau: float = TAU) -> float:
        """Share of the signs that are broken."""
        return float(self.broken(tau).mean())

    def marked(self, tau: float = TAU) -> np.ndarray:
        """(N, 16, 40) bool: the broken letters' boxes, and the residual above tau in their columns."""
        marks = np.zeros(self.residual.shape, bool)
        for picture, letter in np.argwhere(self.broken_letters(tau)):
            first, end = self.columns[picture, letter]
            marks[picture, :, first:end] |= self.residual[picture, :, first:end] > tau
            left, top, right, bottom = self.boxes[picture, letter]
            marks[picture, top:bottom, left:right] = True
        return marks

    def letters(self) -> np.ndarray:
        """(N, 4) single letters of the words."""
        return np.array([list(word) for word in self.words], "<U1").reshape(len(self), world.LETTERS_PER_SIGN)

    def where(self, chosen: np.ndarray) -> Reading:
        """The signs that a boolean mask (N,) or an index array chooses."""
        return Reading(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def read_signs(pictures: np.ndarray | torch.Tensor, chunk: int = 500) -> Reading:
    """Read signs.

    Args:
        pictures: uint8 (N, 16, 40, 3), or a tensor (N, 3, 16, 40).
        chunk: pictures at a time.
    """
    if isinstance(pictures, torch.Tensor):
        pictures = pictures.permute(0, 2, 3, 1).numpy()
    size = (world.HEIGHT, world.WIDTH, 3)
    if pictures.dtype != np.uint8 or pictures.shape[1:] != size or not len(pictures):
        raise ValueError(f"pictures: expected uint8 (N, {', '.join(map(str, size))}), got {pictures.shape}")
    parts = [
        _read(torch.from_numpy(part.copy()).float()) for part in np.split(pictures, range(chunk, len(pictures), chunk))
    ]
    return Reading(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@functools.cache
def _templates() -> tuple[torch.Tensor, torch.Tensor]:
    """Every letter at every place within its columns: (T, 16 * 10), and (T, 3) letter, x and y of each."""
    inks, names = [], []
    for number, letter in enumerate(world.LETTERS):
        for x in _PLACES_X:
            for y in _PLACES_Y:
                inks.append(world.ink_of([world.dots(letter)], x, y, width=_CELL).ravel())
                names.append((number, x, y))
    return torch.from_numpy(np.stack(inks)), torch.tensor(names)


@torch.no_grad()
def _read(pictures: torch.Tensor):
    count = len(pictures)
    border = torch.cat([pictures[:, 0], pictures[:, -1]], 1)
    ground = border.median(1).values
    relative = pictures - ground[:, None, None]
    farthest = relative.norm(dim=-1).flatten(1).topk(_INK_PIXELS).indices
    ink = relative.flatten(1, 2).gather(1, farthest[..., None].expand(-1, -1, 3)).median(1).values
    contrast = ink.norm(dim=1)
    share = (relative @ ink[:, :, None].unsqueeze(1)).squeeze(-1) / contrast.clamp_min(1.0)[:, None, None] ** 2

    templates, names = _templates()
    cells = share.unflatten(2, (world.LETTERS_PER_SIGN, _CELL)).permute(0, 2, 1, 3).flatten(2)
    best = (templates.square().sum(1) - 2 * cells @ templates.T).argmin(2)
    letter, x, y = names[best].unbind(-1)

    drawn = _drawn(letter, x, y)
    unexplained = relative - drawn[..., None] * ink[:, None, None]
    residual = unexplained.norm(dim=-1) / contrast.clamp_min(1.0)[:, None, None]
    residual = F.avg_pool2d(residual[:, None], 3, 1, 1)[:, 0]
    boxes = _boxes(x, y)
    columns = _columns(boxes)
    position = torch.arange(world.WIDTH)
    own = (position >= columns[..., :1]) & (position < columns[..., 1:])
    of_letter = torch.where(own[:, :, None], residual[:, None], 0.0).flatten(2)
    severity = of_letter.topk(LEAST).values[..., -1]
    # a sign without ink has no letters to be whole
    severity[contrast < _LEAST_CONTRAST] = 1.0

    table = torch.tensor(list(world.COLOURS.values()), dtype=torch.float32)
    distance = (ground[:, None] + ink[:, None] - table).norm(dim=2)
    nearest = distance.argmin(1)
    words = ["".join(world.LETTERS[number] for number in row) for row in letter.tolist()]
    colours = np.array(list(world.COLOURS))[nearest.numpy()]
    found = (severity, np.array(words), colours, distance.amin(1), residual, columns, boxes)
    assert len(words) == count
    return tuple(part.numpy() if isinstance(part, torch.Tensor) else part for part in found)


def _drawn(letter: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The ink of the matched letters, (N, 16, 40), each at its own place."""
    drawn = torch.zeros(len(letter), world.HEIGHT, world.WIDTH + 2 * _CELL)
    for number in range(world.LETTERS_PER_SIGN):
        keys = zip(letter[:, number].tolist(), x[:, number].tolist(), y[:, number].tolist(), strict=True)
        drawn[:, :, _CELL * number : _CELL * (number + 3)] += torch.stack([_letter_ink(*key) for key in keys])
    return drawn[:, :, _CELL:-_CELL].clamp_max(1.0)


@functools.cache
def _letter_ink(letter: int, x: int, y: int) -> torch.Tensor:
    """(16, 30): a letter with ten columns to either side, into which it may reach by a half pixel."""
    ink = world.ink_of([world.dots(world.LETTERS[letter])], x + world.PITCH, y, width=3 * _CELL)
    return torch.from_numpy(ink)


def _boxes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    left = x + world.PITCH * torch.arange(world.LETTERS_PER_SIGN)
    edges = [left // 2, y // 2, (left + world.LETTER_WIDTH + 1) // 2, (y + world.LETTER_HEIGHT + 1) // 2]
    limits = (world.WIDTH, world.HEIGHT, world.WIDTH, world.HEIGHT)
    return torch.stack([edge.clamp(0, limit) for edge, limit in zip(edges, limits, strict=True)], -1)


def _columns(boxes: torch.Tensor) -> torch.Tensor:
    """Each letter answers for its own columns and half of the gaps beside them; the outer ones to the edge."""
    between = (boxes[:, :-1, 2] + boxes[:, 1:, 0] + 1) // 2
    edge = torch.zeros(len(boxes), 1, dtype=torch.long)
    return torch.stack([torch.cat([edge, between], 1), torch.cat([between, edge + world.WIDTH], 1)], -1)
