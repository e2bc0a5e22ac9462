"""Stage 2: tune a pipeline, or guide one sampling run, exactly where its pictures are broken."""

from typing import TYPE_CHECKING

from diffdoctor.lazy import lazy_names

if TYPE_CHECKING:  # what an editor sees; tests/packaging/test_lazy_names.py holds it equal to the table below
    from diffdoctor.treat.autoguidance import autoguide as autoguide
    from diffdoctor.treat.config import TreatConfig as TreatConfig
    from diffdoctor.treat.families import Conditioning as Conditioning
    from diffdoctor.treat.families import Family as Family
    from diffdoctor.treat.families import register_family as register_family
    from diffdoctor.treat.guided_sampling import GuideLog as GuideLog
    from diffdoctor.treat.guided_sampling import guide as guide
    from diffdoctor.treat.lora import save_lora as save_lora
    from diffdoctor.treat.train import TreatResult as TreatResult
    from diffdoctor.treat.train import treat as treat

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "autoguide": "diffdoctor.treat.autoguidance",
        "Conditioning": "diffdoctor.treat.families",
        "Family": "diffdoctor.treat.families",
        "guide": "diffdoctor.treat.guided_sampling",
        "GuideLog": "diffdoctor.treat.guided_sampling",
        "register_family": "diffdoctor.treat.families",
        "save_lora": "diffdoctor.treat.lora",
        "treat": "diffdoctor.treat.train",
        "TreatConfig": "diffdoctor.treat.config",
        "TreatResult": "diffdoctor.treat.train",
    },
)
