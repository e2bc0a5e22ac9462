"""`diffdoctor diagnose`: confidence maps, boxes and a gallery for any pictures; several processes; resumable."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffdoctor._errors import UserError, missing_extra
from diffdoctor._io import atomic_write_bytes, atomic_write_json, atomic_write_text
from diffdoctor._progress import progress
from diffdoctor.detector.base import Detector, load_detector
from diffdoctor.detector.pictures import find_sources, read_source, versions, write_config
from diffdoctor.detector.shards import SkipCounts
from diffdoctor.evaluate.components import components
from diffdoctor.evaluate.draw import overlay, png_bytes
from diffdoctor.evaluate.pixel import FLAG_SHARE, flagged_share

RECORDS = "records"


@dataclasses.dataclass
class DiagnoseConfig:
    """Options of `diffdoctor diagnose`.

    Attributes:
        pictures: files, folders, patterns, shards.
        detector: the detector's folder or hub id, or the published checkpoint's .bin file.
        output: the folder to make: maps, overlays, diagnosis.jsonl, gallery.html, config.yaml, metrics.json. Run again,
            it goes on with the pictures that are not there yet.
        batch_size: pictures of one size that are diagnosed together.
        tile: side in pixels of the tiles that larger pictures are cut into; null: pictures are diagnosed whole.
        overlap: share of a tile that it has in common with the next.
        bits: of the confidence maps, 8 or 16.
        overlays: write the pictures reddened where the detector is confident.
        gallery: pictures in the gallery, the worst first; 0: none.
        precision: fp32 or bf16.
        device: such as cpu or cuda:1; null: the fastest there is.
        strict: stop at the first broken picture instead of leaving it out and counting it.
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
    precision: str = "fp32"
    device: str | None = None
    strict: bool = False

    def __post_init__(self):
        if self.bits not in (8, 16):
            raise UserError(f"bits: expected 8 or 16, got {self.bits}")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision: expected fp32 or bf16, got {self.precision!r}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected >= 1, got {self.batch_size}")


def run_diagnose(config: DiagnoseConfig) -> dict:
    """Run `diffdoctor diagnose`; returns what metrics.json holds."""
    import torch

    try:
        from accelerate import PartialState
    except ImportError:
        raise missing_extra("accelerate", "stages") from None
    state = PartialState(cpu=not torch.accelerator.is_available())
    output = Path(config.output)
    sources = find_sources(config.pictures)
    detector = open_detector(config.detector)
    device = torch.device(config.device) if config.device else state.device
    detector.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    if state.is_main_process:
        _same_run(output, config)
        write_config(output, config)
    state.wait_for_everyone()
    (output / RECORDS).mkdir(parents=True, exist_ok=True)
    # A source is the unit of sharing and of resuming within a shard by name: whoever has it, its record is unique.
    mine = sources[state.process_index :: state.num_processes]
    counts = SkipCounts()
    done = set(read_records(output))
    name = f"part-{state.process_index:04d}-{os.getpid()}-{len(list((output / RECORDS).iterdir())):04d}.jsonl"
    with (
        open(output / RECORDS / name, "w") as records,
        progress(desc="diagnose", unit="picture", enabled=state.is_main_process) as bar,
    ):
        for batch in _batches(mine, config, counts, done):
            for record in _diagnose_batch(detector, batch, config, output):
                records.write(json.dumps(record) + "\n")
            # The maps are on the disk before their records say so.
            records.flush()
            os.fsync(records.fileno())
            bar.update(len(batch))
    skipped = _gather_counts(counts, state)
    state.wait_for_everyone()
    metrics: dict = {}
    if state.is_main_process:
        metrics = _finish(output, config, skipped)
    state.wait_for_everyone()
    return metrics


def open_detector(source: str) -> Detector:
    """A detector from a folder, a hub id, or the published checkpoint's file."""
    if Path(source).is_file():
        from diffdoctor.detector.segformer import ArtifactDetector

        return ArtifactDetector.from_official(source)
    return load_detector(source)


def _same_run(output: Path, config: DiagnoseConfig) -> None:
    """Refuse to mix maps of two detectors or settings in one folder."""
    import yaml

    path = output / "config.yaml"
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text()) or {}
    for name in ("detector", "tile", "overlap", "bits", "precision"):
        if before.get(name) != getattr(config, name):
            raise UserError(
                f"{output}: holds maps made with {name}={before.get(name)}, not {getattr(config, name)}; "
                "choose another output folder or remove it"
            )


