"""What a treatment changes on a pipeline while it runs, and puts back afterwards."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from diffdoctor.detector.models.base import Detector
from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.families import Family

logger = logging.getLogger(__name__)


def move_modules(pipeline, device: torch.device, *, without: Sequence[torch.nn.Module] = ()) -> None:
    """Move the pipeline's networks to a device, but for those in `without`."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and not any(part is other for other in without):
            part.to(device)


def release_text_encoders(family: Family, how: str) -> None:
    """Let go of the text encoders: `how` is "keep", "offload" (to the CPU) or "free" (out of the pipeline).

    The tokenizers stay. After "free" the pipeline takes prompt embeddings alone, until it is loaded again.
    """
    for name in family.text_encoder_names:
        encoder = getattr(family.pipeline, name, None)
        if encoder is None:
            continue
        if how == "offload":
            encoder.to("cpu")
        elif how == "free":
            setattr(family.pipeline, name, None)
    if how != "keep" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def restore_text_encoders(family: Family, device: torch.device) -> None:
    """Bring those that are still there back to the device, or leave them on the CPU where they do not fit."""
    try:
        for encoder in family.text_encoders:
            encoder.to(device)
    except torch.OutOfMemoryError:
        for encoder in family.text_encoders:
            encoder.to("cpu")
        logger.warning(
            "the text encoders stay on the CPU: there is no room for them beside the denoiser; "
            "pipeline.enable_model_cpu_offload() draws with both"
        )


@contextmanager
def memory_options(family: Family, config: TreatConfig, detector: torch.nn.Module | None = None) -> Iterator[None]:
    """Inside, denoiser, VAE and detector save memory and compute as the options ask; afterwards they are as before.

    Args:
        family: of the pipeline.
        config: of the treatment.
        detector: the one with a gradient; None: there is none.
    """
    vae, undo = family.vae, []
    try:
        if config.gradient_checkpointing:
            for module in (*family.denoisers, vae):
                if not module._supports_gradient_checkpointing:
                    undo.append(recompute(module.decoder))
                elif not module.is_gradient_checkpointing:
                    module.enable_gradient_checkpointing()
                    undo.append(module.disable_gradient_checkpointing)
            if detector is not None:
                parts = detector.recomputable() if isinstance(detector, Detector) else [detector]
                undo += [recompute(part) for part in parts]
        if config.vae_slicing or config.vae_tiling:
            undo.append(_save_memory_in_vae(vae, config))
        if config.attention_backend is not None:
            undo += [_set_attention_backend(denoiser, config.attention_backend) for denoiser in family.denoisers]
        if config.precision != "fp32":
            family.autocast_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float16
        yield
    finally:
        family.autocast_dtype = family.gradient_scale = None
        for action in reversed(undo):
            action()


def _save_memory_in_vae(vae, config: TreatConfig):
    names = ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    video_names = (
        "use_slicing", "use_tiling", "spatial_compression_ratio", "tile_sample_min_height", "tile_sample_min_width",
        "tile_sample_stride_height", "tile_sample_stride_width",
    )  # fmt: skip
    if takes_videos := all(hasattr(vae, name) for name in video_names):
        names = video_names
    elif not all(hasattr(vae, name) for name in names):
        option = "vae_tiling" if config.vae_tiling else "vae_slicing"
        raise UserError(expected(option, "a VAE with slices and tiles such as AutoencoderKL", type(vae).__name__))
    before = {name: getattr(vae, name) for name in names}
    undo_recomputing = None
    vae.use_slicing = vae.use_slicing or config.vae_slicing
    if config.vae_tiling:
        scale = vae.spatial_compression_ratio if takes_videos else vae.tile_sample_min_size // vae.tile_latent_min_size
        if config.vae_tiling % (4 * scale):
            what = f"a multiple of {4 * scale} pixels, for tiles that overlap by a quarter"
            raise UserError(expected("vae_tiling", what, config.vae_tiling))
        vae.use_tiling = True
        if takes_videos:
            vae.tile_sample_min_height = vae.tile_sample_min_width = config.vae_tiling
            vae.tile_sample_stride_height = vae.tile_sample_stride_width = config.vae_tiling * 3 // 4
        else:
            vae.tile_sample_min_size, vae.tile_latent_min_size = config.vae_tiling, config.vae_tiling // scale
        undo_recomputing = recompute(vae.decoder)

    def undo():
        if undo_recomputing is not None:
            undo_recomputing()
        for name, value in before.items():
            setattr(vae, name, value)

    return undo


def recompute(module: torch.nn.Module) -> Callable[[], None]:
    """Make a module keep its inputs alone for backward, and nothing that it computes; gives what undoes it."""
    if "forward" in vars(module):
        return lambda: None
    forward = module.forward

    def recomputed(*args, **kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return forward(*args, **kwargs)
        # decoders of videos keep in these lists what the next frames need: a frame finds them as they were, also when
        # it is recomputed, and the next one as this one has left them
        lists = {name: value for name, value in kwargs.items() if isinstance(value, list)}
        before = {name: list(value) for name, value in lists.items()}

        def call(*args):
            after = {name: list(value) for name, value in before.items()}
            return forward(*args, **{**kwargs, **after}), after

        found, after = checkpoint(call, *args, use_reentrant=False)
        for name, value in lists.items():
            value[:] = after[name]
        return found

    module.forward = recomputed
    return lambda: module.__dict__.pop("forward", None)


def _set_attention_backend(denoiser, name: str):
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    processors = getattr(denoiser, "attn_processors", {})
    active = _AttentionBackendRegistry._active_backend
    # denoisers of the older kind choose a processor for each backend, the newer ones dispatch inside one processor
    older = [
        m for m in denoiser.modules() if isinstance(m, Attention) and not hasattr(m.processor, "_attention_backend")
    ]
    if older and name not in ("native", "xformers"):
        what = f"native or xformers for {type(denoiser).__name__}"
        raise UserError(expected("attention_backend", what, repr(name)))
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise missing_extra("xformers", "xformers")
    try:
        if older and name == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
        elif older:
            # the joint processors of transformers have no other kind than PyTorch's own
            if isinstance(denoiser, UNet2DConditionModel):
                denoiser.set_attn_processor(AttnProcessor2_0())
        else:
            denoiser.set_attention_backend(name)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"attention_backend: {name} cannot be used here ({first_line(error)})") from error

    def undo():
        if older:
            denoiser.set_attn_processor(dict(processors))
        else:
            denoiser.reset_attention_backend()
            _AttentionBackendRegistry.set_active_backend(active)

    return undo
