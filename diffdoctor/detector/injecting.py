"""`diffdoctor inject`: clean pictures in, labelled shards with exact masks out."""

import contextlib
import dataclasses
import multiprocessing
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffdoctor._errors import UserError
from diffdoctor._io import atomic_write_bytes, atomic_write_json
from diffdoctor._progress import track
from diffdoctor.detector.inject import MIN_SIDE, NoVisibleDamage, benign, damage_kinds, inject
from diffdoctor.detector.pictures import Source, find_sources, read_source, shrink_to, versions, write_config
from diffdoctor.detector.shards import SkipCounts, write_shards

# Of each kind, on the contact sheet.
EXAMPLES = 6

_CHUNK = 8  # pictures that a worker gets at once


@dataclasses.dataclass
class InjectConfig:
    """Options of `diffdoctor inject`.

    Attributes:
        pictures: clean pictures: files, folders, patterns, shards.
        output: the folder to make: shards, manifest.parquet, contact_sheet.png, config.yaml, metrics.json.
        damaged: damaged versions of each picture.
        benign: mildly changed look-alikes of each picture, with empty masks.
        clean: put each picture itself in as well, with an empty mask.
        kinds: kinds of damage to draw from; none named: all.
        strength: range of the damage's strength, within (0, 1].
        area: range of the damaged region's size, share of the picture.
        visible: smallest mean change of the changed pixels, of 1.
        longest: pictures are shrunk to this longest side in pixels before; null: they stay as they are.
        seed: of all draws; each picture's damage depends on it and on the picture's place in the input alone.
        workers: processes; the result does not depend on their number.
        shard_size: pictures in a shard.
        picture_type: png, webp (both exact) or jpg.
        strict: stop at the first broken picture instead of leaving it out and counting it.
        overwrite: replace the output folder when it is there.
    """

    pictures: list[str]
    output: str
    damaged: int = 1
    benign: int = 0
    clean: bool = True
    kinds: list[str] | None = None
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
    unknown = sorted(set(config.kinds or ()) - set(damage_kinds()))
    if unknown:
        raise UserError(f"kinds: no such kind {', '.join(unknown)}; there are {', '.join(damage_kinds())}")
    if min(config.damaged, config.benign, config.workers - 1) < 0:
        raise UserError("damaged and benign: expected >= 0, workers: expected >= 1")
    output = Path(config.output)
    if output.exists() and not config.overwrite and any(output.iterdir()):
        raise UserError(f"{output}: is there already; choose another folder or give --overwrite true")
    sources = find_sources(config.pictures)
    tally = _Tally()
    try:
        write_shards(
            tally.watch(_samples(config, sources, tally)),
            output,
            shard_size=config.shard_size,
            picture_type=config.picture_type,
        )
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if tally.sheet:
        atomic_write_bytes(output / "contact_sheet.png", contact_sheet(tally.sheet))
    metrics = tally.metrics() | {"versions": versions()}
    write_config(output, config)
    atomic_write_json(output / "metrics.json", metrics)
    return metrics


class _Tally:
    """Counts what passes by, and keeps examples of each kind, drawn from the whole set, for the contact sheet."""

    def __init__(self):
        self.kinds, self.skipped, self.sheet, self.areas, self.failed = Counter(), SkipCounts(), {}, [], 0

    def watch(self, samples: Iterator[dict]) -> Iterator[dict]:
        rng = np.random.default_rng(0)
        for sample in samples:
            clean = sample.pop("original")
            self.kinds[sample["kind"] or "clean"] += 1
            if sample["mask"].any():
                self.areas.append(float((sample["mask"] >= 0.5).mean()))
            examples = self.sheet.setdefault(sample["kind"], [])
            if sample["kind"]:
                place = len(examples) if len(examples) < EXAMPLES else rng.integers(self.kinds[sample["kind"]])
                if place < EXAMPLES:
                    examples[place : place + 1] = [(clean, sample["picture"], sample["mask"])]
            yield sample

    def metrics(self) -> dict:
        return {
            "pictures": sum(self.kinds.values()),
            "kinds": dict(sorted(self.kinds.items())),
            "mask_area": {
                name: float(np.quantile(self.areas, q)) if self.areas else 0.0
                for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95))
            },
            "without_visible_damage": self.failed,
            "skipped": self.skipped.reasons,
            "skipped_examples": self.skipped.examples,
        }


