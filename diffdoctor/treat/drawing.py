"""Drawing a treatment's pictures: those of a step's batch, and the fixed ones that are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import IntEnum

import torch

from diffdoctor.training.processes import Processes, seed_of
from diffdoctor.treat.adapters import merged_adapters
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.encoded_prompts import EncodedPrompts
from diffdoctor.treat.rollout import Rollout, initial_latents, picture_generators, roll_out
from diffdoctor.treat.rows import RowStore
from diffdoctor.treat.sampling import Sampling


class Purpose(IntEnum):
    """What the random numbers of a treatment are for; part of every seed."""

    PICTURES = 0
    METHOD = 1
    PAIRS = 2
    FIXED = 3
    ORDER = 4
    LORA = 5
    POLICY = 6


class Drawing:
    """Draws pictures of the treatment's prompts.

    Args:
        sampling: draws and diagnoses.
        prompts: of the treatment; `encode` turns them into embeddings.
        config: of the treatment.
        processes: that draw together.
        size: height and width of the pictures, in pixels.

    Attributes:
        chunk: pictures that a process works on at a time.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[str],
        config: TreatConfig,
        processes: Processes,
        size: tuple[int, int],
    ):
        self.sampling, self.prompts, self.config, self.processes = sampling, prompts, config, processes
        self.height, self.width = size
        share = -(-config.batch_size // processes.count)
        self.chunk = share if config.micro_batch_size is None else min(share, config.micro_batch_size)

    def encode(self, store: RowStore, *, show: bool = False) -> None:
        """Encode the prompts; comes before anything is drawn.

        Args:
            store: where the embeddings are kept; empty.
            show: whether to show a bar.
        """
        self.conditioning = EncodedPrompts(
            self.sampling.family,
            self.prompts,
            store,
            batch_size=self.config.encode_batch_size,
            device=self.processes.device,
            show=show,
            guidance_scale=self.sampling.guidance.scale,
            height=self.height,
            width=self.width,
        )

    def prompt_row(self, number: int) -> int:
        """The prompt of the number-th picture of the treatment.

        Every prompt comes once before any comes again, each time round in another order.
        """
        count = len(self.prompts)
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, Purpose.ORDER, number // count))
        return int(torch.randperm(count, generator=generator)[number % count])

    def roll_out(self, rows: Sequence[int], seeds: Sequence[int], keep: Sequence[int] = ()) -> Rollout:
        """Sample pictures without a graph.

        Args:
            rows: (B,) of the prompts.
            seeds: (B,) of the pictures.
            keep: the steps before which the state is stored for a replay.
        """
        return self.roll_out_from(rows, picture_generators(seeds), keep)

    def roll_out_from(
        self, rows: Sequence[int], generators: list[torch.Generator], keep: Sequence[int] = (), **options
    ) -> Rollout:
        """As `roll_out`, from the B pictures' generators, with further options of `rollout.roll_out`."""
        family, size = self.sampling.family, (self.height, self.width)
        latents = initial_latents(self.sampling, generators, *size, self.processes.device, family.latents_dtype)
        conditioning = self.conditioning.rows(torch.tensor(rows, dtype=torch.long))
        # weights that are not there cannot be merged into
        merge = self.config.merge_rollout and self.config.resident_blocks is None and not family.is_sharded
        with merged_adapters(family) if merge else nullcontext():
            return roll_out(self.sampling, conditioning, latents, generators, keep=keep, **options)

    def diagnose(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures (B, 3, H, W) of a roll-out and their confidence maps (B, 1, H, W)."""
        return self.sampling.diagnose(rollout.final, 1 if self.config.vae_slicing else None)

    def fixed(
        self, count: int, check: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first fixed pictures, drawn by all processes together.

        Args:
            count: how many.
            check: called with pictures and final latents of each part before it is used.

        Returns:
            Pictures (count, 3, H, W) and their confidence maps (count, 1, H, W), on the CPU.
        """
        pictures, maps = [], []
        for part in chunks(self.processes.even_share(count), self.chunk):
            rows = [number % len(self.prompts) for number in part]
            rollout = self.roll_out(rows, [seed_of(self.config.seed, Purpose.FIXED, number) for number in part])
            drawn, confidence = self.diagnose(rollout)
            if check is not None:
                check(drawn, rollout.final)
            pictures.append(self.processes.gather(drawn, len(part) * self.processes.count))
            maps.append(self.processes.gather(confidence, len(part) * self.processes.count))
        return torch.cat(pictures)[:count], torch.cat(maps)[:count]


def chunks(numbers: list[int], size: int) -> list[list[int]]:
    """The numbers in lists of this size, the last one perhaps shorter."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
