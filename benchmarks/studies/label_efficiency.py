"""Which pictures are worth a person's time? `python -m benchmarks.studies.label_efficiency --output runs/labels`.

A detector that knows two kinds of injected damage meets a pool of digits, a quarter of them damaged in five other ways.
A simulated rater, careful or noisy, labels what each strategy of `annotate add` asks for; the detector learns from the
labels beside what it knew, and chooses the next ones. Measured on held-out digits, against labels and against the
rater's seconds. Writes table.md, labels.png and results.json; stopped and started again, it resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.treatment.table import put_into
from diffdoctor.annotate.pool import disagreement, undecided_share
from diffdoctor.annotate.select import STRATEGIES, Candidate, ranked
from diffdoctor.annotate.simulated import Annotator
from diffdoctor.demo.data import AREA, STRENGTH, VISIBLE, WORDS, clean_digits
from diffdoctor.detector import ConvDetector, DetectorTrainingConfig, load_detector, train_detector
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.damage.injection import inject
from diffdoctor.detector.predict import describe_map, diagnose_data
from diffdoctor.detector.samples import ArrayData, JoinedData
from diffdoctor.measures.components import mean_average_precision
from diffdoctor.measures.pixels import flagged_share, is_flagged
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_dir, atomic_write_json, atomic_write_text
from diffdoctor.runs.record import RunFolder, versions
from diffdoctor.runs.units import Units

# Of the kinds that can be told at 16 pixels, two that say little of the five others.
KNOWN, UNKNOWN = ("texture_noise", "tint"), ("duplicate", "warp", "smear", "seam", "fuse")
KNOWN_CLEAN, POOL, TEST = 400, 1000, 360
DAMAGED = 0.25
# 16 pixels are few: of a picture of 512, 0.7 would be 22.
RATERS = {
    "careful": Annotator(jitter_px=0.2, missed=0.02, false_rate=0.01, anchor=0.0),
    "noisy": Annotator(jitter_px=0.7, missed=0.1, false_rate=0.05, anchor=0.5),
}
# Labels after each round; random ones cost fewer seconds, and so there are more.
BUDGETS = dict.fromkeys(STRATEGIES, (20, 40, 80, 160)) | {"random": (20, 40, 80, 160, 320)}
MINUTES = (5, 10, 20, 40)
COLOURS = {"paper": "#d55e00", "uncertainty": "#0072b2", "random": "#555555", "mixed": "#009e73"}
START, END = "<!-- labels: begin -->", "<!-- labels: end -->"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the results depend on.

    Attributes:
        first_steps: of the detector that knows the injected damage.
        steps: of each training with labels, which begins with that detector.
        batch_size: of all trainings.
    """

    first_steps: int = 300
    steps: int = 120
    batch_size: int = 32


class World:
    """The pictures of one seed, and the detector that knows two kinds of damage.

    Args:
        seed: of everything.
        settings: of the trainings.
        folder: for the detector.
    """

    def __init__(self, seed: int, settings: Settings, folder: Path):
        self.seed, self.settings = seed, settings
        pictures, digits = clean_digits()
        rng = np.random.default_rng([seed, 40])
        parts = np.split(rng.permutation(len(pictures))[: KNOWN_CLEAN + POOL + TEST], [KNOWN_CLEAN, KNOWN_CLEAN + POOL])
        known, pool, test = parts
        self.known = ArrayData(pictures[known], category=[WORDS[d] for d in digits[known]])
        self.categories = [WORDS[digit] for digit in digits[pool]]
        self.pool, self.truth = _damaged(pictures[pool], DAMAGED, rng)
        self.test = ArrayData(*_damaged(pictures[test], 0.5, rng))
        if not folder.is_dir():
            torch.manual_seed(seed)
            detector = self.train(ConvDetector((16, 32)), self.known, settings.first_steps)
            with atomic_dir(folder) as temporary:
                detector.save_pretrained(temporary)
        self.folder = folder

    def first(self):
        """A fresh copy of the detector that knows two kinds."""
        return load_detector(self.folder)

    def train(self, detector, data, steps: int):
        """The detector, trained with the two kinds it knows injected into what nobody labelled."""
        augment = AugmentConfig(
            kinds=KNOWN, strength=STRENGTH, area=AREA, visible=VISIBLE, shrink_share=0.0, shift=0.07, noise=0.02
        )
        config = DetectorTrainingConfig(
            steps=steps, batch_size=self.settings.batch_size, bce=1.0, mse=0.0, seed=self.seed, augment=augment
        )
        return train_detector(config, data, detector=detector, progress=False).detector

    def maps(self, detector) -> np.ndarray:
        """The detector's maps (POOL, 16, 16) of the pool."""
        return diagnose_data(detector, ArrayData(self.pool), batch_size=250).confidence

    def measures(self, detector) -> dict[str, float]:
        """mAP@0.5, and the shares of damaged and of clean pictures that are flagged, on held-out digits."""
        found = diagnose_data(detector, self.test, batch_size=180)
        flags, damaged = is_flagged(flagged_share(found.confidence)), (found.masks >= 0.5).any(axis=(1, 2))
        return {
            "map50": mean_average_precision(found.confidence, found.masks),
            "hit_rate": float(flags[damaged].mean()),
            "false_positive_rate": float(flags[~damaged].mean()),
        }


