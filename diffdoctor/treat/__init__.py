"""Stage 2: tune a pipeline, or guide one sampling run, exactly where its pictures are broken."""

from diffdoctor._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Family": "families",
        "register_family": "families",
        "TreatConfig": "config",
        "TreatResult": "trainer",
        "treat": "trainer",
        "guide": "guiding",
        "GuideLog": "guiding",
        "save_lora": "lora",
    },
)
