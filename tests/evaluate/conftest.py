"""What the tests of `diffdoctor evaluate model` share: its input files, and one run."""

import json

import numpy as np
import pytest
import torch

from diffdoctor.detector import ConvDetector
from support.model_evaluation import Means, evaluate, save_lora
from support.tiny_pipelines import PROMPTS, tiny_pipeline


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A tiny pipeline, a LoRA, two detectors, prompts, real pictures and a network of features, as files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("evaluate")
    for family in ("sd", "flux"):
        tiny_pipeline(family).save_pretrained(folder / family)
        save_lora(family, folder / f"{family}-lora")
    for seed, name in enumerate(("detector", "judge")):
        torch.manual_seed(seed)
        detector = ConvDetector((8, 8))
        # Some pixels above 0.5, others below.
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.mul_(1.5)
        detector.save_pretrained(folder / name)
    rows = [{"prompt": prompt, "category": prompt.split()[-1], "label": "1"} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    rng = np.random.default_rng(0)
    (folder / "real").mkdir()
    for number in range(9):
        picture = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(picture).save(folder / "real" / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def evaluated(files, tmp_path_factory):
    """The folder of a finished run on `files`, and its figures."""
    output = tmp_path_factory.mktemp("evaluated") / "sd"
    return output, evaluate(files, output)
