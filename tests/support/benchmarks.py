"""Benchmark cases for tests, by key."""

from benchmarks.ops import registry

EVERY = {case.key: case for device in ("cuda", "cpu") for case in registry.cases(device)}


def tiny(key: str = "latents/fp32") -> registry.Case:
    """A case of few elements."""
    return registry.shrunken(EVERY[key])
