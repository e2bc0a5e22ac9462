"""Which pictures of a pool people are asked about."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from diffdoctor.detector.balance import category_statistics

STRATEGIES = ("paper", "uncertainty", "random", "mixed")
# z beyond which an abnormal category gets no further share.
_MOST_Z = 6.0
# Pictures of a category whose maps are read, as a multiple of how many are wanted of it.
_LOOKED_AT = 4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A picture that might be asked about.

    Attributes:
        name: of the picture, unique in the pool.
        path: of its file, or of its shard.
        key: of a shard's picture; "": a file.
        category, generator, prompt: "" where they are not known.
        mean: mean confidence of the detector, in [0, 1].
        uncertainty: see `measures.pixels.uncertainty`.
        flagged: by the detector.
        disagreement: of its map with that of the mirrored picture, see `diagnose --mirrored`; 0: not known.
    """

    name: str
    path: str
    key: str = ""
    category: str = ""
    generator: str = ""
    prompt: str = ""
    mean: float = 0.0
    uncertainty: float = 0.0
    flagged: bool = False
    disagreement: float = 0.0


# Of a candidate: further measures of how much its label would tell, by the maps; higher is more.
Measure = Callable[[Candidate], Sequence[float]]


def composition(budget: int, audit: float, gold: float, new: float) -> dict[str, int]:
    """How many tasks of a budget are audit, gold, new (of new generators) and selected, which is the rest."""
    counts = {name: round(budget * share) for name, share in (("audit", audit), ("gold", gold), ("new", new))}
    return {"selected": budget - sum(counts.values()), **counts}


def ranked(
    candidates: Sequence[Candidate],
    strategy: str,
    count: int,
    rng: np.random.Generator,
    measure: Measure | None = None,
) -> list[Candidate]:
    """The candidates in the order in which they are asked about.

    Args:
        candidates: of the pool.
        strategy: "random"; "uncertainty": the most undecided first; "mixed": the most undecided and random ones in
            turn; "paper": categories that the detector flags too often or too rarely get more of the count, by their z
            among the categories' mean confidences (`balance.category_statistics`), and within each the mean rank of
            uncertainty, of disagreement where it is known, and of the further measures decides.
        count: how many are wanted.
        rng: of all draws.
        measure: further measures, taken of the most undecided pictures of each category alone; None: none.

    Returns:
        All candidates.
    """
    shuffled = [candidates[index] for index in rng.permutation(len(candidates))]
    if strategy == "random":
        return shuffled
    undecided = sorted(shuffled, key=lambda each: -each.uncertainty)
    if strategy == "uncertainty":
        return undecided
    if strategy == "mixed":
        return list(dict.fromkeys(each for pair in zip(undecided, shuffled, strict=True) for each in pair))
    groups = defaultdict(list)
    for each in shuffled:
        groups[each.category].append(each)
    statistics = category_statistics(
        [each.category for each in shuffled], [each.mean for each in shuffled], [each.flagged for each in shuffled]
    )
    weights = {each.category: 1 + min(abs(each.z), _MOST_Z) for each in statistics}
    quotas = shares(count, weights, {name: len(group) for name, group in groups.items()})
    inside = {name: _by_ranks(group, quotas[name], measure) for name, group in sorted(groups.items())}
    first = [each for name, group in inside.items() for each in group[: quotas[name]]]
    rest = [each for name, group in inside.items() for each in group[quotas[name] :]]
    return first + sorted(rest, key=lambda each: -each.uncertainty)


def shares(count: int, weights: dict[str, float], available: dict[str, int]) -> dict[str, int]:
    """Split a count by weights, none above what is available; largest remainders decide."""
    result = dict.fromkeys(weights, 0)
    left, open_ = min(count, sum(available.values())), dict(weights)
    while open_:
        total = sum(open_.values())
        exact = {name: left * weight / total for name, weight in open_.items()}
        full = [name for name, value in exact.items() if value >= available[name]]
        for name in full:
            result[name] = available[name]
            left -= available[name]
            del open_[name]
        if not full:
            result |= {name: int(value) for name, value in exact.items()}
            order = sorted(open_, key=lambda name: (int(exact[name]) - exact[name], name))
            for name in order[: left - sum(map(int, exact.values()))]:
                result[name] += 1
            break
    return result


def _by_ranks(group: list[Candidate], quota: int, measure: Measure | None) -> list[Candidate]:
    group = sorted(group, key=lambda each: -each.uncertainty)
    top, rest = group[: _LOOKED_AT * quota], group[_LOOKED_AT * quota :]
    if not top:
        return rest
    from scipy.stats import rankdata

    values = np.array([[each.uncertainty, *(() if measure is None else measure(each))] for each in top])
    if any(each.disagreement for each in top):
        values = np.column_stack([values, [each.disagreement for each in top]])
    ranks = rankdata(-values, axis=0).mean(axis=1)
    return [top[index] for index in np.argsort(ranks, kind="stable")] + rest


class Caps:
    """How many pictures of one prompt, generator or near-duplicate may be selected.

    Args:
        per_prompt: of one prompt.
        per_generator: of one generator.
        per_look: of pictures that look alike.
        distance: bits of the perceptual hash in which pictures that look alike differ at most.
    """

    def __init__(self, per_prompt: int, per_generator: int, per_look: int, distance: int):
        self.per_prompt, self.per_generator, self.per_look, self.distance = (
            per_prompt,
            per_generator,
            per_look,
            distance,
        )
        self._prompts, self._generators, self._looks = Counter(), Counter(), []

    def has_room(self, candidate: Candidate) -> bool:
        """Whether its prompt and generator may be selected once more; what has none is not capped."""
        prompt, generator = candidate.prompt, candidate.generator
        return not (
            (prompt and self._prompts[prompt] >= self.per_prompt)
            or (generator and self._generators[generator] >= self.per_generator)
        )

    def take(self, candidate: Candidate, look: int) -> bool:
        """Count a picture, unless too many of those taken look like it.

        Args:
            candidate: the picture.
            look: its perceptual hash.
        """
        alike = sum(_bits(other ^ look) <= self.distance for other in self._looks)
        if alike >= self.per_look:
            return False
        self._looks.append(look)
        self._prompts[candidate.prompt] += 1
        self._generators[candidate.generator] += 1
        return True


def _bits(value: int) -> int:
    return bin(value & (2**64 - 1)).count("1")


def new_generators(candidates: Sequence[Candidate], known: set[str]) -> Iterator[Candidate]:
    """The pictures that look clean to the detector, of generators that nobody has labelled pictures of."""
    for each in candidates:
        if each.generator and each.generator not in known and not each.flagged:
            yield each
