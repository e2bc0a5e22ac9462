"""The GPUs that predictions are made for: arithmetic with their data, not measurements."""

from __future__ import annotations

from dataclasses import dataclass

# A kernel of one kind of block keeps about so much of its issue slots busy before it, and not memory, is the limit; and
# so much of a copy's speed is left by the ends of its blocks. Both are assumptions of the prediction.
ISSUE_LIMIT, END_SHARE = 0.6, 0.95


@dataclass(frozen=True)
class Card:
    """What a prediction takes of a GPU: multiprocessors, clock in Hz, measured copy speed in bytes per second."""

    name: str
    arch: int
    processors: int
    clock: float
    copy: float

    def issue_load(self, instructions: float, bytes: float) -> float:
        """The share of all issue slots that is filled at a copy's speed, from the warp instructions that 32 times 8
        elements take and the bytes that 8 elements move."""
        return instructions / 32 * self.copy / bytes / (self.processors * 4 * self.clock)

    def predicted_share(self, instructions: float, bytes: float) -> float:
        """Of the copy's speed, what such a kernel reaches."""
        return END_SHARE * min(1.0, ISSUE_LIMIT / self.issue_load(instructions, bytes))


CARDS = (
    Card("A100-80", 80, 108, 1.41e9, 1.75e12),
    Card("RTX 3090", 86, 82, 1.70e9, 0.86e12),
    Card("RTX 4090", 89, 128, 2.52e9, 0.93e12),
    Card("H100", 90, 132, 1.98e9, 3.0e12),
    Card("H200", 90, 132, 1.98e9, 4.3e12),
    Card("B200", 100, 148, 1.97e9, 6.8e12),
)
