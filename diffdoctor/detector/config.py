"""The options of a detector's training, and of what happens to its pictures."""

from __future__ import annotations

import dataclasses

from diffdoctor.detector.damage.injection import check_range
from diffdoctor.detector.damage.kinds import check_kinds
from diffdoctor.runs.errors import check_least


@dataclasses.dataclass
class AugmentConfig:
    """What happens to a picture before it is trained on; each share is a probability in [0, 1].

    Attributes:
        inject_share: a clean picture gets fresh damage.
        kinds: kinds of damage to draw from (`damage_kinds()`); None takes all.
        strength: range of the fresh damage's strength, within (0, 1].
        area: range of its region's size, share of the picture.
        visible: smallest mean change of the changed pixels, of 1.
        benign_share: a clean picture that got no damage is mildly changed all over (resampled, recompressed, ...).
        shrink_share: a clean picture is shrunk to 40..90 % and padded, so that small correct things are negatives
            (the paper's dynamic augmentation).
        flip_share: picture and mask are mirrored left to right. Leave it at 0 for lettering and digits.
        shift: largest translation of picture and mask in each direction, share of the side; the border is held.
        exposure: largest relative change of brightness; 0.1 multiplies by 0.9..1.1.
        noise: largest standard deviation of Gaussian noise, of 1.
        blur: largest standard deviation of the Gaussian blur that half of the pictures get, damaged ones too, in
            pixels. What a model draws is softer than the damage it learnt; without blur a detector overlooks it.
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
                raise ValueError(f"{name}: expected a probability in [0, 1], got {getattr(self, name)!r}")
        if not self.blur >= 0:
            raise ValueError(f"blur: expected >= 0 pixels, got {self.blur!r}")
        for name in ("shift", "exposure", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)!r}")
        if not 0 <= self.visible <= 1:
            raise ValueError(f"visible: expected a change within [0, 1], got {self.visible!r}")
        check_kinds(self.kinds)
        for name in ("strength", "area"):
            check_range(name, getattr(self, name), 0, 1)

    @classmethod
    def none(cls) -> AugmentConfig:
        """No augmentation at all."""
        return cls(inject_share=0.0, benign_share=0.0, shrink_share=0.0, shift=0.0, exposure=0.0, noise=0.0)


@dataclasses.dataclass
class DetectorTrainingConfig:
    """Options of `train_detector`.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures in a step, over all processes and accumulated parts.
        accumulate: parts that a process' share of the batch is computed in, to save memory.
        learning_rate: AdamW's peak rate.
        warmup_steps: of linear warm-up; afterwards the rate falls along a cosine to 0.
        weight_decay: AdamW's, on weights of two or more dimensions.
        betas: AdamW's.
        max_grad_norm: the gradient is clipped to this norm; 0 leaves it.
        mse, bce, dice: weights of the losses, see `losses.detector_loss`.
        ema_decay: decay a step of the averaged weights, which are the result; 0: the last weights are.
        precision: "fp32", or "bf16" for autocast.
        size: side in pixels that training pictures are resized to; None: they must agree in size.
        augment: what happens to the pictures, see `AugmentConfig`.
        balance: sample categories evenly, and damaged and clean pictures evenly within each, where the data say
            their category.
        damaged_share: with `balance`, the share of damaged pictures within each category.
        seed: of the samples and the noise.
        workers: processes that prepare samples; 0: the training process does.
        checkpoint_every: steps between checkpoints, where there is an output folder; 0: none.
        keep_checkpoints: how many of the last checkpoints to keep.
        validate_every: steps between validations, where there are validation data; 0: only at the end.
        strict: stop at the first broken picture of the data instead of taking another in its place and counting it.
        tensorboard: write the curves as TensorBoard events to the output folder's `logs`.
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
        if not self.mse + self.bce + self.dice > 0:
            raise ValueError("mse, bce, dice: expected at least one weight above 0")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected > 0, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected within [0, 1), got {self.ema_decay}")
        if not 0 < self.damaged_share < 1:
            raise ValueError(f"damaged_share: expected within (0, 1), got {self.damaged_share}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected >= 1 pixels, got {self.size}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers within [0, 1), got {self.betas}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: expected fp32 or bf16, got {self.precision!r}")
        if isinstance(self.augment, dict):
            self.augment = AugmentConfig(**self.augment)
