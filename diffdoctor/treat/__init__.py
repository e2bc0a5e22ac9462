"""Stage 2: tune a pipeline, or guide one sampling run, exactly where its pictures are broken."""

import importlib

_PUBLIC = {
    "Family": "families",
    "register_family": "families",
    "TreatConfig": "config",
    "TreatResult": "trainer",
    "treat": "trainer",
    "guide": "guide",
    "GuideLog": "guide",
    "save_lora": "lora",
}

__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"diffdoctor.treat.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'diffdoctor.treat' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
