"""Autoguidance: draw with what a LoRA changed, taken further."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real

import torch
from torch.utils import _pytree as pytree

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.adapters import active_adapters, adapter_layers
from diffdoctor.treat.families import Family, family_of

# What denoisers call the time that they are given.
_TIME_NAMES = ("timestep", "t")
# Of a time that a denoiser is given, at most: bf16's, twice.
_ROUNDING = 0.02
# Denoisers inside a `with autoguide(...)`.
_autoguided: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_OWN_FAMILIES = "a family of your own has time_of to say what the denoiser is given"


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
    (Kynkäänniemi et al., arXiv 2404.07724). It needs no detector, and half as much time again. `diffdoctor.guide` may
    be used inside. What a LoRA changes in text encoders stays. `repair` and `treat` refuse the pipeline meanwhile:
    they do not call it, and its scheduler says which steps are in the interval.

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
        UserError: no such adapter is active, one is fused, the denoiser has a cache, or a number is out of its range (a
            `ValueError`).
    """
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise UserError(expected("scale", "a finite number", repr(scale)))
    for name, value in (("start", start), ("stop", stop)):
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise UserError(expected(name, "a number in [0, 1]", repr(value)))
    if stop < start:
        raise UserError(expected("stop", f"at least start, which is {start}", stop))
    family = family_of(pipeline)
    names = None if adapters is None else {adapters} if isinstance(adapters, str) else set(adapters)
    switches = [(denoiser, _Switch(denoiser, names)) for denoiser in family.denoisers]
    found = {name for _, switch in switches for name in switch.names()}
    if not found or (names is not None and names - found):
        what = "a LoRA that is loaded and active"
        if names is not None:
            what = f"active adapters, of which there are {sorted(_active(family)) or 'none'}"
        raise UserError(expected("autoguide", what, "none" if names is None else sorted(names)))
    if any(getattr(denoiser, "is_cache_enabled", False) for denoiser in family.denoisers):
        what = "a denoiser that makes every prediction anew"
        raise UserError(expected("autoguide", what, "one with a cache; call disable_cache() of it"))
    interval = _Interval(family, start, stop)
    hooks: list[Callable[[], None]] = []
    entered = [denoiser for denoiser in family.denoisers if denoiser not in _autoguided]
    _autoguided.update(entered)
    try:
        for denoiser, switch in switches:
            hooks.append(_extrapolate(denoiser, switch, scale, interval))
        yield
    finally:
        for remove in hooks:
            remove()
        for denoiser in entered:
            _autoguided.discard(denoiser)


def refuse_autoguided(pipeline, what: str) -> None:
    """Refuse a pipeline inside `with autoguide(...)`.

    Args:
        pipeline: of diffusers.
        what: does not work there.

    Raises:
        UserError: a part of the pipeline is autoguided at the moment.
    """
    parts = getattr(pipeline, "components", {})
    if any(isinstance(part, torch.nn.Module) and part in _autoguided for part in parts.values()):
        raise UserError(expected(what, "a pipeline that is not autoguided", "one inside `with autoguide(...)`"))


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


def scale_identity(scale: float | None) -> dict[str, float]:
    """The option as a part of a run's identity; absent where it is not given, so that runs from before there was such
    an option can be resumed."""
    return {} if scale is None else {"autoguidance": scale}


def _active(family) -> set[str]:
    return {name for denoiser in family.denoisers for name in active_adapters(denoiser)}


