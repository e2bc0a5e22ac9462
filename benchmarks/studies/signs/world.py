"""Signs: four letters of a bitmap font in one colour on a dark ground, drawn exactly and as a function of a seed."""

from __future__ import annotations

import dataclasses

import numpy as np

HEIGHT, WIDTH = 16, 40
"""Of a sign, in pixels."""
LETTERS_PER_SIGN = 4
FONT = {
    "J": ("..###", "...#.", "...#.", "...#.", "...#.", "#..#.", ".##.."),
    "K": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
    "P": ("####.", "#...#", "#...#", "####.", "#....", "#....", "#...."),
    "S": (".####", "#....", "#....", ".###.", "....#", "....#", "####."),
    "U": ("#...#", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "Y": ("#...#", "#...#", ".#.#.", "..#..", "..#..", "..#..", "..#.."),
}
"""5 x 7 dots a letter; every two letters differ in at least a dozen dots, so that no half of one is another."""
LETTERS = "".join(FONT)
COLOURS = {
    "red": (235, 60, 50),
    "green": (70, 210, 80),
    "blue": (80, 120, 250),
    "yellow": (245, 220, 60),
    "white": (245, 245, 245),
    "pink": (240, 110, 220),
}
PROMPTS = tuple(f"{colour} letters" for colour in COLOURS)
# In half pixels: a dot is three wide, so that a stroke is a pixel and a half and its place within a pixel shows.
DOT, PITCH = 3, 20
LETTER_HEIGHT, LETTER_WIDTH = 7 * DOT, 5 * DOT
# Where the word's left upper corner may be: whole pixels, so that every letter lies in its own ten columns.
CORNER_X, CORNER_Y = (0, 2, 4), (2, 4, 6, 8)
GROUND = (5, 60)


def dots(letter: str) -> np.ndarray:
    """The dots of a letter: (7, 5) float32, 1 where there is ink."""
    return np.array([[dot == "#" for dot in row] for row in FONT[letter]], np.float32)


def ink_of(letters: list[np.ndarray], x: int, y: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """How much of each pixel letters cover, box-filtered: (height, width) float32 in [0, 1].

    Args:
        letters: (7, 5) dots of each, which need not be a letter's.
        x: of the first letter's left edge, in half pixels; each further one begins `PITCH` later. Letters may leave
            the picture.
        y: of their upper edge, in half pixels.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
    """
    margin = PITCH
    fine = np.zeros((2 * height + 2 * margin, 2 * width + 2 * margin), np.float32)
    for number, letter in enumerate(letters):
        top, left = margin + y, margin + x + PITCH * number
        fine[top : top + LETTER_HEIGHT, left : left + LETTER_WIDTH] += np.kron(letter, np.ones((DOT, DOT), np.float32))
    fine = fine[margin : margin + 2 * height, margin : margin + 2 * width]
    return fine.reshape(height, 2, width, 2).mean((1, 3))


def paint(ink: np.ndarray, colour, ground) -> np.ndarray:
    """A picture (H, W, 3) uint8 of ink (H, W) in a colour on a ground, each of three numbers in 0..255."""
    share = ink[..., None]
    return np.rint(np.asarray(ground) * (1 - share) + np.asarray(colour) * share).astype(np.uint8)


@dataclasses.dataclass
class Signs:
    """Clean signs.

    Attributes:
        pictures: (N, 16, 40, 3) uint8.
        words: (N,) four letters each.
        colours: (N,) names of the ink.
    """

    pictures: np.ndarray
    words: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def prompts(self) -> list[str]:
        """What each picture is asked for by: its colour; the word is free."""
        return [f"{colour} letters" for colour in self.colours]


def draw_signs(count: int, seed: int) -> Signs:
    """Signs of random words, colours, grounds and places; sign i depends on (seed, i) alone."""
    pictures = np.empty((count, HEIGHT, WIDTH, 3), np.uint8)
    words, colours = np.empty(count, f"<U{LETTERS_PER_SIGN}"), np.empty(count, "<U8")
    for index in range(count):
        rng = np.random.default_rng([seed, 5, index])
        word = "".join(rng.choice(list(LETTERS), LETTERS_PER_SIGN))
        colour = str(rng.choice(list(COLOURS)))
        ink = ink_of([dots(letter) for letter in word], rng.choice(CORNER_X), rng.choice(CORNER_Y))
        pictures[index] = paint(ink, COLOURS[colour], rng.integers(*GROUND, 3))
        words[index], colours[index] = word, colour
    return Signs(pictures, words, colours)
