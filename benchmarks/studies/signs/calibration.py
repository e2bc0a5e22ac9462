"""Does the oracle see what is known to be broken, and nothing else? Signs broken on purpose, by kind and degree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.studies.signs import world
from benchmarks.studies.signs.oracle import TAUS, read_signs

FLIPPED = (1, 2, 3, 4, 6)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
FADED = (0.1, 0.25, 0.4, 0.6, 1.0)
GHOSTS = (0.2, 0.4, 0.6, 0.8, 1.0)


def flipped(letter: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """A letter (7, 5) with so many of its dots turned over: strokes missing, strokes too many."""
    broken = letter.ravel().copy()
    places = rng.choice(broken.size, count, replace=False)
    broken[places] = 1 - broken[places]
    return broken.reshape(letter.shape)


def mixed(letter: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """A letter with this share of another one: half P, half K."""
    others = [name for name in world.LETTERS if not np.array_equal(world.dots(name), letter)]
    return (1 - share) * letter + share * world.dots(str(rng.choice(others)))


def faded(letter: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """A letter that lacks this share of its ink."""
    return (1 - share) * letter


def ghosted(letter: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """A letter with its own ghost a dot to the side, in this share of the ink."""
    side = np.roll(letter, int(rng.choice((-1, 1))), axis=1)
    side[:, 0 if side[:, 0].sum() > letter[:, 0].sum() else -1] = 0
    return np.maximum(letter, share * side)


DAMAGE: dict[str, tuple[Callable, tuple]] = {
    "dots flipped": (flipped, FLIPPED),
    "mixed with another letter": (mixed, SHARES),
    "faded": (faded, FADED),
    "ghost beside it": (ghosted, GHOSTS),
}


def broken_signs(damage: Callable, degree: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs with one broken letter each.

    Args:
        damage: one of `DAMAGE`'s functions.
        degree: its last argument.
        count: signs.
        seed: of them.

    Returns:
        pictures (count, 16, 40, 3) uint8, and the broken letter's place in the word (count,).
    """
    pictures, places = np.empty((count, world.HEIGHT, world.WIDTH, 3), np.uint8), np.empty(count, int)
    for index in range(count):
        rng = np.random.default_rng([seed, 6, index])
        letters = [world.dots(letter) for letter in rng.choice(list(world.LETTERS), world.LETTERS_PER_SIGN)]
        places[index] = place = rng.integers(world.LETTERS_PER_SIGN)
        letters[place] = damage(letters[place], rng, degree)
        ink = world.ink_of(letters, rng.choice(world.CORNER_X), rng.choice(world.CORNER_Y))
        colour = world.COLOURS[str(rng.choice(list(world.COLOURS)))]
        pictures[index] = world.paint(ink, colour, rng.integers(*world.GROUND, 3))
    return pictures, places


def misses(count: int = 300, seed: int = 20) -> list[dict]:
    """How many known broken letters the oracle overlooks: a dict per kind, degree and tau.

    Returns:
        Each with kind, degree, tau, missed (share of the broken letters that are not marked) and beside (share of the
        sound letters beside them that are).
    """
    rows = []
    for kind, (damage, degrees) in DAMAGE.items():
        for degree in degrees:
            pictures, places = broken_signs(damage, degree, count, seed)
            reading = read_signs(pictures)
            for tau in TAUS:
                marked = reading.broken_letters(tau)
                hit = marked[np.arange(count), places]
                beside = (marked.sum(1) - hit).sum() / (marked.size - count)
                rows.append(
                    {"kind": kind, "degree": degree, "tau": tau, "missed": 1 - hit.mean(), "beside": float(beside)}
                )
    return rows


def false_alarms(pictures: np.ndarray | torch.Tensor, words: np.ndarray, colours: np.ndarray) -> dict:
    """What the oracle says of clean signs: {"broken at 0.20", …: shares, "words", "colours": shares read right}."""
    reading = read_signs(pictures)
    return {
        **{f"broken at {tau:.2f}": reading.rate(tau) for tau in TAUS},
        "words": float((reading.words == words).mean()),
        "colours": float((reading.colours == colours).mean()),
        "largest severity": float(reading.severity.max()),
    }


@torch.no_grad()
def round_trip(pipeline, pictures: np.ndarray) -> torch.Tensor:
    """Pictures (N, 16, 40, 3) uint8 through a pipeline's autoencoder and back: (N, 3, 16, 40) uint8."""
    from diffdoctor.demo.pipeline import encode_latents

    latents = encode_latents(pipeline, pictures)
    shift = getattr(pipeline.vae.config, "shift_factor", None) or 0.0
    parts = (latents / pipeline.vae.config.scaling_factor + shift).split(250)
    decoded = torch.cat([pipeline.vae.decode(part).sample for part in parts])
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
