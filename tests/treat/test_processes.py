"""Two processes with the same global batch give the LoRA that one gives, with the denoiser sharded or not."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.paths import PROGRAMS


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


@pytest.mark.cpu
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
def test_two_processes_equal_one(family, method, replay_area, environment, commands, tmp_path):
    options = {"family": family, "method": method, "replay_area": replay_area}
    for count, name, more in ((1, "one", {}), (2, "two", environment)):
        said = {"output": tmp_path / f"said-{name}", "program": PROGRAMS / "treat_ranks.py"}
        commands.run(tmp_path / name, options, count=count, **said, **more)
    weights = "lora/pytorch_lora_weights.safetensors"
    assert_same(*(load_file(tmp_path / name / weights) for name in ("one", "two")))
    account = json.loads((tmp_path / "two-0.json").read_text())
    assert [row["step"] for row in account["history"]] == [1, 2, 3]
    assert (account["share"] < 0.7) == bool(environment)
