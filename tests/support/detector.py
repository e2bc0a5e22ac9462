"""Small pictures, options and networks for the detector's training tests."""

import numpy as np
import torch

from diffdoctor.detector import ArtifactDetector, ConvDetector, DetectorTrainingConfig, train_detector
from diffdoctor.detector.damage.injection import inject
from diffdoctor.detector.samples import ArrayData


def shapes(count=60, side=16, seed=0, **fields):
    """Clean pictures: soft discs on a dark ground."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:side, 0:side]
    pictures = np.zeros((count, side, side, 3), np.uint8)
    for picture in pictures:
        y, x, r = rng.uniform(4, side - 4), rng.uniform(4, side - 4), rng.uniform(2, 5)
        picture[:] = (220 * np.clip(r - np.hypot(ys - y, xs - x), 0, 1))[..., None] * rng.uniform(0.6, 1, 3)
    return ArrayData(pictures, **fields)


def quick(**changes):
    options = {"steps": 12, "batch_size": 8, "warmup_steps": 3, "bce": 1.0, "mse": 0.5, "dice": 0.5, "seed": 3}
    return DetectorTrainingConfig(**{**options, **changes})


def fresh(seed=0, kind="conv"):
    torch.manual_seed(seed)
    return ConvDetector((8, 16)) if kind == "conv" else ArtifactDetector.tiny()


def weights_of(detector):
    return torch.cat([p.detach().flatten() for p in detector.parameters()])


def held_out():
    clean = shapes(60, seed=9)
    rng = np.random.default_rng(1)
    pairs = [inject(clean.pictures[i], rng, ["texture_noise"], area=(0.1, 0.3)) for i in range(30)]
    pictures = np.concatenate([[p.picture for p in pairs], clean.pictures[30:]])
    return ArrayData(pictures, np.concatenate([[p.mask for p in pairs], np.zeros((30, 16, 16), np.float32)]))


class StopAt:
    """Data that end the run, as a kill would, when a picture is asked for the n-th time."""

    def __init__(self, data, reads):
        self.data, self.reads = data, reads

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return self.data[index]


def twenty_steps(kind):
    """Every step's loss, and the first gradient's norm."""
    history = train_detector(quick(steps=20), shapes(), detector=fresh(kind=kind), progress=False).history
    return [entry["loss"] for entry in history], history[0]["grad_norm"]
