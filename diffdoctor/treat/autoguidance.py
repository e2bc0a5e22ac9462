"""Autoguidance: draw with what a LoRA changed, taken further."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch.utils import _pytree as pytree

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.adapters import adapter_layers
from diffdoctor.treat.families import family_of

# What denoisers call the time that they are given.
_TIME_NAMES = ("timestep", "t")


@contextmanager
def autoguide(
    pipeline,
    scale: float = 2.0,
    *,
    start: float = 0.2,
    stop: float = 0.7,
    adapters: str | Sequence[str] | None = None,
) -> Iterator[None]:
    """Inside this context the pipeline's own call takes what its LoRA changed further; afterwards it is as it was.

    In the middle of the sampling every prediction is made twice, with the LoRA and without, and extrapolated from the
    untreated model's through the treated one's: without + scale * (with - without). This is autoguidance (Karras et
    al., arXiv 2406.02507, equation 3), with the model before the treatment as the inferior one, in a limited interval
    (Kynkäänniemi et al., arXiv 2404.07724). It needs no detector, and one and a half times the time of plain sampling;
    `diffdoctor.guide` may be used inside.

        pipeline.load_lora_weights("runs/treated/lora")
        with diffdoctor.autoguide(pipeline):
            pictures = pipeline("a handwritten seven").images

    Args:
        pipeline: a pipeline that `treat` serves, with a LoRA that is active and not fused.
        scale: 1 draws as the LoRA does, 0 as the model without it. The larger it is, the more everything else grows,
            too, that the treatment changed.
        start: share of the steps before which nothing is extrapolated, in [0, 1]: the layout and the colours are
            decided there.
        stop: share of the steps from which on nothing is extrapolated, in [0, 1].
        adapters: names of the adapters to extrapolate, others stay as they are; None: all that are active.

    Raises:
        UserError: no such adapter is active, one is fused, or a number is out of its range (a `ValueError`).
    """
    if not math.isfinite(scale):
        raise UserError(expected("scale", "a finite number", scale))
    for name, value in (("start", start), ("stop", stop)):
        if not 0 <= value <= 1:
            raise UserError(expected(name, "a number in [0, 1]", value))
    family = family_of(pipeline)
    interval = _Interval(pipeline.scheduler, start, stop)
    names = None if adapters is None else {adapters} if isinstance(adapters, str) else set(adapters)
    switches = [(denoiser, _Switch(denoiser, names)) for denoiser in family.denoisers]
    found = {name for _, switch in switches for name in switch.names}
    if not found or (names is not None and names - found):
        what = "a LoRA that is loaded and active" if names is None else f"active adapters, of which there are {found}"
        raise UserError(expected("autoguide", what, "none" if names is None else sorted(names)))
    with ExitStack() as until_done:
        for denoiser, switch in switches:
            if switch.names:
                until_done.enter_context(_extrapolated(denoiser, switch, scale, interval))
        yield


def autoguided(pipeline, scale: float | None) -> AbstractContextManager[None]:
    """`autoguide` at the scale of a command's option; None: nothing is done."""
    return nullcontext() if scale is None else autoguide(pipeline, scale)


def check_scale(scale: float | None, lora: str | None) -> None:
    """Check a command's option `autoguidance`.

    Raises:
        UserError: it is not a finite number, or there is no LoRA to extrapolate.
    """
    if scale is None:
        return
    if not math.isfinite(scale):
        raise UserError(expected("autoguidance", "a finite number", scale))
    if lora is None:
        raise UserError(expected("autoguidance", "a LoRA with it, which it extrapolates", "none"))


@contextmanager
def _extrapolated(denoiser, switch, scale, interval) -> Iterator[None]:
    original, was_own = denoiser.forward, "forward" in vars(denoiser)
    signature = inspect.signature(original)

    def extrapolate(without, tuned):
        if not isinstance(tuned, torch.Tensor) or not tuned.is_floating_point():
            return tuned
        return torch.lerp(without.float(), tuned.float(), scale).to(tuned.dtype)

    @functools.wraps(original)
    def forward(*args, **kwargs):
        tuned = original(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        if not interval.holds(next(given[name] for name in _TIME_NAMES if name in given)):
            return tuned
        with switch.off():
            without = original(*args, **kwargs)
        return pytree.tree_map(extrapolate, without, tuned)

    # an attribute of the instance hides the class's method until it is deleted
    denoiser.forward = forward
    try:
        yield
    finally:
        if was_own:
            denoiser.forward = original
        else:
            del denoiser.forward


class _Interval:
    """Which steps of a sampling are extrapolated, told by the times that the denoiser is given.

    Whatever the family makes of the scheduler's times, a run's come in its order, the first of them first.

    Args:
        scheduler: of the pipeline, whose times say when another kind of run begins.
        start: see `autoguide`.
        stop: see `autoguide`.
    """

    def __init__(self, scheduler, start: float, stop: float):
        self.scheduler, self.start, self.stop = scheduler, start, stop
        self._times: list[float] = []
        self._steps: dict[float, int] = {}

    def holds(self, timestep: torch.Tensor | float) -> bool:
        """Whether the step at this time, as the denoiser takes it, is inside."""
        if self.start == 0 and self.stop == 1:
            return True
        times = list(dict.fromkeys(self.scheduler.timesteps.tolist()))
        if times != self._times:
            self._times, self._steps = times, {}
        # of a video whose first frame is given, other tokens are at their own times
        time = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        step = self._steps.setdefault(time, len(self._steps))
        return self.start <= step / len(times) < self.stop


class _Switch:
    """Leaves some adapters of a denoiser out of its prediction.

    Args:
        denoiser: that carries them.
        wanted: their names; None: all that are active.

    Attributes:
        names: of those that are there and active.
    """

    def __init__(self, denoiser: torch.nn.Module, wanted: set[str] | None):
        self.names: set[str] = set()
        # layers all of whose active adapters are left out, and others with the names of those that are
        self._whole, self._some = [], []
        for layer in adapter_layers(denoiser).values() if getattr(denoiser, "peft_config", None) else ():
            active = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in layer.scaling]
            out = [name for name in active if wanted is None or name in wanted]
            self.names.update(out)
            if out and layer.merged:
                raise UserError(
                    "autoguide: a LoRA is fused into the weights, so that nothing can be drawn without it; load it "
                    "without pipeline.fuse_lora()"
                )
            if out and len(out) == len(active):
                self._whole.append(layer)
            elif out:
                self._some.append((layer, out))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, they have no part in what the denoiser predicts."""
        trainable = [(p, p.requires_grad) for layer in self._whole for p in layer.parameters()]
        scales = [(layer.scaling, name, layer.scaling[name]) for layer, names in self._some for name in names]
        try:
            for layer in self._whole:
                layer.enable_adapters(False)
            for scaling, name, _ in scales:
                scaling[name] = 0.0
            yield
        finally:
            for layer in self._whole:
                layer.enable_adapters(True)
            for scaling, name, scale in scales:
                scaling[name] = scale
            for parameter, was_trainable in trainable:
                parameter.requires_grad_(was_trainable)
