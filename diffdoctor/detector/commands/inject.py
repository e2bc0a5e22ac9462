"""`diffdoctor inject`: clean pictures in, labelled shards with exact masks out."""

import collections
import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.resumable import ResumableSet, work_folder
from diffdoctor.data.shard_writer import SHEET, check_options, refuse_no_set
from diffdoctor.data.sources import Source, find_sources, read_source
from diffdoctor.data.store_path import StorePath
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.damage.injection import MIN_SIDE, check_range
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.detector.damage.plugins import load_plugins
from diffdoctor.detector.damage.stats import Cursor, InjectStats
from diffdoctor.detector.damage.versions import VersionOptions, labelled_versions
from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, clear_leftovers
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.progress import track
from diffdoctor.runs.record import METRICS, RunFolder, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.runs.workers import ordered_map
from diffdoctor.viz.draw import contact_sheet

# Damaging a larger picture takes more than eight gigabytes.
_MAX_PIXELS = 2**26


@dataclasses.dataclass
class InjectConfig:
    """Options of `diffdoctor inject`.

    Attributes:
        pictures: clean pictures: files, folders, patterns, shards.
        output: the folder to make: shards, manifest.parquet, contact_sheet.png, config.yaml, metrics.json. It appears
            when all is there. Interrupted and run again, the command resumes after the last complete shard.
        damaged: number of damaged versions of each picture.
        benign: number of benign changes of each picture, with empty masks.
        clean: include each picture itself, with an empty mask.
        kinds: kinds of damage to draw from: warp, swirl, patch_permutation, duplicate, removal, smear,
            glyph_scramble, watermark, texture_noise, over_smooth, strip_shift, fuse, phase_scramble, seam,
            pixelate, ghost_limb, tint, or those of the plugins; null: all.
        plugins: Python files to run first, which register kinds by `diffdoctor.detector.damage_kind`.
        strength: range of the damage's strength, in (0, 1].
        area: range of the damaged region's size, as a share of the picture.
        visible: smallest mean change of the changed pixels, in [0, 1]; 0.6 of it for over_smooth and pixelate and 0.8
            of it for fuse and removal, which are seen by their structure.
        longest: larger pictures are shrunk to this longest side, in pixels; null: they keep their size.
        seed: of all draws; each picture's damage is a function of the seed and of the picture's index in the input.
        workers: processes; the result does not depend on their number.
        shard_size: pictures in a shard.
        picture_type: png, webp (both exact) or jpg.
        strict: stop at the first broken picture instead of skipping and counting it.
        overwrite: replace the output folder when it is there: a set of shards, and none that the pictures come from.
    """

    pictures: list[str]
    output: str
    damaged: int = 1
    benign: int = 0
    clean: bool = True
    kinds: list[str] | None = None
    plugins: list[str] | None = None
    strength: tuple[float, float] = (0.5, 1.0)
    area: tuple[float, float] = (0.03, 0.33)
    visible: float = 0.2
    longest: int | None = None
    seed: int = 0
    workers: int = 1
    shard_size: int = 1000
    picture_type: str = "png"
    strict: bool = False
    overwrite: bool = False


