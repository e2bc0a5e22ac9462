"""A whole training step with the loss written out and with the fused loss: what the loss is worth in it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.ops import formulas, inputs, memory, timing
from benchmarks.ops.implementations import OWN
from benchmarks.ops.registry import dtype_name
from benchmarks.ops.table import STEP as OP
from benchmarks.ops.table import aligned

#: Relative L2 distance of all parameters' gradients between the two losses: fp32 sums in another order; bf16 rounds the
#: gradient of the prediction once, at the same place in both.
SAME_GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Step:
    """A model and its input's shape: `build(small)` gives the module, `predict(model, noisy, timesteps)` calls it."""

    name: str
    shape: tuple[int, ...]
    build: Callable[[bool], torch.nn.Module]
    predict: Callable


def _unet(small):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 32) if small else (32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=16,
    )


def _predict_unet(model, noisy, timesteps):
    prompt_embeds = torch.zeros(noisy.shape[0], 8, 64, device=noisy.device, dtype=noisy.dtype)
    return model(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample


def _diffusers_dit(small):
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=1 if small else 4,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def _predict_dit(model, noisy, timesteps):
    labels = torch.zeros_like(timesteps)
    return model(noisy, timesteps, class_labels=labels).sample


def _plain(channels, size, patch):
    def build(small):
        from benchmarks.ops.models import PlainDiT

        return PlainDiT(channels, size, patch, depth=1 if small else 4)

    return build


STEPS = (
    Step("unet-latent", (4, 4, 32, 32), _unet, _predict_unet),
    Step("dit-latent", (4, 4, 32, 32), _diffusers_dit, _predict_dit),
    Step("plain-dit-latent", (4, 4, 32, 32), _plain(4, 32, 2), lambda model, x, t: model(x, t)),
    Step("plain-dit-pixel", (2, 3, 512, 512), _plain(3, 512, 32), lambda model, x, t: model(x, t)),
)
CUDA_STEPS = (
    Step("unet-latent", (16, 4, 32, 32), _unet, _predict_unet),
    Step("dit-latent", (16, 4, 32, 32), _diffusers_dit, _predict_dit),
    Step("plain-dit-latent", (16, 4, 64, 64), _plain(4, 64, 2), lambda model, x, t: model(x, t)),
    Step("plain-dit-pixel", (4, 3, 2048, 2048), _plain(3, 2048, 32), lambda model, x, t: model(x, t)),
)


class Training:
    """One implementation of a step: its own model from the same seed, its optimizer, fixed inputs."""

    def __init__(self, step: Step, loss: Callable, device: torch.device, dtype: torch.dtype, small: bool):
        torch.manual_seed(0)
        self.model = step.build(small).to(device)
        if dtype != torch.float32:
            self.model = self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.step, self.loss = step, loss
        batch = step.shape[0]
        self.noisy = inputs.normal(step.shape, dtype, device, 1)
        self.target = inputs.normal(step.shape, dtype, device, 2)
        self.confidence = inputs.soft_map(batch, *step.shape[-2:], device)
        self.timesteps = inputs.timesteps(batch, device)

    def forward(self):
        return self.loss(self.step.predict(self.model, self.noisy, self.timesteps), self.target, self.confidence)

    def __call__(self):
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self):
        """All parameters' gradients of one step, in fp64, end to end; nothing is updated."""
        torch.manual_seed(1)  # a model may drop labels at random while it trains
        self.forward().backward()
        flat = torch.cat([p.grad.double().flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return flat

    def loss_alone(self) -> Callable[[], object]:
        """The step's loss and the gradient of its prediction, without the model."""
        with torch.no_grad():
            prediction = self.step.predict(self.model, self.noisy, self.timesteps)
        prediction = prediction.requires_grad_()

        def call():
            return torch.autograd.grad(self.loss(prediction, self.target, self.confidence), prediction)

        return call


def _fused(backend):
    import diffdoctor

    return lambda model_pred, target, confidence: diffdoctor.weighted_loss(
        model_pred, target, confidence, artifact_weight=2.0, backend=backend
    )


def measure(step: Step, device: torch.device, small: bool, seconds: float) -> list[dict]:
    """Rows for the two losses. Raises ValueError where their gradients differ: then nothing is timed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    losses = {"eager": formulas.confidence_mse, OWN[device.type][0]: _fused(OWN[device.type][0])}
    implementations = {name: Training(step, loss, device, dtype, small) for name, loss in losses.items()}
    first, second = (impl.gradients() for impl in implementations.values())
    distance = ((first - second).norm() / first.norm()).item()
    if not distance <= SAME_GRADIENTS[dtype]:
        raise ValueError(f"the two losses give other gradients: relative distance {distance:.1e}")
    clock = timing.clock_for(device)
    whole = timing.interleaved(implementations, clock, seconds)
    alone = timing.interleaved(
        {name: impl.loss_alone() for name, impl in implementations.items()},
        clock,
        min(seconds, 2.0),
    )
    rows = []
    for name, impl in implementations.items():
        used = memory.forward_and_backward(impl.forward, lambda loss: loss.backward(), device)
        impl.optimizer.zero_grad(set_to_none=True)
        loss_us = timing.percentile(alone[name], 0.2) * 1e6
        step_us = timing.percentiles_us(whole[name])
        rows.append(
            _describe(step, device, name, dtype_name(dtype))
            | step_us
            | used
            | {
                "ours": name != "eager",
                "reason": None,
                "rounds": len(whole[name]),
                "grad_error": distance,
                "loss_us": round(loss_us, 3),
                "loss_share": round(loss_us / step_us["p20_us"], 5),
            }
        )
    return rows


def _describe(step, device, backend, dtype):
    return {
        "device": device.type,
        "op": OP,
        "case": step.name,
        "backend": backend,
        "dtype": dtype,
        "shape": list(step.shape),
        "map": "grid",
        "tags": ["step"],
    }


def rows(device: torch.device, small: bool = False, deadline: float | None = None, seconds: float = 12.0) -> list[dict]:
    """Rows for every step that can be built here; for one that cannot, a row with the reason (no diffusers, say)."""
    found = []
    steps = CUDA_STEPS if device.type == "cuda" else STEPS
    for number, step in enumerate(steps):
        left = float("inf") if deadline is None else deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError("left out for lack of time")
            # A third of a step's share: models are built and their gradients compared besides.
            share = left / (len(steps) - number) / 3
            found.extend(measure(step, device, small, min(share, 0.5 if small else seconds)))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            dtype = "bf16" if device.type == "cuda" else "fp32"
            found.append(_describe(step, device, "any", dtype) | {"ours": False, "reason": reason})
    return found


def text(found: list[dict]) -> str:
    lines = [("training step", "shape", "loss", "step p20 ms", "p50 ms", "peak MiB", "loss alone ms", "share of step")]
    for row in found:
        start = (row["case"], "×".join(map(str, row["shape"])), row["backend"])
        if row["reason"]:
            lines.append((*start, row["reason"]))
            continue
        lines.append((
            *start,
            f"{row['p20_us'] / 1e3:.2f}",
            f"{row['p50_us'] / 1e3:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['loss_us'] / 1e3:.3f}",
            f"{row['loss_share']:.2%}",
        ))  # fmt: skip
    return aligned(lines, left=3)
