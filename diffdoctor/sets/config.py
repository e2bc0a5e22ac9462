"""The options of `diffdoctor set check | stats | dedup | join`."""

from __future__ import annotations

import dataclasses

from diffdoctor.engine.options import EngineConfig
from diffdoctor.runs.errors import UserError, check_least, expected


@dataclasses.dataclass
class SetCheckConfig:
    """Options of `diffdoctor set check`.

    Attributes:
        sets: folders of shards with a manifest, label sets among them.
        pixels: also read every sample, and compare each picture with the uid that the manifest has of it.
        hashes: also compare every file of a committed unit with its sha256.
    """

    sets: list[str]
    pixels: bool = False
    hashes: bool = False


@dataclasses.dataclass
class SetStatsConfig:
    """Options of `diffdoctor set stats`.

    Attributes:
        sets: folders of shards with a manifest; counted together.
        output: the folder to make: quality.html, metrics.json, config.yaml; null: the figures are printed alone.
        previous: sets of the round before, with which they are compared.
        duplicates: output folder of `set dedup` over these sets, for the page.
        samples: pictures on the page, evenly from all.
        limit: robust deviations from the categories' median beyond which a category is unusual.
    """

    sets: list[str]
    output: str | None = None
    previous: list[str] = dataclasses.field(default_factory=list)
    duplicates: str | None = None
    samples: int = 100
    limit: float = 3.0

    def __post_init__(self):
        check_least(self, samples=0, limit=0)


@dataclasses.dataclass
class SetDedupConfig:
    """Options of `diffdoctor set dedup`.

    Attributes:
        sets: folders of shards with a manifest, to train on.
        output: the folder to make: duplicates.parquet (set, key, cluster, kept), metrics.json, config.yaml.
        test: sets to measure on: where a picture of theirs, or nearly that, is among `sets`, the command fails, after
            it has written which.
        distance: bits of the perceptual hashes' 64 in which near-duplicates may differ; 0: equal hashes; null: equal
            pixels alone.
    """

    sets: list[str]
    output: str
    test: list[str] = dataclasses.field(default_factory=list)
    distance: int | None = 8

    def __post_init__(self):
        if self.distance is not None and not 0 <= self.distance <= 16:
            raise UserError(expected("distance", "0 to 16 bits, or null", self.distance))


@dataclasses.dataclass
class SetJoinConfig:
    """Options of `diffdoctor set join`.

    Attributes:
        sets: folders of shards with a manifest. A picture that several have, by its key, is taken once, with the label
            of the last set that has one: a set of pictures and then a label set of it make a labelled set.
        output: the folder to make: shards, manifest.parquet, config.yaml, metrics.json. The same command resumes after
            the last finished unit.
        prefix: begin each key with the number of its set, 00_ and so on, for sets whose keys are not of one kind.
        without: output folder of `set dedup`, whose superfluous pictures are left out.
        shard_size: pictures in a shard, which is a unit of work.
        engine: where the work is done.
    """

    sets: list[str]
    output: str
    prefix: bool = False
    without: str | None = None
    shard_size: int = 1000
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self):
        check_least(self, shard_size=1)
