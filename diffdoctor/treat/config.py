"""Every option of a treatment; light to import."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from diffdoctor.runs.errors import UserError, expected


@dataclass
class TreatConfig:
    """Options of `treat`.

    Attributes:
        method: draft_k (graph through the last grad_steps steps), draft_lv (one step from a re-noised result), drtune
            (spaced steps, denoiser input detached), full (every step), leap (two random steps joined by leaps),
            nft (no gradient through VAE or detector: the pictures are noised again, and the prediction is led away from
            them where they are flagged), grpo (none either: groups of pictures of a prompt are compared pixel by pixel)
            or weighted (no sampling: the offline term alone).
        steps: optimisation steps. More steps continue a finished treatment where final_learning_rate is 1: with any
            other, what each step's rate was depends on how many there are.
        batch_size: pictures sampled per step, over all processes.
        sampling_steps: denoising steps of a roll-out.
        grad_steps: denoising steps that carry a gradient in draft_k and drtune, at most all of them; None: a quarter of
            sampling_steps.
        guidance_scale: of classifier-free guidance (or FLUX's embedded guidance); the same here as in evaluation.
        negative_prompt: what the negative prediction of classifier-free guidance is told; None: nothing.
        leap_discount: leap: how much of the gradient passes through the second step's prediction to the first, in
            [0, 1].
        guidance_scale_2: of a second denoiser (Wan 2.2's, at low noise); None: guidance_scale.
        denoiser: high or low: which of two denoisers (Wan 2.2) is tuned, the one at high noise or at low; None where
            there is one alone.
        cfg_grad: both, or cond to keep the negative prediction out of the graph.
        height: of the sampled pictures, in pixels; None: the pipeline's own.
        width: as height.
        num_frames: of the sampled videos; None: the pipeline's own, 1 where it draws pictures.
        frames_per_call: frames of videos that the detector, which sees pictures, is given at a time; None: all.
        max_sequence_length: of prompts of the long text encoder (SD3, FLUX, FLUX.2), in tokens; None: the
            pipeline's own.
        learning_rate: peak of AdamW, after warm-up, before cosine decay.
        warmup_steps: steps of linear warm-up.
        final_learning_rate: where the cosine decay ends, as a share of learning_rate.
        weight_decay: of AdamW.
        adam_epsilon: of AdamW. A parameter whose gradient is small beside it moves in proportion to its gradient; with
            AdamW's usual 1e-8 even the noise of a cured model's offline term moves every weight by a full step.
        max_grad_norm: gradients are clipped to this norm; 0: not.
        rank: of the LoRA.
        alpha: of the LoRA, whose update is alpha / rank times the product of its factors; None: the rank.
        lora_targets: groups of modules: attention, convolution (U-Nets), feed_forward (transformers); a group that the
            denoiser's kind does not have is left out.
        ema_decay: running average of the LoRA weights, which is then what is measured and saved; 0: none.
        artifact_grad: the gradient's factor where the confidence is 1.
        clean_grad: the gradient's factor where the confidence is 0.
        modulate: output (once per graph step, at the denoiser's output), latents (between steps, which compounds over
            the graph steps) or none.
        artifact_threshold: confidences above it enter the threshold loss, in [0, 1].
        artifact_method: threshold, mean, sum or max: how a confidence map becomes a loss.
        replay_area: a picture is replayed when at least this share of its pixels has a confidence of at least
            replay_confidence; 0: every picture is.
        replay_confidence: see replay_area, in [0, 1].
        old_decay: nft: decay per step of the running average of the LoRA that the old predictions come from; 0: the
            LoRA as it is.
        nft_clean: nft: where the confidence is 0, the target is the old prediction plus this times the way from there
            to what the picture asks for; 0 holds, a positive number teaches the picture, a negative one leads away.
        nft_artifact: nft: likewise where the confidence is 1.
        nft_repeats: nft: random times at which each replayed picture is used.
        anchor_weight: nft: weight of the squared distance to the prediction of the model before the treatment, where
            the map is clean; 0: none; None: 0.4 if no offline pairs hold the model to what it could do, else 0.
        group_size: grpo: pictures of a prompt that are compared; batch_size is a multiple of it.
        grpo_window: grpo: denoising steps that draw noise and are learnt from; where they lie is random.
        grpo_eta: grpo: how much noise they draw; 1 is DDPM's, or DanceGRPO's unit.
        grpo_updates: grpo: optimisation steps taken with the pictures of one step.
        grpo_clip: grpo: how far from 1 a ratio of probabilities counts, where there are several updates.
        grpo_level: grpo: pixel (a ratio for each pixel) or sample (one for each picture).
        kl_weight: grpo: weight of the KL divergence from the model before the treatment; 0: none; None: 0.04
            (Flow-GRPO's) if no offline pairs hold the model to what it could do, else 0.
        reward_weight: grpo: of the reward given to `treat`, relative to the maps.
        offline_weight: of the denoising loss on the pipeline's own training pairs; 0: none; None: 2, for nft and grpo
            0.1 if there are pairs.
        offline_batch_size: pairs per step, over all processes; None: batch_size.
        offline_confidence: pixels of a training picture at or above this confidence are masked out of the offline term.
        offline_dilation: the mask grows by this many pixels.
        map_source: detector; uniform (control: one constant in place of every map: no pixel is masked and the artifact
            loss has no gradient); shuffled (control: every picture gets the map and the gradient of another one).
        evaluate_every: steps between measurements on the fixed pictures; 0: only before and after.
        evaluate_pictures: how many fixed pictures.
        patience: stop after this many measurements without a better one; 0: never.
        good_enough: stop when the flagged area is at most this share of what it was before; 0: never.
        min_sharpness: collapse guard: stop when the sharpness falls below this share of what it was before.
        min_diversity: collapse guard, likewise for the spread of the pictures of one prompt.
        max_skipped: stop with an error after this many steps in a row with a loss or gradient that is not finite.
        checkpoint_every: steps between checkpoints in the output folder; 0: only when interrupted or done.
        micro_batch_size: pictures and pairs that a process works on at a time; None: all of its share. Smaller ones
            need less memory and change the result by rounding alone.
        gradient_checkpointing: recompute the denoiser's, the VAE's and the detector's activations in backward.
        vae_slicing: decode, diagnose and run backward through the VAE picture by picture.
        vae_tiling: decode in tiles of this many pixels a side, recomputed one by one in backward; 0: whole pictures.
        resident_blocks: blocks of the denoiser that are on the device at a time, forward and backward, while the others
            wait in the CPU's memory; they come in the time that copying takes. Needs gradient_checkpointing. None: all.
        encode_batch_size: prompts that are encoded at a time.
        embedding_cache: GiB that the embeddings of the prompts may take on the device, and likewise those of the
            offline pairs' captions and, in memory, their latents and masks; what takes more is written to files, in the
            output folder or a temporary one, and read from there.
        text_encoders: what happens to them once the prompts are encoded: keep, offload (to the CPU until the end) or
            free (taken out of the pipeline for good).
        merge_rollout: sample with the LoRA merged into a copy of the weights: quicker, at the cost of that copy.
        precision: of the computation: fp32, or bf16 or fp16 for autocast over the denoiser, Accelerate's
            mixed_precision (the LoRA, VAE, detector and losses keep their dtype). With fp16 the gradient is scaled
            inside the denoiser, and the scale halved when it overflows.
        attention_backend: of the denoiser: native, xformers or another one that diffusers knows; None: as it is.
        log_with: tensorboard (in the output folder's logs), wandb or none.
        sample_every: steps between pictures of the fixed prompts and seeds in the output folder's samples; 0: with
            every measurement.
        sample_pictures: how many of them; 0: none.
        strict: refuse prompts beyond the token limit instead of cutting them with a warning; the command ends with exit
            code 3 where nothing was flagged.
        seed: of everything random.

    Raises:
        UserError: an option out of its range (a `ValueError`).
    """

    method: str = "draft_k"
    steps: int = 100
    batch_size: int = 32
    sampling_steps: int = 10
    grad_steps: int | None = None
    leap_discount: float = 0.3
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    guidance_scale_2: float | None = None
    denoiser: str | None = None
    cfg_grad: str = "both"
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    frames_per_call: int | None = None
    max_sequence_length: int | None = None
    learning_rate: float = 5e-4
    warmup_steps: int = 5
    final_learning_rate: float = 0.1
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    rank: int = 16
    alpha: float | None = None
    lora_targets: tuple[str, ...] = ("attention", "convolution", "feed_forward")
    ema_decay: float = 0.0
    artifact_grad: float = 1.0
    clean_grad: float = 0.2
    modulate: str = "output"
    artifact_threshold: float = 0.1
    artifact_method: str = "threshold"
    replay_area: float = 0.005
    replay_confidence: float = 0.3
    old_decay: float = 0.5
    nft_clean: float = 0.0
    nft_artifact: float = -1.0
    nft_repeats: int = 1
    anchor_weight: float | None = None
    group_size: int = 8
    grpo_window: int = 3
    grpo_eta: float = 0.7
    grpo_updates: int = 1
    grpo_clip: float = 0.2
    grpo_level: str = "pixel"
    kl_weight: float | None = None
    reward_weight: float = 1.0
    offline_weight: float | None = None
    offline_batch_size: int | None = None
    offline_confidence: float = 0.5
    offline_dilation: int = 1
    map_source: str = "detector"
    evaluate_every: int = 20
    evaluate_pictures: int = 64
    patience: int = 0
    good_enough: float = 0.0
    min_sharpness: float = 0.5
    min_diversity: float = 0.5
    max_skipped: int = 10
    checkpoint_every: int = 50
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    vae_slicing: bool = False
    vae_tiling: int = 0
    resident_blocks: int | None = None
    encode_batch_size: int = 32
    embedding_cache: float = 1.0
    text_encoders: str = "offload"
    merge_rollout: bool = True
    precision: str = "fp32"
    attention_backend: str | None = None
    log_with: str = "tensorboard"
    sample_every: int = 0
    sample_pictures: int = 16
    strict: bool = False
    seed: int = 0

    def __post_init__(self):
        self.lora_targets = tuple(self.lora_targets)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(map(str, allowed))
                raise UserError(expected(name, f"one of {names}", repr(getattr(self, name))))
        for field in fields(self):
            _check_bounds(field.name, field.type.removesuffix(" | None"), getattr(self, field.name))
        if self.method in ("grpo", "leap") and self.sampling_steps < 2:
            raise UserError(expected("sampling_steps", f"at least 2 for {self.method}", self.sampling_steps))
        if self.method == "grpo" and self.batch_size % self.group_size:
            raise UserError(expected("batch_size", f"a multiple of group_size {self.group_size}", self.batch_size))
        if self.resident_blocks is not None and not self.gradient_checkpointing:
            what = "true with resident_blocks, since autograd would keep the blocks' weights"
            raise UserError(expected("gradient_checkpointing", what, self.gradient_checkpointing))
        if self.attention_backend == "":
            raise UserError(expected("attention_backend", "a name, or None for the pipeline's own", "''"))

    @property
    def can_be_longer(self) -> bool:
        """Whether the first steps are the same, however many follow."""
        return self.final_learning_rate == 1


def _check_bounds(name: str, kind: str, value: object) -> None:
    if value is None or kind not in ("int", "float"):
        return
    low, high = _BOUNDS.get(name, (0, None))
    within = low <= value < math.inf and (high is None or value <= high)
    if within and (value > 0 or name not in _POSITIVE):
        return
    if name in _POSITIVE:
        what = "a positive number"
    else:
        what = "a number" if low == -math.inf else f"at least {low}" if high is None else f"a number in [{low}, {high}]"
    if name in _NOT_GIVEN:
        what += f", or None for {_NOT_GIVEN[name]}"
    raise UserError(expected(name, what, repr(value)))


_CHOICES = {
    # methods.METHODS in its order; a test holds them equal
    "method": ("draft_k", "draft_lv", "drtune", "full", "grpo", "leap", "nft", "weighted"),
    "denoiser": (None, "high", "low"),
    "cfg_grad": ("both", "cond"),
    "modulate": ("output", "latents", "none"),
    "artifact_method": ("threshold", "mean", "sum", "max"),
    "grpo_level": ("pixel", "sample"),
    "map_source": ("detector", "uniform", "shuffled"),
    "precision": ("fp32", "bf16", "fp16"),
    "text_encoders": ("keep", "offload", "free"),
    "log_with": ("tensorboard", "wandb", "none"),
}
# what an option that may be left out stands for then
_NOT_GIVEN = {
    "grad_steps": "a quarter of sampling_steps",
    "height": "the pipeline's own",
    "width": "the pipeline's own",
    "num_frames": "the pipeline's own",
    "frames_per_call": "all",
    "max_sequence_length": "the pipeline's own",
    "alpha": "the rank",
    "anchor_weight": "the method's own",
    "kl_weight": "the method's own",
    "offline_weight": "the method's own",
    "offline_batch_size": "batch_size",
    "micro_batch_size": "all of a process's share",
    "resident_blocks": "all",
}
_POSITIVE = ("alpha", "grpo_eta")
_BOUNDS = {
    "steps": (1, None),
    "batch_size": (1, None),
    "sampling_steps": (1, None),
    "grad_steps": (1, None),
    "height": (1, None),
    "width": (1, None),
    "num_frames": (1, None),
    "frames_per_call": (1, None),
    "max_sequence_length": (1, None),
    "offline_batch_size": (1, None),
    "micro_batch_size": (1, None),
    "resident_blocks": (1, None),
    "encode_batch_size": (1, None),
    "rank": (1, None),
    "evaluate_pictures": (2, None),
    "ema_decay": (0, 1),
    "leap_discount": (0, 1),
    "old_decay": (0, 1),
    "group_size": (2, None),
    "grpo_window": (1, None),
    "grpo_eta": (0, 1),
    "grpo_updates": (1, None),
    "grpo_clip": (0, 1),
    "nft_clean": (-math.inf, None),
    "nft_artifact": (-math.inf, None),
    "nft_repeats": (1, None),
    "final_learning_rate": (0, 1),
    "artifact_threshold": (0, 1),
    "replay_area": (0, 1),
    "replay_confidence": (0, 1),
    "offline_confidence": (0, 1),
    "max_skipped": (1, None),
}
