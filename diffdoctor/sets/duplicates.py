"""Pictures that are the same, or nearly: by their pixels and by perceptual hashes, in clusters."""

from __future__ import annotations

import numpy as np

BANDS = 4  # of 16 bits each
_TOGETHER = 512  # hashes that share a band, all pairs of which are compared
_NEIGHBOURS = 64  # of each hash in a larger group, in the order of the hashes


def clusters_of(uids: np.ndarray, hashes: np.ndarray, distance: int | None) -> np.ndarray:
    """The cluster of each picture, the lowest index of its members.

    Pictures of one uid are in one cluster. So are those whose hashes differ in at most `distance` bits and agree in one
    of four bands of 16 bits: all pairs that differ in up to 3 bits, and of those that differ in more, fewer (91 % at 4
    and 38 % at 8 bits, where these lie anywhere). Of more than 512 hashes that share a band, each is compared with its
    64 neighbours in order.

    Args:
        uids: (N,) of the pictures.
        hashes: (N,) int64, perceptual hashes of 64 bits.
        distance: largest number of bits; None: equal pixels alone.
    """
    parents = np.arange(len(uids))
    _union_equal(parents, np.unique(uids.astype(str), return_inverse=True)[1])
    if distance is not None and len(hashes):
        unique, first, inverse = np.unique(hashes.astype(np.int64), return_index=True, return_inverse=True)
        _union_equal(parents, inverse)
        for a, b in _close_pairs(unique.view(np.uint64), distance):
            _union(parents, int(first[a]), int(first[b]))
    return np.array([_root(parents, index) for index in range(len(parents))], np.int64)


def _close_pairs(hashes: np.ndarray, distance: int):
    """Pairs of indices of sorted, distinct hashes that share a band and differ in at most `distance` bits."""
    for band in range(BANDS):
        values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(values, kind="stable")
        bounds = np.flatnonzero(np.diff(values[order])) + 1
        for group in np.split(order, bounds):
            reach = len(group) - 1 if len(group) <= _TOGETHER else _NEIGHBOURS
            for step in range(1, reach + 1):
                close = _bits(hashes[group[:-step]] ^ hashes[group[step:]]) <= distance
                yield from zip(group[:-step][close], group[step:][close], strict=True)


def _bits(values: np.ndarray) -> np.ndarray:
    """How many bits of each of (N,) uint64 are set."""
    return np.unpackbits(values.view(np.uint8).reshape(len(values), 8), axis=1).sum(axis=1)


def _union_equal(parents: np.ndarray, codes: np.ndarray) -> None:
    """Join all that have one code."""
    order = np.argsort(codes, kind="stable")
    same = codes[order][1:] == codes[order][:-1]
    for a, b in zip(order[:-1][same], order[1:][same], strict=True):
        _union(parents, int(a), int(b))


def _root(parents: np.ndarray, index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = int(parents[index])
    return index


def _union(parents: np.ndarray, a: int, b: int) -> None:
    a, b = _root(parents, a), _root(parents, b)
    parents[max(a, b)] = min(a, b)
