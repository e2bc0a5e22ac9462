"""The operations: checks, autograd, dispatch to a backend, and the helpers beside them.

The functions are taken from their modules by `public`, not imported here: a function would hide the module that has its
name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffdoctor.ops.artifact_loss import artifact_loss as artifact_loss
    from diffdoctor.ops.layout import Packed as Packed
    from diffdoctor.ops.modulate_gradient import GradientModulator as GradientModulator
    from diffdoctor.ops.modulate_gradient import modulate_gradient as modulate_gradient
    from diffdoctor.ops.policy_loss import policy_log_prob as policy_log_prob
    from diffdoctor.ops.policy_loss import policy_loss as policy_loss
    from diffdoctor.ops.policy_steps import ddim_coefs as ddim_coefs
    from diffdoctor.ops.policy_steps import flow_sde_coefs as flow_sde_coefs
    from diffdoctor.ops.policy_steps import group_advantages as group_advantages
    from diffdoctor.ops.preference import dpo_loss as dpo_loss
    from diffdoctor.ops.schedules import huber_schedule as huber_schedule
    from diffdoctor.ops.schedules import prior_preservation_weights as prior_preservation_weights
    from diffdoctor.ops.schedules import snr_weights as snr_weights
    from diffdoctor.ops.stats import LossStats as LossStats
    from diffdoctor.ops.stats import PolicyStats as PolicyStats
    from diffdoctor.ops.target import Target as Target
    from diffdoctor.ops.weighted_loss import weighted_loss as weighted_loss

#: Every op: a module here, in library/ and in reference/; the value is the file of a backend that serves it.
OPS = {
    "weighted_loss": "weighted_loss",
    "modulate_gradient": "weighted_loss",
    "artifact_loss": "artifact_loss",
    "policy_loss": "policy_loss",
}
_HELPERS = ("layout", "policy_steps", "preference", "schedules", "stats", "target")


def public() -> dict[str, object]:
    """The public names of the ops and of the helpers beside them."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in (*OPS, *_HELPERS)]
    return {name: getattr(module, name) for module in modules for name in module.__all__}


# Operators are registered before anything is traced.
for _op in OPS:
    importlib.import_module(f"{__name__}.library.{_op}")
