"""The artifact detector: transformers' SegFormer with one output channel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.files import load_exactly
from diffdoctor.detector.models.limits import checked_segformer
from diffdoctor.detector.models.preprocess import PreprocessConfig
from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.training.pretrained import load_from_transformers, load_state_dict_file

if TYPE_CHECKING:
    from transformers import SegformerConfig

# MiT sizes, table 6 of the SegFormer paper (arXiv 2105.15203): (depths, hidden_sizes, decoder_hidden_size).
SIZES = {
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}

# Files have the names of transformers 4, as the published checkpoint does; transformers 5 renamed the weights.
# Pairs of (file, transformers 5); {0}, {1} are numbers.
_RENAMES = (
    ("segformer.encoder.patch_embeddings.{0}.", "segformer.stages.{0}.patch_embeddings."),
    ("segformer.encoder.block.{0}.{1}.attention.self.query.", "segformer.stages.{0}.blocks.{1}.attention.q_proj."),
    ("segformer.encoder.block.{0}.{1}.attention.self.key.", "segformer.stages.{0}.blocks.{1}.attention.k_proj."),
    ("segformer.encoder.block.{0}.{1}.attention.self.value.", "segformer.stages.{0}.blocks.{1}.attention.v_proj."),
    (
        "segformer.encoder.block.{0}.{1}.attention.self.sr.",
        "segformer.stages.{0}.blocks.{1}.attention.sequence_reduction.sequence_reduction.",
    ),
    (
        "segformer.encoder.block.{0}.{1}.attention.self.layer_norm.",
        "segformer.stages.{0}.blocks.{1}.attention.sequence_reduction.layer_norm.",
    ),
    ("segformer.encoder.block.{0}.{1}.attention.output.dense.", "segformer.stages.{0}.blocks.{1}.attention.o_proj."),
    ("segformer.encoder.block.{0}.{1}.mlp.dense1.", "segformer.stages.{0}.blocks.{1}.mlp.fc1."),
    ("segformer.encoder.block.{0}.{1}.mlp.dense2.", "segformer.stages.{0}.blocks.{1}.mlp.fc2."),
    ("segformer.encoder.block.{0}.{1}.layer_norm_1.", "segformer.stages.{0}.blocks.{1}.layernorm_before."),
    ("segformer.encoder.block.{0}.{1}.layer_norm_2.", "segformer.stages.{0}.blocks.{1}.layernorm_after."),
    ("segformer.encoder.block.{0}.{1}.", "segformer.stages.{0}.blocks.{1}."),
    ("segformer.encoder.layer_norm.{0}.", "segformer.stages.{0}.layer_norm."),
    ("decode_head.linear_c.{0}.", "decode_head.linear_projections.{0}."),
)


def _rename(key: str, layout: int) -> str:
    """A key of one layout (0: file, 1: transformers 5) in the other; other keys are unchanged."""
    for pair in _RENAMES:
        pattern = re.escape(pair[layout]).replace(r"\{0\}", r"(\d+)").replace(r"\{1\}", r"(\d+)")
        match = re.match(pattern, key)
        if match:
            return pair[1 - layout].format(*match.groups()) + key[match.end() :]
    return key


class _Fp32Conv2d(nn.Conv2d):
    """A convolution that is always computed in fp32 or fp64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            bias = None if self.bias is None else self.bias.to(wide.dtype)
            result = nn.functional.conv2d(wide, self.weight.to(wide.dtype), bias, self.stride, self.padding)
            return result.to(x.dtype)


