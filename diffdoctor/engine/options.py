"""Where a command's units are done, and how patiently."""

from __future__ import annotations

import dataclasses

from diffdoctor.runs.errors import UserError, check_least, expected

KINDS = ("none", "ranks", "processes", "ray")


@dataclasses.dataclass
class EngineConfig:
    """Options `--engine.…` of the commands whose work is done in units.

    Attributes:
        kind: none: in this process; ranks: in the processes that `accelerate launch` or torchrun started, or in this
            one; processes: in processes of its own on this machine; ray: on a Ray cluster.
        address: of the Ray cluster, such as HOST:6379; auto: the one of this machine; local: start one here, for a try.
            `--address` is short for it.
        actors: worker processes; null: one for each accelerator, or two without (processes), as many as find room
            (ray); of work that uses no accelerator one for each core, at most 16 (processes).
        gpus: GPUs that Ray reserves for a worker, a part of one allowed; null: 1 where the cluster has any and the work
            uses them, else 0.
        cpus: cores of a worker: what Ray reserves, and threads of torch; null: this machine's cores divided among the
            workers (processes), 1 (ray).
        retries: deaths of a worker while it does a unit, after which the unit is given up and named.
        unit_timeout: seconds that a unit may take before its worker is ended, which counts as a death; null: no limit.
        retry_failed: try the units again that earlier runs gave up.
    """

    kind: str = "ranks"
    address: str | None = None
    actors: int | None = None
    gpus: float | None = None
    cpus: int | None = None
    retries: int = 3
    unit_timeout: float | None = None
    retry_failed: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(expected("engine", f"one of {', '.join(KINDS)}", repr(self.kind)))
        check_least(self, actors=1, gpus=0, cpus=1, retries=1)
        if self.unit_timeout is not None and not self.unit_timeout > 0:
            raise UserError(expected("engine.unit_timeout", "a number of seconds above 0", self.unit_timeout))
        if (self.kind == "ray") != (self.address is not None):
            what = "auto, HOST:PORT or local with --engine ray" if self.kind == "ray" else "none without --engine ray"
            raise UserError(expected("engine.address", what, self.address or "none"))


@dataclasses.dataclass
class OptionalEngineConfig(EngineConfig):
    """`EngineConfig` of a command that can also do without units.

    Attributes:
        kind: none, ranks, processes or ray, as of `EngineConfig`; null: the work is not done in units.
    """

    kind: str | None = None

    def __post_init__(self):
        if self.kind is not None:
            super().__post_init__()
            return
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                what = f"one of {', '.join(KINDS)} beside engine.{field.name}"
                raise UserError(expected("engine", what, "no engine"))
