"""Bounds of what a detector's files may ask for, checked before anything is built: they may come from anybody."""

from __future__ import annotations

from typing import Any

from diffdoctor.runs.errors import expected

MAX_STAGES, MAX_BLOCKS, MAX_WIDTH, MAX_PARAMETERS = 8, 200, 8192, 500_000_000
MAX_FILE_BYTES = 1 << 20

# Fields of SegFormer's configuration with one whole number a stage -> its largest.
_PER_STAGE = {
    "depths": MAX_BLOCKS, "hidden_sizes": MAX_WIDTH, "num_attention_heads": 256, "sr_ratios": 64, "patch_sizes": 64,
    "strides": 64, "mlp_ratios": 64,
}  # fmt: skip
_SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "drop_path_rate")


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
        ValueError: it is none, or out of them.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(expected(name, f"a whole number in [{low}, {high}]", repr(value)[:40]))
    return value


def check_wholes(name: str, value: Any, high: int, *, count: int | None = None) -> tuple[int, ...]:
    """Whole numbers from 1 to `high`.

    Args:
        count: how many; None: 1 to `MAX_STAGES`.

    Raises:
        ValueError: they are none, or out of bounds.
    """
    counts = range(1, MAX_STAGES + 1) if count is None else (count,)
    if not isinstance(value, (list, tuple)) or len(value) not in counts:
        what = f"{counts[0]} to {counts[-1]}" if count is None else count
        raise ValueError(expected(name, f"a list of {what} whole numbers", repr(value)[:40]))
    return tuple(check_whole(f"{name}[{index}]", item, 1, high) for index, item in enumerate(value))


def check_parameters(count: int) -> None:
    """Refuse a network of more than `MAX_PARAMETERS`.

    Raises:
        ValueError: it has more.
    """
    if count > MAX_PARAMETERS:
        raise ValueError(expected("network", f"at most {MAX_PARAMETERS:,} parameters", f"about {count:,}"))


def checked_segformer(options: dict[str, Any]) -> dict[str, Any]:
    """SegFormer's architecture from a configuration that may hold anything: the known fields, each within bounds.

    No other key reaches transformers, which would take some for the names of code to be fetched.

    Raises:
        ValueError: names the field, what was expected and what came.
    """
    from transformers.activations import ACT2FN

    stages = check_whole("num_encoder_blocks", options.get("num_encoder_blocks", 4), 1, MAX_STAGES)
    known: dict[str, Any] = {"num_encoder_blocks": stages}
    for name, high in _PER_STAGE.items():
        if name in options:
            known[name] = list(check_wholes(name, options[name], high, count=stages))
    for name, low, high in (("num_channels", 3, 3), ("decoder_hidden_size", 4, MAX_WIDTH)):
        if name in options:
            known[name] = check_whole(name, options[name], low, high)
    for name, high in (*((name, 1.0) for name in _SHARES), ("initializer_range", 100.0), ("layer_norm_eps", 1.0)):
        if name in options:
            value = options[name]
            if not isinstance(value, (int, float)) or not 0 <= value <= high:  # NaN is in no range
                raise ValueError(expected(name, f"a number in [0, {high:g}]", repr(value)[:40]))
            known[name] = value
    if "hidden_act" in options:
        if not isinstance(options["hidden_act"], str) or options["hidden_act"] not in ACT2FN:
            raise ValueError(expected("hidden_act", "an activation of transformers", repr(options["hidden_act"])[:40]))
        known["hidden_act"] = options["hidden_act"]
    if "reshape_last_stage" in options:
        known["reshape_last_stage"] = bool(options["reshape_last_stage"])
    check_parameters(_parameters(known))
    return known


def _parameters(options: dict[str, Any]) -> int:
    """About how many a SegFormer has, of those that the widths multiply."""
    widths = options.get("hidden_sizes", (32, 64, 160, 256))
    depths = options.get("depths", (2, 2, 2, 2))
    ratios = options.get("mlp_ratios", (4, 4, 4, 4))
    reductions = options.get("sr_ratios", (8, 4, 2, 1))
    patches = options.get("patch_sizes", (7, 3, 3, 3))
    total = options.get("decoder_hidden_size", 256) ** 2 * options["num_encoder_blocks"]
    before = 3
    for width, depth, ratio, reduction, patch in zip(widths, depths, ratios, reductions, patches, strict=False):
        total += before * width * patch**2 + depth * width**2 * (4 + 2 * ratio + (reduction**2 if reduction > 1 else 0))
        before = width
    return total


def check_conv(channels: Any, patch: Any) -> None:
    """Bounds of a `ConvDetector`'s configuration.

    Raises:
        ValueError: names the field, what was expected and what came.
    """
    check_wholes("channels", channels, MAX_WIDTH)
    check_whole("patch", patch, 1, 64)
    # Two 3x3 convolutions a scale, down and up again.
    check_parameters(sum(36 * (a + b) * b for a, b in zip((3 * patch**2, *channels), channels, strict=False)))
