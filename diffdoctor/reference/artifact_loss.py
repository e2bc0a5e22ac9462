"""The definition of `diffdoctor.artifact_loss`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdoctor.reference.grid import accumulation_dtype


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
        x = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    c = torch.sigmoid(x).flatten(1)
    if method == "threshold":
        above = c > torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
        value = torch.where(above, c, torch.zeros_like(c)).sum(1) / (above.sum(1, dtype=dtype) + 1e-5)
    else:
        value = {"mean": c.mean, "sum": c.sum, "max": c.amax}[method](1)
    return {"mean": value.mean, "sum": value.sum, "sample": lambda: value}[reduction]()
