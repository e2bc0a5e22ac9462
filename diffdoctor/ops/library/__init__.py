"""The operators that are registered with torch.library, behind torch.compile."""

from diffdoctor.ops.library import artifact_loss, modulate_gradient, weighted_loss  # noqa: F401
