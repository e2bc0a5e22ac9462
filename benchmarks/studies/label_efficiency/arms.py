"""One strategy with one rater: pictures are chosen, labelled and learnt from, round by round."""

from __future__ import annotations

import numpy as np

from benchmarks.studies.label_efficiency.design import RATERS, World, labelled
from diffdoctor.annotate.pool import disagreement, undecided_share
from diffdoctor.annotate.select import Candidate, ranked
from diffdoctor.detector.predict import describe_map
from diffdoctor.detector.samples import JoinedData


def arm(world: World, name: str, strategy: str, budgets: tuple[int, ...]) -> list[dict]:
    """One strategy's points: labels, seconds, how many of the labelled are damaged, `World.measures` and `outcome`.

    Args:
        world: in which labels are asked for.
        name: of the rater.
        strategy: by which pictures are chosen.
        budgets: labels after each round.
    """
    rater, detector, previous, labels = RATERS[name], world.first(), None, {}
    first = world.measures(detector) | world.outcome(detector, name, strategy, 0)
    points, seconds = [{"labels": 0, "seconds": 0.0, "damaged": 0, **first}], 0.0
    for number, budget in enumerate(budgets):
        maps = world.maps(detector)
        rng = np.random.default_rng([world.seed, 41, number])
        for index in _asked(world, maps, previous, labels, strategy, budget - len(labels), rng):
            proposal = maps[index] >= 0.5
            answer = rater.marks(world.truth[index] >= 0.5, proposal, seed=[world.seed, 42, index])
            labels[index], seconds = answer.mask, seconds + answer.seconds
        chosen = list(labels)
        data = JoinedData([labelled(world, chosen, [*labels.values()]), world.known], shares=[1, 1])
        previous, detector = maps, world.train(world.first(), data, world.settings.steps)
        damaged = int((world.truth[chosen] >= 0.5).any(axis=(1, 2)).sum())
        found = world.measures(detector) | world.outcome(detector, name, strategy, budget)
        points.append({"labels": budget, "seconds": seconds, "damaged": damaged, **found})
    return points


def _asked(world: World, maps, previous, labels, strategy: str, count: int, rng) -> list[int]:
    """The indices of the pictures that are asked about next."""
    candidates = []
    for index in range(len(maps)):
        if index not in labels:
            record = describe_map(str(index), maps[index])
            values = {name: record[name] for name in ("mean", "uncertainty", "flagged")}
            candidates.append(Candidate(str(index), "", category=world.categories[index], **values))
    bytes_ = np.rint(255 * maps).astype(np.uint8)
    before = None if previous is None else np.rint(255 * previous).astype(np.uint8)

    def measure(candidate):
        index = int(candidate.name)
        values = [undecided_share(bytes_[index])]
        return values if before is None else [*values, disagreement(bytes_[index], before[index])]

    order = ranked(candidates, strategy, count, rng, measure)
    return [int(each.name) for each in order[:count]]
