"""What a treatment did to a pipeline: the same prompts, seeds and latents before and after, under two detectors.

The public names work on pictures in memory; `diffdoctor evaluate model` measures the same from files.
"""

from diffdoctor._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Comparison": "comparing",
        "artifact_rates": "summary",
        "compare_pictures": "comparing",
        "diagnose_pictures": "comparing",
        "draw_pictures": "comparing",
        "sample_pictures": "comparing",
    },
)
