"""Precision and recall of generated pictures: inside the real ones' neighbourhoods, and the other way round."""

from __future__ import annotations

import torch

from diffdoctor.measures.features import FeatureRows, blocks
from diffdoctor.runs.errors import expected

# Distances are computed for so many rows against all others at a time.
_ROWS = 1024


class Manifold:
    """A set of pictures as a union of balls: around each one's features, as wide as the distance to its k-th neighbour.

    Source: T. Kynkäänniemi et al., Improved Precision and Recall Metric, arXiv 1904.06991.

    Args:
        features: (N, D), N more than k.
        k: neighbours.

    Raises:
        ValueError: too few rows.
    """

    def __init__(self, features: FeatureRows, k: int = 3):
        if len(features) <= k:
            raise ValueError(expected("features", f"more than {k} rows", len(features)))
        self._centres = torch.cat(list(blocks(features)))
        # the nearest is the row itself
        near = [torch.cdist(part, self._centres).kthvalue(k + 1).values for part in self._centres.split(_ROWS)]
        self._radii = torch.cat(near)

    def contains(self, features: FeatureRows) -> torch.Tensor:
        """Whether each of the rows (M, D) is in a ball; (M,) bool.

        Of the generated pictures in the real ones' manifold the mean is the precision; of the real ones in the
        generated ones' it is the recall, which depends on how many were generated.
        """
        parts = (part for block in blocks(features) for part in block.split(_ROWS))
        return torch.cat([(torch.cdist(part, self._centres) <= self._radii).any(1) for part in parts])
