"""The options of a detector's training, and of the augmentation of its pictures."""

from __future__ import annotations

import dataclasses

from diffdoctor.detector.damage.injection import check_range
from diffdoctor.detector.damage.kinds import check_kinds
from diffdoctor.runs.errors import check_least, expected


@dataclasses.dataclass
class AugmentConfig:
    """The augmentation of training pictures; each share is a probability in [0, 1].

    Attributes:
        inject_share: of damaging a clean picture.
        kinds: kinds of damage to draw from (`damage_kinds()`); None takes all.
        strength: range of the damage's strength, in (0, 1].
        area: range of the damaged region's size, as a share of the picture.
        visible: smallest mean change of the changed pixels, in [0, 1].
        benign_share: of mildly changing a clean picture that was not damaged as a whole (resampling, recompression...).
        shrink_share: of shrinking a clean picture to 40..90 % and padding it, so that small correct things are
            negatives (the paper's dynamic augmentation).
        flip_share: of mirroring picture and mask left to right. Leave it at 0 for lettering and digits.
        shift: largest translation of picture and mask in each direction, as a share of the side; the border is
            repeated.
        exposure: largest relative change of brightness; 0.1 multiplies by 0.9..1.1.
        noise: largest standard deviation of Gaussian noise, in [0, 1) of the value range.
        blur: largest standard deviation in pixels of the Gaussian blur of half of the pictures, damaged ones too.
            Generated pictures are softer than injected damage; without blur a detector overlooks their artifacts.

    Raises:
        ValueError: an option is out of range.
    """

    inject_share: float = 0.5
    kinds: tuple[str, ...] | None = None
    strength: tuple[float, float] = (0.5, 1.0)
    area: tuple[float, float] = (0.03, 0.33)
    visible: float = 0.2
    benign_share: float = 0.3
    shrink_share: float = 0.1
    flip_share: float = 0.0
    shift: float = 0.05
    exposure: float = 0.1
    noise: float = 0.01
    blur: float = 0.0

    def __post_init__(self):
        for name in ("inject_share", "benign_share", "shrink_share", "flip_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(expected(name, "a probability in [0, 1]", repr(getattr(self, name))))
        if not self.blur >= 0:
            raise ValueError(expected("blur", ">= 0 pixels", repr(self.blur)))
        for name in ("shift", "exposure", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(expected(name, "a share in [0, 1)", repr(getattr(self, name))))
        if not 0 <= self.visible <= 1:
            raise ValueError(expected("visible", "a change in [0, 1]", repr(self.visible)))
        check_kinds(self.kinds)
        for name in ("strength", "area"):
            check_range(name, getattr(self, name), 0, 1)

    @classmethod
    def none(cls) -> AugmentConfig:
        """The options that leave pictures as they are."""
        return cls(inject_share=0.0, benign_share=0.0, shrink_share=0.0, shift=0.0, exposure=0.0, noise=0.0)


@dataclasses.dataclass
class DetectorTrainingConfig:
    """Options of `train_detector`.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures in a step, over all processes and micro-batches.
        accumulate: micro-batches in which a process computes its pictures of a step, to save memory.
        learning_rate: AdamW's peak rate.
        warmup_steps: of linear warm-up; afterwards the rate falls along a cosine to 0.
        weight_decay: AdamW's, on weights of two or more dimensions.
        betas: AdamW's.
        max_grad_norm: the gradient is clipped to this norm; 0 does not clip.
        mse: weight of the mean squared error, see `losses.detector_loss`.
        bce: weight of the binary cross entropy.
        dice: weight of the Dice loss.
        ema_decay: decay per step of the averaged weights, which are the result; 0: the last weights are the result.
        precision: "fp32", or "bf16" for autocast.
        size: side in pixels that training pictures are resized to; None: they must agree in size.
        augment: the augmentation of the pictures.
        balance: sample categories evenly, and damaged and clean pictures evenly within each, where the data has
            categories.
        damaged_share: with `balance`, the share of damaged pictures within each category.
        order: "shuffled" draws from all pictures alike; "blocks" from blocks of 64 neighbouring shards, in random order
            within a block and among them: a set of any size is read shard by shard, and `balance` holds in each step.
        seed: of the samples and the noise.
        workers: processes that prepare samples; 0: the training process does.
        checkpoint_every: steps between checkpoints, where there is an output folder; 0: only when interrupted.
        keep_checkpoints: how many of the last checkpoints to keep.
        validate_every: steps between validations, where there are validation data; 0: only at the end.
        strict: stop at the first broken picture of the data instead of replacing it by another and counting it.
        tensorboard: write the curves as TensorBoard events to the output folder's `logs`.

    Raises:
        ValueError: an option is out of range.
    """

    steps: int = 500
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    mse: float = 1.0
    bce: float = 0.0
    dice: float = 0.0
    ema_decay: float = 0.99
    precision: str = "fp32"
    size: int | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    balance: bool = False
    damaged_share: float = 0.5
    order: str = "shuffled"
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    validate_every: int = 0
    strict: bool = False
    tensorboard: bool = False

    def __post_init__(self):
        check_least(self, steps=1, batch_size=1, accumulate=1)
        check_least(self, warmup_steps=0, weight_decay=0, max_grad_norm=0, mse=0, bce=0, dice=0, seed=0, workers=0)
        if self.order not in ("shuffled", "blocks"):
            raise ValueError(expected("order", "shuffled or blocks", repr(self.order)))
        if not self.mse + self.bce + self.dice > 0:
            raise ValueError(expected("mse, bce, dice", "at least one weight > 0", "none"))
        if not self.learning_rate > 0:
            raise ValueError(expected("learning_rate", "> 0", self.learning_rate))
        if not 0 <= self.ema_decay < 1:
            raise ValueError(expected("ema_decay", "a number in [0, 1)", self.ema_decay))
        if not 0 < self.damaged_share < 1:
            raise ValueError(expected("damaged_share", "a share in (0, 1)", self.damaged_share))
        if self.size is not None and self.size < 1:
            raise ValueError(expected("size", ">= 1 pixels", self.size))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(expected("betas", "two numbers in [0, 1)", self.betas))
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(expected("precision", "fp32 or bf16", repr(self.precision)))
        if isinstance(self.augment, dict):
            self.augment = AugmentConfig(**self.augment)
