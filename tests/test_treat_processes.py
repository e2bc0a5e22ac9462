"""Two processes with the same global batch give the LoRA that one gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
import numpy as np
import torch
sys.path.insert(0, sys.argv[1])
from helpers_tiny_pipelines import PROMPTS, tiny_pipeline
from test_treat_guide import BrightDetector
from diffdoctor.treat import TreatConfig, treat

method, output = sys.argv[2:]
pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
config = TreatConfig(method=method, steps=3, batch_size=4, sampling_steps=3, height=16, width=16, rank=2,
                     replay_confidence=0.6, replay_area=0.5, learning_rate=1e-2, evaluate_every=0,
                     evaluate_pictures=3)
treat(tiny_pipeline("sd", prediction_type="v_prediction"), BrightDetector(), PROMPTS, config,
      offline=(pictures, [PROMPTS[i % 3] for i in range(6)]), output_dir=output, progress=False)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def start(count, rank, port, method, output):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if count > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), method, str(output)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def run(count, method, output):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [start(count, rank, port, method, output) for rank in range(count)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return load_file(output / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("method", ["draft_lv"])
def test_two_processes_equal_one(method, tmp_path):
    one, two = run(1, method, tmp_path / "one"), run(2, method, tmp_path / "two")
    assert one.keys() == two.keys()
    assert any(float(value.abs().max()) > 1e-3 for name, value in one.items() if "lora_B" in name)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
