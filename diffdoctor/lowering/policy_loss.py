"""What a compiled backend receives of a call of policy_loss: `PolicyProblem`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch import Tensor

from diffdoctor.lowering.plan import Grid, MapMeta, Options, PerSample, Plan, make_plan

# Values shared with csrc/common/policy_loss_params.h and kernels/policy_loss.py.
LEVELS = {"pixel": 0, "sample": 1}
OLD_IS_NEW, OLD_PER_SAMPLE, OLD_PER_PIXEL = 0, 1, 2
WRITE_LOG_PROB = 8  # beside WRITE_LOSS, WRITE_GRAD and WRITE_SUMS, and without them
POLICY_SUMS = 6  # columns of PolicyProblem.sums


@dataclass(slots=True)
class PolicyProblem:
    """One call of policy_loss. Outputs are allocated and uninitialised; no size is zero.

    `plan` is the iteration space of a weighted_loss whose terms are latents, next_latents and, where there is one,
    ref_pred, whose weighting is the log-probability, and whose confidence is the advantage. It has the channels' dim as
    a dim of its own, `channel_dim`, along which the last two do not change.

    Attributes:
        outputs: a union of WRITE_LOSS, WRITE_GRAD and WRITE_SUMS, or WRITE_LOG_PROB alone.
        old_mean: the old log-probability of each sample; None where there is none or `old_log_prob` has each pixel's.
        loss: () for mean and sum, (B,) for sample; of the accumulation dtype, as the outputs below.
        grad: like pred.
        sums: (B, POLICY_SUMS).
        log_prob: the log-probability of each pixel.
        keeps_workspace: as Problem's.
    """

    plan: Plan
    outputs: int
    pred: Tensor
    latents: Tensor
    next_latents: Tensor
    a: PerSample
    b: PerSample
    sigma: PerSample
    grad_output: PerSample
    old_log_prob: Tensor | None = None
    old_mean: PerSample | None = None
    advantage: Tensor | None = None
    mask: Tensor | None = None
    ref_pred: Tensor | None = None
    clip_range: tuple[float, float] = (0.0, 0.0)
    advantage_clip: float = inf
    kl_weight: float = 0.0
    level: str = "pixel"
    reduction: str = "mean"
    loss: Tensor | None = None
    grad: Tensor | None = None
    sums: Tensor | None = None
    log_prob: Tensor | None = None
    keeps_workspace: bool = True

    @property
    def old_kind(self) -> int:
        """Where the old log-probability comes from."""
        if self.old_log_prob is not None:
            return OLD_PER_PIXEL
        return OLD_IS_NEW if self.old_mean is None else OLD_PER_SAMPLE

    @property
    def channel_dim(self) -> int:
        """The plan's dim of the channels; one of size 1 where there is one channel."""
        begin, end = self.plan.free_dims_weighted
        return begin if end > begin else 0

    @property
    def terms(self) -> tuple[Tensor, ...]:
        """The tensors of the plan's terms."""
        step = (self.latents, self.next_latents)
        return step if self.ref_pred is None else (*step, self.ref_pred)


def make_policy_plan(
    grid: Grid,
    dtype,
    pred: list[int],
    grad: list[int],
    terms: list,
    log_prob: tuple,
    advantage: MapMeta | None,
    mask: MapMeta | None,
    interpolation: str,
) -> Plan:
    """The plan of a PolicyProblem. Strides are over (b, c, t, h, ph, w, pw).

    Args:
        log_prob: its dtype and strides, of which only the channels' may be 0 where the size is not 1.
    """
    return make_plan(grid, dtype, pred, grad, terms, log_prob, advantage, mask, interpolation, Options())