class ArtifactDetector(Detector):
    """SegFormer (arXiv 2105.15203) with one output channel: where is this picture broken?

    Args:
        config: transformers' configuration, or its fields as a dict. `num_labels` is set to 1.
        head_norm: the normalisation in the decode head. "group": GroupNorm, for training from scratch; the losses do
            not depend on the number of processes. "batch": SegFormer's BatchNorm with frozen statistics, for published
            weights.
        preprocess: how pictures are resized for the network.
        **fields: of a `PreprocessConfig` (input_size, min_side, max_side, multiple), instead of `preprocess`.

    Raises:
        TypeError: both `preprocess` and its fields.
        ValueError: an option is out of range.

    Example:
        >>> detector = ArtifactDetector.from_pretrained("runs/demo/detector")
        >>> confidence = detector.confidence(images)            # images (B, 3, H, W) in [0, 1]
        >>> logits = detector(decoded, value_range=(-1, 1))     # differentiable; what a VAE decodes
    """

    kind = "segformer"

    def __init__(
        self,
        config: SegformerConfig | dict,
        *,
        head_norm: str = "group",
        preprocess: PreprocessConfig | None = None,
        **fields,
    ):
        if preprocess is not None and fields:
            raise TypeError(expected("preprocess", "either a PreprocessConfig or its fields by name", "both"))
        super().__init__(preprocess or PreprocessConfig(**fields))
        if head_norm not in ("group", "batch"):
            raise ValueError(expected("head_norm", "'group' or 'batch'", repr(head_norm)))
        try:
            from transformers import SegformerConfig, SegformerForSemanticSegmentation
        except ImportError:
            raise missing_extra("transformers", "stages") from None
        config = SegformerConfig(**config) if isinstance(config, dict) else config
        config.num_labels = 1
        self.head_norm = head_norm
        self.segformer = SegformerForSemanticSegmentation(config)
        if head_norm == "group":
            channels = config.decoder_hidden_size
            groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4)
            self.segformer.decode_head.batch_norm = nn.GroupNorm(groups, channels)
        for module in self.segformer.modules():
            # In bf16 with kernel = stride = 4 and fewer than 32 channels, torch 2.13's CPU convolution (oneDNN on
            # processors with AMX) is wrong by more than its own size. Only the tiny configuration has such layers.
            narrow = isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels < 32
            if narrow and module.kernel_size == module.stride == (4, 4):
                module.__class__ = _Fp32Conv2d
        self.train(False)

    @classmethod
    def of_size(cls, size: str, **options) -> ArtifactDetector:
        """A detector with fresh weights.

        Args:
            size: "tiny", or "b0" ... "b5".
            **options: of the class.

        Raises:
            ValueError: there is no such size.
        """
        if size == "tiny":
            return cls.tiny(**options)
        if size not in SIZES:
            raise ValueError(expected("size", f"tiny or one of {', '.join(SIZES)}", repr(size)))
        depths, hidden_sizes, decoder = SIZES[size]
        return cls({"depths": depths, "hidden_sizes": hidden_sizes, "decoder_hidden_size": decoder}, **options)

    @classmethod
    def tiny(cls, **options) -> ArtifactDetector:
        """A small detector (0.15 M parameters) with fresh weights, for small pictures and tests.

        Args:
            **options: of the class.
        """
        config = {
            "depths": (1, 1, 1, 1),
            "hidden_sizes": (24, 32, 48, 64),
            "num_attention_heads": (1, 2, 2, 2),
            "sr_ratios": (4, 2, 1, 1),
            "mlp_ratios": (2, 2, 2, 2),
            "decoder_hidden_size": 48,
            "drop_path_rate": 0.0,
            "classifier_dropout_prob": 0.0,
            # SegFormer's own 0.02 is for wide layers; with it, training narrow ones from scratch makes no progress for
            # hundreds of steps.
            "initializer_range": 0.2,
        }
        return cls(config, **options)

    @classmethod
    def from_official(cls, path: str | Path, *, input_size: int | None = 512) -> ArtifactDetector:
        """Load the published detector, frozen: a state dict written by `torch.save` from transformers 4's SegFormer.

        Args:
            path: the file, for the published one `ad_pytorch_model.bin`; read with `weights_only=True`. Depths and
                widths are inferred from the weights' shapes.
            input_size: side in pixels that pictures are resized to; the published detector was trained at 512.

        Raises:
            UserError: the file is not a state dict of tensors, or a key is missing, unexpected or of another shape.
        """
        state = load_state_dict_file(path)
        state = {_rename(key, 1): value for key, value in state.items()}
        try:
            config = _config_of(state)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            keys = ", ".join(sorted(state)[:3]) or "none"
            raise UserError(expected(path, "a SegFormer's state dict", f"other keys ({keys} …)")) from error
        try:
            detector = cls(checked_segformer(config), head_norm="batch", input_size=input_size)
        except (ValueError, RuntimeError) as error:  # transformers' own where widths and heads do not fit
            raise UserError(f"{path}: {first_line(error)}") from error
        # Some releases of torch's BatchNorm did not count batches; the count has no effect on frozen statistics.
        state.setdefault("decode_head.batch_norm.num_batches_tracked", torch.tensor(0))
        state = {f"segformer.{key}": value for key, value in state.items()}
        load_exactly(detector, detector.from_file_keys(state), path)
        return detector.eval().requires_grad_(False)

    def load_encoder(self, source: str | Path) -> None:
        """Load the encoder's weights from a SegFormer of transformers, such as the ImageNet-trained `nvidia/mit-b2`.

        Args:
            source: a folder or a hub id of a model of the same size.

        Raises:
            UserError: it cannot be loaded, or is of another size.
        """
        encoder, _ = load_from_transformers("encoder", str(source), "SegformerModel", None)
        load_exactly(self.segformer.segformer, encoder.state_dict(), source)

    def train(self, mode: bool = True) -> ArtifactDetector:
        """Set the training mode of all modules but a BatchNorm with frozen statistics."""
        super().train(mode)
        if self.head_norm == "batch":
            self.segformer.decode_head.batch_norm.eval()
        return self

    def network(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, H / 4, W / 4) of normalised pictures (B, 3, H, W)."""
        stages = getattr(self.segformer.segformer, "stages", None)
        if stages is None:  # transformers 4
            return self.segformer(pixel_values=pixel_values).logits
        # As transformers' own forward, which torch.compile cannot trace: it collects the stages' outputs by hooks that
        # it installs under a lock.
        outputs = []
        for stage in stages:
            pixel_values = stage(pixel_values)
            outputs.append(pixel_values)
        return self.segformer.decode_head(outputs)

    def recomputable(self) -> list[nn.Module]:
        """See `Detector.recomputable`."""
        stages = getattr(self.segformer.segformer, "stages", None)
        if stages is None:  # transformers 4
            return [self]
        blocks = [part for stage in stages for part in (stage.patch_embeddings, *stage.blocks)]
        return [*blocks, self.segformer.decode_head]

    def config_dict(self) -> dict:
        """See `Detector.config_dict`."""
        config = self.segformer.config.to_diff_dict()
        left_out = ("architectures", "transformers_version", "dtype", "id2label", "label2id")
        return {"segformer": {k: v for k, v in config.items() if k not in left_out}, "head_norm": self.head_norm}

    @classmethod
    def from_config(cls, config: dict, preprocess: PreprocessConfig) -> ArtifactDetector:
        """See `Detector.from_config`."""
        return cls(checked_segformer(config["segformer"]), head_norm=config["head_norm"], preprocess=preprocess)

    def to_file_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Detector.to_file_keys`."""
        return {_file_key(key): value for key, value in state.items()}

    def from_file_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Detector.from_file_keys`."""
        own = {_file_key(key): key for key in self.state_dict()}
        return {own.get(key, key): value for key, value in state.items()}


def _file_key(key: str) -> str:
    prefix, _, rest = key.partition(".")
    return f"{prefix}.{_rename(rest, 1)}"


def _config_of(state: dict[str, torch.Tensor]) -> dict:
    """The configuration that a file-layout state dict was made with, from its keys and shapes."""
    depths, widths, ratios, reductions, patches = [], [], [], [], []
    stages = 1 + max(int(m[1]) for m in (re.match(r"segformer\.encoder\.block\.(\d+)\.", k) for k in state) if m)
    for stage in range(stages):
        prefix = f"segformer.encoder.block.{stage}."
        depths.append(1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)))
        patch = state[f"segformer.encoder.patch_embeddings.{stage}.proj.weight"]
        widths.append(patch.shape[0])
        patches.append(patch.shape[2])
        ratios.append(state[f"{prefix}0.mlp.dense1.weight"].shape[0] // patch.shape[0])
        reduction = state.get(f"{prefix}0.attention.self.sr.weight")
        reductions.append(1 if reduction is None else reduction.shape[2])
    return {
        "num_encoder_blocks": stages,
        "depths": depths,
        "hidden_sizes": widths,
        "mlp_ratios": ratios,
        "sr_ratios": reductions,
        "patch_sizes": patches,
        # Weights do not show the number of heads; all MiT sizes have 1, 2, 5, 8.
        "num_attention_heads": [1, 2, 5, 8][:stages],
        "strides": [4, 2, 2, 2][:stages],
        "decoder_hidden_size": state["decode_head.linear_fuse.weight"].shape[0],
    }
