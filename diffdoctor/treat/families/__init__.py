"""The kinds of pipelines that can be treated, one small file each; a further one is a file and a word below."""

# each module registers its family
from diffdoctor.treat.families import (  # noqa: F401
    chroma,
    flux,
    flux2,
    krea2,
    qwen_image,
    sana,
    sdxl,
    stable_diffusion,
    stable_diffusion_3,
    wan,
    z_image,
)
from diffdoctor.treat.families.base import Family
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.registry import family_of, register_family

__all__ = ["Conditioning", "Family", "family_of", "register_family"]