def run_inject(config: InjectConfig) -> dict:
    """Run `diffdoctor inject`.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    plugins = load_plugins(config.plugins)
    _check(config)
    left_out = SkipCounts()
    output, sources = Path(config.output), find_sources(config.pictures, left_out)
    run = RunFolder(output, "inject", _identity(config, sources, plugins), {})
    work, metrics = work_folder(output), _already_made(config, run, sources)
    if metrics is None or work.exists():
        with locked_folder(work):
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


def _check(config: InjectConfig) -> None:
    unknown = sorted(set(config.kinds or ()) - set(damage_kinds()))
    if unknown:
        raise UserError(expected("kinds", f"some of {', '.join(damage_kinds())}", ", ".join(unknown)))
    check_least(config, damaged=0, benign=0, workers=1, seed=0, longest=MIN_SIDE)
    if not (config.damaged or config.benign or config.clean):
        raise UserError(expected("damaged, benign, clean", "at least one version of each picture", "none"))
    if not 0 <= config.visible <= 1:
        raise UserError(expected("visible", "a change in [0, 1]", config.visible))
    here, output = Path.cwd(), Path(config.output).resolve()
    if output in (here, *here.parents):
        what = "a folder that is not the working folder nor above it, since the finished set takes its place"
        raise UserError(expected("output", what, config.output))
    try:
        for name in ("strength", "area"):
            check_range(name, getattr(config, name), 0, 1)
        check_options(config.shard_size, config.picture_type)
    except ValueError as error:
        raise UserError(str(error)) from error


def _refuse_loss(output: Path, sources: list[Source]) -> None:
    """Refuse an output whose replacement would delete a source, or anything but an earlier set."""
    replaced = output.resolve()
    for source in sources:
        if isinstance(source.path, StorePath):
            continue  # lies in no folder of this machine
        # A link inside the output would be deleted too, wherever it leads.
        link = source.path.parent.resolve() / source.path.name
        if link.is_relative_to(replaced) or source.path.resolve().is_relative_to(replaced):
            raise UserError(f"{output}: would be replaced, but contains the input {source.path}; choose another folder")
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
    left_out = SkipCounts(dict(stats.skipped.reasons), stats.skipped.examples)
    if stats.failed:
        left_out.reasons["damage that was not visible"] = stats.failed
    if not metrics["pictures"]:
        made.remove()
        raise UserError(f"{output}: no pictures to write ({left_out.sentence()})")

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
    print_summary(f"{metrics['pictures']} pictures: {output}", left_out.reasons, left_out.examples)
    rare, share = stats.rare_kinds(kinds)
    if rare:
        few = ", ".join(f"{kind} {count}" for kind, count in rare.items())
        print_summary(f"of each kind of damage {share:.0f} pictures are due, but there are of {few} (see --visible)")
    return metrics


def _identity(config: InjectConfig, sources: list[Source], plugins: list[str]) -> dict:
    """All that the set is a function of, by name."""
    options = dataclasses.asdict(config) | {"plugins": plugins}
    for name in ("output", "workers", "overwrite"):
        del options[name]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr((source.name, source.category, source.path.suffix, source.stamp())).encode())
    known = {"known kinds": damage_kinds(), "versions": versions()}
    return options | known | {"pictures": digest.hexdigest()}


def _samples(
    config: InjectConfig, sources: list[Source], stats: InjectStats
) -> Iterator[tuple[Cursor, int, int, dict]]:
    """Labelled samples from the cursor of `stats` on, in the order of the input for any number of workers.

    Yields:
        See `InjectStats.count`.
    """
    cursors: collections.deque[tuple[Cursor, str]] = collections.deque()
    # Named here, so that a worker in which one of them is not registered raises instead of drawing from the others.
    kinds = tuple(config.kinds or damage_kinds())
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(VersionOptions)}
    options = VersionOptions(**values | {"kinds": kinds})

    def jobs():
        for cursor, sample in _pictures(config, sources, stats.skipped, stats.cursor):
            cursors.append((cursor, sample["name"]))
            yield options, cursor.index, sample

    if config.workers > 1:
        results = ordered_map(_versions, jobs(), config.workers, load_plugins, config.plugins)
    else:
        results = (_versions(job) for job in jobs())
    total = None
    if not any(source.is_shard for source in sources):
        total = len(sources) - (stats.cursor.source if stats.cursor else 0)
    written = stats.versions
    with contextlib.closing(results):
        for result in track(results, desc="inject", unit="picture", total=total):
            cursor, name = cursors.popleft()
            if result is None:
                stats.skipped.add("a picture for which there is not enough memory", name, config.strict)
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

    def check(height: int, width: int) -> str | None:
        shrunk = min(1.0, (config.longest or math.inf) / max(height, width))
        if height * width * shrunk**2 <= _MAX_PIXELS:
            return None
        return f"a picture of more than {_MAX_PIXELS:,} pixels to damage (give longest)"

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
            if min(picture.shape[:2]) < MIN_SIDE:
                counts.add(f"a picture of less than {MIN_SIDE} pixels", sample["name"], config.strict)
            elif np.any(sample.get("mask", 0)):
                counts.add("a picture that is damaged already", sample["name"], config.strict)
            else:
                yield Cursor(number, sample_index, index, *before), {**sample, "picture": picture}
                index += 1


def _versions(job: tuple[VersionOptions, int, dict]) -> tuple[list[dict], int] | None:
    """See `labelled_versions`; None where there is not enough memory for the picture."""
    try:
        return labelled_versions(*job)
    except MemoryError:
        return None
