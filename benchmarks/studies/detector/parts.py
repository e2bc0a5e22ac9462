"""The parts of the study: labelled sets, and trainings with their measures. A finished part is not done again."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.studies.detector import pictures
from benchmarks.studies.detector.drawing import KINDS
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.record import METRICS, RunFolder

TESTS = ("digits", "pieces", "photographs")
# Trained on: what puts in something foreign, or breaks the order with sharp edges. Only tested on: what softens, moves
# or repeats what is there.
SEEN = (
    "ghost_limb",
    "glyph_scramble",
    "patch_permutation",
    "phase_scramble",
    "strip_shift",
    "swirl",
    "texture_noise",
    "tint",
    "watermark",
)
UNSEEN = ("duplicate", "fuse", "over_smooth", "pixelate", "removal", "seam", "smear", "warp")
# Of each picture; together they make DAMAGED_SHARE, so that balance changes nothing but the categories.
DAMAGED_VERSIONS, BENIGN_VERSIONS = 1, 3
BOOTSTRAP = 200
SHIFTS = (0.0, -0.5, -1.0, -1.5, -2.0)
# What every training has in common; the rest are `train_detector`'s defaults.
TRAINING = {
    "batch_size": 32,
    "learning_rate": 3e-3,
    "warmup_steps": 300,
    "mse": 0.0,
    "bce": 1.0,
    "precision": "bf16",
    "checkpoint_every": 250,
    "keep_checkpoints": 1,
    "size": pictures.SIDE,
}
AUGMENT = {
    "inject_share": 0.0,
    "benign_share": 0.0,
    "shrink_share": 0.1,
    "flip_share": 0.5,
    "exposure": 0.2,
    "noise": 0.0,
}
DAMAGED_SHARE = 0.2
SETS = ("train-damaged", "skewed-damaged", "train-clean")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What one training has that the others do not.

    Attributes:
        sets: labelled sets that it is trained on.
        balance: sample by category.
        shrink_share: share of the clean pictures that are shrunk and padded.
        network: "conv" or "segformer".
        drawn: train on the drawn pictures too.
    """

    sets: tuple[str, ...] = SETS
    balance: bool = True
    shrink_share: float = AUGMENT["shrink_share"]
    network: str = "conv"
    drawn: bool = True


# The detector itself is spared the shortcut; the ablation is not.
DETECTOR = "everything"
VARIANTS = {
    DETECTOR: Variant(sets=(*SETS, "skewed-clean")),
    "complete": Variant(),
    "without real negatives": Variant(sets=SETS[:2]),
    "without drawn pictures": Variant(drawn=False),
    "without class balance": Variant(balance=False),
    "without dynamic augmentation": Variant(shrink_share=0.0),
    "with the tiny SegFormer": Variant(network="segformer"),
}


def part_of(output: Path, name: str, settings: dict) -> RunFolder:
    """The record of one part of the study, which is made of these settings."""
    advice = "choose another --output or remove it"
    return RunFolder(output / "parts" / name, "a part of the detector study", settings, {METRICS: None}, advice=advice)


def made(part: RunFolder, make: Callable[[], dict]) -> dict:
    """The result of a part, made unless it is there.

    Raises:
        UserError: the part was made with other settings.
    """
    part.check()
    if (found := part.finished()) is not None:
        return found
    result = make()
    part.begin()
    atomic_write_json(part.path / METRICS, result)
    return result


def make_sets(output: Path, seed: int, workers: int) -> dict:
    """Pictures, and the labelled sets made from them at `inject`'s default strengths; returns their metrics."""
    from diffdoctor.detector.commands.inject import InjectConfig, run_inject

    clean = output / "pictures"
    counts = {name: getattr(pictures, name) for name in ("TRAINING_PIECES", "TEST_PIECES", "DRAWN_PICTURES")}
    settings = {"seed": seed} | counts
    made(part_of(output, "pictures", settings), lambda: pictures.write_pictures(clean, seed))
    plans = {
        "train-clean": {"pictures": "train", "damaged": 0, "benign": BENIGN_VERSIONS},
        "train-damaged": {"pictures": "train", "kinds": list(SEEN), "damaged": DAMAGED_VERSIONS, "clean": False},
        "skewed-clean": {"pictures": "skewed", "damaged": 0, "benign": BENIGN_VERSIONS},
        "skewed-damaged": {"pictures": "skewed", "kinds": list(SEEN), "damaged": DAMAGED_VERSIONS, "clean": False},
    }
    for group in TESTS:
        plans[f"{group}-seen"] = {"pictures": f"test/{group}", "kinds": list(SEEN)}
        plans[f"{group}-unseen"] = {"pictures": f"test/{group}", "kinds": list(UNSEEN)}
    result = {}
    for number, (name, plan) in enumerate(plans.items()):
        folder = output / "sets" / name
        settings = plan | {"seed": 100 * seed + number}
        where = [str(clean / plan["pictures"])]
        config = InjectConfig(**settings | {"pictures": where}, output=str(folder), workers=workers, overwrite=True)
        result[name] = made(part_of(output, name, settings), functools.partial(run_inject, config))
    return result | {"small": _small(output, seed)}


