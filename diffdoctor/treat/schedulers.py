"""Sampling that can be stopped, stored and resumed: a private copy of a pipeline's scheduler with its state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from diffdoctor.ops.policy_steps import ddim_step, flow_sde_coefs
from diffdoctor.ops.target import Target
from diffdoctor.runs.errors import UserError, expected, first_line

logger = logging.getLogger(__name__)

# of consistency models, in as many steps as these were distilled for
_CONSISTENCY = ("LCMScheduler", "TCDScheduler")
_DISCRETE = ("DDIMScheduler", "DDPMScheduler", *_CONSISTENCY)
_SIGMA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_DPM = ("DPMSolverMultistepScheduler",)
# solvers of several steps, of flow matching too where `use_flow_sigmas` says so
_MULTISTEP = (*_DPM, "UniPCMultistepScheduler")
_SUPPORTED = (*_DISCRETE, *_SIGMA, *_FLOW, *_MULTISTEP)
_STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")
_NEAREST = {
    "PNDMScheduler": "DDIMScheduler",
    "LMSDiscreteScheduler": "EulerDiscreteScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler",
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler": "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler",
}
# What changes from step to step; everything else is fixed by set_timesteps.
_STATE = (
    "_step_index", "model_outputs", "lower_order_nums",
    "timestep_list", "last_sample", "this_order",  # UniPC
    "prev_derivative", "dt", "sample",  # Heun
)  # fmt: skip


class Sampler:
    """The sampling steps of one pipeline's scheduler, as pure a function of (state, step) as the scheduler allows.

    Latents, predictions and noise are (B, C, h, w), of videos (B, C, t, h, w), and step is a number from 0. The
    pipeline's own scheduler is never touched. `clip_sample` and `thresholding` are switched off with a notice: they
    zero the gradient where they clip.

    Args:
        scheduler: DDIM or TCD (eta 0, the default of the pipelines' calls), DDPM, LCM, Euler, Euler ancestral,
            FlowMatchEuler, FlowMatchHeun, DPM++ 2M or UniPC, these two with `use_flow_sigmas` too.
        device: where the timesteps live.
        timestep_options: of `set_timesteps`, from `Family.timestep_options`.

    Raises:
        UserError: for another scheduler, naming the nearest that works; for a number of steps that it does not take.
    """

    def __init__(self, scheduler, *, device: torch.device, timestep_options: dict):
        self.kind = type(scheduler).__name__
        _check_supported(scheduler)
        clipping = [name for name in ("clip_sample", "thresholding") if scheduler.config.get(name)]
        if clipping:
            logger.warning("%s: %s switched off for the treatment", self.kind, " and ".join(clipping))
        self.scheduler = type(scheduler).from_config(scheduler.config, **dict.fromkeys(clipping, False))
        try:
            self.scheduler.set_timesteps(device=device, **timestep_options)
        except ValueError as error:
            raise UserError(f"sampling_steps: {self.kind} does not take them ({first_line(error)})") from error
        except (TypeError, AssertionError) as error:
            what = f"one that takes the noise levels of this pipeline ({', '.join(timestep_options)})"
            raise UserError(expected("scheduler", what, self.kind)) from error
        self._timesteps = self.scheduler.timesteps
        # its own copy is an index into tables on the CPU, for which each step would wait for a GPU
        self.scheduler.timesteps = self._timesteps.cpu()
        self._sigmas = self.scheduler.sigmas.tolist() if hasattr(self.scheduler, "sigmas") else None
        self.stochastic = self.kind in _STOCHASTIC
        self._mu = timestep_options.get("mu")
        self._fresh = self.state()

    @classmethod
    def around(cls, scheduler) -> Sampler:
        """A sampler that reads the formulas of a scheduler in use, without a copy; its `step` is not for calling.

        Raises:
            UserError: as the constructor.
        """
        sampler = cls.__new__(cls)
        sampler.kind = type(scheduler).__name__
        _check_supported(scheduler)
        sampler.scheduler, sampler._timesteps, sampler._sigmas = scheduler, None, None
        sampler.stochastic = sampler.kind in _STOCHASTIC
        return sampler

    @property
    def timesteps(self) -> torch.Tensor:
        """The times (steps,) that the denoiser is told."""
        return self.scheduler.timesteps if self._timesteps is None else self._timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def is_flow(self) -> bool:
        """Whether the scheduler is one of flow matching."""
        return _is_flow(self.scheduler)

    @property
    def initial_scale(self) -> float:
        """Deviation of the first latents: they are this times standard normal noise."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def state(self) -> dict:
        """A copy of what the scheduler carries from one step to the next; tensors are shared, never written."""
        values = {name: getattr(self.scheduler, name) for name in _STATE if hasattr(self.scheduler, name)}
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    def restore(self, state: dict | None, index: torch.Tensor | None = None) -> None:
        """Load a stored state (None: before the first step), for the pictures at index (M,) alone where given."""
        for name, value in (self._fresh if state is None else state).items():
            value = [_rows(v, index) for v in value] if isinstance(value, list) else _rows(value, index)
            setattr(self.scheduler, name, value)

    def scale_input(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The denoiser's input at this step."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        self._at(step)
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[step])

    def step(
        self,
        prediction: torch.Tensor,
        step: int,
        latents: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """The next latents; generators, one per picture, are drawn from by the stochastic schedulers alone."""
        self._at(step)
        options = {"generator": list(generators)} if self.stochastic else {}
        if self.kind == "TCDScheduler":
            options["eta"] = 0.0
        return self.scheduler.step(prediction, self.scheduler.timesteps[step], latents, return_dict=False, **options)[0]

    def denoised(self, prediction: torch.Tensor, step: int, latents: torch.Tensor) -> torch.Tensor:
        """The clean latents that the prediction at this step implies."""
        alpha, sigma = self._alpha_sigma(step)
        if self.is_flow:
            return latents - sigma * prediction
        if self.kind in _SIGMA:
            # these schedulers keep latents at clean + s * noise; the denoiser sees them divided by sqrt(1 + s^2)
            latents = latents * alpha
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            # at zero terminal SNR an epsilon prediction says nothing of the picture
            return (latents - sigma * prediction) / max(alpha, 1e-4)
        return prediction if kind == "sample" else alpha * latents - sigma * prediction

    def prediction_for(
        self, clean: torch.Tensor, prediction: torch.Tensor, step: int, latents: torch.Tensor
    ) -> torch.Tensor:
        """The prediction that would imply these clean latents instead."""
        change = clean - self.denoised(prediction, step, latents)
        alpha, sigma = self._alpha_sigma(step)
        if self.is_flow:
            return prediction - change / sigma
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return prediction + change
        return prediction - change * ((max(alpha, 1e-4) if kind == "epsilon" else 1.0) / sigma)

    def renoised(self, clean: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Clean latents brought back to the noise level before this step."""
        alpha, sigma = self._alpha_sigma(step)
        if self.kind in _SIGMA:
            return clean + (sigma / alpha) * noise
        return alpha * clean + sigma * noise

    def noise_of(self, clean: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The noise that makes these latents of these clean ones before this step: the inverse of `renoised`."""
        alpha, sigma = self._alpha_sigma(step)
        if self.kind in _SIGMA:
            return (latents - clean) * (alpha / sigma)
        return (latents - alpha * clean) / sigma

    def model_input(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """As `scale_input`, without a change of the scheduler's state."""
        return latents * self._alpha_sigma(step)[0] if self.kind in _SIGMA else latents

    def policy_coefs(self, eta: float, window: range) -> list[tuple[float, float, float]]:
        """(a, b, sigma) of every step: next latents drawn from N(a latents + b prediction, sigma^2).

        In the window the step is Flow-GRPO's (flow matching) or DDIM's with noise, elsewhere the same without noise:
        the scheduler's own for flow matching, DDIM and Euler, and first order for DPM++ and UniPC.

        Args:
            eta: how much noise a step of the window adds.
            window: steps, the last one not among them.

        Raises:
            UserError: the scheduler predicts twice for a step, as Heun's does.
        """
        if "Heun" in self.kind:
            raise UserError(expected("scheduler", "one that predicts once for a step, for a policy", self.kind))
        rates = [eta if step in window else 0.0 for step in range(len(self))]
        if self.is_flow:
            found = [flow_sde_coefs(self.scheduler.sigmas.cpu(), step, rate) for step, rate in enumerate(rates)]
            return [tuple(map(float, coefs)) for coefs in found]
        kind = self.scheduler.config.prediction_type
        found = []
        for rate, (current, after) in zip(rates, self._alphas_cumprod(), strict=True):
            a, b, sigma = map(float, ddim_step(current, after, rate, kind))
            if self.kind in _SIGMA:
                # these schedulers keep latents at clean + s * noise: the others' divided by sqrt(alphas_cumprod)
                root = float(after.sqrt())
                a, b, sigma = a * float(current.sqrt()) / root, b / root, sigma / root
            found.append((a, b, sigma))
        return found

    def _alphas_cumprod(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each step, before and after it, fp64."""
        scheduler, timesteps = self.scheduler, self.scheduler.timesteps.tolist()
        if self.kind not in _DISCRETE:
            levels = 1 / (1 + scheduler.sigmas.cpu().double() ** 2)
            return list(pairwise(levels))
        table = scheduler.alphas_cumprod.cpu().double()
        if self.kind in _CONSISTENCY:
            following, final = [*timesteps[1:], -1], table[0] if self.kind == "TCDScheduler" else table.new_ones(())
        elif self.kind == "DDPMScheduler":
            following, final = [int(scheduler.previous_timestep(t)) for t in timesteps], table.new_ones(())
        else:
            following = [t - len(table) // len(timesteps) for t in timesteps]
            final = scheduler.final_alpha_cumprod.cpu().double()
        return [(table[t], table[s] if s >= 0 else final) for t, s in zip(timesteps, following, strict=True)]

    def training_pair(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        uniform: torch.Tensor,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> tuple[torch.Tensor, torch.Tensor, Target]:
        """(denoiser input, timesteps (B,), target) at random times: the pipeline's own training objective.

        Times are uniform over the training timesteps, for flow matching logit-normal and shifted as the sampler's are.

        Args:
            latents: (B, C, h, w) or (B, C, t, h, w), clean.
            noise: as latents.
            uniform: (B,) in [0, 1): where in the distribution of times each picture lies.
            part: of that distribution, from where to where; see `part_of_times`.
        """
        uniform = part[0] + (part[1] - part[0]) * uniform
        if self.is_flow:
            logit_normal = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)))
            sigmas = self._shifted(logit_normal).to(latents.device, latents.dtype)
            view = sigmas.view(-1, *(1,) * (latents.ndim - 1))
            timesteps = sigmas * self.scheduler.config.num_train_timesteps
            return (1 - view) * latents + view * noise, timesteps, Target.flow(latents, noise)
        alphas_cumprod = self.scheduler.alphas_cumprod.to(latents.device)
        timesteps = (uniform * len(alphas_cumprod)).long().to(latents.device)
        chosen = alphas_cumprod[timesteps].to(torch.float32)
        view = chosen.to(latents.dtype).view(-1, *(1,) * (latents.ndim - 1))
        noisy = view.sqrt() * latents + (1 - view).sqrt() * noise
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            target = Target.epsilon(noise)
        elif kind == "sample":
            target = Target.sample(latents)
        else:
            target = Target.velocity(latents, noise, chosen)
        return noisy, timesteps, target

    def _at(self, step: int) -> None:
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = step

    def _alpha_sigma(self, step: int) -> tuple[float, float]:
        if self.kind in _DISCRETE:
            alpha_cumprod = float(self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[step])])
            return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        sigma = self._sigma(step)
        if self.is_flow:
            return 1 - sigma, sigma
        alpha = (1 + sigma**2) ** -0.5
        return alpha, sigma * alpha

    def _sigma(self, step: int) -> float:
        return float(self.scheduler.sigmas[step]) if self._sigmas is None else self._sigmas[step]

    def part_of_times(self, trains_at: Callable[[float], bool]) -> tuple[float, float]:
        """The part of the distribution of times, from and to a place in [0, 1], whose times take part.

        Args:
            trains_at: whether a time takes part: all do, or those on one side of a boundary.
        """
        ends = [trains_at(self._time_at(place)) for place in (0.0, 1.0)]
        if all(ends):
            return 0.0, 1.0
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if trains_at(self._time_at(middle)) == ends[0] else (low, middle)
        return (0.0, low) if ends[0] else (high, 1.0)

    def _time_at(self, place: float) -> float:
        uniform = torch.tensor([place], dtype=torch.float64)
        if not self.is_flow:
            return float(int(place * len(self.scheduler.alphas_cumprod)))
        sigma = self._shifted(torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))))
        return float(sigma) * self.scheduler.config.num_train_timesteps

    def _shifted(self, uniform: torch.Tensor) -> torch.Tensor:
        # reads the shift off the sampler's own first sigma ratio, which holds the dynamic shift too
        config = self.scheduler.config
        if self.kind in _MULTISTEP:
            exponential = config.get("time_shift_type", "exponential") == "exponential"
            shift = float(config.flow_shift)
            if config.get("use_dynamic_shifting"):
                shift = math.exp(self._mu) if exponential else self._mu
        else:
            shift = self._flow_shift if config.get("use_dynamic_shifting") else float(config.shift)
        return shift * uniform / (1 + (shift - 1) * uniform)

    @property
    def _flow_shift(self) -> float:
        count = len(self.timesteps)
        if count < 2:
            return 1.0
        # sigmas before the shift are evenly spaced from 1 to 1 / count; the last one is far from both ends of the map
        last = self._sigma(count - 1)
        before = 1 / count
        return last * (1 - before) / (before * (1 - last))


def _check_supported(scheduler) -> None:
    kind = type(scheduler).__name__
    if kind not in _SUPPORTED:
        nearest = _NEAREST.get(kind, "DDIMScheduler")
        raise UserError(
            f"{kind}: its steps cannot be replayed yet; the nearest that can is {nearest}: "
            f"pipeline.scheduler = diffusers.{nearest}.from_config(pipeline.scheduler.config)"
        )
    config = scheduler.config
    if config.get("stochastic_sampling"):
        what = "stochastic_sampling False, since it draws from the global random state, which no replay can repeat"
        raise UserError(expected(kind, what, "True"))
    if kind == "EulerAncestralDiscreteScheduler" and config.prediction_type == "sample":
        raise UserError(expected(kind, "prediction_type epsilon or v_prediction", "'sample', which it cannot step"))
    if str(config.get("variance_type")).startswith("learned"):
        what = "a variance_type that is fixed, since the denoiser's prediction is read without a variance"
        raise UserError(expected(kind, what, repr(config.variance_type)))
    if kind in _DPM and (config.algorithm_type != "dpmsolver++" or config.solver_order > 2):
        what = "algorithm_type 'dpmsolver++' of order 1 or 2"
        raise UserError(expected(kind, what, f"{config.algorithm_type!r} of order {config.solver_order}"))
    if kind in _MULTISTEP and (config.prediction_type == "flow_prediction") != bool(config.get("use_flow_sigmas")):
        what = "prediction_type 'flow_prediction' with use_flow_sigmas, and only with it"
        raise UserError(expected(kind, what, f"{config.prediction_type!r}, use_flow_sigmas {config.use_flow_sigmas}"))
    if config.get("solver_p") is not None:
        raise UserError(expected(kind, "solver_p None, since another scheduler's state is not kept", "one"))


def _is_flow(scheduler) -> bool:
    kind = type(scheduler).__name__
    return kind in _FLOW or (kind in _MULTISTEP and bool(scheduler.config.get("use_flow_sigmas")))


def _rows(value, index: torch.Tensor | None):
    """The rows at index (M,) of a tensor that has rows; anything else as it is."""
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 0
    return value[index] if has_rows and index is not None else value
