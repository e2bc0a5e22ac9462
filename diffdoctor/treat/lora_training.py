"""What turns gradients of the LoRA into steps: optimizer, learning rate, fp16's scale, running average."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.training.ema import RunningAverage, put
from diffdoctor.training.schedule import warmup_cosine
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.methods import METHODS

logger = logging.getLogger(__name__)


class LoraTraining:
    """The LoRA's parameters and everything that changes from step to step with them.

    Args:
        parameters: the LoRA's.
        config: of the treatment.
        device: of the computation.

    Attributes:
        average: the running average of the parameters.
        old: the running average that a method's old predictions come from; empty where it has none.
        initial: the parameters before the first step; empty where nothing is held to them.
        skipped: steps left out so far, because a loss or gradient was not finite.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], config: TreatConfig, device: torch.device):
        self.parameters, self.config, self.device = parameters, config, device
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            eps=config.adam_epsilon,
        )
        # the scaler's skipping and halving for fp16; for other precisions its scale is 1 and it changes nothing
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = RunningAverage(parameters, config.ema_decay)
        self.old = RunningAverage(parameters, config.old_decay if METHODS[config.method].has_old else 0, warm_up=False)
        # made before a checkpoint is loaded, and the same in every run: it need not be stored
        self.initial = RunningAverage(parameters, float(bool(config.anchor_weight or config.kl_weight)))
        self.skipped = self.skipped_in_a_row = 0

    def begin(self) -> torch.Tensor | None:
        """Before a step's gradients: clears the last ones and gives their scale, or None where they need none."""
        self.optimizer.zero_grad(set_to_none=True)
        # also makes the scaler's state, which it does on first use
        scale = self.scaler.scale(torch.ones((), device=self.device))
        return scale if self.scaler.is_enabled() else None

    def update(self, step: int, loss: float) -> tuple[float, float]:
        """Change the LoRA by the gradients of a step, or leave it as it is where they are not finite.

        Args:
            step: counted from 0.
            loss: of the step.

        Returns:
            The gradient's norm and the learning rate.

        Raises:
            UserError: if `max_skipped` steps in a row were not finite.
        """
        config = self.config
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf))
        schedule = warmup_cosine(step, config.warmup_steps, config.steps, config.final_learning_rate)
        rate = config.learning_rate * schedule
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(self.optimizer)
            self.average.update(step)
            self.old.update(step)
        else:
            self._skip(step, loss, norm)
        self.scaler.update()
        return norm, rate

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning("step %d skipped: loss %s, gradient norm %s", step + 1, loss, norm)
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that was not finite: "
                "lower learning_rate, or use precision fp32 and a VAE that is safe in its dtype"
            )

    def state_dict(self, *, is_over: bool) -> dict:
        """For a checkpoint; where the treatment is over without the optimizer, which is of no more use."""
        return {
            "lora": [p.detach() for p in self.parameters],
            "average": self.average.values,
            "old": [] if is_over else self.old.values,
            "optimizer": None if is_over else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": [self.skipped, self.skipped_in_a_row],
        }

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` gave."""
        put(state["lora"], self.parameters)
        self.average.load(state["average"])
        if state["optimizer"] is not None:
            self.old.load(state["old"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
