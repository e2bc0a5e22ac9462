"""Asking a detector for its maps, and refusing what is no confidence: NaN compares as "not flagged" everywhere else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.devices import device_of

# A detector of one's own may resize its map after the sigmoid, which rounds.
_ROUNDING = 1e-3
_PROBE = 64


def confidence_of(
    detector: nn.Module,
    images: torch.Tensor,
    *,
    name: str = "detector",
    frames_per_call: int | None = None,
    **options,
) -> torch.Tensor:
    """A detector's maps without a gradient, checked.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        images: (B, 3, H, W), floating point, in [0, 1]; or videos (B, 3, T, H, W), each frame of which is a picture.
        name: what the detector is here, for the error: detector, judge or monitor.
        frames_per_call: frames of videos that it is given at a time; None: all.
        **options: of its `confidence`.

    Returns:
        (B, 1, H, W) in [0, 1]; (B, 1, T, H, W) of videos.

    Raises:
        UserError: see `check_confidence`.
    """

    def checked(pictures):
        return check_confidence(detector.confidence(pictures, **options), pictures, name=name)

    with torch.no_grad():
        return by_frame(checked, images, frames_per_call)


def by_frame(
    function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, frames_per_call: int | None = None
) -> torch.Tensor:
    """What a function of pictures gives of each frame of videos; of pictures it is called once.

    Args:
        function: from (N, 3, H, W) to (N, C, h, w).
        images: pictures (B, 3, H, W), or videos (B, 3, T, H, W).
        frames_per_call: frames of videos at a time; None: all.

    Returns:
        (B, C, h, w), of videos (B, C, T, h, w).
    """
    if images.ndim == 4:
        return function(images)
    frames = images.transpose(1, 2).flatten(0, 1)
    found = torch.cat([function(part) for part in frames.split(frames_per_call or max(1, len(frames)))])
    return found.unflatten(0, (images.shape[0], images.shape[2])).transpose(1, 2)


@torch.no_grad()
def check_confidence(confidence: torch.Tensor, images: torch.Tensor, *, name: str = "detector") -> torch.Tensor:
    """The maps, clamped to [0, 1] where they are outside by rounding alone.

    Args:
        confidence: maps (B, 1, H, W).
        images: (B, 3, H, W), of which they are. The map of a picture that is not finite itself may be anything.
        name: of what gave them.

    Raises:
        UserError: a value is not finite or outside [0, 1].
    """
    if not _is_confidence(confidence):
        found = confidence[images.isfinite().flatten(1).all(1)]
        if not _is_confidence(found):
            wrong = found[~((found >= -_ROUNDING) & (found <= 1 + _ROUNDING))][0]
            advice = "are these logits?" if wrong.isfinite() else "its weights, or their dtype, overflow"
            raise UserError(expected(name, "confidences in [0, 1]", f"{float(wrong):.4g} in a map ({advice})"))
    return confidence.clamp(0, 1)


def _is_confidence(values: torch.Tensor) -> bool:
    # NaN compares as false
    low, high = torch.aminmax(values) if values.numel() else (0, 1)
    return bool(low >= -_ROUNDING) and bool(high <= 1 + _ROUNDING)


def check_detector(detector: nn.Module, *, name: str = "detector") -> None:
    """Refuse a detector whose weights or whose map of a small grey picture are broken, before work is spent on it.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        name: what it is here, for the error.

    Raises:
        UserError: says which weights are not finite, or what is in the map.
    """
    check_finite_weights(detector.state_dict(), name)
    device = device_of(detector)
    confidence_of(detector, torch.full((1, 3, _PROBE, _PROBE), 0.5, device=device), name=name)


def check_finite_weights(state: dict[str, torch.Tensor], name: object) -> None:
    """Refuse weights that are not finite.

    Args:
        state: tensors by name.
        name: the detector's path or name, for the error.

    Raises:
        UserError: names the first of them.
    """
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(expected(name, "finite weights", f"NaN or infinity in {broken[0]}{more}"))
