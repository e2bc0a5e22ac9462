"""Two processes with the same global batch give the LoRA that one gives, with the denoiser sharded or not."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from support import launch

SCRIPT = """
import json
import sys
import numpy as np
import torch
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import BrightDetector
from diffdoctor.treat import TreatConfig, treat

output, options = sys.argv[1], json.loads(sys.argv[2])
family = options.pop("family")
pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
common = dict(steps=3, batch_size=4, group_size=2, sampling_steps=3, height=16, width=16, rank=2,
              max_sequence_length=32, replay_confidence=0.6, learning_rate=1e-2, evaluate_every=2, evaluate_pictures=3,
              log_with="none", lora_targets=("attention", "convolution", "feed_forward"), min_sharpness=0,
              min_diversity=0)
pipeline = tiny_pipeline(family, prediction_type="v_prediction" if family == "sd" else "epsilon")
result = treat(pipeline, BrightDetector(), PROMPTS, TreatConfig(**{**common, **options}),
               offline=(pictures, [PROMPTS[i % 3] for i in range(6)]), output_dir=output, progress=False)
if torch.distributed.is_initialized():
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    mine = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in denoiser.parameters())
    rank = torch.distributed.get_rank()
    share = mine / sum(p.numel() for p in denoiser.parameters())
    with open(f"{output}-{rank}.json", "w") as file:
        json.dump({"history": result.history, "share": share}, file)
    torch.distributed.destroy_process_group()
"""


def run(count, output, options, **environment):
    command = [sys.executable, "-c", SCRIPT, output, json.dumps(options)]
    if count == 1:
        subprocess.run(command, env=launch.environment(), check=True, timeout=900)
    else:
        launch.run_group(command, count, **environment)
    return load_file(output / "lora" / "pytorch_lora_weights.safetensors")


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert any(float(value.abs().max()) > 1e-3 for name, value in one.items() if "lora_B" in name)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.mark.parametrize(
    ("family", "method", "replay_area", "environment"),
    [
        ("sd", "grpo", 0.5, {}),
        ("flux", "draft_k", 0.0, FSDP),
        # so few pictures are flagged that in some step one process has none and must go along
        ("sd", "nft", 0.57, FSDP),
    ],
    ids=["plain", "sharded-transformer", "sharded-unet"],
)
def test_two_processes_equal_one(family, method, replay_area, environment, tmp_path):
    options = {"family": family, "method": method, "replay_area": replay_area}
    one, two = run(1, tmp_path / "one", options), run(2, tmp_path / "two", options, **environment)
    assert_same(one, two)
    account = json.loads((tmp_path / "two-0.json").read_text())
    assert [row["step"] for row in account["history"]] == [1, 2, 3]
    assert (account["share"] < 0.7) == bool(environment)
