"""What a treatment did to a pipeline: the same prompts, seeds and latents before and after, under two detectors.

The public names work on pictures in memory; `diffdoctor evaluate model` measures the same from files.
"""

from typing import TYPE_CHECKING

from diffdoctor.lazy import lazy_names

if TYPE_CHECKING:  # what an editor sees; tests/packaging/test_lazy_names.py holds it equal to the table below
    from diffdoctor.detector.predict import diagnose_pictures as diagnose_pictures
    from diffdoctor.evaluate.model.measure import Comparison as Comparison
    from diffdoctor.evaluate.model.measure import compare_pictures as compare_pictures
    from diffdoctor.evaluate.model.summary import artifact_rates as artifact_rates
    from diffdoctor.treat.text_to_image import draw_pictures as draw_pictures
    from diffdoctor.treat.text_to_image import sample_pictures as sample_pictures

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "artifact_rates": "diffdoctor.evaluate.model.summary",
        "compare_pictures": "diffdoctor.evaluate.model.measure",
        "Comparison": "diffdoctor.evaluate.model.measure",
        "diagnose_pictures": "diffdoctor.detector.predict",
        "draw_pictures": "diffdoctor.treat.text_to_image",
        "sample_pictures": "diffdoctor.treat.text_to_image",
    },
)
