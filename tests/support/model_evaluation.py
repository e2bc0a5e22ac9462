"""Small files for `diffdoctor evaluate model`, and the command on them."""

import json

import torch

from diffdoctor.cli import main
from diffdoctor.evaluate.model import sample_pictures
from diffdoctor.evaluate.model.store import PictureFiles
from support.tiny_pipelines import PROMPTS, tiny_pipeline

SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
COUNT = 7


class Means(torch.nn.Module):
    """Three features: the mean of each channel."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean(dim=(2, 3))


def save_lora(family, folder):
    """A LoRA that visibly changes what the tiny pipeline draws."""
    from diffdoctor.treat.families import family_of
    from diffdoctor.treat.lora import add_lora
    from diffdoctor.treat.lora import save_lora as save

    served = family_of(tiny_pipeline(family))
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(served, rank=2, alpha=4, groups=("attention",), seed=0):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    save(served, folder)


def options(files, output, family="sd", /, **changes):
    values = {
        "pipeline": files / family,
        "lora": files / f"{family}-lora",
        "detector": files / "detector",
        "judge": files / "judge",
        "prompts": files / "prompts.jsonl",
        "real": files / "real",
        "features": files / "means.pt",
        "classifier": files / "means.pt",
        "pictures": COUNT,
        "sampling_steps": SAMPLING["num_inference_steps"],
        "guidance_scale": SAMPLING["guidance_scale"],
        "height": 16,
        "width": 16,
        "batch_size": 4,
        "examples": 2,
        "output": output,
        **({"max_sequence_length": 32} if family == "flux" else {}),
        **changes,
    }
    return ["evaluate", "model", *(f"--{name}={value}" for name, value in values.items() if value != "")]


def evaluate(files, output, family="sd", **changes):
    assert main(options(files, output, family, **changes)) == 0
    return json.loads((output / "metrics.json").read_text())


def pictures_of(output, side):
    return PictureFiles(output / "pictures" / side).load(range(COUNT))


def drawn(family, pipeline, count=COUNT):
    more = {"max_sequence_length": 32} if family == "flux" else {}
    prompts = [PROMPTS[number % 3] for number in range(count)]
    return sample_pictures(pipeline, prompts, range(count), batch_size=4, progress=False, **SAMPLING, **more)


def flat(values, known_to=None):
    """Nested figures as one dict; `known_to` leaves out what that one does not have."""
    if not isinstance(values, dict):
        values, known_to = {"": values}, None
    result = {}
    for name, value in values.items():
        if known_to is not None and name not in known_to:
            continue
        if isinstance(value, dict):
            inner = flat(value, None if known_to is None else known_to[name])
            result |= {f"{name}.{key}": number for key, number in inner.items()}
        elif isinstance(value, list):
            result |= {f"{name}.{place}": number for place, number in enumerate(value)}
        elif value is not None:
            result[name] = value
    return result
