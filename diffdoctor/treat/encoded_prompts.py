"""Embeddings of any number of prompts, encoded once and a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffdoctor.runs.progress import progress
from diffdoctor.treat.families import Conditioning, Family
from diffdoctor.treat.rows import RowStore


class EncodedPrompts:
    """What the denoiser is told of N prompts.

    Args:
        family: encodes them.
        prompts: N strings.
        store: where the embeddings are kept; empty.
        batch_size: prompts that are encoded at a time.
        device: of the embeddings.
        show: whether to show a bar.
        **options: `guidance_scale`, `height` and `width` of `Family.encode_prompts`.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[str],
        store: RowStore,
        *,
        batch_size: int,
        device: torch.device,
        show: bool = False,
        **options,
    ):
        self.store, self.device = store, device
        with progress(len(prompts), desc=store.name, unit="prompt", enabled=show and len(prompts) > batch_size) as bar:
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                store.add(len(part), lambda part=part: _flat(family.encode_prompts(part, device=device, **options)))
                bar.update(len(part))

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, index: torch.Tensor) -> Conditioning:
        """The conditioning of the prompts at index (M,), on the device."""
        found = self.store.take(index)
        positive = {name.removeprefix("+"): value.to(self.device) for name, value in found.items() if name[0] == "+"}
        negative = {name.removeprefix("-"): value.to(self.device) for name, value in found.items() if name[0] == "-"}
        return Conditioning(positive, negative or None).trimmed()


def _flat(conditioning: Conditioning) -> dict[str, torch.Tensor]:
    negative = conditioning.negative or {}
    return {
        **{f"+{name}": value for name, value in conditioning.positive.items()},
        **{f"-{name}": value for name, value in negative.items()},
    }
