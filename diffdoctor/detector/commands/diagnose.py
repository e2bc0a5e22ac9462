"""`diffdoctor diagnose`: confidence maps, boxes and a gallery for any pictures; several processes; resumable."""

import dataclasses
import heapq
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffdoctor.data.pictures import to_images
from diffdoctor.data.source_index import Completed, SourceIndex, absolute_path, gather_counts
from diffdoctor.data.sources import Source, find_sources, read_source
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.confidence import confidence_of
from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.detector.predict import TOO_LARGE, describe_map, in_batches, takes
from diffdoctor.detector.report import write_gallery
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, check_least, expected, first_line
from diffdoctor.runs.files import NO_SUCH_NAME, atomic_path, atomic_write_bytes, atomic_write_json, file_name
from diffdoctor.runs.journal import Journal, Records
from diffdoctor.runs.progress import progress
from diffdoctor.runs.record import METRICS, RunFolder, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.training.devices import device_of, open_device
from diffdoctor.training.processes import process_state
from diffdoctor.training.weights import weights_digest
from diffdoctor.viz.draw import map_png, overlay, png_bytes

RECORDS = "records"
# What the maps and overlays depend on, beside the detector's weights and the pictures.
_IDENTITY = ("detector", "tile", "overlap", "bits", "dtype", "overlays")
RESULTS = dict.fromkeys(("maps", "overlays", RECORDS, "diagnosis.jsonl", "gallery.html"))


@dataclasses.dataclass
class DiagnoseConfig:
    """Options of `diffdoctor diagnose`.

    Attributes:
        pictures: files, folders, patterns, shards.
        detector: the detector's folder or hub id, the published checkpoint's .bin file, FILE.py:FUNCTION or a URL.
        output: the folder to make: maps, overlays, diagnosis.jsonl, gallery.html, config.yaml, metrics.json, records.
            Run again, it resumes with the pictures that are not there yet or whose files were replaced, and reports
            those that are given now.
        batch_size: pictures of one size that are diagnosed together; processes take so many files at a time.
        tile: side in pixels of the tiles that larger pictures are cut into; null: pictures are diagnosed whole.
        overlap: share of a tile that it has in common with the next, in [0, 0.5].
        bits: of the confidence maps, 8 or 16.
        overlays: write the pictures reddened where the detector is confident.
        gallery: number of pictures in the gallery, the worst first; 0: no gallery.
        mirrored: diagnose each picture mirrored left to right too, and record as `disagreement` the mean absolute
            difference of the two maps, by which `annotate add` chooses; takes twice the time. Not for lettering.
        dtype: of the detector, fp32 or bf16.
        device: such as cpu or cuda:1; null: the fastest there is.
        strict: stop at the first broken picture instead of skipping and counting it.
    """

    pictures: list[str]
    detector: str
    output: str
    batch_size: int = 16
    tile: int | None = None
    overlap: float = 0.25
    bits: int = 8
    overlays: bool = True
    gallery: int = 200
    mirrored: bool = False
    dtype: str = "fp32"
    device: str | None = None
    strict: bool = False

    def __post_init__(self):
        if self.bits not in (8, 16):
            raise UserError(expected("bits", "8 or 16", self.bits))
        if self.dtype not in ("fp32", "bf16"):
            raise UserError(expected("dtype", "fp32 or bf16", repr(self.dtype)))
        check_least(self, batch_size=1, tile=16, gallery=0)
        if not 0 <= self.overlap <= 0.5:
            raise UserError(expected("overlap", "a share in [0, 0.5]", self.overlap))


