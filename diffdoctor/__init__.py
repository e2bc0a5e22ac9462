"""Diagnose image diffusion models pixel by pixel, then treat them where they are broken.

The operations any training loop can call: `weighted_loss`, `modulate_gradient`, `GradientModulator`, `artifact_loss`,
`policy_loss`, with `Target`, `Packed`, `LossStats`, `PolicyStats` and the helpers beside them. The stages live in
`diffdoctor.detector`, `diffdoctor.treat` and `diffdoctor.evaluate` and need `pip install '.[stages]'`.
"""

import importlib
import pathlib
from typing import TYPE_CHECKING

# In a checkout the Triton kernels lie beside the package, in kernels/, and are imported as diffdoctor.kernels.
# Extending __path__ (rather than sys.path) keeps the top-level name `kernels` free for the Hugging Face package.
_checkout = pathlib.Path(__file__).resolve().parent.parent
if (_checkout / "CMakeLists.txt").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
del _checkout

from diffdoctor.openmp import limit_spinning_of_own_programs as _limit_spinning  # noqa: E402

_limit_spinning()  # before torch is imported

from diffdoctor import ops as _ops  # noqa: E402
from diffdoctor import reference as reference  # noqa: E402
from diffdoctor.backends.select import available_backends  # noqa: E402
from diffdoctor.version import __version__  # noqa: E402

if TYPE_CHECKING:  # what an editor sees
    from diffdoctor import demo as demo
    from diffdoctor import detector as detector
    from diffdoctor import evaluate as evaluate
    from diffdoctor import maps as maps
    from diffdoctor import repairs as repairs
    from diffdoctor import treat as treat
    from diffdoctor.ops import *  # noqa: F403
    from diffdoctor.repairs.repairer import repair as repair
    from diffdoctor.treat.autoguidance import autoguide as autoguide
    from diffdoctor.treat.guided_sampling import guide as guide

_LAZY = {
    "autoguide": "diffdoctor.treat.autoguidance",
    "guide": "diffdoctor.treat.guided_sampling",
    "repair": "diffdoctor.repairs.repairer",
}
_STAGES = ("demo", "detector", "evaluate", "maps", "repairs", "treat")

_public = _ops.public()
globals().update(_public)
__all__ = [*_public, "__version__", "available_backends", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _STAGES:
        return importlib.import_module(f"diffdoctor.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffdoctor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_STAGES, *_LAZY})
