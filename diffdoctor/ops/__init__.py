"""The operations: checks, autograd, dispatch to a backend, and the helpers beside them."""

# The library registers the operators before anything is traced.
from diffdoctor.ops import library as _library  # noqa: F401
from diffdoctor.ops.artifact_loss import artifact_loss
from diffdoctor.ops.layout import Packed
from diffdoctor.ops.modulate_gradient import GradientModulator, modulate_gradient
from diffdoctor.ops.schedules import huber_schedule, prior_preservation_weights, snr_weights
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target
from diffdoctor.ops.weighted_loss import weighted_loss

__all__ = [
    "GradientModulator",
    "LossStats",
    "Packed",
    "Target",
    "artifact_loss",
    "huber_schedule",
    "modulate_gradient",
    "prior_preservation_weights",
    "snr_weights",
    "weighted_loss",
]
