"""A reward of whole pictures, or their quality: any function of pictures and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.devices import as_numbers

Reward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def checked_reward(function: Callable[[torch.Tensor, Sequence[str]], Any], name: str = "reward") -> Reward:
    """The function, whose answers are checked: one finite number a picture, as an fp32 tensor (B,) on the CPU.

    Args:
        function: pictures (B, 3, H, W) fp32 in [0, 1] and their B prompts to B numbers, higher for better pictures.
        name: of the argument, for errors.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(function):
        what = "a function from pictures (B, 3, H, W) in [0, 1] and prompts to B numbers"
        raise TypeError(expected(name, what, type(function).__name__))

    @torch.no_grad()
    def reward(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        found = function(pictures, list(prompts))
        if not isinstance(found, torch.Tensor):
            found = torch.as_tensor(np.asarray(as_numbers(found), np.float32))
        values = found.detach().to("cpu", torch.float32)
        if values.shape != (len(pictures),):
            raise UserError(expected(name, f"{len(pictures)} numbers, one a picture", tuple(values.shape)))
        if not bool(torch.isfinite(values).all()):
            raise UserError(expected(name, "finite numbers", values[~torch.isfinite(values)][0].item()))
        return values

    return reward
