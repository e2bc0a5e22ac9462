"""Clean pictures drawn by rule, for what a dozen photographs do not show: foliage, lines, lettering, plain gradients.

A detector that knows few edges and textures flags every new one. Dead leaves, shapes that cover one another with sizes
by a power law, have the statistics of natural pictures (A. B. Lee, D. Mumford, J. Huang, "Occlusion models for natural
images", IJCV 41, 2001) and are known to stand in for photographs in training (arXiv 2106.05963).
"""

from functools import cache
from pathlib import Path

import numpy as np

SIDE, FINE = 32, 4
LETTERS = "aaabcdeeeefghiiijklmnnoooprsstttuuvwyzABCDEFGHIKLMNOPRSTUVWZ0123456789"


def drawn(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A picture (SIDE, SIDE, 3) uint8 of one of `KINDS`, drawn FINE times as large and then resized."""
    from PIL import Image, ImageFilter

    canvas = KINDS[kind](rng)
    canvas = canvas.astype(np.float32) * (1 + 0.6 * rng.uniform() * (_field(rng, 2.0)[..., None] - 0.5))
    canvas += 20 * rng.uniform() ** 2 * rng.standard_normal(canvas.shape)
    picture = Image.fromarray(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
    if rng.uniform() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(FINE * rng.uniform(0.1, 0.8)))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def leaves(rng: np.random.Generator) -> np.ndarray:
    """Shapes that cover one another; sizes by a power law, so that there are many small and few large ones."""
    from PIL import Image, ImageDraw

    side = FINE * SIDE
    palette = _palette(rng)
    image = Image.fromarray(_ground(rng, palette))
    draw = ImageDraw.Draw(image)
    smallest, form = np.exp(rng.uniform(np.log(2), np.log(24))), rng.integers(4)
    radii = smallest * rng.uniform(1e-3, 1, int(rng.integers(20, 400))) ** -0.5
    # a part of some pictures is left empty, as the sky is beside a tree
    border = rng.uniform(0, side) if rng.uniform() < 0.5 else 0.0
    for radius in np.minimum(radii, side / 2):
        centre = rng.uniform(border - 10, side), rng.uniform(0, side)
        centre = centre if not border or form % 2 else centre[::-1]
        _shape(draw, int(form if rng.uniform() < 0.7 else rng.integers(4)), *centre, radius, palette(rng), rng)
    return np.asarray(image)


def strokes(rng: np.random.Generator) -> np.ndarray:
    """Curves, branches, rays and bars on a quiet ground."""
    from PIL import Image, ImageDraw

    side = FINE * SIDE
    palette = _palette(rng)
    image = Image.fromarray(_ground(rng, palette))
    draw = ImageDraw.Draw(image)
    # 0: rays of one centre, 1: curves, 2: upright and level bars
    form, centre = int(rng.integers(3)), rng.uniform(0, side, 2)
    for _ in range(int(rng.integers(1, 25))):
        width, colour = int(np.exp(rng.uniform(0, np.log(20)))), palette(rng)
        start = centre if form == 0 else rng.uniform(-20, side + 20, 2)
        if form == 2:
            start, end = (rng.uniform(-20, side + 20, 2) for _ in range(2))
            end[int(rng.integers(2))] = start[int(rng.integers(2))]
            points = [start, end]
        else:
            turn, bend, step = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.15), rng.uniform(3, 9)
            angles = turn + (0 if form == 0 else bend) * np.arange(30) * rng.uniform(0, 2)
            points = start + np.cumsum(step * np.stack([np.cos(angles), np.sin(angles)], 1), 0)
        draw.line([tuple(map(float, point)) for point in points], fill=colour, width=width, joint="curve")
    return np.asarray(image)


def lettering(rng: np.random.Generator) -> np.ndarray:
    """Lines of made-up words in one of matplotlib's fonts, dark on light or light on dark, a little turned."""
    from PIL import Image, ImageDraw

    side = FINE * SIDE
    palette = _palette(rng)
    paper = rng.uniform(0.6, 1) * 255 * (1 - 0.2 * rng.uniform(size=3) ** 3)
    ink = rng.uniform(0, 0.4) * paper
    if rng.uniform() < 0.25:
        paper, ink = ink, paper
    image = Image.new("RGB", (2 * side, 2 * side), tuple(int(v) for v in paper))
    draw = ImageDraw.Draw(image)
    size = int(np.exp(rng.uniform(np.log(9), np.log(70))))
    font, y, gap = _font(int(rng.integers(len(_fonts()))), size), -rng.uniform(0, size), rng.uniform(1.0, 1.8)
    while y < 2 * side:
        words = ["".join(rng.choice(list(LETTERS), int(rng.integers(1, 10)))) for _ in range(2 * side // size + 3)]
        if rng.uniform() < 0.85:
            fill = palette(rng) if rng.uniform() < 0.05 else tuple(int(v) for v in ink)
            draw.text(
                (-rng.uniform(0, 3 * size) + (side if rng.uniform() < 0.2 else 0), y), " ".join(words), fill, font
            )
        y += gap * size
    if rng.uniform() < 0.4:
        image = image.rotate(rng.normal(0, 8), Image.Resampling.BILINEAR, fillcolor=tuple(int(v) for v in paper))
    corner = side // 2
    return np.asarray(image.crop((corner, corner, corner + side, corner + side)))


def fields(rng: np.random.Generator) -> np.ndarray:
    """Noise of a drawn spectrum in a few colours: clouds, sand, water, skies."""
    palette = _palette(rng)
    low, high = (np.array(palette(rng), np.float32) for _ in range(2))
    field = _field(rng, rng.uniform(0.5, 3.0))
    if rng.uniform() < 0.3:
        field = 1 / (1 + np.exp(-(field - 0.5) * rng.uniform(10, 80)))
    canvas = low + (high - low) * field[..., None]
    return canvas + (np.array(palette(rng), np.float32) - canvas) * 0.5 * _field(rng, 2.5)[..., None]


KINDS = {"leaves": leaves, "strokes": strokes, "lettering": lettering, "fields": fields}


def _palette(rng: np.random.Generator):
    """A function from a random generator to a colour: all of a picture's colours lie near one or two."""
    centres = rng.uniform(0, 255, (int(rng.integers(1, 4)), 3))
    grey = centres.mean(axis=1, keepdims=True)
    centres = grey + (centres - grey) * rng.choice([0.0, 0.3, 0.6, 1.0], p=[0.25, 0.3, 0.3, 0.15])
    spread, light = (0.0 if (centres == grey).all() else rng.uniform(2, 20)), rng.uniform(10, 80)

    def colour(rng):
        value = centres[rng.integers(len(centres))] + rng.normal(0, spread, 3) + rng.normal(0, light)
        return tuple(int(v) for v in np.clip(value, 0, 255))

    return colour


def _ground(rng: np.random.Generator, palette) -> np.ndarray:
    first, second = (np.array(palette(rng), np.float32) for _ in range(2))
    share = _field(rng, 3.0)[..., None] if rng.uniform() < 0.7 else np.zeros((1, 1, 1), np.float32)
    ground = first + (second - first) * share * np.ones((FINE * SIDE, FINE * SIDE, 1), np.float32)
    return np.rint(np.clip(ground, 0, 255)).astype(np.uint8)


def _field(rng: np.random.Generator, slope: float) -> np.ndarray:
    """(FINE SIDE, FINE SIDE) float32 in [0, 1]: noise whose amplitude falls as frequency ** -slope."""
    side = FINE * SIDE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None] * np.exp(rng.normal(0, 0.4)))
    frequency[0, 0] = np.inf
    phase = rng.uniform(0, 2 * np.pi, frequency.shape)
    field = np.fft.irfft2(frequency**-slope * np.exp(1j * phase), (side, side))
    return ((field - field.min()) / (np.ptp(field) + 1e-12)).astype(np.float32)


# form 0: an ellipse, 1: a level box, 2: a turned box, 3: any polygon
def _shape(draw, form: int, x: float, y: float, radius: float, colour, rng: np.random.Generator) -> None:
    ratio = np.exp(rng.normal(0, 0.5))
    if form == 0:
        # nested, so that it looks round
        steps = 8 if radius > 6 else 1
        gain, (dx, dy) = rng.uniform(0.5, 1.8), rng.uniform(-0.5, 0.5, 2)
        for step in range(steps):
            inner = 1 - step / steps
            cx, cy, w, h = x + (1 - inner) * dx * radius, y + (1 - inner) * dy * radius, radius * ratio, radius / ratio
            fill = tuple(int(min(255, v * gain ** (step / steps))) for v in colour)
            draw.ellipse((cx - w * inner, cy - h * inner, cx + w * inner, cy + h * inner), fill=fill)
        return
    corners = (4, 4, int(rng.integers(3, 9)))[form - 1]
    angles = rng.uniform(0, 2 * np.pi) * (form > 1) + np.pi / 4 + 2 * np.pi * np.arange(corners) / corners
    if form == 3:
        angles = angles + rng.normal(0, 0.3, corners)
    points = np.stack([x + radius * ratio * np.cos(angles), y + radius / ratio * np.sin(angles)], axis=1)
    draw.polygon([tuple(map(float, point)) for point in points], fill=colour)


@cache
def _fonts() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        path for path in folder.glob("*.ttf") if path.name.startswith(("DejaVu", "STIXGeneral", "cmr", "cmtt"))
    )


@cache
def _font(number: int, size: int):
    from PIL import ImageFont

    return ImageFont.truetype(str(_fonts()[number]), size)
