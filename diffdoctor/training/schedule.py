"""Learning rates over a training."""

import math


def warmup_cosine(step: int, warmup_steps: int, steps: int, final: float = 0.0) -> float:
    """The learning rate of a step as a share of the peak: linear warm-up, then a cosine.

    Args:
        step: counted from 0.
        warmup_steps: the last of them has the peak rate; 0: no warm-up.
        steps: of the whole training.
        final: where the cosine ends, as a share of the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
    return final + (1 - final) * cosine
