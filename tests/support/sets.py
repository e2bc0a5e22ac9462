"""A small set of shards, and a detector that has learnt nothing, by the commands that users have."""

from pathlib import Path

import torch

from diffdoctor.cli import main
from diffdoctor.detector import ConvDetector
from support.pictures import write_shapes


def write_set_and_detector(folder: Path, pictures: int, shard_size: int) -> None:
    """Write folder/pictures, folder/set, with each picture clean and tinted, and folder/detector."""
    write_shapes(folder / "pictures", pictures)
    words = ["inject", f"{folder}/pictures", "--output", f"{folder}/set", "--shard_size", str(shard_size)]
    assert main([*words, "--kinds", '["tint"]']) == 0
    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(folder / "detector")
