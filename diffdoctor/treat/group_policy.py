"""The method `grpo`: pictures drawn in groups with noise on the way, and a policy gradient from how they compare.

Of each prompt `group_size` pictures are drawn from the same first latents. In a window of denoising steps every picture
gets noise of its own, so that its chance under the model is known; where its map is better than the group's, what was
drawn there is made more likely, where it is worse less (GRPO, arXiv 2402.03300, for flow models 2505.05470, over a
window of steps 2507.21802, with one advantage a pixel 2510.01010 and 2606.06113).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffdoctor.ops.policy_loss import policy_log_prob, policy_loss
from diffdoctor.ops.policy_steps import group_advantages
from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.processes import Processes, seed_of
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.drawing import Drawing, Purpose, chunks
from diffdoctor.treat.reward import Reward
from diffdoctor.treat.rollout import Rollout, picture_generators
from diffdoctor.treat.sampling import Sampling
from diffdoctor.treat.terms import pictures_to_replay


@dataclass
class _Part:
    """Pictures that are worked on together: how they were drawn, the advantages of their pixels, those that count."""

    rollout: Rollout
    advantage: torch.Tensor
    index: torch.Tensor


class GroupPolicy:
    """The pictures of one step, drawn when it is made, and the policy's gradient from them as often as it is asked for.

    Args:
        sampling: predictions and steps.
        drawing: draws and diagnoses.
        config: of the treatment.
        processes: each has whole groups.
        step: of the treatment, from 0.
        reward: a further reward of whole pictures, or None.
        initial: the LoRA that the KL divergence is taken to; empty where it has no weight.

    Attributes:
        replayed: how many of this process's pictures are learnt from: those of groups in which one is flagged.
    """

    def __init__(
        self,
        sampling: Sampling,
        drawing: Drawing,
        config: TreatConfig,
        processes: Processes,
        step: int,
        reward: Reward | None,
        initial: RunningAverage,
    ):
        self.sampling, self.config, self.initial = sampling, config, initial
        generator = torch.Generator().manual_seed(seed_of(config.seed, Purpose.METHOD, step))
        steps = len(sampling.sampler)
        self.window = window_of(config.grpo_window, [s for s in sampling.own_steps if s < steps - 1], generator)
        self.coefs = sampling.sampler.policy_coefs(config.grpo_eta, self.window)
        groups, size = config.batch_size // config.group_size, config.group_size
        numbers = [group * size + i for group in processes.share(groups) for i in range(size)]
        # decoded videos of a whole step may not fit beside one another
        drawn = [self._draw(drawing, step, part, reward is not None) for part in chunks(numbers, drawing.chunk)]
        rollouts, pictures, maps, prompts = zip(*drawn, strict=True) if drawn else ((), (), (), ())
        advantages, counts = self._judge(pictures, maps, [p for part in prompts for p in part], reward, generator)
        self.replayed = int(counts.sum())
        counted = advantages * _per_picture(counts.to(advantages.device), advantages)
        self.parts, first = [], 0
        for rollout in rollouts:
            rows = slice(first, first + len(rollout.final))
            first = rows.stop
            # every process calls a sharded denoiser equally often: pictures that count for nothing go along
            index = torch.nonzero(counts[rows] | sampling.family.is_sharded).flatten()
            self.parts.append(_Part(rollout, counted[rows], index))
        self.old_log_probs: dict[tuple[int, int], torch.Tensor] = {}

    def _draw(self, drawing: Drawing, step: int, numbers: Sequence[int], keeps_pictures: bool):
        config = self.config
        per_step, groups = config.batch_size // config.group_size, [n // config.group_size for n in numbers]
        rows = [drawing.prompt_row(step * per_step + group) for group in groups]
        generators = picture_generators([seed_of(config.seed, Purpose.PICTURES, step, group) for group in groups])
        noise = picture_generators([seed_of(config.seed, Purpose.POLICY, step, number) for number in numbers])
        keep = (*self.window, self.window.stop)
        rollout = drawing.roll_out_from(rows, generators, keep, coefs=self.coefs, noise=noise)
        pictures, confidence = drawing.diagnose(rollout)
        return rollout, pictures if keeps_pictures else None, confidence, [drawing.prompts[row] for row in rows]

    def _judge(self, pictures, maps, prompts, reward, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages (B, 1, H, W) of this process's pictures, those of videos with frames, and which count (B,)."""
        config, size = self.config, self.config.group_size
        if not maps:
            return torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.bool)
        confidence = torch.cat(maps)
        if config.map_source == "shuffled":
            shift = int(torch.randint(1, max(2, len(confidence)), (), generator=generator))
            confidence = confidence.roll(shift, 0)
        flagged = torch.zeros(len(confidence), dtype=torch.bool)
        flagged[pictures_to_replay(confidence, config)] = True
        if config.map_source == "uniform":
            confidence = confidence.mean(tuple(range(2, confidence.ndim)), keepdim=True).expand_as(confidence)
        advantage = group_advantages(-confidence.contiguous(), size, scale=None)
        counts = flagged.view(-1, size).any(1).repeat_interleave(size)
        if reward is not None:
            values = reward(torch.cat(pictures), prompts)
            whole = group_advantages(values, size).to(advantage.device)
            advantage = advantage + config.reward_weight * _per_picture(whole, advantage)
            counts |= True
        return self.sampling.family.maps_for_latents(advantage), counts

    def backward(self) -> float:
        """Run backward through every picture and step of the window; returns the loss.

        The first call takes the model to be the one that drew; later ones compare it with what it was then.
        """
        config, sampling = self.config, self.sampling
        losses = []
        for number, part in enumerate(self.parts):
            if not len(part.index):
                continue
            conditioning = part.rollout.conditioning.rows(part.index)
            index = part.index.to(part.rollout.final.device)
            advantage = part.advantage.index_select(0, index)
            for step in self.window:
                latents, following = (part.rollout.latents[s].index_select(0, index) for s in (step, step + 1))
                model_input, coefs = sampling.sampler.model_input(latents, step), self.coefs[step]
                reference = None
                if config.kl_weight:
                    with torch.no_grad(), self.initial.in_place():
                        reference = sampling.predict(model_input, step, conditioning)
                prediction = sampling.predict(model_input, step, conditioning)
                old = self.old_log_probs.get((number, step))
                if old is None and config.grpo_updates > 1:
                    drawn = policy_log_prob(prediction.detach(), latents, following, coefs=coefs)
                    self.old_log_probs[number, step] = drawn
                loss = policy_loss(
                    prediction, latents, following, old, advantage, coefs=coefs, level=config.grpo_level,
                    clip_range=(config.grpo_clip, config.grpo_clip), ref_pred=reference,
                    kl_weight=config.kl_weight, reduction="sample",
                ).sum() / (config.batch_size * len(self.window))  # fmt: skip
                loss.backward()
                losses.append(loss.detach())
        # read at the end: until then nothing waits for a GPU
        return float(sum(map(float, losses)))


def _per_picture(values: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(B,) values as they broadcast to maps (B, ...)."""
    return values.view(-1, *(1,) * (maps.ndim - 1))


def window_of(length: int, steps: Sequence[int], generator: torch.Generator) -> range:
    """A random window of so many of these denoising steps, which follow one another.

    The last step of all is not to be among them: noise drawn there stays in the picture.
    """
    length = min(length, len(steps))
    first = steps[0] + int(torch.randint(0, len(steps) - length + 1, (), generator=generator))
    return range(first, first + length)
