"""Public names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys


def lazy_names(package: str, places: dict[str, str]):
    """What a package's `__init__` needs so that importing it imports none of its modules.

    Args:
        package: its `__name__`.
        places: public name -> the module that has it. No name may be that of a module of the package: once that is
            imported, the package's attribute of that name is the module.

    Returns:
        (`__all__`, `__getattr__`, `__dir__`).
    """

    def find(name):
        if name in places:
            return getattr(importlib.import_module(places[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names():
        return sorted({*vars(sys.modules[package]), *places})

    return [*places], find, names