def _samples(config: InjectConfig, sources: list[Source], tally: _Tally) -> Iterator[dict]:
    """Labelled samples of all pictures, in the order of the input whatever the number of workers."""
    jobs = ((config, index, sample) for index, sample in enumerate(_pictures(config, sources, tally.skipped)))
    with contextlib.ExitStack() as stack:
        if config.workers > 1:
            # "spawn": a process that has used threads must not be forked.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(config.workers))
            room, ended = threading.Semaphore(4 * _CHUNK * config.workers), threading.Event()
            stack.callback(ended.set)
            results = pool.imap(_variants, _bounded(jobs, room, ended), chunksize=_CHUNK)
        else:
            room, results = None, map(_variants, jobs)
        total = len(sources) if not any(source.is_shard for source in sources) else None
        for variants, failed in track(results, desc="inject", unit="picture", total=total):
            tally.failed += failed
            yield from variants
            if room is not None:
                room.release()


def _bounded(jobs: Iterator, room: threading.Semaphore, ended: threading.Event) -> Iterator:
    """The jobs, as far ahead of the results as there is room: Pool.imap alone would read them all into memory."""
    for job in jobs:
        while not room.acquire(timeout=0.1):
            if ended.is_set():
                return
        yield job


def _pictures(config: InjectConfig, sources: list[Source], counts: SkipCounts) -> Iterator[dict]:
    for source in sources:
        for sample in read_source(source, strict=config.strict, counts=counts):
            picture = shrink_to(sample["picture"], config.longest)
            if min(picture.shape[:2]) < MIN_SIDE:
                counts.add(f"a picture of less than {MIN_SIDE} pixels", sample["name"], config.strict)
            elif np.any(sample.get("mask", 0)):
                counts.add("a picture that is damaged already", sample["name"], config.strict)
            else:
                yield {**sample, "picture": picture}


def _variants(job) -> tuple[list[dict], int]:
    """The labelled versions of one picture, and how many more were asked for that left no visible damage."""
    config, index, sample = job
    picture, empty = sample["picture"], np.zeros(sample["picture"].shape[:2], np.float32)
    known = {name: sample[name] for name in ("prompt", "category", "generator", "round") if name in sample}
    common = {**known, "source": sample["name"], "original": picture}
    result, failed = [], 0
    if config.clean:
        entry = {"key": f"{index:08d}-clean", "picture": picture, "mask": empty, "label": "real", "kind": ""}
        result.append(common | entry)
    for number in range(config.benign):
        changed = benign(picture, np.random.default_rng([config.seed, 2, index, number]))
        entry = {"key": f"{index:08d}-benign-{number}", "label": "real", "kind": changed.kind}
        result.append(common | entry | {"picture": changed.picture, "mask": changed.mask})
    for number in range(config.damaged):
        rng = np.random.default_rng([config.seed, 1, index, number])
        try:
            damaged = inject(picture, rng, config.kinds, config.strength, config.area, visible=config.visible)
        except NoVisibleDamage:
            failed += 1
            continue
        entry = {"key": f"{index:08d}-damaged-{number}", "label": "injected", "kind": damaged.kind}
        result.append(common | entry | {"picture": damaged.picture, "mask": damaged.mask})
    return result, failed


def contact_sheet(examples: dict[str, list[tuple]], side: int = 128) -> bytes:
    """PNG bytes: a row for each kind, with clean picture, damaged picture and mask of up to six examples.

    Args:
        examples: {kind: [(clean (H, W, 3) uint8, damaged, mask (H, W) in [0, 1])]}.
        side: of a tile, in pixels.
    """
    from PIL import Image, ImageDraw

    rows = {kind: found for kind, found in sorted(examples.items()) if found}
    label, gap = 14, 4
    width = max(len(found) for found in rows.values()) * (3 * side + gap)
    sheet = Image.new("RGB", (width, len(rows) * (side + label + gap)), (40, 40, 40))
    draw = ImageDraw.Draw(sheet)
    for row, (kind, found) in enumerate(rows.items()):
        top = row * (side + label + gap)
        draw.text((4, top + 1), kind, fill=(255, 255, 255))
        for column, (clean, damaged, mask) in enumerate(found):
            grey = np.repeat(np.rint(mask[..., None] * 255).astype(np.uint8), 3, axis=2)
            for place, picture in enumerate((clean, damaged, grey)):
                tile = Image.fromarray(picture)
                scale = side / max(tile.size)
                resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                tile = tile.resize(tuple(max(1, round(s * scale)) for s in tile.size), resampling)
                sheet.paste(tile, (column * (3 * side + gap) + place * side, top + label))
    from diffdoctor.evaluate.draw import png_bytes

    return png_bytes(np.asarray(sheet))
