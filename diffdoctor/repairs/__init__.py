"""Repair of finished pictures: diagnosed, redrawn where they are broken, diagnosed again, and kept only if better.

`repair` is `diffdoctor.repair`; `diffdoctor repair` does the same on files.
"""

from typing import TYPE_CHECKING

from diffdoctor.lazy import lazy_names

if TYPE_CHECKING:  # what an editor sees; tests/packaging/test_lazy_names.py holds it equal to the table below
    from diffdoctor.repairs.config import RepairOptions as RepairOptions
    from diffdoctor.repairs.repairer import RegionOutcome as RegionOutcome
    from diffdoctor.repairs.repairer import Repaired as Repaired
    from diffdoctor.repairs.repairer import Try as Try
    from diffdoctor.repairs.repairer import repair as repair

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "repair": "diffdoctor.repairs.repairer",
        "Repaired": "diffdoctor.repairs.repairer",
        "RegionOutcome": "diffdoctor.repairs.repairer",
        "RepairOptions": "diffdoctor.repairs.config",
        "Try": "diffdoctor.repairs.repairer",
    },
)
