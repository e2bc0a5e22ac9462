"""The arguments of a `weighted_loss` call as two objects: its tensors and its options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from torch import Tensor

from diffdoctor.lowering.numbers import round_to_fp32
from diffdoctor.lowering.plan import LOSS_KINDS, Options
from diffdoctor.ops import checks
from diffdoctor.ops.layout import ORDERS, Packed
from diffdoctor.ops.observed import PLAIN, is_plain
from diffdoctor.ops.target import Target

# The numbers that kernels take of a LossOptions, in the order of the registered operators.
MAP_OPTIONS = tuple(option.name for option in fields(Options) if option.type == "float")


class Inputs(NamedTuple):
    """The tensors of a call, and the numbers that may be tensors; by name as `weighted_loss` has them.

    Attributes:
        model_pred: what gets the gradient.
        target: a tensor or a Target; None where the residual is model_pred itself.
        confidence: a map of any size, or None.
        mask: likewise.
        weighting: per sample or broadcast to model_pred, or None.
        huber_c: a number or a (B,) tensor.
        normalizer: likewise, or None.
    """

    model_pred: Tensor
    target: Tensor | Target | None
    confidence: Tensor | None = None
    mask: Tensor | None = None
    weighting: Tensor | None = None
    huber_c: float | Tensor = 0.1
    normalizer: float | Tensor | None = None


@dataclass(frozen=True)
class LossOptions:
    """The numbers and names of a call, checked; by name as `weighted_loss` has them.

    Attributes:
        artifact_weight: weight of the loss where confidence is 1.
        clean_weight: weight of the loss where confidence is 0.
        artifact_grad: factor of the gradient where confidence is 1.
        clean_grad: factor of the gradient where confidence is 0.
        threshold: confidence below it counts as 0; rounded to fp32, except while it is traced.
        gamma: exponent of the confidence.
        interpolation: from a map's size to the grid.
        loss_type: a name, or a dict of names with their weights.
        normalize: "sample", "batch" or None.
        reduction: "mean", "sample" or "sum".
        layout: of packed tokens, or None.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: a name or a number that cannot be.
    """

    artifact_weight: float = 1.0
    clean_weight: float = 1.0
    artifact_grad: float = 1.0
    clean_grad: float = 1.0
    threshold: float = 0.0
    gamma: float = 1.0
    interpolation: str = "area"
    loss_type: str | dict[str, float] = field(default="l2", hash=False)
    normalize: str | None = None
    reduction: str = "mean"
    layout: Packed | None = None

    def __post_init__(self):
        checks.check_choice("interpolation", self.interpolation, checks.INTERPOLATIONS)
        checks.check_choice("reduction", self.reduction, checks.REDUCTIONS)
        for name in MAP_OPTIONS:
            value = checks.check_number(name, getattr(self, name), *_BOUNDS.get(name, ()))
            object.__setattr__(self, name, round_to_fp32(value) if name == "threshold" else value)
        checks.check_loss_type(self.loss_type)
        if isinstance(self.loss_type, dict):  # the caller's may change
            object.__setattr__(self, "loss_type", dict(self.loss_type))
        checks.check_choice("normalize", self.normalize, checks.NORMALIZE)
        checks.check_layout(self.layout)

    @property
    def map_options(self) -> list[float]:
        """The values of MAP_OPTIONS."""
        return [getattr(self, name) for name in MAP_OPTIONS]

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """The weight of each element loss in the order of LOSS_KINDS."""
        mixture = self.loss_type if isinstance(self.loss_type, dict) else {self.loss_type: 1.0}
        return tuple(float(mixture.get(name, 0.0)) for name in LOSS_KINDS)

    def for_plan(self) -> Options:
        """What a plan keeps of them."""
        return Options(*self.map_options, strength=self.loss_weights, reduction=self.reduction)

    def to_schema(self) -> tuple[list[float], list[float], str, str, str, list[int]]:
        """The arguments of a registered operator that `from_schema` takes."""
        return (
            self.map_options, list(self.loss_weights), self.interpolation, self.normalize or "", self.reduction,
            pack_layout(self.layout),
        )  # fmt: skip

    @classmethod
    def from_schema(cls, map_options, loss_weights, interpolation, normalize, reduction, layout) -> LossOptions:
        """The options of a registered operator's arguments."""
        return cls(
            *map_options, interpolation, dict(zip(LOSS_KINDS, loss_weights, strict=True)), normalize or None, reduction,
            unpack_layout(layout),
        )  # fmt: skip


