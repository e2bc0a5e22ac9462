"""`diffdoctor inject --engine …`: a shard for each unit of clean pictures, made by any engine in any order."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from diffdoctor.data.manifest import MANIFEST
from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.resumable import load_state, save_state
from diffdoctor.data.shard_writer import RECORDS, SHEET
from diffdoctor.data.sources import Source, read_source
from diffdoctor.data.store import is_url
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.inject_config import InjectConfig
from diffdoctor.detector.commands.inject_pictures import NO_MEMORY, size_check, versions_of, why_unused
from diffdoctor.detector.commands.inject_results import print_made, refuse_empty, source_inside
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.detector.damage.plugins import load_plugins
from diffdoctor.detector.damage.stats import EXAMPLES, InjectStats
from diffdoctor.detector.damage.versions import Origin
from diffdoctor.engine.attempt import ATTEMPTS, Attempt
from diffdoctor.engine.commits import COMMITS, FAILED, PLAN
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.running import Report
from diffdoctor.engine.sets import IDENTITIES, PARTS, RESULTS, SHARDS, UnitFiles, make_set
from diffdoctor.engine.source_units import plan_of_sources, sources_of
from diffdoctor.engine.store_run import run_folder
from diffdoctor.engine.units import Place, Plan, Unit, Worker, check_unchanged
from diffdoctor.measures.pixels import is_flagged
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, reading, refuse_foreign
from diffdoctor.runs.record import METRICS, RunFolder, as_json, kind_of_run, versions
from diffdoctor.training.processes import process_state
from diffdoctor.viz.draw import contact_sheet

# Units that keep examples for the contact sheet: of a few, each several of a kind; of thousands, some.
_SHOWING = 48


def inject_in_units(
    config: InjectConfig, sources: list[Source], not_read: SkipCounts, plugins: list[str]
) -> dict[str, Any]:
    """Make a set in units.

    Args:
        config: the command's options, checked.
        sources: of the pictures.
        not_read: what was left out while they were looked for.
        plugins: digests of the plugins.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read, or there is no picture to write.
    """
    if not is_url(config.output) and (path := source_inside(Path(config.output), sources)) is not None:
        raise UserError(f"{config.output}: contains the input {path}; choose another folder")
    state = process_state("cpu")
    plan = plan_of_sources(sources, max(1, config.shard_size // config.versions))
    identity = config.identity(plugins) | {"engine": "in units", "plan": plan.digest()}
    results = dict.fromkeys((*RESULTS, SHEET))
    with run_folder(config.output, "inject", identity, results, main=state.is_main_process) as folder:
        spec = InjectWorkerSpec(config, _digest(config, plugins), len(plan))
        made = make_set(folder, plan, spec, config, state=state, desc="inject", overwrite=config.overwrite)
        if made is None:
            return {}
        report, found = made
        found.skipped.join(not_read)
        return _write_results(config, folder, plan, report, found.skipped)


def is_made_in_units(output: Path) -> bool:
    """Whether a folder holds a set that is made in units, finished or not."""
    return kind_of_run(output) == "inject" and (output / PLAN).is_file()


def refuse_beside_units(output: Path) -> None:
    """Refuse to replace a set that was made in units where something else lies in its folder.

    Raises:
        UserError: names it.
    """
    folders = {ATTEMPTS: ("*",), COMMITS: ("*.json",), FAILED: ("*.json",), PARTS: ("*.parquet", "*.npz")}
    refuse_foreign(output, (MANIFEST, SHARDS, PLAN, *RECORDS), folders)


def _digest(config: InjectConfig, plugins: list[str]) -> str:
    """A hash of what a picture's versions depend on beside the picture."""
    return hashlib.sha256(strict_json.dumps(as_json(config.identity(plugins)), sort_keys=True).encode()).hexdigest()


def _write_results(
    config: InjectConfig, folder: RunFolder, plan: Plan, report: Report, skipped: SkipCounts
) -> dict[str, Any]:
    stats, commits, kinds = InjectStats(), commits_at(folder.place), config.kinds or damage_kinds()
    for unit in plan:
        if unit.id not in report.failed:
            path = commits.file(commits.read(unit.id), f"{PARTS}/{unit.id}.npz")
            with reading(path):
                stats.join(load_state(path))
    stats.skipped = skipped
    metrics = stats.metrics(kinds) | {"units": report.units, "failed_units": report.failed, "versions": versions()}
    refuse_empty(folder.place, stats)
    if stats.sheet:
        atomic_write_bytes(folder.path / SHEET, contact_sheet(stats.examples()))
    atomic_write_json(folder.path / METRICS, metrics)
    print_made(folder.place, stats, kinds, report.given_up)
    return metrics


@dataclasses.dataclass(frozen=True)
class InjectWorkerSpec:
    """How a worker is made that damages the pictures of a unit.

    Attributes:
        config: the command's options.
        begun: digest of the options, kinds of damage and versions with which the run began.
        units: of the plan.
    """

    uses_accelerator: ClassVar[bool] = False

    config: InjectConfig
    begun: str
    units: int

    def build(self, place: Place) -> Worker:
        """Load the plugins.

        Raises:
            UserError: they, the kinds of damage or the versions of libraries are not those with which the run began.
        """
        now = _digest(self.config, load_plugins(self.config.plugins))
        check_unchanged("inject: other plugins, kinds of damage or versions of libraries", now, self.begun)
        return _InjectWorker(self.config, self.units)


class _InjectWorker:
    def __init__(self, config: InjectConfig, units: int):
        self.config, self.units, self.options = config, units, config.version_options()

    def __call__(self, unit: Unit, attempt: Attempt) -> dict[str, Any]:
        counts, stats = SkipCounts(), InjectStats(examples=examples_of(int(unit.id), self.units))
        with UnitFiles(unit, attempt, self.config.picture_type, IDENTITIES) as files:
            for place, sample in enumerate(self._pictures(unit, counts)):
                origin = Origin.of_name(f"{unit.id}_{place:06d}", sample["name"])
                if (result := versions_of((self.options, origin, sample))) is None:
                    counts.add(NO_MEMORY, sample["name"], self.config.strict)
                    continue
                made, failed = result
                stats.failed += failed
                for version in made:
                    area = stats.add(version)
                    files.add(version, area=area, flagged=bool(is_flagged(area)))
        save_state(attempt.path(f"{PARTS}/{unit.id}.npz"), stats.counts())
        return files.result(counts)

    def _pictures(self, unit: Unit, counts: SkipCounts) -> Iterator[dict]:
        """The pictures of a unit that are used."""
        check = size_check(self.config.longest)
        for source in sources_of(unit):
            for sample in read_source(source, strict=self.config.strict, counts=counts, check=check):
                picture = shrink_to(sample["picture"], self.config.longest)
                if (reason := why_unused(picture, sample)) is not None:
                    counts.add(reason, sample["name"], self.config.strict)
                else:
                    yield sample | {"picture": picture}


def examples_of(number: int, units: int) -> int:
    """How many examples of each kind a unit keeps for the contact sheet.

    Args:
        number: of the unit, from 0.
        units: of the plan.
    """
    if number % max(1, units // _SHOWING):
        return 0
    return max(1, min(EXAMPLES, -(-4 * EXAMPLES // units)))
