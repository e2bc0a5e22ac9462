"""The definition of each op in plain PyTorch: any dtype, any device, differentiable. Every backend is held to it."""

from diffdoctor.reference.artifact_loss import artifact_loss
from diffdoctor.reference.modulate_gradient import modulate_gradient
from diffdoctor.reference.weighted_loss import weighted_loss

__all__ = ["artifact_loss", "modulate_gradient", "weighted_loss"]