_BOUNDS = {"threshold": (0.0, 1.0), "gamma": (0.0, float("inf"), True)}


def pack_layout(layout: Packed | None) -> list[int]:
    """A layout as an operator's argument: [] or [height, width, patch_size, order]."""
    if layout is None:
        return []
    return [layout.height, layout.width, layout.patch_size, ORDERS.index(layout.order)]


def unpack_layout(layout: list[int]) -> Packed | None:
    """The layout of an operator's argument."""
    return Packed(*layout[:3], ORDERS[layout[3]]) if layout else None


class TargetParts(NamedTuple):
    """A target as kernels take it; a tensor is one term with coefficient 1.

    Attributes:
        terms: the tensors.
        coefs: the factor of each, a number or a tensor.
        pred_scale: the factor of model_pred.
        artifact_coefs: the factors where u is 1; () where they are the same everywhere.
    """

    terms: tuple[Tensor, ...] = ()
    coefs: tuple = ()
    pred_scale: float | Tensor = 1.0
    artifact_coefs: tuple = ()


def target_parts(target: Tensor | Target | None) -> TargetParts:
    """The parts of any target."""
    if target is None:
        return TargetParts()
    if not isinstance(target, Target):
        return TargetParts((target,), (1.0,))
    return TargetParts(target.terms, target.coefs, target.pred_scale, target.artifact_coefs or ())


def per_sample_order(pred_scale, coefs, artifact_coefs, huber_c, weight, z) -> tuple:
    """The numbers of a call, one per sample or one for all, in the order in which backends take them."""
    return (pred_scale, *coefs[:2], huber_c, weight, z, *coefs[2:], *artifact_coefs)


def tensor_key(x):
    """What a plan depends on in an argument: a tensor's metadata, or the argument itself."""
    if x is None or not isinstance(x, Tensor):
        return x
    return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_neg(), type(x) in PLAIN)


def target_key(target):
    """Likewise in a target."""
    if not isinstance(target, Target):
        return tensor_key(target)
    key = (*map(tensor_key, target.terms), *map(tensor_key, target.coefs), tensor_key(target.pred_scale))
    return key if target.artifact_coefs is None else (*key, *map(tensor_key, target.artifact_coefs))


def has_memory(inputs: Inputs) -> bool:
    """Whether the memory of every tensor of a call holds its values, by the tensors' types."""
    terms, coefs, pred_scale, artifact_coefs = target_parts(inputs.target)
    return is_plain(inputs.model_pred, *inputs[2:], *terms, *coefs, pred_scale, *artifact_coefs)


def check_inputs(inputs: Inputs, options: LossOptions) -> None:
    """Check the tensors of a call against each other and against its options.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device or number that cannot be; an argument that requires a gradient.
    """
    pred, layout = inputs.model_pred, options.layout
    checks.check_pred("model_pred", pred, layout)
    checks.check_memory("model_pred", pred)
    checks.check_target(inputs.target, pred, layout)
    if inputs.confidence is None and target_parts(inputs.target).artifact_coefs:
        raise checks.value_error("confidence", "a map beside a target with artifact_coefs", None)
    for name in ("confidence", "mask"):
        value = getattr(inputs, name)
        if value is not None:
            checks.check_map(name, value, pred, layout)
    if inputs.weighting is not None:
        checks.check_weighting(inputs.weighting, pred, layout)
    if isinstance(inputs.huber_c, Tensor):
        checks.check_per_sample("huber_c", inputs.huber_c, pred)
    else:
        checks.check_number("huber_c", inputs.huber_c, 0.0)
    if isinstance(inputs.normalizer, Tensor):
        checks.check_per_sample("normalizer", inputs.normalizer, pred)
    elif inputs.normalizer is not None:
        checks.check_number("normalizer", inputs.normalizer)
    if options.normalize is not None and inputs.normalizer is not None:
        got = f"a normalizer beside normalize={options.normalize!r}"
        raise checks.value_error("normalizer", "None beside normalize, whose place it takes", got)