def _damaged(pictures: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and masks (N, 16, 16) float32, the first share of them damaged."""
    pictures, masks = pictures.copy(), np.zeros(pictures.shape[:3], np.float32)
    for index in range(round(share * len(pictures))):
        # All kinds are tried, since a digit may have nothing of what one of them changes.
        damaged = inject(pictures[index], rng, UNKNOWN, STRENGTH, AREA, visible=VISIBLE, attempts=64)
        pictures[index], masks[index] = damaged.picture, damaged.mask
    return pictures, masks


def arm(world: World, rater: Annotator, strategy: str) -> list[dict]:
    """One strategy's points: labels, seconds, how many of the labelled are damaged, and `World.measures`."""
    detector, previous, labels = world.first(), None, {}
    points, seconds = [{"labels": 0, "seconds": 0.0, "damaged": 0, **world.measures(detector)}], 0.0
    for number, budget in enumerate(BUDGETS[strategy]):
        maps = world.maps(detector)
        rng = np.random.default_rng([world.seed, 41, number])
        for index in _asked(world, maps, previous, labels, strategy, budget - len(labels), rng):
            proposal = maps[index] >= 0.5
            answer = rater.marks(world.truth[index] >= 0.5, proposal, seed=[world.seed, 42, index])
            labels[index], seconds = answer.mask, seconds + answer.seconds
        chosen = list(labels)
        marked = ArrayData(world.pool[chosen], np.stack([*labels.values()]) * 1.0, label=["human"] * len(chosen))
        data = JoinedData([marked, world.known], shares=[1, 1])
        previous, detector = maps, world.train(world.first(), data, world.settings.steps)
        damaged = int((world.truth[chosen] >= 0.5).any(axis=(1, 2)).sum())
        points.append({"labels": budget, "seconds": seconds, "damaged": damaged, **world.measures(detector)})
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


def at_minutes(points: list[dict], minutes: float) -> float | None:
    """The mAP that so many minutes of a rater's work buy, linear between points; None beyond the last."""
    seconds = [point["seconds"] for point in points]
    if 60 * minutes > seconds[-1]:
        return None
    return float(np.interp(60 * minutes, seconds, [point["map50"] for point in points]))


def arms_of(results: dict[str, dict], rater: str, strategy: str) -> dict[int, list[dict]]:
    """{seed: points} of one strategy with one rater."""
    found = [each for each in results.values() if (each["rater"], each["strategy"]) == (rater, strategy)]
    return {each["seed"]: each["points"] for each in found}


def table(results: dict[str, dict]) -> str:
    """The results in Markdown: mAP by labels and by minutes, the mean over seeds with its standard error."""
    counts = sorted({budget for budgets in BUDGETS.values() for budget in budgets})
    header = ["rater", "strategy", *(f"{n} labels" for n in counts), *(f"{m} min" for m in MINUTES)]
    lines = [[*header, "damaged of 160 labels", "minutes for 160"], ["---"] * (len(header) + 2)]
    for rater in RATERS:
        for strategy in STRATEGIES:
            arms = list(arms_of(results, rater, strategy).values())
            if not arms:
                continue
            by_labels = [[p["map50"] for a in arms for p in a if p["labels"] == count] for count in counts]
            by_minutes = [[value for a in arms if (value := at_minutes(a, m)) is not None] for m in MINUTES]
            # of fewer seeds, those that were slower, it would be another mean
            by_minutes = [values if len(values) == len(arms) else [] for values in by_minutes]
            full = [(p["damaged"], p["seconds"] / 60) for a in arms for p in a if p["labels"] == 160]
            cells = [rater, strategy, *map(_mean, by_labels), *map(_mean, by_minutes)]
            lines.append(cells + [f"{value:.0f}" for value in np.mean(full or [(0, 0)], axis=0)])
    return _markdown(lines)


def against_random(results: dict[str, dict]) -> str:
    """By how much mAP lies above that of random pictures of the same seed, after as many minutes, in Markdown."""
    lines = [["rater", "strategy", *(f"{m} min" for m in MINUTES)], ["---"] * (len(MINUTES) + 2)]
    for rater in RATERS:
        base = arms_of(results, rater, "random")
        for strategy in [name for name in STRATEGIES if name != "random"]:
            arms = arms_of(results, rater, strategy)
            seeds = sorted({*arms} & {*base})
            cells = []
            for minutes in MINUTES:
                pairs = [(at_minutes(arms[seed], minutes), at_minutes(base[seed], minutes)) for seed in seeds]
                known = [new - old for new, old in pairs if new is not None and old is not None]
                cells.append(_mean(known if len(known) == len(seeds) else [], "+.2f"))
            if seeds:
                lines.append([rater, strategy, *cells])
    return _markdown(lines)


def text(results: dict[str, dict]) -> str:
    """Both tables."""
    return f"{table(results)}\n\nThe same less what random pictures gave, seed by seed:\n\n{against_random(results)}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: list[float], form: str = ".2f") -> str:
    if not values:
        return "–"
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{error}"


def plot(results: dict[str, dict], path: Path) -> None:
    """mAP against labels and against minutes, a row for each rater."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    grid = figure.subplots(len(RATERS), 2, squeeze=False, sharey=True)
    for row, rater in zip(grid, RATERS, strict=True):
        for axes, key, scale in zip(row, ("labels", "seconds"), (1, 60), strict=True):
            for strategy, colour in COLOURS.items():
                arms = list(arms_of(results, rater, strategy).values())
                if arms:
                    x, y = (np.array([[p[name] for p in a] for a in arms]) for name in (key, "map50"))
                    axes.plot(x.mean(0) / scale, y.mean(0), marker="o", color=colour, label=strategy)
                    axes.plot(x.T / scale, y.T, color=colour, alpha=0.2, linewidth=1)
            axes.set(
                xlabel="labels" if scale == 1 else "minutes of the rater", ylabel="mAP@0.5", title=f"{rater} rater"
            )
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines and axes is row[0]:
                axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.studies.label_efficiency", description=__doc__)
    command.add_argument("--output", type=Path, default=Path("runs/labels"), help="folder (runs/labels)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="0 1 2 3 4")
    command.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="all")
    command.add_argument("--raters", nargs="+", choices=list(RATERS), default=list(RATERS), help="both")
    command.add_argument("--settings", type=json.loads, default={}, help="JSON: other values of Settings")
    command.add_argument("--docs", help="page whose table is replaced as well, such as docs/detector.md")
    return command


def run(options) -> dict[str, dict]:
    """Do what is left to do; returns {arm: rater, strategy, seed, points}."""
    settings = Settings(**options.settings)
    identity = {**dataclasses.asdict(settings), "raters": {name: dataclasses.asdict(r) for name, r in RATERS.items()}}
    folder = RunFolder(options.output, "label efficiency", identity, {"arms": None, "detectors": None})
    with folder:
        folder.check()
        folder.begin()
        units = Units(options.output / "arms", ".json")
        for seed in options.seeds:
            names = {f"{r}-{s}-{seed}": (r, s) for r in options.raters for s in options.strategies}
            if not (missing := units.missing(names)):
                continue
            world = World(seed, settings, options.output / "detectors" / str(seed))
            for name in missing:
                rater, strategy = names[name]
                points = arm(world, RATERS[rater], strategy)
                atomic_write_json(
                    units.path(name), {"rater": rater, "strategy": strategy, "seed": seed, "points": points}
                )
                print(
                    f"{name}: mAP@0.5 {' '.join(format(p['map50'], '.2f') for p in points)}",
                    file=sys.stderr,
                    flush=True,
                )
        results = {name: json.loads(units.path(name).read_text(encoding="utf-8")) for name in units.done()}
        atomic_write_json(options.output / "results.json", {"arms": results, "versions": versions()})
        atomic_write_text(options.output / "table.md", text(results) + "\n")
        plot(results, options.output / "labels.png")
    return results


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 for a folder that cannot be used."""
    options = parser().parse_args(argv)
    try:
        results = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.docs:
        put_into(options.docs, text(results), START, END)
    print(text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
