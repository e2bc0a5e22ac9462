"""The demo's pictures: scikit-learn's real handwritten digits, half of them damaged, split for detector and judge.

Nothing is downloaded. Of a damaged picture only the damaged version is kept: its clean original enters neither the base
pipeline nor the treatment, and not the detector or the judge either.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from diffdoctor.runs.errors import UserError, missing_extra

SIDE = 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Kinds of damage that can be seen at 16 pixels. The last one is kept from the detector.
KINDS = (
    "swirl",
    "glyph_scramble",
    "strip_shift",
    "phase_scramble",
    "texture_noise",
    "pixelate",
    "patch_permutation",
)
HIDDEN_KIND = "patch_permutation"
DETECTOR_KINDS = tuple(kind for kind in KINDS if kind != HIDDEN_KIND)
STRENGTH = (0.6, 1.0)
AREA = (0.1, 0.28)
VISIBLE = 0.2
# Shares of the pictures for the detector, the judge, and the last fifth that neither they nor the pipeline see.
SPLITS = (("detector", 0.4), ("judge", 0.4), ("heldout", 0.2))


@dataclasses.dataclass
class DemoData:
    """Labelled digits.

    Attributes:
        pictures: (N, 16, 16, 3) uint8, half of them damaged.
        masks: (N, 16, 16) float32 in [0, 1], where the damage is.
        digits: (N,) int64, 0..9.
        kinds: (N,) str, the kind of damage; "" for a clean picture.
        splits: (N,) str: detector, judge or heldout.
    """

    pictures: np.ndarray
    masks: np.ndarray
    digits: np.ndarray
    kinds: np.ndarray
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict:
        """One picture as `diffdoctor.detector.samples.DetectorData` has it."""
        kind = str(self.kinds[index])
        return {
            "picture": self.pictures[index],
            "mask": self.masks[index],
            "prompt": prompt_of(int(self.digits[index])),
            "category": WORDS[int(self.digits[index])],
            "generator": "scikit-learn digits",
            "label": "injected" if kind else "real",
            "round": 0,
            "kind": kind,
            "digit": int(self.digits[index]),
            "split": str(self.splits[index]),
        }

    @property
    def damaged(self) -> np.ndarray:
        """(N,) bool."""
        return self.kinds != ""

    def where(self, chosen: np.ndarray) -> DemoData:
        """The pictures that a boolean mask or an index array (N,) chooses."""
        return DemoData(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def split(self, *names: str) -> DemoData:
        """The pictures of these splits: "detector", "judge", "heldout"."""
        return self.where(np.isin(self.splits, names))

    @property
    def training(self) -> DemoData:
        """What the base pipeline and the treatment's offline pairs are made of: everything but the held-out fifth."""
        return self.split("detector", "judge")


def prompt_of(digit: int) -> str:
    """The prompt that a picture of this digit goes with, such as "a handwritten seven"."""
    return f"a handwritten {WORDS[digit]}"