def run_diagnose(config: DiagnoseConfig) -> dict:
    """Run `diffdoctor diagnose`.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    state = process_state()
    left_out = SkipCounts()
    sources = find_sources(config.pictures, left_out)
    detector = open_detector(config.detector)
    identity = {name: getattr(config, name) for name in _IDENTITY} | {"weights": weights_digest(detector)}
    if config.mirrored:
        identity["mirrored"] = True
    with RunFolder(config.output, "diagnose", identity, RESULTS, main=state.is_main_process) as run:
        return _diagnose(run, detector, config, sources, left_out, state)


def _diagnose(
    run: RunFolder, detector: Detector, config: DiagnoseConfig, sources: list[Source], left_out: SkipCounts, state
) -> dict:
    import torch

    run.check()
    journal = Journal(run.path / RECORDS, state.process_index)
    index = SourceIndex(sources)
    completed = Completed(index, journal)
    detector.to(open_device(config.device, state.device))
    detector.to(torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    state.wait_for_everyone()
    if state.is_main_process:
        run.begin(config)
    state.wait_for_everyone()
    skipped = _diagnose_units(detector, config, index, completed, journal, state)
    state.wait_for_everyone()
    metrics: dict = {}
    if state.is_main_process:
        skipped.join(left_out)
        metrics = _finish(index, config, journal.read(), skipped)
        page = run.path / ("gallery.html" if config.gallery else "diagnosis.jsonl")
        line = f"{metrics['flagged']} of {metrics['pictures']} pictures are flagged: {page}"
        print_summary(line, metrics["skipped"], metrics["skipped_examples"])
    state.wait_for_everyone()
    if metrics and not metrics["pictures"]:
        raise UserError(f"{run.path}: no picture could be diagnosed (left out: {skipped.sentence()})")
    return metrics


def _units(sources: list[Source], size: int) -> list[list[Source]]:
    """Units of work for one process each: one shard, or up to `size` picture files.

    Batches, and so the last bits of the maps, depend neither on the number of processes nor on what is finished.
    """
    files = [source for source in sources if not source.is_shard]
    groups = [files[first : first + size] for first in range(0, len(files), size)]
    return groups + [[source] for source in sources if source.is_shard]


def _diagnose_units(
    detector, config: DiagnoseConfig, index: SourceIndex, completed: Completed, journal: Journal, state
) -> SkipCounts:
    """Diagnose this process's units; returns what all processes skipped."""
    counts, units = SkipCounts(), _units(index.sources, config.batch_size)
    files = sum(len(unit) for unit in units if not unit[0].is_shard)
    total = files if not any(unit[0].is_shard for unit in units) else None
    show = progress(total, desc="diagnose", unit="picture", enabled=state.is_main_process)
    with journal, show as bar:
        for number, unit in enumerate(units):
            shard = unit[0].name if unit[0].is_shard else None
            whole = shard in completed.shards if shard else all(source.name in completed.names for source in unit)
            if whole or number % state.num_processes != state.process_index:
                bar.update(0 if shard else len(unit))
                continue
            before, pictures = counts.total, 0
            for batch in _batches(unit, config, detector, counts, index.stamps):
                pictures += len(batch)
                missing = {sample["name"] for sample in batch if sample["name"] not in completed.names}
                if missing:
                    # The maps must be on the disk before their records.
                    journal.append(list(_diagnose_batch(detector, batch, missing, config, counts)))
                bar.update(len(batch))
            # A shard of which something was skipped is read again by the next attempt, which counts that again.
            if shard and counts.total == before:
                journal.append([{"shard": index.mark(shard, pictures)}])
    return gather_counts(counts, state)


def _batches(
    unit: list[Source], config: DiagnoseConfig, detector: Detector, counts: SkipCounts, stamps: dict
) -> Iterator[list[dict]]:
    """The pictures of a unit that the detector takes, in batches of one size."""

    def check(height: int, width: int) -> str | None:
        return None if takes(detector, height, width, config.tile) else TOO_LARGE

    samples = (
        sample | {"path": absolute_path(source), "stamp": stamps[source.name]}
        for source in unit
        for sample in read_source(source, strict=config.strict, counts=counts, masks="ignored", check=check)
    )
    return in_batches(samples, config.batch_size)


