"""A small world for rounds: digits damaged in ways that the first detector does not know."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml

from diffdoctor.data.codec import encode_picture
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.demo.data import AREA, STRENGTH, VISIBLE, WORDS, clean_digits
from diffdoctor.detector import ConvDetector, DetectorTrainingConfig, train_detector
from diffdoctor.detector.damage.injection import inject
from diffdoctor.detector.samples import ArrayData

KNOWN, UNKNOWN = ("texture_noise", "tint"), ("duplicate", "warp", "smear", "seam")
# All damage is in the sets.
TRAINING = {
    "steps": 45,
    "batch_size": 32,
    "bce": 1.0,
    "mse": 0.0,
    "warmup_steps": 10,
    "augment": {"inject_share": 0.0, "benign_share": 0.0, "shrink_share": 0.0, "shift": 0.07},
}


all_digits = cache(clean_digits)


def digits(count, kinds, first=0, share=0.5):
    """Samples of digits from `first` on, so many of them damaged in one of these ways; none without a category."""
    pictures, numbers = all_digits()
    rng = np.random.default_rng([7, first])
    for index in range(first, first + count):
        picture, mask = pictures[index], np.zeros(pictures.shape[1:3], np.float32)
        if index - first < share * count:
            damaged = inject(picture, rng, kinds, STRENGTH, AREA, visible=VISIBLE, attempts=64)
            picture, mask = damaged.picture, damaged.mask
        word = WORDS[numbers[index]]
        yield {"key": f"d{index}", "picture": picture, "mask": mask, "prompt": f"{word} {index}", "category": word}


def make_world(folder: Path, pool: int = 160, test: int = 120) -> None:
    """Write `pool/` (half of it files, half a shard), `truth`, `test` and `injected` as shards, and `detector`."""
    known = list(digits(160, KNOWN))
    write_shards(known, folder / "injected")
    chosen = list(digits(pool, UNKNOWN, 200, 0.4))
    order = np.random.default_rng(0).permutation(pool)
    write_shards((chosen[index] for index in order[::2]), folder / "pool" / "shards")
    for index in order[1::2]:
        path = folder / "pool" / chosen[index]["category"] / f"{chosen[index]['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(chosen[index]["picture"], "png"))
    write_shards(chosen, folder / "truth")
    # without categories, each of which would have measures and intervals of its own
    write_shards((each | {"category": ""} for each in digits(test, UNKNOWN, 200 + pool)), folder / "test")
    torch.manual_seed(0)
    data = ArrayData([each["picture"] for each in known], [each["mask"] for each in known])
    config = DetectorTrainingConfig(**TRAINING | {"steps": 60})
    trained = train_detector(config, data, detector=ConvDetector((8, 16)), progress=False)
    trained.detector.save_pretrained(folder / "detector")


def options(world: Path, output: Path, **changes) -> dict:
    """What a ROUND.yaml says."""
    return {
        "pool": [str(world / "pool")],
        "detector": str(world / "detector"),
        "output": str(output),
        "test": [str(world / "test")],
        "data": [str(world / "injected")],
        "annotator": "simulated",
        "truth": [str(world / "truth")],
        "rater": {"jitter_px": 0.3, "missed": 0.05, "false_rate": 0.02},
        "budget": 100,
        "double_share": 0.1,
        "training": {**TRAINING, "checkpoint_every": 15},
        "bootstrap": 40,
        **changes,
    }


def write_yaml(path: Path, **values) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path
