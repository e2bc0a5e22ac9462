"""Commands of diffdoctor, and a detector's training, in one process or in each of a group.

Has imported what the other programs of tests need that `support.warm` forks from it.
"""

import importlib
import json

import torch

from diffdoctor.cli import main as command
from support.detector import twenty_steps
from support.tiny_pipelines import tiny_pipeline


def warm_up():
    """Import what the runs would, each for itself."""
    for name in (
        "accelerate.utils",
        "jinja2",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "peft",
        "PIL.PngImagePlugin",
        "pyarrow.parquet",
        "pycocotools.cocoeval",
        "scipy.ndimage",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)
    importlib.import_module("tensorboard.compat").tf.io.gfile.GFile  # noqa: B018 (imports)
    for family in ("sd", "flux"):
        tiny_pipeline(family)


def main(name, *arguments):
    """Run the command `name`; or train for `twenty_steps` of each kind, and write the losses to a file."""
    torch.set_num_threads(1)
    if name == "twenty_steps":
        losses = {kind: twenty_steps(kind) for kind in ("conv", "segformer")}
        if torch.distributed.get_rank() == 0:
            with open(arguments[0], "w") as file:
                json.dump({"processes": torch.distributed.get_world_size(), **losses}, file)
    else:
        assert command([name, *map(str, arguments)]) == 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
