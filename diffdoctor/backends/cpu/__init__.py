"""The C++ backend for CPU tensors: one file per op, found by its name."""

from diffdoctor.backends import native


def unavailable() -> str | None:
    """Why the backend cannot be used here, or None."""
    return native.reason()
