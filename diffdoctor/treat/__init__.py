"""Stage 2: tune a pipeline, or guide one sampling run, exactly where its pictures are broken."""

from diffdoctor.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Family": "diffdoctor.treat.families",
        "register_family": "diffdoctor.treat.families",
        "TreatConfig": "diffdoctor.treat.config",
        "TreatResult": "diffdoctor.treat.train",
        "treat": "diffdoctor.treat.train",
        "guide": "diffdoctor.treat.guided_sampling",
        "GuideLog": "diffdoctor.treat.guided_sampling",
        "save_lora": "diffdoctor.treat.lora",
    },
)
