"""`diffdoctor repair`: finished pictures mended on disk; several processes; resumable."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch

from diffdoctor.data.source_index import (
    CASE_ALONE,
    Completed,
    ResultNames,
    SourceIndex,
    absolute_path,
    gather_counts,
)
from diffdoctor.data.sources import Source, find_sources, read_source, refuse_output_among
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.confidence import check_detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.detector.predict import TOO_LARGE, takes
from diffdoctor.measures.pixels import flagged
from diffdoctor.repairs.config import RepairConfig, RepairOptions
from diffdoctor.repairs.metadata import prompt_of
from diffdoctor.repairs.pictures import read_picture
from diffdoctor.repairs.redraw import open_redrawer
from diffdoctor.repairs.repairer import Job, Repaired, Repairer, key_of
from diffdoctor.repairs.report import summarise, thumbnail, write_page
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import NO_SUCH_NAME, atomic_path, atomic_write_bytes, atomic_write_json, file_name, stamp
from diffdoctor.runs.journal import Journal, Records
from diffdoctor.runs.progress import progress, quiet_loaders
from diffdoctor.runs.record import METRICS, RunFolder, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.training.devices import open_device
from diffdoctor.training.processes import process_state
from diffdoctor.training.weights import weights_digest
from diffdoctor.treat.loading import load_lora, load_pipeline, replace_scheduler
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.viz.draw import map_png, png_bytes

logger = logging.getLogger(__name__)

RECORDS = "records"
PAGE, LINES = "before_after.html", "repair.jsonl"
RESULTS = dict.fromkeys(("pictures", "maps", "masks", "before", RECORDS, LINES, PAGE))


def run_repair(config: RepairConfig) -> dict:
    """Run `diffdoctor repair`.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    state = process_state(config.device)
    left_out = SkipCounts()
    sources = find_sources(config.pictures, left_out)
    refuse_output_among(config.output, sources)
    quiet_loaders()
    detector = open_detector(config.detector)
    check_detector(detector)
    with RunFolder(config.output, "repair", _identity(config, detector), RESULTS, main=state.is_main_process) as run:
        run.check()
        index = SourceIndex(sources)
        index.refuse_one_file(run.path)
        journal = Journal(run.path / RECORDS, state.process_index)
        completed = Completed(index, journal)
        device = open_device(config.device, state.device)
        options = {"dtype": config.dtype, "quantize": config.quantize, "device": device}
        pipeline = load_pipeline("pipeline", config.pipeline, **options)
        replace_scheduler(pipeline, config.scheduler)
        if config.lora:
            load_lora(pipeline, config.lora)
        repairer = Repairer(open_redrawer(pipeline, config.options()), detector, config.options())
        repairer.redrawer.to(device)
        detector.to(device)
        state.wait_for_everyone()
        if state.is_main_process:
            run.begin(config)
        state.wait_for_everyone()
        skipped = gather_counts(_repair_units(repairer, config, index, completed, journal, state), state)
        state.wait_for_everyone()
        metrics: dict = {}
        if state.is_main_process:
            skipped.join(left_out)
            metrics = _finish(index, config, repairer.redrawer.method, journal.read(), skipped)
        state.wait_for_everyone()
    if metrics and not metrics["pictures"]:
        raise UserError(f"{run.path}: no picture could be repaired (left out: {skipped.sentence()})")
    return metrics


def _identity(config: RepairConfig, detector: torch.nn.Module) -> dict:
    """All that the results depend on beside the pictures, by name."""
    options = {field.name: getattr(config, field.name) for field in fields(RepairOptions)}
    files = {name: [getattr(config, name), stamp(getattr(config, name))] for name in ("pipeline", "lora")}
    return {
        **options,
        **files,
        "scheduler": config.scheduler,
        "dtype": config.dtype,
        "quantize": config.quantize,
        "weights": weights_digest(detector),
    }


def _repair_units(
    repairer: Repairer, config: RepairConfig, index: SourceIndex, completed: Completed, journal: Journal, state
) -> SkipCounts:
    """Repair this process's share; returns what it skipped.

    The pictures that are worked on together depend neither on the number of processes nor on what is finished: the
    last bits of a drawing do depend on its batch.
    """
    counts, size = SkipCounts(), config.batch_size
    taken = completed.result_names(config.output)
    files = [source for source in index.sources if not source.is_shard]
    shards = [source for source in index.sources if source.is_shard]
    units = [files[first : first + size] for first in range(0, len(files), size)] + [[shard] for shard in shards]
    total = None if shards else len(files)
    with journal, progress(total, desc="repair", unit="picture", enabled=state.is_main_process) as bar:
        for number, unit in enumerate(units):
            shard = unit[0].name if unit[0].is_shard else None
            whole = shard in completed.shards if shard else all(source.name in completed.names for source in unit)
            if whole or number % state.num_processes != state.process_index:
                bar.update(0 if shard else len(unit))
                continue
            before, pictures = counts.total, 0
            for samples in _batches(_samples(unit, config, repairer, counts, index.stamps), size):
                pictures += len(samples)
                if any(sample["name"] not in completed.names for sample in samples):
                    # The files must be on the disk before their records.
                    journal.append(list(_repair_batch(repairer, samples, taken, config, counts)))
                bar.update(len(samples))
            # A shard of which something was skipped is read again by the next attempt, which counts that again.
            if shard and counts.total == before:
                journal.append([{"shard": index.mark(shard, pictures)}])
    return counts


