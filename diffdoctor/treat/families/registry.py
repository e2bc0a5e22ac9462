"""Which family serves which pipeline."""

from __future__ import annotations

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.families.base import Family

_FAMILIES: list[type[Family]] = []


def register_family(family: type[Family]) -> type[Family]:
    """Make a family known, its own file's or a user's; usable as a decorator.

    The last one registered for a pipeline's class wins.

    Args:
        family: whose `pipeline_classes` name what it serves.

    Raises:
        TypeError: if it is no subclass of `Family`.
        ValueError: if it serves no class.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(expected("family", "a subclass of Family", repr(family)))
    if not family.pipeline_classes:
        raise ValueError(expected(f"{family.__name__}.pipeline_classes", "names of diffusers classes", "none"))
    _FAMILIES.append(family)
    return family


def find_family(pipeline) -> Family | None:
    """The family that serves a loaded pipeline, or None where none does."""
    name = type(pipeline).__name__
    return next((family(pipeline) for family in reversed(_FAMILIES) if name in family.pipeline_classes), None)


def family_of(pipeline) -> Family:
    """The family that serves a loaded pipeline.

    Raises:
        UserError: if none serves its class.
    """
    found = find_family(pipeline)
    if found is not None:
        return found
    name = type(pipeline).__name__
    known = ", ".join(sorted(known for family in _FAMILIES for known in family.pipeline_classes))
    raise UserError(f"{name} cannot be treated yet: served are {known}; docs/treat.md shows how to add one")
