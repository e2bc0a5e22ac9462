"""Signals that ask a run to stop, held back until it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interruption:
    """Whether SIGINT or SIGTERM came; `signal` is its number, or None."""

    def __init__(self):
        self.signal: int | None = None


def leave_signals_to_the_parent(*_) -> None:
    """In a process that loads data: Ctrl-C, which reaches all, is for the one that trains; SIGTERM ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
