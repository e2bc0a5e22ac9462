"""The tensors of a case: shapes and dtypes of real training, values from a fixed seed."""

import torch
import torch.nn.functional as F

from benchmarks.ops.formulas import ARTIFACT_THRESHOLD, POLICY_STEP
from diffdoctor import Packed, reference


def generator(device, seed=0):
    return torch.Generator(device=device).manual_seed(seed)


def normal(shape, dtype, device, seed):
    return torch.randn(shape, generator=generator(device, seed), device=device, dtype=torch.float32).to(dtype)


def soft_map(batch, height, width, device, seed=7):
    """A soft map (B, 1, H, W) in [0, 1]: blobs over a quarter of the picture or so, exactly 0 elsewhere."""
    coarse = torch.rand((batch, 1, 8, 8), generator=generator(device, seed), device=device)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return ((smooth - 0.55) * 5.0).clamp(0.0, 1.0)


def alphas_cumprod(device):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
    return torch.cumprod(1.0 - betas, 0)


def timesteps(batch, device):
    return torch.linspace(40, 960, batch, device=device).long()


def pixels(case, factor=8):
    return tuple(side * factor for side in case.shape[-2:])


def pair(case, device):
    tensors = {
        "model_pred": normal(case.shape, case.dtype, device, 1),
        "target": normal(case.shape, case.dtype, device, 2),
    }
    size = {"none": None, "grid": case.shape[-2:], "pixel": pixels(case)}[case.map]
    if size is not None:
        tensors["confidence"] = soft_map(case.shape[0], *size, device)
    return tensors


def min_snr(case, device):
    return pair(case, device) | {
        "timesteps": timesteps(case.shape[0], device),
        "alphas_cumprod": alphas_cumprod(device),
    }


def kohya(case, device):
    batch = case.shape[0]
    return {
        "model_pred": normal(case.shape, case.dtype, device, 1),
        "target": normal(case.shape, case.dtype, device, 2),
        "alpha_mask": soft_map(batch, *pixels(case), device)[:, 0],
        "timesteps": timesteps(batch, device),
        "alphas_cumprod": alphas_cumprod(device),
        "loss_weights": torch.linspace(0.5, 1.0, batch, device=device),
    }


def onetrainer(case, device):
    return {
        "model_pred": normal(case.shape, case.dtype, device, 1),
        "target": normal(case.shape, case.dtype, device, 2),
        "prior": normal(case.shape, case.dtype, device, 3),
        "mask": soft_map(case.shape[0], *case.shape[-2:], device),
        "loss_weights": torch.linspace(0.5, 1.0, case.shape[0], device=device),
    }


def _flow_triple(case, device):
    """Latents and noise for a prediction in tokens (B, h·w, 4C) or in latents' own shape."""
    shape = case.shape
    if len(shape) == 3:
        side = 2 * int(shape[1] ** 0.5)
        latents = (shape[0], shape[2] // 4, side, side)
    else:
        latents = shape
    return {
        "model_pred": normal(shape, case.dtype, device, 1),
        "latents": normal(latents, case.dtype, device, 2),
        "noise": normal(latents, case.dtype, device, 3),
    }


def flow(case, device):
    tensors = _flow_triple(case, device)
    tensors["weighting"] = torch.linspace(0.5, 1.5, case.shape[0], device=device)
    if case.map == "grid":
        tensors["confidence"] = soft_map(case.shape[0], *tensors["latents"].shape[-2:], device)
    return tensors


def contrastive(case, device):
    return _flow_triple(case, device) | {
        "old_pred": normal(case.shape, case.dtype, device, 4),
        "confidence": soft_map(case.shape[0], *case.shape[-2:], device),
    }


def simpletuner(case, device):
    mask = soft_map(case.shape[0], *pixels(case), device)
    return _flow_triple(case, device) | {
        "timesteps": timesteps(case.shape[0], device).float(),
        "conditioning": (mask * 2.0 - 1.0).expand(-1, 3, -1, -1).contiguous(),
    }


#: A confidence so near the threshold counts or not as it is rounded, and changes the gradient by more than a rounding.
NEAR = 1e-6


def logits(case, device, size):
    """Logits that are moved where, up-sampled to `size`, a pixel's confidence is near the official threshold."""
    found = 2.0 * normal(case.shape, case.dtype, device, 1) - 1.0
    for _ in range(100):
        enlarged = F.interpolate(found.double(), size=size, mode="bilinear", align_corners=False)
        near = (torch.sigmoid(enlarged) - ARTIFACT_THRESHOLD).abs() < NEAR
        if not near.any():
            return {"logits": found}
        found = torch.where(F.adaptive_max_pool2d(near.double(), found.shape[-2:]) > 0, found + 0.05, found)
    raise RuntimeError("some pixels stay near the threshold")


def modulation(case, device):
    return {
        "x": normal(case.shape, case.dtype, device, 1),
        "confidence": soft_map(case.shape[0], *pixels(case), device),
    }


def policy(case, device):
    """A step that was drawn; the old log-probability is so far from the new one that no rounding crosses a bound."""
    a, b, sigma = POLICY_STEP
    pred, latents, noise = (normal(case.shape, case.dtype, device, seed) for seed in (1, 2, 3))
    drawn = (a * latents.float() + b * pred.float() + sigma * noise.float()).to(case.dtype)
    side = 2 * int(case.shape[1] ** 0.5)
    layout = Packed(side, side) if len(case.shape) == 3 else None
    old = reference.policy_log_prob(pred, latents, drawn, coefs=POLICY_STEP, layout=layout)
    step = normal(old.shape, torch.float32, device, 4)
    return {
        "model_pred": pred,
        "latents": latents,
        "next_latents": drawn,
        "old_log_prob": old + torch.where(step > 0, 0.05, 0.3) * step.sign(),
        "advantage": normal((case.shape[0], 1, *old.shape[-2:]), torch.float32, device, 5),
    }
