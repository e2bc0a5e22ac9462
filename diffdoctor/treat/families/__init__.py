"""The kinds of pipelines that can be treated, one small file each."""

from __future__ import annotations

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families.base import Conditioning, Family
from diffdoctor.treat.families.flux import FluxFamily
from diffdoctor.treat.families.sdxl import SDXLFamily
from diffdoctor.treat.families.stable_diffusion import StableDiffusionFamily
from diffdoctor.treat.families.stable_diffusion_3 import StableDiffusion3Family

_FAMILIES: list[type[Family]] = [StableDiffusionFamily, SDXLFamily, StableDiffusion3Family, FluxFamily]

__all__ = ["Conditioning", "Family", "family_of", "register_family"]


def register_family(family: type[Family]) -> type[Family]:
    """Make a family of your own known; usable as a decorator. The last one registered for a class wins."""
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"family: a subclass of Family was expected, got {family!r}")
    if not family.pipeline_classes:
        raise ValueError(f"{family.__name__}.pipeline_classes: names of diffusers classes were expected, got none")
    _FAMILIES.append(family)
    return family


def family_of(pipeline) -> Family:
    """The family that serves a loaded pipeline.

    Raises:
        UserError: if none serves its class.
    """
    name = type(pipeline).__name__
    for family in reversed(_FAMILIES):
        if name in family.pipeline_classes:
            return family(pipeline)
    known = ", ".join(sorted(known for family in _FAMILIES for known in family.pipeline_classes))
    raise UserError(f"{name} cannot be treated yet: served are {known}; docs/treat.md shows how to add one")
