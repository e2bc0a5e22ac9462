"""`diffdoctor annotate export`: labels as shards, or as files for other tools."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.annotate.config import AnnotateExportConfig
from diffdoctor.annotate.label_studio import CONFIG, task_of
from diffdoctor.annotate.labels import Label, key_of, labels_of
from diffdoctor.annotate.project import Project
from diffdoctor.data.codec import encode_picture
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.exchange import write_coco
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from diffdoctor.runs.record import RunFolder
from diffdoctor.runs.summary import print_summary

PICTURES = "pictures"


def run_annotate_export(config: AnnotateExportConfig) -> int:
    """Run `diffdoctor annotate export`.

    Raises:
        UserError: there is no project, no label, or a picture cannot be read.
    """
    project, counts = Project(config.project), SkipCounts()
    write = {"shards": _write_shards, "coco": _write_coco, "label-studio": _write_label_studio}[config.format]
    written = write(project, config, counts)
    with project.store.writing():
        project.store.log("export", output=str(Path(config.output).absolute()), format=config.format, labels=written)
    print_summary(f"{written} labels in {config.output}", counts.reasons, counts.examples)
    return 0


def _labels(project: Project, config: AnnotateExportConfig, counts: SkipCounts) -> Iterator[Label]:
    options: dict[str, Any] = {"merge": config.merge, "round": config.round, "kinds": tuple(config.kinds)}
    for label in labels_of(project, **options, conflicts=config.conflicts):
        if isinstance(label, str):
            counts.add(label, "")
        else:
            yield label


def _some(labels: Iterator[Any]) -> Iterator[Any]:
    """The labels.

    Raises:
        UserError: there are none.
    """
    for first in labels:
        return itertools.chain([first], labels)
    raise UserError(expected("project", "labels to export", "none that are done"))


def _samples(project: Project, config: AnnotateExportConfig, counts: SkipCounts) -> Iterator[dict[str, Any]]:
    for label in _some(_labels(project, config, counts)):
        yield sample_of(project, label)


def sample_of(project: Project, label: Label) -> dict[str, Any]:
    """A label as a sample of shards, see `data.shard_writer.write_shards`."""
    planes = {"picture": project.picture(label.picture), "mask": label.mask, "ignore": label.ignore}
    return {"key": label.key, **planes, "label": "human", **label.values}


def _write_shards(project: Project, config: AnnotateExportConfig, counts: SkipCounts) -> int:
    samples, options = _samples(project, config, counts), {"picture_type": config.picture_type}
    return write_shards(samples, config.output, shard_size=config.shard_size, **options)


def _write_coco(project: Project, config: AnnotateExportConfig, counts: SkipCounts) -> int:
    with tempfile.TemporaryDirectory(dir=project.folder, prefix=".export-") as folder:
        write_shards(_samples(project, config, counts), Path(folder) / "set")
        return write_coco(Path(folder) / "set", config.output)


def _write_label_studio(project: Project, config: AnnotateExportConfig, counts: SkipCounts) -> int:
    """Every task, labelled or not: what is not is for others to label."""
    labels = {label.task: label for label in _labels(project, config, counts)}
    rows = project.store.all(
        "SELECT task.id, picture, proposal, blind, round, uid, category, generator, prompt FROM task JOIN picture ON "
        f"picture.id = picture WHERE kind IN ({', '.join('?' * len(config.kinds))}) AND (? IS NULL OR round = ?) "
        "ORDER BY task.id",
        *config.kinds,
        config.round,
        config.round,
    )
    rows = list(_some(iter(rows)))
    with _Folder(config, ("tasks.json", "labelling.xml")) as folder:
        tasks = []
        for row in rows:
            label, key = labels.get(row["id"]), key_of(row["uid"], row["round"])
            proposal = None
            if row["proposal"] is not None and not row["blind"]:
                shown = project.store.mask(row["proposal"]) >= project.settings.threshold_byte
                proposal = shown * np.uint8(255)
            file = _write_picture(project, folder, key, row["picture"])
            meta = {name: row[name] for name in ("category", "generator", "prompt", "round")}
            hard = None if label is None else (label.mask >= 0.5) * np.uint8(255)
            seconds = 0.0 if label is None else label.values["seconds"]
            image = config.image_prefix + file
            tasks.append(task_of(key, image, proposal=proposal, label=hard, meta=meta, seconds=seconds))
        atomic_write_json(folder / "tasks.json", tasks)
        atomic_write_text(folder / "labelling.xml", CONFIG)
    return len(labels)


class _Folder:
    """The output folder, as a context: another run's is refused, this one's is written anew."""

    def __init__(self, config: AnnotateExportConfig, files: tuple[str, ...]):
        identity = {"project": str(Path(config.project).absolute()), "format": config.format, "at": time.time()}
        results = {**dict.fromkeys(files), PICTURES: ("*.png",)}
        self.config, self.run = config, RunFolder(config.output, "annotate export", identity, results)

    def __enter__(self) -> Path:
        self.run.open()
        self.run.begin(self.config, overwrite=True)
        return self.run.path

    def __exit__(self, *_) -> None:
        self.run.close()


def _write_picture(project: Project, folder: Path, key: str, picture: int) -> str:
    """Write a picture; returns its name in the folder."""
    file = f"{PICTURES}/{key}.png"
    atomic_write_bytes(folder / file, encode_picture(project.picture(picture), "png"))
    return file