def _diagnose_batch(
    detector: Detector, batch: list[dict], missing: set[str], config: DiagnoseConfig, counts: SkipCounts
) -> Iterator[dict]:
    """Diagnose a batch, and write the maps and yield the records of its `missing` pictures."""
    output = Path(config.output)
    for sample, confidence, disagreement in _confidences(detector, batch, config, counts):
        name = sample["name"]
        if name not in missing:
            continue
        file = file_name(name, ".png")
        try:
            atomic_write_bytes(output / "maps" / file, map_png(confidence, config.bits))
            if config.overlays:
                reddened = overlay(sample["picture"], confidence)
                atomic_write_bytes(output / "overlays" / file, png_bytes(reddened))
        except OSError as error:
            # Of two names from elsewhere, one may be a file where the other needs a folder.
            if error.errno not in NO_SUCH_NAME:
                raise
            counts.add("a name that no file can have here", name, config.strict, error.strerror or "")
            continue
        known = {key: sample[key] for key in ("path", "stamp", "category", "generator", "prompt") if sample.get(key)}
        yield describe_map(name, confidence) | disagreement | known


def _confidences(
    detector: Detector, batch: list[dict], config: DiagnoseConfig, counts: SkipCounts
) -> Iterator[tuple[dict, np.ndarray, dict]]:
    """The samples with their maps (H, W), and {"disagreement": of the mirrored one's} if that is asked for.

    Where a batch fails, its pictures are diagnosed one by one, and those that fail counted.
    """
    try:
        maps, disagreements = _maps(detector, batch, config)
    except (MemoryError, RuntimeError) as error:
        if len(batch) == 1:
            reason = "a picture on which the detector failed"
            counts.add(reason, batch[0]["name"], config.strict, first_line(error))
            return
        maps = None
    if maps is None:
        for sample in batch:
            yield from _confidences(detector, [sample], config, counts)
        return
    yield from zip(batch, maps, disagreements, strict=True)


def _maps(detector: Detector, batch: list[dict], config: DiagnoseConfig) -> tuple[np.ndarray, list[dict]]:
    images = to_images([sample["picture"] for sample in batch], device_of(detector))
    options = {"tile": config.tile, "overlap": config.overlap}
    maps = confidence_of(detector, images, **options)[:, 0]
    if not config.mirrored:
        return maps.cpu().numpy(), [{}] * len(batch)
    mirrored = confidence_of(detector, images.flip(-1), **options)[:, 0].flip(-1)
    means = (maps - mirrored).abs().float().mean(dim=(1, 2)).tolist()
    return maps.cpu().numpy(), [{"disagreement": mean} for mean in means]


def _finish(index: SourceIndex, config: DiagnoseConfig, records: Records, skipped: SkipCounts) -> dict:
    output, pictures, flagged, confidence = Path(config.output), 0, 0, 0.0
    with atomic_path(output / "diagnosis.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for record in index.current_records(records):
            lines.write(strict_json.dumps(record) + "\n")
            pictures, flagged = pictures + 1, flagged + record["flagged"]
            confidence += record["mean"]
    metrics = {
        "pictures": pictures,
        "flagged": flagged,
        "artifact_rate": flagged / pictures if pictures else None,
        "mean_confidence": confidence / pictures if pictures else None,
        "skipped": dict(sorted(skipped.reasons.items())),
        "skipped_examples": dict(sorted(skipped.examples.items())),
        "versions": versions(),
    }
    if config.gallery:
        worst = heapq.nsmallest(config.gallery, index.current_records(records), key=_worst_first)
        folders = ("overlays", "maps") if config.overlays else ("maps",)
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
        settings["pictures"] = [os.path.abspath(path) for path in config.pictures]
        if os.path.exists(config.detector):
            settings["detector"] = os.path.abspath(config.detector)
        write_gallery(output, worst, metrics, folders, settings)
    atomic_write_json(output / METRICS, metrics)
    return metrics


def _worst_first(record: dict) -> tuple:
    return -record["flagged_share"], -record["max"], record["name"]
