"""Distances and spreads in the feature space of a network: FID, within-class variance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from diffdoctor.runs.errors import expected

# Rows of features that are in memory as float64 at a time.
BLOCK = 4096


class FeatureRows(Protocol):
    """Features (N, D): a tensor, or rows on the disk that are read when they are indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor: ...


def blocks(features: FeatureRows, chosen: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Rows of features in order, as float64 (up to 4096, D).

    Args:
        features: (N, D).
        chosen: (M,) indices of the rows wanted; None: all.

    Yields:
        (up to 4096, D) float64.
    """
    chosen = torch.arange(len(features)) if chosen is None else chosen
    for part in chosen.split(BLOCK):
        yield features[part].double()


class _Precomputed(torch.nn.Module):
    """Hands precomputed features to torchmetrics, which expects to compute them itself."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """The Fréchet distance of two sets of features (the FID when they are Inception's).

    ‖μ_r − μ_g‖² + tr(Σ_r + Σ_g − 2(Σ_r Σ_g)^½), computed by torchmetrics. It is biased upwards for small sets: compare
    only distances of sets of the same size, beside a floor (two halves of the real data).

    Args:
        real: (N, D), N at least 2.
        generated: (M, D), M at least 2.

    Returns:
        The distance, in squared feature units.

    Raises:
        ValueError: the features do not have the same D, or either set has fewer than two rows.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(expected("real, generated", "(N, D) and (M, D)", shapes))
    if min(len(real), len(generated)) < 2:
        raise ValueError(expected("real, generated", "at least 2 rows each", f"{len(real)} and {len(generated)}"))
    return frechet_distance_of_blocks(blocks(real), blocks(generated))


def frechet_distance_of_blocks(real: Iterable[torch.Tensor], generated: Iterable[torch.Tensor]) -> float:
    """`frechet_distance` of two sets that come in blocks, so that neither need be in memory.

    Args:
        real: blocks (·, D) of one set.
        generated: blocks (·, D) of the other.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for rows, is_real in ((real, True), (generated, False)):
        for block in rows:
            if metric is None:
                # What it is fed is everything: gathering over processes would wait for them in vain.
                metric = FrechetInceptionDistance(feature=_Precomputed(block.shape[1]), sync_on_compute=False)
                metric.set_dtype(torch.float64)
            metric.update(block.double().cpu(), real=is_real)
    return float(metric.compute())


def within_class_variance(features: FeatureRows, labels: torch.Tensor) -> float:
    """The mean over classes of the total variance (trace of the covariance) of the features inside a class.

    A model that has collapsed draws the same picture for each prompt: few artifacts, no variance.

    Args:
        features: (N, D).
        labels: (N,) integers; classes with fewer than two rows are left out.

    Returns:
        The variance, in squared feature units; 0.0 when no class has two rows.
    """
    spreads = []
    # A stable sort puts the rows of each class together without a comparison of all labels for every class.
    order = labels.argsort(stable=True)
    for members in order.split(labels.unique(return_counts=True)[1].tolist()):
        if len(members) < 2:
            continue
        mean = sum(block.sum(dim=0) for block in blocks(features, members)) / len(members)
        squares = sum((block - mean).square().sum() for block in blocks(features, members))
        spreads.append(float(squares) / (len(members) - 1))
    return sum(spreads) / len(spreads) if spreads else 0.0