def _samples(
    unit: list[Source], config: RepairConfig, repairer: Repairer, counts: SkipCounts, stamps: dict
) -> Iterator[dict]:
    """The pictures of a unit that can be repaired, with what is known of them."""
    for source in unit:
        known = {"path": absolute_path(source), "stamp": stamps[source.name]}
        for sample in read_source(source, strict=config.strict, counts=counts, masks="ignored", read=read_picture):
            if takes(repairer.detector, *sample["picture"].size, config.tile):
                yield sample | known
            else:
                counts.add(TOO_LARGE, sample["name"], config.strict)


def _batches(samples: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _repair_batch(
    repairer: Repairer, samples: list[dict], taken: ResultNames, config: RepairConfig, counts: SkipCounts
) -> Iterator[dict]:
    """Repair pictures together, write their files and yield their records."""
    options, jobs = repairer.options, []
    for sample in samples:
        own = sample.get("prompt") or prompt_of(sample["picture"])
        jobs.append(Job(sample["picture"], options.prompt_for(own), key_of(sample["name"])))
    if texts := [job.prompt for job in jobs if job.prompt.strip()]:
        check_prompts(repairer.redrawer.pipeline, texts, max_sequence_length=config.max_sequence_length)
    try:
        done = repairer(jobs)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: give a smaller --batch_size than {config.batch_size}") from error
    for sample, repaired in zip(samples, done, strict=True):
        if (other := taken.take(sample["name"])) is not None:
            counts.add(CASE_ALONE, sample["name"], config.strict, other)
            continue
        try:
            _write(Path(config.output), sample["name"], repaired)
        except OSError as error:
            # Of two names from elsewhere, one may be a file where the other needs a folder.
            if error.errno not in NO_SUCH_NAME:
                raise
            counts.add("a name that no file can have here", sample["name"], config.strict, error.strerror or "")
            continue
        known = {key: sample[key] for key in ("name", "path", "stamp", "category", "generator") if sample.get(key)}
        yield known | describe(repaired)


def _write(output: Path, name: str, repaired: Repaired) -> None:
    file = file_name(name, ".png")
    atomic_write_bytes(output / "pictures" / file, repaired.picture.png())
    for side, confidence in (("before", repaired.before), ("after", repaired.after)):
        atomic_write_bytes(output / "maps" / side / file, map_png(confidence, 8))
    if repaired.regions:
        atomic_write_bytes(output / "masks" / file, png_bytes(repaired.mask.astype("uint8") * 255))
        atomic_write_bytes(output / "before" / file, thumbnail(repaired.original.rgb()))


def describe(repaired: Repaired) -> dict:
    """What became of a picture, as JSON values: a line of repair.jsonl without the picture's name."""
    height, width = repaired.original.size
    before, after, pairs = repaired.seam()
    return {
        "height": height,
        "width": width,
        "mode": repaired.picture.mode,
        "prompt": repaired.prompt,
        "flagged_before": bool(flagged(repaired.before[None])[0]),
        "flagged_after": bool(flagged(repaired.after[None])[0]),
        "mean_before": float(repaired.before.mean()),
        "mean_after": float(repaired.after.mean()),
        "changed": int(repaired.mask.sum()),
        "changed_outside": repaired.changed_outside(),
        "seam": {"before": before, "after": after, "pairs": pairs},
        "regions": [asdict(region) | {"kept": region.kept} for region in repaired.regions],
    }


def _finish(index: SourceIndex, config: RepairConfig, method: str, records: Records, skipped: SkipCounts) -> dict:
    output = Path(config.output)
    with atomic_path(output / LINES) as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for record in index.current_records(records):
            lines.write(strict_json.dumps(record) + "\n")
    metrics = summarise(index.current_records(records)) | {
        "method": method,
        "skipped": dict(sorted(skipped.reasons.items())),
        "skipped_examples": dict(sorted(skipped.examples.items())),
        "versions": versions(),
    }
    if config.gallery:
        found = (record for record in index.current_records(records) if record["regions"])
        write_page(output / PAGE, heapq.nsmallest(config.gallery, found, key=_most_changed), metrics)
    atomic_write_json(output / METRICS, metrics)
    page = output / (PAGE if config.gallery else LINES)
    line = (
        f"{metrics['kept']} of {metrics['regions']} regions repaired; flagged pictures: {metrics['flagged_before']} -> "
        f"{metrics['flagged_after']} of {metrics['pictures']}: {page}"
    )
    print_summary(line, metrics["skipped"], metrics["skipped_examples"])
    if without := metrics["without_prompt"]:
        logger.warning("%d of the pictures with flagged regions have no prompt; see --prompt", without)
    return metrics


def _most_changed(record: dict) -> tuple:
    return record["mean_after"] - record["mean_before"], record["name"]
