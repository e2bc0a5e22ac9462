"""A detector's files may hold anything: what is out of bounds is refused in one line before anything is built."""

import json

import pytest
import torch

from diffdoctor.detector import ArtifactDetector, ConvDetector, load_detector
from diffdoctor.runs.errors import UserError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A detector of each class, as files."""
    folder = tmp_path_factory.mktemp("detectors")
    ArtifactDetector.tiny().save_pretrained(folder / "segformer")
    ConvDetector((8, 16)).save_pretrained(folder / "conv")
    return folder


def segformer(**values):
    return lambda config: config["network"]["segformer"].update(values)


def preprocess(**values):
    return lambda config: config["preprocess"].update(values)


def network(**values):
    return lambda config: config["network"].update(values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("segformer", segformer(depths=[10**6, 1, 1, 1]), r"depths\[0\]: expected a whole number in \[1, 200\]"),
        ("segformer", segformer(hidden_sizes=[10**9] * 4), r"hidden_sizes\[0\]: expected a whole number"),
        ("segformer", segformer(hidden_sizes=[8192] * 4, depths=[200] * 4), "network: expected at most 500,000,000"),
        ("segformer", segformer(hidden_sizes="x"), "hidden_sizes: expected a list of 4 whole numbers, got 'x'"),
        ("segformer", segformer(num_attention_heads=[0] * 4), r"num_attention_heads\[0\]: expected"),
        ("segformer", segformer(num_attention_heads=[5] * 4), "the weights do not fit"),
        ("segformer", segformer(num_encoder_blocks=10**6), "num_encoder_blocks: expected"),
        ("segformer", segformer(decoder_hidden_size=0), r"decoder_hidden_size: expected a whole number in \[4,"),
        ("segformer", segformer(decoder_hidden_size=True), "decoder_hidden_size: expected"),
        ("segformer", segformer(drop_path_rate=float("nan")), "drop_path_rate: expected .*, got nan"),
        ("segformer", segformer(hidden_act="os.system"), "hidden_act: expected an activation"),
        ("segformer", network(segformer=[]), "not a complete detector"),
        ("segformer", network(head_norm="x"), "head_norm: expected 'group' or 'batch', got 'x'"),
        ("conv", network(channels=[8] * 60), "channels: expected a list of 1 to 8 whole numbers"),
        ("conv", network(channels=[8192] * 8), "network: expected at most 500,000,000 parameters"),
        ("conv", network(channels=[8, 10**9]), r"channels\[1\]: expected"),
        ("conv", network(patch=10**6), "patch: expected a whole number in"),
        ("conv", preprocess(min_side=0), "min_side: expected >= 1 pixels, got 0"),
        ("conv", preprocess(min_side=10**9), "min_side: expected <= 16384 pixels"),
        ("conv", preprocess(input_size=10**9), "input_size: expected <= 16384 pixels"),
        ("conv", preprocess(multiple="x"), "multiple: expected an int, got 'x'"),
        ("conv", preprocess(more=1), "not a complete detector"),
        ("conv", lambda config: config.update(network=None), "an object with the objects `network` and `preprocess`"),
        ("conv", lambda config: config.update(detector=["conv"]), "not a complete detector"),
        ("conv", lambda config: b"[" * 100_000, "not a complete detector"),
        ("conv", lambda config: b"\xff\xfe{}", "not a complete detector"),
        ("conv", lambda config: b" " * 2_000_000, "expected at most 1,048,576 bytes, got 2,000,000"),
    ],
    ids=[
        "depths", "widths", "parameters", "text", "no-heads", "heads", "stages", "no-decoder", "bool", "nan",
        "activation", "list", "norm", "scales", "conv-parameters", "conv-widths", "patch", "no-side", "side",
        "input-size", "multiple", "unknown", "null", "kind", "deep", "encoding", "large",
    ],
)  # fmt: skip
def test_a_configuration_out_of_bounds_is_refused(folders, tmp_path, name, change, message):
    config = json.loads((folders / name / "detector.json").read_text())
    data = change(config)
    (tmp_path / "detector.json").write_bytes(data or json.dumps(config).encode())
    (tmp_path / "model.safetensors").symlink_to(folders / name / "model.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        load_detector(tmp_path)
    assert "\n" not in str(refused.value)


def test_no_other_key_reaches_transformers(folders, tmp_path):
    config = json.loads((folders / "segformer" / "detector.json").read_text())
    segformer(attn_implementation="somebody/kernels", quantization_config={"quant_method": "x"}, dtype="int8")(config)
    (tmp_path / "detector.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folders / "segformer" / "model.safetensors")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_detector(tmp_path)(images), load_detector(folders / "segformer")(images))


def stages(count, width=8):
    state = {"decode_head.linear_fuse.weight": torch.ones(8, 8, 1, 1)}
    for i in range(count):
        state[f"segformer.encoder.block.{i}.0.mlp.dense1.weight"] = torch.ones(2 * width, width)
        state[f"segformer.encoder.patch_embeddings.{i}.proj.weight"] = torch.ones(width, 3, 7, 7)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.ones(1)}, "expected a state dict of tensors by name"),
        (stages(6), "num_attention_heads: expected a list of 6"),
        (stages(1, width=0), "expected a SegFormer's state dict"),
        (
            stages(1) | {"decode_head.linear_fuse.weight": torch.ones(1).expand(3 * 10**9, 1, 1, 1)},
            "decoder_hidden_size",
        ),
        (stages(1) | {"segformer.encoder.block.0.99999999.x": torch.ones(1)}, r"depths\[0\]: expected"),
        (stages(1) | {"segformer.encoder.block.99999999.0.x": torch.ones(1)}, "expected a SegFormer's state dict"),
    ],
    ids=["keys", "stages", "no-width", "expanded", "depth", "stage-number"],
)
def test_a_state_dict_out_of_bounds_is_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        ArtifactDetector.from_official(tmp_path / "x.bin")
