"""`diffdoctor inject`: clean pictures in, labelled shards with exact masks out."""

import array
import collections
import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.resumable import ResumableSet, State, clear_finished, work_folder
from diffdoctor.data.shard_writer import SHEET, check_options, refuse_no_set
from diffdoctor.data.sources import Source, find_sources, read_source, tell, versions, write_config
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.damage.injection import MIN_SIDE, check_range
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.detector.damage.plugins import load_plugins
from diffdoctor.detector.damage.versions import VersionOptions, labelled_versions
from diffdoctor.runs.errors import UserError, check_least
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, clear_leftovers
from diffdoctor.runs.lock import held
from diffdoctor.runs.progress import track
from diffdoctor.runs.workers import ordered_map
from diffdoctor.viz.draw import SHEET_TILE, contact_sheet

# Of each kind, on the contact sheet.
EXAMPLES = 6


@dataclasses.dataclass
class InjectConfig:
    """Options of `diffdoctor inject`.

    Attributes:
        pictures: clean pictures: files, folders, patterns, shards.
        output: the folder to make: shards, manifest.parquet, contact_sheet.png, config.yaml, metrics.json. It appears
            when all is there. Interrupted and run again, the command goes on after the last complete shard.
        damaged: damaged versions of each picture.
        benign: mildly changed look-alikes of each picture, with empty masks.
        clean: put each picture itself in as well, with an empty mask.
        kinds: kinds of damage to draw from; none named: all.
        plugins: Python files to run first, which register kinds of their own by `diffdoctor.detector.damage_kind`.
        strength: range of the damage's strength, within (0, 1].
        area: range of the damaged region's size, share of the picture.
        visible: smallest mean change of the changed pixels, of 1.
        longest: pictures are shrunk to this longest side in pixels before; null: they stay as they are.
        seed: of all draws; each picture's damage depends on it and on the picture's place in the input alone.
        workers: processes; the result does not depend on their number.
        shard_size: pictures in a shard.
        picture_type: png, webp (both exact) or jpg.
        strict: stop at the first broken picture instead of leaving it out and counting it.
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
    """Run `diffdoctor inject`; returns what metrics.json holds."""
    plugins = load_plugins(config.plugins)
    _check(config)
    output, sources = Path(config.output), find_sources(config.pictures)
    made_from = _made_from(config, sources, plugins)
    # An output that was killed while it was replaced gets its old content back.
    clear_leftovers(output.parent, output.name)
    if not config.overwrite and output.exists():
        if (metrics := _finished(output, made_from)) is not None:
            clear_finished(output)
            tell(f"{metrics['pictures']} pictures are there already: {output}")
            return metrics
        if not output.is_dir() or any(output.iterdir()):
            raise UserError(f"{output}: is there already; choose another folder or give --overwrite true")
    _refuse_loss(output, sources)
    with held(work_folder(output)):
        return _make(config, output, sources, made_from)


def _check(config: InjectConfig) -> None:
    unknown = sorted(set(config.kinds or ()) - set(damage_kinds()))
    if unknown:
        raise UserError(f"kinds: no such kind {', '.join(unknown)}; there are {', '.join(damage_kinds())}")
    check_least(config, damaged=0, benign=0, workers=1, seed=0, longest=MIN_SIDE)
    if not (config.damaged or config.benign or config.clean):
        raise UserError("damaged, benign, clean: expected at least one version of each picture, got none")
    if not 0 <= config.visible <= 1:
        raise UserError(f"visible: expected a change within [0, 1], got {config.visible}")
    try:
        for name in ("strength", "area"):
            check_range(name, getattr(config, name), 0, 1)
        check_options(config.shard_size, config.picture_type)
    except ValueError as error:
        raise UserError(str(error)) from error


def _refuse_loss(output: Path, sources: list[Source]) -> None:
    """Refuse an output where giving the set its name would remove anything but an earlier set, or a source."""
    place = output.resolve()
    for source in sources:
        # A link inside would go too, wherever it leads.
        itself = source.path.parent.resolve() / source.path.name
        if itself.is_relative_to(place) or source.path.resolve().is_relative_to(place):
            raise UserError(f"{output}: would be replaced, but {source.path} is to be read; choose another folder")
    refuse_no_set(output)


def _make(config: InjectConfig, output: Path, sources: list[Source], made_from: str) -> dict:
    run = ResumableSet(output, made_from, shard_size=config.shard_size, picture_type=config.picture_type)
    if run.begun_otherwise:
        tell(f"{output}: was begun with other pictures or options; begun anew")
    tally = _Tally(run.state)
    run.write(tally.watch(_samples(config, sources, tally)), tally.record)
    metrics = tally.metrics() | {"made_from": made_from, "versions": versions()}
    left_out = dict(tally.skipped.reasons)
    if tally.failed:
        left_out["a damage that could not be seen"] = tally.failed
    if not metrics["pictures"]:
        run.drop()
        raise UserError(
            f"{output}: no pictures to write ({', '.join(f'{count} x {why}' for why, count in left_out.items())})"
        )

    def add(folder: Path) -> None:
        if tally.sheet:
            atomic_write_bytes(folder / SHEET, contact_sheet(tally.examples()))
        write_config(folder, config)
        atomic_write_json(folder / "metrics.json", metrics)

    # Something may have been put there meanwhile.
    _refuse_loss(output, sources)
    run.finish(add)
    tell(f"{metrics['pictures']} pictures: {output}", left_out)
    return metrics


def _made_from(config: InjectConfig, sources: list[Source], plugins: list[str]) -> str:
    """A hash of all that the set is a function of."""
    options = dataclasses.asdict(config) | {"plugins": plugins}
    for name in ("pictures", "output", "workers", "overwrite"):
        del options[name]
    digest = hashlib.sha256(json.dumps([options, damage_kinds(), versions()], sort_keys=True).encode())
    for source in sources:
        digest.update(repr((source.name, source.category, source.path.suffix, source.stamp())).encode())
    return digest.hexdigest()


def _finished(output: Path, made_from: str) -> dict | None:
    """The metrics of a set that is there already, if it was made from the same; else None."""
    try:
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and metrics.get("made_from") == made_from else None


@dataclasses.dataclass
class _Place:
    """Where in the input a picture stands, and what was left out before it.

    Attributes:
        source: index of its source.
        sample: its index among the samples of this source.
        index: its index among the pictures that are used.
        reasons, examples: of `SkipCounts`.
    """

    source: int
    sample: int
    index: int
    reasons: dict[str, int]
    examples: dict[str, str]


class _Tally:
    """Counts what passes by, and keeps examples of each kind, drawn from the whole set, for the contact sheet.

    Args:
        state: what `record` gave, to go on from there.
    """

    def __init__(self, state: State | None = None):
        account, arrays = state or ({}, {})
        self.kinds, self.failed = Counter(account.get("kinds")), account.get("failed", 0)
        self.skipped, self.areas = SkipCounts(), array.array("d", arrays.get("areas", ()))
        # {kind: [(rank, (clean, damaged, mask))]}: those of lowest rank are kept, so that any is as likely.
        self.sheet: dict[str, list[tuple]] = {}
        for number, (kind, rank) in enumerate(account.get("sheet", ())):
            tiles = tuple(arrays[f"tile-{number}-{part}"] for part in range(3))
            self.sheet.setdefault(kind, []).append((rank, tiles))
        # The picture to go on with, and how many of its versions are written.
        self.place = _Place(**account["place"]) if account else None
        self.versions = account.get("versions", 0)

    def watch(self, samples: Iterator[tuple[_Place, int, int, dict]]) -> Iterator[dict]:
        """The samples, counted.

        Args:
            samples: (place, versions of the picture with this one, failed before the picture, sample).
        """
        for self.place, self.versions, self.failed_before, sample in samples:
            clean = sample.pop("original")
            self.kinds[sample["kind"] or "clean"] += 1
            if sample["mask"].any():
                self.areas.append(float((sample["mask"] >= 0.5).mean()))
            if sample["kind"]:
                self._show(clean, sample)
            yield sample

    def _show(self, clean: np.ndarray, sample: dict) -> None:
        rank = hashlib.blake2b(sample["key"].encode(), digest_size=8).hexdigest()
        shown = self.sheet.setdefault(sample["kind"], [])
        if len(shown) < EXAMPLES or rank < shown[-1][0]:
            mask = np.rint(sample["mask"] * 255).astype(np.uint8)
            shown.append((rank, tuple(shrink_to(tile, SHEET_TILE) for tile in (clean, sample["picture"], mask))))
            shown.sort(key=lambda entry: entry[0])
            del shown[EXAMPLES:]

    def record(self) -> State:
        """All of it after the sample that was watched last, for `ResumableSet`."""
        shown = [(kind, *entry) for kind, entries in self.sheet.items() for entry in entries]
        account = {
            "kinds": dict(self.kinds),
            "failed": self.failed_before,
            "place": dataclasses.asdict(self.place),
            "versions": self.versions,
            "sheet": [(kind, rank) for kind, rank, _ in shown],
        }
        arrays = {"areas": np.array(self.areas)}
        for number, (_, _, tiles) in enumerate(shown):
            arrays |= {f"tile-{number}-{part}": tile for part, tile in enumerate(tiles)}
        return account, arrays

    def examples(self) -> dict[str, list[tuple]]:
        """What `contact_sheet` takes."""
        return {kind: [tiles for _, tiles in shown] for kind, shown in self.sheet.items()}

    def metrics(self) -> dict:
        return {
            "pictures": sum(self.kinds.values()),
            "kinds": dict(sorted(self.kinds.items())),
            "mask_area": {
                name: float(np.quantile(self.areas, q)) if len(self.areas) else 0.0
                for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95))
            },
            "without_visible_damage": self.failed,
            "skipped": self.skipped.reasons,
            "skipped_examples": self.skipped.examples,
        }


def _samples(config: InjectConfig, sources: list[Source], tally: _Tally) -> Iterator[tuple[_Place, int, int, dict]]:
    """Labelled samples from the tally's place on, in the order of the input whatever the number of workers.

    With each: its picture's place, how many versions of the picture have come with it, and how many failed before.
    """
    places: collections.deque[_Place] = collections.deque()
    # Named here, so that a worker in which one of them was never registered says so and does not draw from the rest.
    kinds = tuple(config.kinds or damage_kinds())
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(VersionOptions)}
    options = VersionOptions(**values | {"kinds": kinds})

    def jobs():
        for place, sample in _pictures(config, sources, tally.skipped, tally.place):
            places.append(place)
            yield options, place.index, sample

    if config.workers > 1:
        results = ordered_map(_versions, jobs(), config.workers, load_plugins, config.plugins)
    else:
        results = (_versions(job) for job in jobs())
    total = None
    if not any(source.is_shard for source in sources):
        total = len(sources) - (tally.place.source if tally.place else 0)
    written = tally.versions
    with contextlib.closing(results):
        for versions, failed in track(results, desc="inject", unit="picture", total=total):
            place = places.popleft()
            for number, sample in enumerate(versions[written:], written + 1):
                yield place, number, tally.failed, sample
            written = 0
            tally.failed += failed


def _pictures(
    config: InjectConfig, sources: list[Source], counts: SkipCounts, start: _Place | None
) -> Iterator[tuple[_Place, dict]]:
    """The pictures that are used, from a place on or all, with their places; fills `counts`."""
    index = start.index if start else 0
    for number in range(start.source if start else 0, len(sources)):
        resumed = start if start and number == start.source else None
        for place, sample in enumerate(read_source(sources[number], strict=config.strict, counts=counts)):
            if resumed and place < resumed.sample:
                continue
            if resumed and place == resumed.sample:
                # What was left out up to here was counted when it was first read.
                counts.reasons, counts.examples = dict(resumed.reasons), dict(resumed.examples)
            before = dict(counts.reasons), dict(counts.examples)
            picture = shrink_to(sample["picture"], config.longest)
            if min(picture.shape[:2]) < MIN_SIDE:
                counts.add(f"a picture of less than {MIN_SIDE} pixels", sample["name"], config.strict)
            elif np.any(sample.get("mask", 0)):
                counts.add("a picture that is damaged already", sample["name"], config.strict)
            else:
                yield _Place(number, place, index, *before), {**sample, "picture": picture}
                index += 1


def _versions(job: tuple[VersionOptions, int, dict]) -> tuple[list[dict], int]:
    return labelled_versions(*job)
