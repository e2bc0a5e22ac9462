"""`diffdoctor diagnose`: confidence maps, boxes and a gallery for any pictures; several processes; resumable."""

from collections.abc import Iterator
from pathlib import Path

from diffdoctor.data.source_index import (
    CASE_ALONE,
    Completed,
    ResultNames,
    SourceIndex,
    absolute_path,
    gather_counts,
)
from diffdoctor.data.sources import Source, find_sources, listed_sources, refuse_output_among
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.diagnose_batches import confidences, diagnosis_batches
from diffdoctor.detector.commands.diagnose_config import DiagnoseConfig
from diffdoctor.detector.commands.diagnose_results import write_diagnosis
from diffdoctor.detector.commands.diagnose_shards import diagnose_shards
from diffdoctor.detector.commands.diagnose_videos import diagnose_video
from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.detector.predict import describe_map
from diffdoctor.engine.sets import RESULTS as SET_RESULTS
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import NO_SUCH_NAME, atomic_write_bytes, file_name
from diffdoctor.runs.journal import Journal
from diffdoctor.runs.progress import progress
from diffdoctor.runs.record import RunFolder
from diffdoctor.training.devices import open_device
from diffdoctor.training.processes import process_state
from diffdoctor.training.weights import weights_digest
from diffdoctor.viz.draw import map_png, overlay, png_bytes

RECORDS = "records"
# What the maps and overlays depend on, beside the detector's weights and the pictures.
_IDENTITY = ("detector", "tile", "overlap", "bits", "dtype", "overlays")
RESULTS = dict.fromkeys(("maps", "overlays", RECORDS, "diagnosis.jsonl", "gallery.html", *SET_RESULTS))


def run_diagnose(config: DiagnoseConfig) -> dict:
    """Run `diffdoctor diagnose`.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    if not config.pictures and config.files is None:
        raise UserError(expected("pictures", "files, folders, patterns or shards (or --files)", "none"))
    state = process_state(config.device)
    left_out = SkipCounts()
    if config.files is None:
        sources = find_sources(config.pictures, left_out, videos=True)
    else:
        sources = listed_sources(config.files, videos=True)
    refuse_output_among(config.output, sources)
    if config.write == "shards":
        if (video := next((source for source in sources if source.is_video), None)) is not None:
            raise UserError(expected("--write", f"maps with a video such as {video.path}", "shards"))
        return diagnose_shards(config, RESULTS, sources, left_out, state)
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
    index.refuse_one_file(run.path)
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
        done = journal.read()
        records = ((strict_json.dumps(record) + "\n", record) for record in index.current_records(done))
        metrics = write_diagnosis(config, records, skipped)
    state.wait_for_everyone()
    return metrics


def _units(sources: list[Source], size: int) -> list[list[Source]]:
    """Units of work for one process each: one shard, one video, or up to `size` picture files.

    Batches, and so the last bits of the maps, depend neither on the number of processes nor on what is finished.
    """
    alone = [source for source in sources if source.is_shard or source.is_video]
    files = [source for source in sources if not (source.is_shard or source.is_video)]
    groups = [files[first : first + size] for first in range(0, len(files), size)]
    return groups + [[source] for source in alone]


def _diagnose_units(
    detector, config: DiagnoseConfig, index: SourceIndex, completed: Completed, journal: Journal, state
) -> SkipCounts:
    """Diagnose this process's units; returns what all processes skipped."""
    counts, units = SkipCounts(), _units(index.sources, config.batch_size)
    taken = completed.result_names(config.output)
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
            if unit[0].is_video:
                found = diagnose_video(detector, unit[0], config, counts)
                if found is not None:
                    stamp = {"path": absolute_path(unit[0]), "stamp": index.stamps[unit[0].name]}
                    journal.append([found | stamp])
                bar.update()
                continue
            before, pictures = counts.total, 0
            for batch in diagnosis_batches(unit, config, detector, counts, index.stamps):
                pictures += len(batch)
                missing = {sample["name"] for sample in batch if sample["name"] not in completed.names}
                if missing:
                    # The maps must be on the disk before their records.
                    journal.append(list(_diagnose_batch(detector, batch, missing, taken, config, counts)))
                bar.update(len(batch))
            # A shard of which something was skipped is read again by the next attempt, which counts that again.
            if shard and counts.total == before:
                journal.append([{"shard": index.mark(shard, pictures)}])
    return gather_counts(counts, state)


def _diagnose_batch(
    detector: Detector,
    batch: list[dict],
    missing: set[str],
    taken: ResultNames,
    config: DiagnoseConfig,
    counts: SkipCounts,
) -> Iterator[dict]:
    """Diagnose a batch, and write the maps and yield the records of its `missing` pictures."""
    output = Path(config.output)
    for sample, confidence, disagreement in confidences(detector, batch, config, counts):
        name = sample["name"]
        if name not in missing:
            continue
        if (other := taken.take(name)) is not None:
            counts.add(CASE_ALONE, name, config.strict, other)
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
