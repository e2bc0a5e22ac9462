"""`diffdoctor inject`: clean pictures in, labelled shards with exact masks out."""

import collections
import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.resumable import ResumableSet, work_folder
from diffdoctor.data.shard_writer import SHEET, refuse_no_set
from diffdoctor.data.sources import Source, find_sources, read_source
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.inject_config import InjectConfig
from diffdoctor.detector.commands.inject_pictures import NO_MEMORY, size_check, versions_of, why_unused
from diffdoctor.detector.commands.inject_results import print_made, refuse_empty, source_inside
from diffdoctor.detector.commands.inject_units import inject_in_units, is_made_in_units, refuse_beside_units
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.detector.damage.plugins import load_plugins
from diffdoctor.detector.damage.stats import Cursor, InjectStats
from diffdoctor.detector.damage.versions import Origin
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, clear_leftovers
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.progress import track
from diffdoctor.runs.record import METRICS, RunFolder, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.runs.workers import ordered_map
from diffdoctor.viz.draw import contact_sheet


def run_inject(config: InjectConfig) -> dict:
    """Run `diffdoctor inject`.

    Returns:
        What metrics.json holds; with an engine, nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    plugins = load_plugins(config.plugins)
    config.check()
    left_out = SkipCounts()
    output, sources = Path(config.output), find_sources(config.pictures, left_out)
    if config.engine.kind is not None:
        return inject_in_units(config, sources, left_out, plugins)
    run = RunFolder(output, "inject", _identity(config, sources, plugins), {})
    work, metrics = work_folder(output), _already_made(config, run, sources)
    if metrics is None or work.exists():
        in_units = config.overwrite and is_made_in_units(output)
        # A run in units keeps the output itself to its process.
        with locked_folder(work), locked_folder(output, main=in_units):
            # Another process may have made the set, or been killed while it replaced one, before this one had the lock.
            clear_leftovers(output.parent, output.name)
            try:
                if (metrics := _already_made(config, run, sources)) is None:
                    return _make(config, run, sources, left_out)
                _clear_finished(work, run)
            finally:
                with contextlib.suppress(OSError):
                    work.rmdir()
    print_summary(f"already complete with {metrics['pictures']} pictures: {output}")
    return metrics


def _already_made(config: InjectConfig, run: RunFolder, sources: list[Source]) -> dict | None:
    """The metrics of this set if it exists and is not to be replaced, else None.

    Raises:
        UserError: the output holds something that must not be replaced.
    """
    output = run.path
    if not config.overwrite and output.exists():
        if output.is_dir() and (metrics := run.finished()) is not None:
            return metrics
        _refuse_replacing(output)
    _refuse_loss(output, sources)
    return None


def _refuse_replacing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; choose another folder or give --overwrite true")


def _refuse_loss(output: Path, sources: list[Source]) -> None:
    """Refuse an output whose replacement would delete a source, or anything but an earlier set."""
    if (path := source_inside(output, sources)) is not None:
        raise UserError(f"{output}: would be replaced, but contains the input {path}; choose another folder")
    if is_made_in_units(output):
        refuse_beside_units(output)
    else:
        refuse_no_set(output)


def _clear_finished(work: Path, run: RunFolder) -> None:
    """Remove the leftovers of a process that was killed right after renaming the finished set."""
    if not (work / "set").exists():
        RunFolder(work, run.kind, run.identity, dict.fromkeys(("rows", "state.npz"))).remove()


def _make(config: InjectConfig, run: RunFolder, sources: list[Source], not_read: SkipCounts) -> dict:
    output = run.path
    made = ResumableSet(output, run.identity, shard_size=config.shard_size, picture_type=config.picture_type)
    if made.discarded_stale:
        other = ", ".join(made.discarded_stale)
        print_summary(f"{output}: deleted the unfinished set of a run with another {other}; starting again")
    stats = InjectStats(made.state)
    made.write(stats.count(_samples(config, sources, stats)), stats.record)
    stats.skipped.join(not_read)
    kinds = config.kinds or damage_kinds()
    metrics = stats.metrics(kinds) | {"versions": versions()}
    try:
        refuse_empty(output, stats)
    except UserError:
        made.remove()
        raise

    def add(folder: Path) -> None:
        if stats.sheet:
            atomic_write_bytes(folder / SHEET, contact_sheet(stats.examples()))
        RunFolder(folder, run.kind, run.identity, {}).begin(config)
        atomic_write_json(folder / METRICS, metrics)

    # The output may have changed in the meantime.
    _refuse_loss(output, sources)
    if not config.overwrite:
        _refuse_replacing(output)
    made.finish(add)
    print_made(output, stats, kinds)
    return metrics


def _identity(config: InjectConfig, sources: list[Source], plugins: list[str]) -> dict:
    """All that the set is a function of, by name."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr((source.name, source.category, source.path.suffix, source.stamp())).encode())
    return config.identity(plugins) | {"pictures": digest.hexdigest()}


def _samples(
    config: InjectConfig, sources: list[Source], stats: InjectStats
) -> Iterator[tuple[Cursor, int, int, dict]]:
    """Labelled samples from the cursor of `stats` on, in the order of the input for any number of workers.

    Yields:
        See `InjectStats.count`.
    """
    cursors: collections.deque[tuple[Cursor, str]] = collections.deque()
    options = config.version_options()

    def jobs():
        for cursor, sample in _pictures(config, sources, stats.skipped, stats.cursor):
            cursors.append((cursor, sample["name"]))
            yield options, Origin.of_index(cursor.index), sample

    if config.workers > 1:
        results = ordered_map(versions_of, jobs(), config.workers, load_plugins, config.plugins)
    else:
        results = (versions_of(job) for job in jobs())
    total = None
    if not any(source.is_shard for source in sources):
        total = len(sources) - (stats.cursor.source if stats.cursor else 0)
    written = stats.versions
    with contextlib.closing(results):
        for result in track(results, desc="inject", unit="picture", total=total):
            cursor, name = cursors.popleft()
            if result is None:
                stats.skipped.add(NO_MEMORY, name, config.strict)
                continue
            versions, failed = result
            for number, sample in enumerate(versions[written:], written + 1):
                yield cursor, number, stats.failed, sample
            written = 0
            stats.failed += failed


def _pictures(
    config: InjectConfig, sources: list[Source], counts: SkipCounts, start: Cursor | None
) -> Iterator[tuple[Cursor, dict]]:
    """The pictures that are used, from `start` on, with their cursors; fills `counts`."""
    check = size_check(config.longest)
    index = start.index if start else 0
    for number in range(start.source if start else 0, len(sources)):
        resumed = start if start and number == start.source else None
        samples = read_source(sources[number], strict=config.strict, counts=counts, check=check)
        for sample_index, sample in enumerate(samples):
            if resumed and sample_index < resumed.sample:
                continue
            if resumed and sample_index == resumed.sample:
                # What was skipped before is counted already.
                counts.reasons, counts.examples = dict(resumed.reasons), dict(resumed.examples)
            before = dict(counts.reasons), dict(counts.examples)
            picture = shrink_to(sample["picture"], config.longest)
            if (reason := why_unused(picture, sample)) is not None:
                counts.add(reason, sample["name"], config.strict)
            else:
                yield Cursor(number, sample_index, index, *before), {**sample, "picture": picture}
                index += 1
