"""The order in which a training takes the pictures of many shards: a function of the draw's number alone.

A permutation of all pictures jumps from shard to shard with every picture, and weights ask for a random number and a
search each. Here neighbouring shards of a shuffled row form a block of some ten thousand pictures, which alone is in
random order: what is read in the next minutes lies in a few files, and nothing but the block's order is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffdoctor.runs.errors import expected

# Draws are spread over groups by multiples of the golden ratio, whose gaps are the most even there are.
_BITS = 32
_STEP = 2654435769  # 2^32 / 1.618..., odd


class BlockPlan:
    """An endless order of rows: pass after pass, each row once in a pass.

    Args:
        counts: (S,) rows of each shard.
        seed: of the order, as `numpy.random.default_rng` takes it.
        shards: shards in a block.

    Raises:
        ValueError: no rows, a negative number, or fewer than one shard in a block.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int | Sequence[int] = 0, shards: int = 64):
        self.counts = np.asarray(counts, np.int64)
        if self.counts.ndim != 1 or not self.counts.sum() or self.counts.min() < 0:
            raise ValueError(expected("counts", "the numbers of rows of shards, one row at least", self.counts[:4]))
        if shards < 1:
            raise ValueError(expected("shards", ">= 1", shards))
        self.seed, self.shards = [seed] if np.isscalar(seed) else list(seed), shards
        self._starts = np.cumsum(self.counts) - self.counts
        self._kept: dict[tuple[int, ...], np.ndarray | tuple] = {}

    def __len__(self) -> int:
        return int(self.counts.sum())

    def row(self, draw: int) -> int:
        """The row of a draw, 0 being the first of the first pass."""
        number, offset = divmod(draw, len(self))
        _, ends = self._once(self._pass, number)
        block = int(np.searchsorted(ends, offset, side="right"))
        return int(self._once(self._block, number, block)[offset - (int(ends[block - 1]) if block else 0)])

    def _once(self, make, *key: int):
        # a plain dict of the last few: a plan goes to other processes
        if key not in self._kept:
            while len(self._kept) >= 4:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make(*key)
        return self._kept[key]

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards' order in a pass, and the draws at which its blocks end."""
        order = np.random.default_rng([*self.seed, number]).permutation(len(self.counts))
        return order, np.cumsum(np.add.reduceat(self.counts[order], np.arange(0, len(order), self.shards)))

    def _block(self, number: int, block: int) -> np.ndarray:
        order, _ = self._once(self._pass, number)
        chosen = order[block * self.shards : (block + 1) * self.shards]
        rows = [np.arange(self._starts[shard], self._starts[shard] + self.counts[shard]) for shard in chosen]
        return np.random.default_rng([*self.seed, number, block]).permutation(np.concatenate(rows))


class WeightedBlocks:
    """Rows in blocks, drawn as often as their weights say; rows of the same weight are a group with a plan of its own.

    The number that a group has had of the first n draws differs from n times its share by a few at any n, and is
    computed without going through them.

    Args:
        shards: (N,) the number of each row's shard; rows of a shard follow one another.
        weights: (N,) weights >= 0, as `balance.training_weights` gives them; None: all alike.
        seed: of the order.
        block: shards in a block.

    Raises:
        ValueError: no rows, or none with a weight.
    """

    def __init__(self, shards: np.ndarray, weights: np.ndarray | None, seed: int, block: int = 64):
        if not len(shards):
            raise ValueError(expected("shards", "at least one row", "none"))
        weights = np.ones(len(shards)) if weights is None else np.asarray(weights, np.float64)
        levels, groups = np.unique(weights, return_inverse=True)
        self._rows, self._plans, shares = [], [], []
        for group, level in enumerate(levels):
            if level <= 0:
                continue
            rows = np.flatnonzero(groups == group)
            starts = np.flatnonzero(np.diff(shards[rows], prepend=-1))
            counts = np.diff(starts, append=len(rows))
            self._rows.append(rows)
            self._plans.append(BlockPlan(counts, [seed, 7, group], block))
            shares.append(level * len(rows))
        if not shares:
            raise ValueError(expected("weights", "a positive one", "none"))
        self._bounds = [round(end / sum(shares) * 2**_BITS) for end in np.cumsum(shares)]
        self._offset = int(np.random.default_rng([seed, 8]).integers(2**_BITS))

    def row(self, draw: int) -> int:
        """The row of a draw."""
        place = (draw * _STEP + self._offset) % 2**_BITS
        group = int(np.searchsorted(self._bounds, place, side="right"))
        before = self._count(draw, self._bounds[group])
        if group:
            before -= self._count(draw, self._bounds[group - 1])
        return int(self._rows[group][self._plans[group].row(before)])

    def _count(self, draws: int, bound: int) -> int:
        """How many of the first draws have a place below the bound."""
        # (place < bound) = floor((x - bound) / 2^32 + 1) - floor(x / 2^32) less one turn, over x = draw * step + offset
        turn = 2**_BITS
        whole = floor_sum(draws, turn, _STEP, self._offset)
        return draws - (floor_sum(draws, turn, _STEP, self._offset + turn - bound) - whole)


def floor_sum(count: int, modulus: int, step: int, offset: int) -> int:
    """The sum of floor((step * i + offset) / modulus) over i = 0 ... count - 1, in O(log modulus) steps; all >= 0.

    By the exchange of the two axes of the points under the line, as in Euclid's algorithm.
    """
    total = 0
    while count:
        total += (step // modulus) * count * (count - 1) // 2 + (offset // modulus) * count
        step, offset = step % modulus, offset % modulus
        top = step * count + offset
        count, offset = divmod(top, modulus)
        modulus, step = step, modulus
    return total