def _batches(sources, config, counts, done) -> Iterator[list[dict]]:
    """Pictures that are not done yet, in batches of one size."""
    batch: list[dict] = []
    for source in sources:
        if not source.is_shard and source.name in done:
            continue
        for sample in read_source(source, strict=config.strict, counts=counts):
            if sample["name"] in done:
                continue
            if batch and (len(batch) == config.batch_size or batch[0]["picture"].shape != sample["picture"].shape):
                yield batch
                batch = []
            batch.append(sample)
    if batch:
        yield batch


def _diagnose_batch(detector: Detector, batch: list[dict], config: DiagnoseConfig, output: Path) -> Iterator[dict]:
    import torch

    device = next(detector.parameters()).device
    images = torch.from_numpy(np.stack([sample["picture"] for sample in batch])).to(device)
    images = images.permute(0, 3, 1, 2).float() / 255.0
    with torch.no_grad():
        maps = detector.confidence(images, tile=config.tile, overlap=config.overlap)[:, 0].cpu().numpy()
    for sample, confidence in zip(batch, maps, strict=True):
        name = sample["name"]
        atomic_write_bytes(output / "maps" / f"{name}.png", map_png(confidence, config.bits))
        if config.overlays:
            reddened = overlay(sample["picture"], confidence)
            atomic_write_bytes(output / "overlays" / f"{name}.png", png_bytes(reddened))
        yield describe(name, confidence) | {
            key: sample[key] for key in ("category", "generator", "prompt") if sample.get(key)
        }


def describe(name: str, confidence: np.ndarray) -> dict:
    """One picture's diagnosis, as JSON values: largest and mean confidence, flagged area, components.

    Args:
        name: of the picture.
        confidence: (H, W) in [0, 1].
    """
    share = float(flagged_share(confidence[None])[0])
    return {
        "name": name,
        "height": confidence.shape[0],
        "width": confidence.shape[1],
        "max": float(confidence.max()),
        "mean": float(confidence.mean()),
        "flagged_share": share,
        "flagged": share >= FLAG_SHARE,
        "components": [
            {"box": list(found.box), "area": found.area, "score": found.score} for found in components(confidence)
        ],
    }


def map_png(confidence: np.ndarray, bits: int) -> bytes:
    """A confidence map (H, W) in [0, 1] as an 8 or 16 bit grey PNG."""
    scale, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    return png_bytes(np.rint(np.clip(confidence, 0, 1).astype(np.float64) * scale).astype(dtype))


def read_records(output: Path) -> dict[str, dict]:
    """All complete records of a run by name; a line that a kill cut short is left out."""
    records: dict[str, dict] = {}
    for path in sorted((output / RECORDS).glob("part-*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                records[record["name"]] = record
    return records


def _gather_counts(counts: SkipCounts, state) -> dict[str, int]:
    if state.num_processes == 1:
        return counts.reasons
    from accelerate.utils import gather_object

    total: dict[str, int] = {}
    for reason, count in gather_object(list(counts.reasons.items())):
        total[reason] = total.get(reason, 0) + count
    return total


def _finish(output: Path, config: DiagnoseConfig, skipped: dict[str, int]) -> dict:
    records = sorted(read_records(output).values(), key=lambda record: record["name"])
    atomic_write_text(output / "diagnosis.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    metrics = {
        "pictures": len(records),
        "flagged": sum(record["flagged"] for record in records),
        "artifact_rate": sum(record["flagged"] for record in records) / len(records) if records else None,
        "mean_confidence": float(np.mean([record["mean"] for record in records])) if records else None,
        "skipped": skipped,
        "versions": versions(),
    }
    if config.gallery:
        worst = sorted(records, key=lambda record: (-record["flagged_share"], -record["max"]))[: config.gallery]
        _write_gallery(output, config, worst, metrics)
    atomic_write_json(output / "metrics.json", metrics)
    return metrics


def _write_gallery(output: Path, config: DiagnoseConfig, records: list[dict], metrics: dict) -> None:
    from PIL import Image

    from diffdoctor.evaluate.report import Report

    report = Report("Diagnosis")
    report.lead(f"{metrics['flagged']} of {metrics['pictures']} pictures are flagged, the worst first.")
    folder = output / ("overlays" if config.overlays else "maps")
    for record in records:
        path = folder / f"{record['name']}.png"
        if not path.is_file():
            continue
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((384, 384))
            if max(small.size) < 128:
                scale = 128 // max(small.size)
                small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
        caption = f"{record['name']}: {record['flagged_share']:.1%} flagged, largest confidence {record['max']:.2f}"
        report.image(png_bytes(np.asarray(small)), caption)
    report.write(output / "gallery.html")
