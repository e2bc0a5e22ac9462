"""Units done by actors on a Ray cluster: one that dies is replaced by another, and its unit tried again.

Nothing of Ray's own fault tolerance is used: an actor that is restarted in place waits for room that may be gone, and
tasks that are retried by themselves are not counted. Paths go in and numbers come out; pictures never pass through Ray.
"""

from __future__ import annotations

import collections
import os
import sys
import time
import traceback
from typing import Any

from diffdoctor.data.store_path import absolute, at
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.tally import Tally, ends_run
from diffdoctor.engine.units import Place, Unit, WorkerSpec
from diffdoctor.runs.errors import UserError, first_line, missing_extra

IN_FLIGHT = 2  # units that an actor has, so that it need not wait for the next
_PATIENCE = 60.0  # seconds without any actor after which it is said that there is no room


def run(tally: Tally, spec: WorkerSpec, options: EngineConfig) -> None:
    """Do all waiting units.

    Raises:
        UserError: Ray is not installed or not there; a worker cannot be built, or says that the work cannot be done.
    """
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray") from None
    connected = _connect(ray, options.address)
    crew = _Crew(ray, tally, spec, options)
    try:
        crew.work()
    finally:
        crew.dismiss()
        if connected:
            ray.shutdown()


def _connect(ray, address: str | None) -> bool:
    """Connect to the cluster, unless the program has; whether this did."""
    if ray.is_initialized():
        return False
    more: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        more = {"include_dashboard": False}
    try:
        ray.init(address=address, logging_level="warning", **more)
    except Exception as error:  # ConnectionError, and what its client and its tokens raise
        raise UserError(f"engine.address {address}: no Ray cluster can be reached ({first_line(error)})") from error
    return True


class _Hand:
    """An actor as the driver sees it: what it was given, the first of which it does."""

    def __init__(self, number: int, actor):
        self.number, self.actor, self.is_ready, self.since = number, actor, False, 0.0
        self.ready = actor.ready.remote()
        self.given: collections.deque[tuple[Unit, Any]] = collections.deque()

    def give(self, unit: Unit) -> None:
        if not self.given:
            self.since = time.monotonic()
        self.given.append((unit, self.actor.do.remote(unit)))

    @property
    def awaited(self):
        """What it will say next."""
        return self.ready if not self.is_ready else self.given[0][1] if self.given else None


class _Crew:
    """All actors of a run."""

    def __init__(self, ray, tally: Tally, spec: WorkerSpec, options: EngineConfig):
        self.ray, self.tally, self.options, self.hands = ray, tally, options, []
        self.cpus = options.cpus or 1
        has_gpus = spec.uses_accelerator and "GPU" in ray.cluster_resources()
        self.gpus = float(has_gpus) if options.gpus is None else options.gpus
        make = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)
        self.actor_class, self.arguments = make(_Actor), (absolute(tally.commits.output), spec)
        self.numbers, self.last_ready, self.told = 0, time.monotonic(), False

    def work(self) -> None:
        while self.tally.waiting or any(hand.given for hand in self.hands):
            self._hire()
            for place in range(IN_FLIGHT):  # each its first, before any its second
                for hand in self.hands:
                    if hand.is_ready and len(hand.given) == place and self.tally.waiting:
                        hand.give(self.tally.waiting.popleft())
            awaited = {hand.awaited: hand for hand in self.hands if hand.awaited is not None}
            said, _ = self.ray.wait(list(awaited), num_returns=1, timeout=1.0)
            for reference in said:
                self._hear(awaited[reference], reference)
            self._end_late()
            self._tell_of_no_room()

    def _hire(self) -> None:
        """Ask for actors while there is work for them; those that find no room wait for it."""
        units = len(self.tally.waiting) + sum(len(hand.given) for hand in self.hands)
        while len(self.hands) < min(self.options.actors or self._room(), units):
            place = Place(self.numbers, self.options.actors or 0)
            actor = self.actor_class.remote(*self.arguments, place, self.cpus, bool(self.gpus))
            self.hands.append(_Hand(self.numbers, actor))
            self.numbers += 1

    def _room(self) -> int:
        """How many actors the cluster has room for, one at least."""
        total = self.ray.cluster_resources()
        rooms = [total.get(name, 0) / each for name, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each]
        return max(1, int(min(rooms)))

    def _hear(self, hand: _Hand, reference) -> None:
        try:
            what, text = self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            # Only one that is known to be dead has died of its unit; another may be out of reach for a while.
            self._lose(hand, first_line(error), counts=not isinstance(error, self._unavailable()))
            return
        except self.ray.exceptions.RayError as error:
            self._lose(hand, first_line(error))
            return
        if what == "stop":
            raise UserError(text)
        if what == "raised":
            self._lose(hand, text)
        elif what == "ready":
            hand.is_ready, self.last_ready = True, time.monotonic()
            self.tally.ready()
        else:
            hand.given.popleft()
            hand.since = time.monotonic()
            self.tally.done()

    def _unavailable(self) -> type:
        return self.ray.exceptions.ActorUnavailableError

    def _lose(self, hand: _Hand, reason: str, counts: bool = True) -> None:
        """Do without an actor: its first unit has killed it perhaps, the others go back."""
        self.ray.kill(hand.actor)
        self.hands.remove(hand)
        units = [unit for unit, _ in hand.given]
        if counts and units:
            self.tally.died(units.pop(0), reason)
        elif counts and not hand.is_ready:
            self.tally.never_ready(reason)
        self.tally.waiting.extendleft(reversed(units))

    def _end_late(self) -> None:
        limit = self.options.unit_timeout
        for hand in [hand for hand in self.hands if limit and hand.given and time.monotonic() - hand.since >= limit]:
            self._lose(hand, f"it took more than {limit:g} seconds")

    def _tell_of_no_room(self) -> None:
        if any(hand.is_ready for hand in self.hands):
            self.last_ready = time.monotonic()
        elif not self.told and time.monotonic() - self.last_ready > _PATIENCE:
            self.told = True
            room = f"{self.cpus} CPUs and {self.gpus:g} GPUs"
            print(f"engine: the cluster has no room yet for a worker with {room}; waiting", file=sys.stderr)

    def dismiss(self) -> None:
        for hand in self.hands:
            self.ray.kill(hand.actor)


class _Actor:
    """A worker on the cluster."""

    def __init__(self, output: str, spec: WorkerSpec, place: Place, threads: int, has_gpu: bool):
        # Ray shows an actor its own GPUs alone, so that they are numbered from 0.
        self.output, self.spec, self.threads = output, spec, threads
        self.number, self.place = place.number, Place(0, 1) if has_gpu else place
        self.worker = None

    def ready(self) -> tuple[str, str]:
        """Build the worker; units are given to an actor only after its answer."""
        import torch

        torch.set_num_threads(self.threads)
        try:
            self.worker = self.spec.build(self.place)
        except (UserError, OSError) as error:
            return "stop", str(error)
        return "ready", ""

    def do(self, unit: Unit) -> tuple[str, str]:
        """Do a unit and commit it."""
        try:
            commits_at(at(self.output)).attempt(unit, self.worker, f"actor {self.number}")
        except Exception as error:
            if ends_run(error):
                return "stop", str(error)
            traceback.print_exc()
            return "raised", f"{type(error).__name__}: {first_line(error)}"
        return "done", ""
