"""The definition of each op in plain PyTorch: any dtype, any device, differentiable. Every backend is held to it."""

from diffdoctor.reference.artifact_loss import artifact_loss
from diffdoctor.reference.modulate_gradient import modulate_gradient
from diffdoctor.reference.policy_loss import policy_log_prob, policy_loss
from diffdoctor.reference.weighted_loss import weighted_loss

__all__ = ["artifact_loss", "modulate_gradient", "policy_log_prob", "policy_loss", "weighted_loss"]
