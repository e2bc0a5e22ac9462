"""What a treatment did to a pipeline: the same prompts, seeds and latents before and after, under two detectors.

The public names work on pictures in memory; `diffdoctor evaluate model` measures the same from files.
"""

from diffdoctor.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Comparison": "diffdoctor.evaluate.model.measure",
        "artifact_rates": "diffdoctor.evaluate.model.summary",
        "compare_pictures": "diffdoctor.evaluate.model.measure",
        "diagnose_pictures": "diffdoctor.detector.predict",
        "draw_pictures": "diffdoctor.evaluate.model.draw",
        "sample_pictures": "diffdoctor.evaluate.model.draw",
    },
)
