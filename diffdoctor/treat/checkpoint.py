"""Checkpoints of a treatment, and what happens when it is told to stop."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffdoctor._errors import UserError
from diffdoctor._io import atomic_dir

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one treatment in one folder, the last two kept.

    Args:
        folder: where they go.
        settings: what the treatment is, as JSON values; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def save(self, step: int, state: dict) -> None:
        """Write the state of tensors and plain values; it appears under its name when it is complete."""
        with atomic_dir(self.folder / f"step-{step:08d}") as temporary:
            torch.save(state, temporary / "state.pt")
            (temporary / "settings.json").write_text(json.dumps(self.settings, indent=2))
        for old in self._all()[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> dict | None:
        """The last complete checkpoint's state on the CPU, or None.

        Raises:
            UserError: if it belongs to a treatment with other settings.
        """
        found = self._all()
        if not found:
            return None
        settings = json.loads((found[-1] / "settings.json").read_text())
        other = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))
        if other:
            raise UserError(
                f"{self.folder}: holds checkpoints of a treatment with another {', '.join(other)}: "
                "choose another output folder or remove them"
            )
        return torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)

    def remove(self) -> None:
        """Delete them all, when the treatment is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Interruption:
    """Whether SIGINT or SIGTERM came; `signal` is its number, or None."""

    def __init__(self):
        self.signal: int | None = None


@contextmanager
def deferred_signals(enabled: bool) -> Iterator[Interruption]:
    """Hold SIGINT and SIGTERM back until the block ends, then deliver the first; the block asks the yielded object.

    A second signal of the same kind is delivered at once. Without effect outside the main thread.
    """
    interruption = Interruption()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        if interruption.signal is None:
            interruption.signal = number
        else:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if interruption.signal is not None:
            signal.raise_signal(interruption.signal)
