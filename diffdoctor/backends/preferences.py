"""Which backend of a device is asked first, by op and size; `python -m benchmarks.ops.prefer` writes it."""

#: Where the table comes from.
SOURCE = "measured on NVIDIA H200, commit d52cd25c2d"

#: By type of device and the file of a backend that serves the op: (elements of the differentiated tensor
#: from which on it is asked first, the backend), beginning at 0.
FIRST: dict[tuple[str, str], tuple[tuple[int, str], ...]] = {
    ("cuda", "artifact_loss"): ((0, "cuda"),),
    ("cuda", "policy_loss"): ((0, "cuda"),),
    ("cuda", "weighted_loss"): ((0, "cuda"),),
}