def _extrapolate(denoiser, switch: _Switch, scale: float, interval: _Interval) -> Callable[[], None]:
    """Have a denoiser's predictions extrapolated until what is returned is called."""
    # of the class: an instance may have another forward, of offloading's or a compiler's
    signature = inspect.signature(type(getattr(denoiser, "_orig_mod", denoiser)).forward)

    def extrapolate(without, tuned):
        if not isinstance(tuned, torch.Tensor) or not tuned.is_floating_point():
            return tuned
        dtype = torch.promote_types(tuned.dtype, torch.float32)
        return torch.lerp(without.to(dtype), tuned.to(dtype), scale).to(tuned.dtype)

    def after(module, args, kwargs, tuned):
        given = signature.bind_partial(module, *args, **kwargs).arguments
        time = next((given[name] for name in _TIME_NAMES if name in given), None)
        if time is None or not interval.holds(time):
            return None
        with switch.off() as changed:
            if not changed:
                return None
            # not module(...), which would come here again
            without = module.forward(*args, **kwargs)
        return pytree.tree_map(extrapolate, without, tuned)

    # A hook rather than another forward: offloading puts a forward of its own in place after every call. The first of
    # the hooks, for others are to see what the pipeline gets.
    return denoiser.register_forward_hook(after, with_kwargs=True, prepend=True).remove


class _Interval:
    """Which steps of a sampling are extrapolated, told by the times that the denoiser is given.

    Args:
        family: of the pipeline, which knows what its scheduler calls them.
        start: see `autoguide`.
        stop: see `autoguide`.
    """

    def __init__(self, family: Family, start: float, stop: float):
        self.family, self.start, self.stop = family, start, stop

    def holds(self, timestep: torch.Tensor | float) -> bool:
        """Whether the step at this time, as the denoiser takes it, is inside.

        Raises:
            UserError: the scheduler has no such step.
        """
        if self.start == 0 and self.stop == 1:
            return True
        # of a video whose first frame is given, other tokens are at their own times
        time = float(torch.as_tensor(self.family.time_of(timestep)).max())
        # a solver of second order is twice at each
        times = list(dict.fromkeys(self.family.pipeline.scheduler.timesteps.tolist()))
        # in low precision the time is not quite one of them
        step = min(range(len(times)), key=lambda step: abs(times[step] - time))
        if abs(times[step] - time) > _ROUNDING * max(abs(time), 1):
            what = f"predictions at the times of the pipeline's last call ({_OWN_FAMILIES})"
            raise UserError(expected("autoguide", what, f"one at {time:g}"))
        return self.start <= step / len(times) < self.stop


class _Switch:
    """Leaves some adapters of a denoiser out of its prediction.

    Args:
        denoiser: that carries them.
        wanted: their names; None: all that are active.
    """

    def __init__(self, denoiser: torch.nn.Module, wanted: set[str] | None):
        self._wanted = wanted
        self._layers = list(adapter_layers(denoiser).values()) if getattr(denoiser, "peft_config", None) else []

    def names(self) -> set[str]:
        """Of those of them that take part now.

        Raises:
            UserError: one is fused into the weights.
        """
        return {name for _, out in self._taking_part() for name in out}

    def _taking_part(self) -> list[tuple[torch.nn.Module, list[str]]]:
        """The layers that carry them, with their names."""
        found = []
        for layer in self._layers:
            own = {name for names in layer.adapter_layer_names for name in getattr(layer, names)}
            active = [] if layer.disable_adapters else layer.active_adapters
            out = [name for name in active if name in own and (self._wanted is None or name in self._wanted)]
            if out and layer.merged:
                raise UserError(
                    "autoguide: a LoRA is fused into the weights, so that nothing can be drawn without it; load it "
                    "without pipeline.fuse_lora()"
                )
            if out:
                found.append((layer, out))
        return found

    @contextmanager
    def off(self) -> Iterator[bool]:
        """Inside, they have no part in what the denoiser predicts; yields whether any had."""
        # by name: offloading puts other parameters in place
        found = [
            (layer, out, list(layer.active_adapters), {name: p.requires_grad for name, p in layer.named_parameters()})
            for layer, out in self._taking_part()
        ]
        try:
            for layer, out, active, _ in found:
                # a scale of 0 would leave DoRA's magnitudes in
                layer.set_adapter([name for name in active if name not in out])
            yield bool(found)
        finally:
            for layer, _, active, trainable in found:
                layer.set_adapter(active)
                for name, parameter in layer.named_parameters():
                    parameter.requires_grad_(trainable[name])
