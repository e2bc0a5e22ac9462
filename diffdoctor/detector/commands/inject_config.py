"""The options of `diffdoctor inject`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffdoctor.data.shard_writer import check_options
from diffdoctor.data.store import is_url
from diffdoctor.detector.damage.injection import MIN_SIDE, check_range
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.detector.damage.versions import VersionOptions
from diffdoctor.engine.options import OptionalEngineConfig
from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.runs.record import versions


@dataclasses.dataclass
class InjectConfig:
    """Options of `diffdoctor inject`.

    Attributes:
        pictures: clean pictures: files, folders, patterns, shards.
        output: the folder to make: shards, manifest.parquet, contact_sheet.png, config.yaml, metrics.json. It appears
            when all is there. Interrupted and run again, the command resumes after the last complete shard. With
            `engine` it is made in place, may be a URL, and the command resumes after the last finished unit.
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
        seed: of all draws; each picture's damage is a function of the seed and of the picture's index in the input,
            with `engine` of the seed and the picture's name.
        workers: processes without `engine`; the result does not depend on their number.
        shard_size: pictures in a shard; with `engine` at most, of picture files, while a shard of pictures makes one.
        picture_type: png, webp (both exact) or jpg.
        strict: stop at the first broken picture instead of skipping and counting it.
        overwrite: replace the output folder when it is there: a set of shards, and none that the pictures come from.
        engine: where the work is done in units; null: it is done by this process or `workers`, as a whole. The two make
            different sets.
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
    engine: OptionalEngineConfig = dataclasses.field(default_factory=OptionalEngineConfig)

    @property
    def versions(self) -> int:
        """How many versions of each picture are asked for."""
        return self.clean + self.benign + self.damaged

    def check(self) -> None:
        """Check the options whose values do not depend on the pictures; the plugins are loaded.

        Raises:
            UserError: names what does not fit.
        """
        unknown = sorted(set(self.kinds or ()) - set(damage_kinds()))
        if unknown:
            raise UserError(expected("kinds", f"some of {', '.join(damage_kinds())}", ", ".join(unknown)))
        check_least(self, damaged=0, benign=0, workers=1, seed=0, longest=MIN_SIDE)
        if not self.versions:
            raise UserError(expected("damaged, benign, clean", "at least one version of each picture", "none"))
        if not 0 <= self.visible <= 1:
            raise UserError(expected("visible", "a change in [0, 1]", self.visible))
        try:
            for name in ("strength", "area"):
                check_range(name, getattr(self, name), 0, 1)
            check_options(self.shard_size, self.picture_type)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._check_output()

    def _check_output(self) -> None:
        if self.engine.kind is None and is_url(self.output):
            raise UserError(expected("output", "a folder, or a URL with --engine", self.output))
        if self.engine.kind is not None and self.workers != 1:
            raise UserError(expected("workers", "none beside --engine (see --engine.actors)", self.workers))
        if is_url(self.output):
            if self.overwrite:
                raise UserError(expected("overwrite", "false with an output in a store", "true"))
            return
        here, output = Path.cwd(), Path(self.output).resolve()
        if output in (here, *here.parents):
            what = "a folder that is not the working folder nor above it, since the finished set takes its place"
            raise UserError(expected("output", what, self.output))

    def version_options(self) -> VersionOptions:
        """Which versions are made of each picture."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(VersionOptions)}
        # Named here, so that a worker in which one of them is not registered raises instead of drawing from the others.
        return VersionOptions(**values | {"kinds": tuple(self.kinds or damage_kinds())})

    def identity(self, plugins: list[str]) -> dict[str, Any]:
        """All that the set is a function of but the pictures, by name.

        Args:
            plugins: digests of the plugins.
        """
        options = dataclasses.asdict(self) | {"plugins": plugins}
        for name in ("output", "workers", "overwrite", "engine"):
            del options[name]
        return options | {"known kinds": damage_kinds(), "versions": versions()}
