"""A treatment in one process or in each of a group: OUTPUT gets what `treat` writes, OUTPUT-RANK.json an account."""

import json

import numpy as np
import torch

from diffdoctor.treat import TreatConfig, treat
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import BrightDetector

COMMON = {
    "steps": 3,
    "batch_size": 4,
    "group_size": 2,
    "sampling_steps": 3,
    "height": 16,
    "width": 16,
    "rank": 2,
    "max_sequence_length": 32,
    "replay_confidence": 0.6,
    "learning_rate": 1e-2,
    "anchor_weight": 0.4,
    "evaluate_every": 2,
    "evaluate_pictures": 3,
    "log_with": "none",
    "lora_targets": ("attention", "convolution", "feed_forward"),
    "min_sharpness": 0,
    "min_diversity": 0,
}


def main(output, options):
    family = options.pop("family")
    pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    pipeline = tiny_pipeline(family, prediction_type="v_prediction" if family == "sd" else "epsilon")
    offline = pictures, [PROMPTS[i % 3] for i in range(6)]
    config = TreatConfig(**{**COMMON, **options})
    result = treat(pipeline, BrightDetector(), PROMPTS, config, offline=offline, output_dir=output, progress=False)
    if torch.distributed.is_initialized():
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        mine = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in denoiser.parameters())
        rank = torch.distributed.get_rank()
        share = mine / sum(p.numel() for p in denoiser.parameters())
        with open(f"{output}-{rank}.json", "w") as file:
            json.dump({"history": result.history, "share": share}, file)
        torch.distributed.destroy_process_group()