def _small(output: Path, seed: int) -> dict:
    """Clean test pictures shrunk and padded: small things, all of them right."""
    from diffdoctor.data.shard_writer import write_shards
    from diffdoctor.data.shards import ShardData
    from diffdoctor.detector.samples import shrink_and_pad

    folder = output / "sets" / "small"

    def samples():
        for part, group in enumerate(TESTS):
            data = ShardData(output / "sets" / f"{group}-seen")
            for index in np.flatnonzero(data.mask_max == 0):
                sample = data[int(index)]
                rng = np.random.default_rng([seed, 22, part, int(index)])
                picture, _ = shrink_and_pad(sample["picture"], sample["mask"], rng)
                # Shards are read back by their keys, which must differ over both groups.
                yield sample | {"key": f"{part}-{sample['key']}", "picture": picture}

    def make():
        write_shards(samples(), folder)
        return {"pictures": len(ShardData(folder))}

    return made(part_of(output, "small", {"seed": seed}), make)


def train(output: Path, name: str, variant: str, steps: int, seed: int) -> dict:
    """Train one detector and measure it; returns its measures, as `measures` gives them, and the seconds."""
    from diffdoctor.data.shards import ShardData
    from diffdoctor.detector.config import AugmentConfig
    from diffdoctor.detector.samples import JoinedData
    from diffdoctor.detector.train import DetectorTrainingConfig, train_detector
    from diffdoctor.training.cpu_settings import cpu_settings

    chosen = VARIANTS[variant]
    config = DetectorTrainingConfig(
        **TRAINING,
        steps=steps,
        augment=AugmentConfig(**AUGMENT | {"shrink_share": chosen.shrink_share}),
        balance=chosen.balance,
        damaged_share=DAMAGED_SHARE,
        seed=seed,
    )
    folder = output / "runs" / f"{name}-seed-{seed}"

    def make():
        start = time.monotonic()
        data = JoinedData([ShardData(output / "sets" / part) for part in chosen.sets])
        if not chosen.drawn:
            data = data.where(~np.isin(data.categories, list(KINDS)))
        folder.mkdir(parents=True, exist_ok=True)
        # Several trainings at a time would write their bars over each other.
        with cpu_settings(threads=1):
            with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
                trained = train_detector(config, data, detector=fresh(chosen.network, seed), output_dir=folder)
            return {"seconds": time.monotonic() - start} | measures(output, trained.detector, folder)

    settings = dataclasses.asdict(config) | {"variant": variant}
    return made(part_of(output, folder.name, settings), make)


def fresh(network: str, seed: int):
    """An untrained detector: "conv" or the tiny "segformer"."""
    import torch

    from diffdoctor.detector import ArtifactDetector, ConvDetector

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "segformer":
            return ArtifactDetector.tiny(min_side=2 * pictures.SIDE)
        return ConvDetector((32, 64, 128))


def measures(output: Path, detector, folder: Path) -> dict:
    """Every measure on held-out pictures; reports of what was found go to `folder`.

    Returns:
        {"seen", "unseen": {"all", and each of `TESTS`: as `evaluate.detector.evaluate_maps` returns,
        "per_category", "per_kind"}, "shifted": what moved logits would give, kinds trained on, "small": the share of
        small clean pictures that is flagged}.
    """
    from diffdoctor.data.shards import ShardData
    from diffdoctor.detector.predict import diagnose_data
    from diffdoctor.detector.samples import JoinedData
    from diffdoctor.evaluate.detector.measure import evaluate_maps, measure
    from diffdoctor.evaluate.detector.report import write_report
    from diffdoctor.runs.strict_json import nan_to_none

    result: dict = {}
    for part in ("seen", "unseen"):
        data = JoinedData([ShardData(output / "sets" / f"{group}-{part}") for group in TESTS])
        found = diagnose_data(detector, data, size=pictures.SIDE)
        measured = nan_to_none(measure(found, bootstrap=BOOTSTRAP))
        groups = np.repeat(TESTS, [len(one) for one in data.sets])
        result[part] = {
            "all": measured["overall"],
            **{
                name: nan_to_none(
                    evaluate_maps(found.confidence[groups == name], found.masks[groups == name], bootstrap=BOOTSTRAP)
                )
                for name in TESTS
            },
            "per_category": measured["per_category"],
            "per_kind": measured["per_kind"],
        }
        if part == "seen":
            result["shifted"] = [_shifted(found, shift) for shift in SHIFTS]
        atomic_write_json(folder / f"{part}.json", measured)
        write_report(folder / f"{part}.html", measured, found, lambda index, data=data: _picture(data, index))
    small = diagnose_data(detector, ShardData(output / "sets" / "small"), size=pictures.SIDE)
    result["small"] = evaluate_maps(small.confidence, small.masks, bootstrap=0)["false_positive_rate"]
    return result


def _shifted(found, shift: float) -> dict:
    """What the detector would reach were its logits moved by `shift`."""
    from diffdoctor.measures.components import mean_average_precision
    from diffdoctor.measures.pixels import flagged_share, is_flagged

    odds = np.exp(shift) * found.confidence / np.maximum(1 - found.confidence, 1e-7)
    confidence = odds / (1 + odds)
    damaged = (found.masks >= 0.5).any(axis=(1, 2))
    flags = is_flagged(flagged_share(confidence))
    return {
        "shift": shift,
        "map50": mean_average_precision(confidence, found.masks),
        "false_positive_rate": float(flags[~damaged].mean()),
        "hit_rate": float(flags[damaged].mean()),
    }


def _picture(data, index: int) -> np.ndarray:
    from diffdoctor.data.pictures import resize_pair

    sample = data[index]
    return resize_pair(sample["picture"], sample["mask"], pictures.SIDE)[0]
