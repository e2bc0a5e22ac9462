"""The definition of `diffdoctor.artifact_loss`."""

import torch
from torch import Tensor

from diffdoctor.reference.grid import accumulation_dtype, linear


def artifact_loss(
    logits: Tensor,
    *,
    size: tuple[int, int] | None = None,
    threshold: float = 0.1,
    method: str = "threshold",
    reduction: str = "mean",
) -> Tensor:
    """The confidence that remains in a picture, from logits (B, 1, h, w) or (B, h, w); () or (B,) for "sample"."""
    dtype = accumulation_dtype(logits.dtype)
    x = logits.to(dtype)
    x = x[:, None] if x.ndim == 3 else x
    if size is not None and tuple(size) != tuple(x.shape[2:]):
        x = linear(linear(x, 3, size[1], selects=True), 2, size[0], selects=True)
    c = torch.sigmoid(x).flatten(1)
    if method == "threshold":
        above = c > torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
        value = torch.where(above, c, torch.zeros_like(c)).sum(1) / (above.sum(1, dtype=dtype) + 1e-5)
    else:
        value = {"mean": c.mean, "sum": c.sum, "max": c.amax}[method](1)
    return {"mean": value.mean, "sum": value.sum, "sample": lambda: value}[reduction]()
