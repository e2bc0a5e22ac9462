"""Pictures with bright blocks, a detector that flags what is bright, and pipelines that inpaint."""

import numpy as np
import torch

from support.tiny_pipelines import autoencoder, tiny_pipeline

PROMPT = "a photo of a red square"
QUICK = {"sampling_steps": 3, "tries": 2, "height": 16, "width": 16, "batch_size": 2}


def bright(pictures):
    """Maps (B, 1, H, W): how bright a picture is, steeply."""
    return (12 * (pictures.mean(1, keepdim=True) - 0.7)).sigmoid()


def blocks(height=40, width=56, places=((4, 5, 8, 9), (25, 40, 9, 16))):
    """A dark picture (H, W, 3) uint8 with bright blocks at (y, x, height, width)."""
    picture = np.random.default_rng(0).integers(40, 80, (height, width, 3), dtype=np.uint8)
    for y, x, h, w in places:
        picture[y : y + h, x : x + w] = 245
    return picture


def inpainter(name):
    """A tiny pipeline that inpaints, or of which diffusers makes one."""
    from diffusers import FluxFillPipeline, SD3Transformer2DModel

    if name in ("sd", "sdxl", "flux", "flux2", "qwen_image", "z_image", "chroma"):
        return tiny_pipeline(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "sd3":  # whose inpainting pipeline insists on 16 channels
            pipeline = tiny_pipeline("sd3")
            config = {**pipeline.transformer.config, "in_channels": 16, "out_channels": 16}
            without = {"use_quant_conv": False, "use_post_quant_conv": False}
            vae = autoencoder(16, scaling_factor=0.7, shift_factor=0.06, **without)
            pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config), vae=vae)
            return pipeline
        pipeline = tiny_pipeline("flux")  # FLUX.1 Fill: latents, masked latents and the mask's pixels as channels
        config = {**pipeline.transformer.config, "in_channels": 16 + 16 + 4 * pipeline.vae_scale_factor**2}
        config.pop("_use_default_values", None)  # among which out_channels stands
        transformer = type(pipeline.transformer).from_config({**config, "out_channels": 16})
        parts = {
            name: part
            for name, part in pipeline.components.items()
            if name not in ("image_encoder", "feature_extractor")
        }
        return FluxFillPipeline(**{**parts, "transformer": transformer})
