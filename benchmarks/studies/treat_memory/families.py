"""What a step of `nft` keeps for each family's denoiser at its own size, `--families`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks.studies.treat_memory.real import made_in, real_step
from benchmarks.studies.treat_memory.table import head, row, size
from diffdoctor.treat.families import Family
from diffdoctor.treat.families.chroma import ChromaFamily
from diffdoctor.treat.families.flux import FluxFamily
from diffdoctor.treat.families.flux2 import Flux2Family
from diffdoctor.treat.families.krea2 import Krea2Family
from diffdoctor.treat.families.qwen_image import QwenImageFamily
from diffdoctor.treat.families.sana import SanaFamily
from diffdoctor.treat.families.wan import WanFamily
from diffdoctor.treat.families.z_image import ZImageFamily


@dataclass(frozen=True)
class Case:
    """A family's denoiser as diffusers configures it by default, and what it is told of one prompt.

    Attributes:
        title: for the table.
        family: its class.
        denoiser: name of diffusers' class.
        latents: (C, h, w), of a picture of 1024 x 1024, or (C, t, h, w) of a video.
        inputs: name -> shape of each input.
    """

    title: str
    family: type[Family]
    denoiser: str
    latents: tuple[int, ...]
    inputs: dict[str, tuple[int, ...]]


_TEXT = "encoder_hidden_states"
# bytes of a weight in NF4: each 64 share a scale of a byte, and 256 of these one of four
_BNB4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
CASES = {
    "sana": Case("SANA", SanaFamily, "SanaTransformer2DModel", (32, 32, 32), {_TEXT: (1, 300, 2304)}),
    "z_image": Case("Z-Image", ZImageFamily, "ZImageTransformer2DModel", (16, 128, 128), {"cap_feats": (1, 512, 2560)}),
    "chroma": Case(
        "Chroma", ChromaFamily, "ChromaTransformer2DModel", (16, 128, 128),
        {_TEXT: (1, 512, 4096), "text_bias": (1, 512)},
    ),
    "flux": Case(
        "FLUX.1", FluxFamily, "FluxTransformer2DModel", (16, 128, 128),
        {_TEXT: (1, 512, 4096), "pooled_projections": (1, 768)},
    ),
    "krea2": Case("Krea 2", Krea2Family, "Krea2Transformer2DModel", (16, 128, 128), {_TEXT: (1, 512, 12, 2560)}),
    "qwen_image": Case(
        "Qwen-Image", QwenImageFamily, "QwenImageTransformer2DModel", (16, 128, 128), {_TEXT: (1, 512, 3584)}
    ),
    "flux2": Case(
        "FLUX.2 dev", Flux2Family, "Flux2Transformer2DModel", (128, 64, 64),
        {_TEXT: (1, 512, 15360), "guidance": (1,)},
    ),
    "wan": Case(
        "Wan, 81 frames of 480 x 832", WanFamily, "WanTransformer3DModel", (16, 21, 60, 104), {_TEXT: (1, 512, 4096)}
    ),
}  # fmt: skip


def family_row(name: str, device: str = "meta", repeats: int = 3) -> dict:
    """Parameters, and `real_step`'s row of a step of `nft` whose denoiser is checkpointed, in bf16."""
    case, count = CASES[name], []

    def build(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module, Callable, tuple, tuple]:
        import diffusers

        with made_in(dtype):
            denoiser = getattr(diffusers, case.denoiser)()
        linear = sum(m.weight.numel() for m in denoiser.modules() if isinstance(m, torch.nn.Linear))
        count.extend([sum(parameter.numel() for parameter in denoiser.parameters()), linear])
        scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
        config = SimpleNamespace(boundary_ratio=None, expand_timesteps=False)
        family = case.family(SimpleNamespace(transformer=denoiser, patch_size=2, scheduler=scheduler, config=config))

        def predict(latents):
            # a bias of 0 hides no word
            values = {name: torch.zeros if name == "text_bias" else torch.randn for name in case.inputs}
            inputs = {name: values[name](*shape, dtype=dtype) for name, shape in case.inputs.items()}
            return family.denoise(latents, torch.full((1,), 500.0), inputs)

        targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
        return denoiser, torch.nn.Identity(), predict, case.latents, targets

    found = real_step(build, torch.bfloat16, 1, "nft", True, False, device=device, repeats=repeats)
    return {"family": case.title, "parameters": count[0], "linear": count[1], **found}


def families_markdown(rows: list[dict]) -> str:
    """`family_row`'s rows as a Markdown table."""
    lines = head(
        "one picture of 1024 x 1024, or as said",
        "parameters",
        "weights in bf16",
        "int8, fp8",
        "bnb4",
        "kept",
        "peak beside them",
        "operations",
    )
    for found in rows:
        linear, rest = found["linear"], 2 * (found["parameters"] - found["linear"])
        weights = size(2 * linear + rest), size(linear + rest), size(_BNB4 * linear + rest)
        cells = f"{found['parameters'] / 1e9:.1f} B", *weights, size(found["kept"]["denoiser"]), size(found["peak"])
        lines.append(row(found["family"], *cells, f"{found['operations'] / 1e12:,.0f} T"))
    return "\n".join(lines)
