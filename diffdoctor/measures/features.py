"""Distances and spreads in the feature space of a network: FID, within-class variance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

# Rows of features that are in memory as float64 at a time.
BLOCK = 4096


def blocks(features, chosen=None) -> Iterator[torch.Tensor]:
    """Rows of features in order, as float64 (up to 4096, D).

    Args:
        features: (N, D), a tensor or what else gives rows for a tensor of indices, such as features on the disk.
        chosen: indices of the rows wanted, (M,); None: all.
    """
    chosen = torch.arange(len(features)) if chosen is None else chosen
    for part in chosen.split(BLOCK):
        yield features[part].double()


class _GivenFeatures(torch.nn.Module):
    """Hands features that are already there to torchmetrics, which expects to compute them itself."""

    def __init__(self, size):
        super().__init__()
        self.num_features = size

    def forward(self, features):
        return features


def frechet_distance(real, generated) -> float:
    """The Fréchet distance of two sets of features (the FID when they are Inception's).

    ‖μ_r − μ_g‖² + tr(Σ_r + Σ_g − 2(Σ_r Σ_g)^½), computed by torchmetrics. It is biased upwards for small sets: compare
    only distances of sets of the same size, beside a floor (two halves of the real data).

    Args:
        real, generated: (N, D) and (M, D), N and M at least 2.

    Returns:
        The distance, in squared feature units.

    Raises:
        ValueError: if the features do not have the same D, or either set has fewer than two rows.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real and generated must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"real and generated must have at least 2 rows each, got {len(real)} and {len(generated)}")
    return frechet_distance_of_blocks(blocks(real), blocks(generated))


def frechet_distance_of_blocks(real: Iterable[torch.Tensor], generated: Iterable[torch.Tensor]) -> float:
    """`frechet_distance` of two sets that come in blocks (·, D), so that neither need be in memory."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for rows, is_real in ((real, True), (generated, False)):
        for block in rows:
            if metric is None:
                # What it is fed is everything: gathering over processes would wait for them in vain.
                metric = FrechetInceptionDistance(feature=_GivenFeatures(block.shape[1]), sync_on_compute=False)
                metric.set_dtype(torch.float64)
            metric.update(block.double(), real=is_real)
    return float(metric.compute())


def within_class_variance(features, labels) -> float:
    """The mean over classes of the total variance (trace of the covariance) of the features inside a class.

    A model that has collapsed draws the same picture for each prompt: few artifacts, no variance.

    Args:
        features: (N, D), a tensor or features on the disk.
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