def clean_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits: pictures (1797, 16, 16, 3) uint8, white on black, and digits (1797,) int64.

    The 8x8 originals are enlarged to 16x16 bicubically.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra(error.name or "scikit-learn", "stages") from None
    digits = load_digits()
    pictures = []
    for image in digits.images:
        small = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
        pictures.append(np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    pictures = np.repeat(np.stack(pictures)[..., None], 3, axis=3)
    return pictures, digits.target.astype(np.int64)


def make_demo_data(seed: int = 0) -> DemoData:
    """Split the digits 40/40/20 and damage half of each part; the same seed gives the same pictures.

    The detector's part has no damage of `HIDDEN_KIND`; the judge's and the held-out part have all `KINDS`.
    """
    from diffdoctor.detector.damage.injection import inject

    pictures, digits = clean_digits()
    count = len(pictures)
    rng = np.random.default_rng([seed, 16])
    order = rng.permutation(count)
    splits = np.empty(count, dtype="<U8")
    kinds = np.full(count, "", dtype="<U24")
    masks = np.zeros((count, SIDE, SIDE), np.float32)
    pictures = pictures.copy()
    start = 0
    for name, share in SPLITS:
        stop = count if name == SPLITS[-1][0] else start + round(share * count)
        part = order[start:stop]
        splits[part] = name
        for index in part[: len(part) // 2]:
            allowed = DETECTOR_KINDS if name == "detector" else KINDS
            # One kind is drawn first, so that kinds which are often too faint do not become rare.
            kind = allowed[rng.integers(len(allowed))]
            damaged = inject(pictures[index], rng, [kind], STRENGTH, AREA, visible=VISIBLE, attempts=64)
            pictures[index], masks[index], kinds[index] = damaged.picture, damaged.mask, damaged.kind
        start = stop
    return DemoData(pictures, masks, digits, kinds, splits)


def detector_training_config(seed: int = 0, *, steps: int = 400, **changes):
    """The settings with which the demo trains its detector (the tiny `ArtifactDetector`)."""
    return _training_config(seed, DETECTOR_KINDS, blur=0.5, steps=steps, **changes)


def judge_training_config(seed: int = 0, *, steps: int = 600, **changes):
    """The settings with which the demo trains its judge (`ConvDetector`): another seed, all kinds of damage."""
    return _training_config(seed + 1000, KINDS, blur=0.9, steps=steps, **changes)


def _training_config(seed, kinds, blur, **options):
    from diffdoctor.detector.config import AugmentConfig
    from diffdoctor.detector.train import DetectorTrainingConfig

    augment = AugmentConfig(
        # Half of the stored pictures are damaged already: 5 of 8 samples are in all.
        inject_share=0.25,
        kinds=tuple(kinds),
        strength=STRENGTH,
        area=AREA,
        visible=VISIBLE,
        benign_share=0.8,
        shrink_share=0.05,
        shift=0.07,
        exposure=0.1,
        noise=0.02,
        blur=blur,
    )
    settings = {"batch_size": 64, "learning_rate": 3e-3, "bce": 1.0, "mse": 0.0, "seed": seed, "augment": augment}
    return DetectorTrainingConfig(**(settings | options))


def train_demo_detector(data: DemoData, config, *, progress: bool = True, device: str | None = None):
    """Train the demo's detector on its 40 % by `detector_training_config()`; returns `TrainedDetector`."""
    from diffdoctor.detector.train import train_detector

    return train_detector(config, data.split("detector"), progress=progress, device=device)


def train_demo_judge(data: DemoData, config, *, progress: bool = True, device: str | None = None):
    """Train the demo's judge, another architecture on another 40 %, by `judge_training_config()`."""
    from diffdoctor.detector.models.conv import ConvDetector
    from diffdoctor.detector.train import train_detector
    from diffdoctor.training.seeds import seeded

    with seeded(config.seed):
        judge = ConvDetector((16, 32, 64))
    options = {"detector": judge, "progress": progress, "name": "judge", "device": device}
    return train_detector(config, data.split("judge"), **options)


def write_demo_data(data: DemoData, folder: str | Path) -> None:
    """Write the pictures as shards (see `diffdoctor.data.shards`)."""
    from diffdoctor.data.shard_writer import write_shards

    write_shards((data[i] for i in range(len(data))), folder, shard_size=600)


def read_demo_data(folder: str | Path) -> DemoData:
    """Read what `write_demo_data` wrote; masks come back to 8 bits of precision.

    Raises:
        UserError: there are no pictures, or a broken one.
    """
    from diffdoctor.data.shards import read_shards

    samples = list(read_shards(folder, strict=True))
    if not samples:
        raise UserError(f"{folder}: no pictures there")
    return DemoData(
        np.stack([s["picture"] for s in samples]),
        np.stack([s["mask"] for s in samples]),
        np.array([s["digit"] for s in samples], np.int64),
        np.array([s["kind"] for s in samples], "<U24"),
        np.array([s["split"] for s in samples], "<U8"),
    )
