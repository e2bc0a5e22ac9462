"""The options of `diffdoctor diagnose`."""

from __future__ import annotations

import dataclasses

from diffdoctor.engine.options import EngineConfig
from diffdoctor.runs.errors import UserError, check_least, expected


@dataclasses.dataclass
class DiagnoseConfig:
    """Options of `diffdoctor diagnose`.

    Attributes:
        pictures: files, folders, patterns, shards.
        files: a Parquet file that lists picture files and shards instead, for sets that take long to look through: the
            column `path`, and perhaps `name`, `category` and `prompt`.
        detector: the detector's folder or hub id, the published checkpoint's .bin file, FILE.py:FUNCTION or a URL.
        output: the folder to make: maps, overlays, diagnosis.jsonl, gallery.html, config.yaml, metrics.json, records.
            Run again, it resumes with the pictures that are not there yet or whose files were replaced, and reports
            those that are given now. With `write` shards it is a label set instead (shards of masks and values,
            manifest.parquet), which `train-detector` takes as it takes any set, with diagnosis.jsonl, and with maps and
            overlays of the gallery alone; run again with the same pictures and options, it resumes.
        write: maps (two files for each picture) or shards (a label set beside the pictures, which stay where they are).
        round: number of the round in which the labels are made, which is kept with them; with `write` shards.
        shard_size: picture files that one shard of labels is made of; a shard of pictures makes one.
        frames_per_call: frames of a video that are diagnosed together; null: batch_size. Videos (mp4, webm, mov, mkv,
            animated GIF and WebP) get a map for every frame, in maps/NAME/000000.png and so on, and are flagged by the
            pixels of all frames together.
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
        engine: where the work is done; processes and ray need `write` shards.
    """

    pictures: list[str] = dataclasses.field(default_factory=list)
    detector: str | None = None
    output: str | None = None
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
    files: str | None = None
    write: str = "maps"
    round: int = 0
    shard_size: int = 256
    frames_per_call: int | None = None
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self):
        if self.bits not in (8, 16):
            raise UserError(expected("bits", "8 or 16", self.bits))
        if self.dtype not in ("fp32", "bf16"):
            raise UserError(expected("dtype", "fp32 or bf16", repr(self.dtype)))
        if self.write not in ("maps", "shards"):
            raise UserError(expected("write", "maps or shards", repr(self.write)))
        if self.write == "maps" and self.engine.kind in ("processes", "ray"):
            raise UserError(expected("write", f"shards with --engine {self.engine.kind}", "maps"))
        if self.pictures and self.files is not None:
            raise UserError(expected("files", "none beside pictures", repr(self.files)))
        check_least(self, batch_size=1, tile=16, gallery=0, round=0, shard_size=1, frames_per_call=1)
        if not 0 <= self.overlap <= 0.5:
            raise UserError(expected("overlap", "a share in [0, 0.5]", self.overlap))
