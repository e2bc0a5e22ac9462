"""The frozen denoiser spread over the processes, as `accelerate launch --use_fsdp` asks for (PyTorch's FSDP2).

Only the frozen weights are sharded. The LoRA stays whole on every process, so that gradients, optimiser, checkpoints
and files are those of an ordinary run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.processes import Processes
from diffdoctor.treat.families import Family


def wants_sharding(processes: Processes) -> bool:
    """Whether Accelerate's configuration asks for FSDP and there is more than one process."""
    return processes.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def shard_denoiser(family: Family, parameters: Sequence[torch.nn.Parameter], processes: Processes) -> None:
    """Shard the denoiser's frozen weights over all processes, block by block.

    Of Accelerate's FSDP options these hold: the wrap policy (the named transformer classes, else the model's own
    `_no_split_modules`; or a least number of parameters), `reshard_after_forward` and `offload_params`.

    Args:
        family: whose denoiser is sharded.
        parameters: the LoRA's, which stay as they are, on the process's device.
        processes: that share the weights.

    Raises:
        UserError: for FSDP's first version.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        what = "2 (fsdp_version: 2 in Accelerate's configuration)"
        raise UserError(expected("FSDP's version", what, plugin.fsdp_version))
    options = {
        "mesh": init_device_mesh(processes.device.type, (processes.count,)),
        "offload_policy": plugin.cpu_offload,
        "ignored_params": set(parameters),
    }
    blocks = [module for module in family.denoiser.modules() if _is_block(module, family.denoiser, plugin)]
    # a module is sharded before the one that holds it, which then takes what is left
    for block in reversed(blocks):
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(family.denoiser, **options)
    with torch.no_grad():
        for parameter in parameters:
            parameter.data = parameter.data.to(processes.device)
    family.is_sharded = True


def _is_block(module: torch.nn.Module, denoiser: torch.nn.Module, plugin) -> bool:
    if module is denoiser:
        return False
    if plugin.min_num_params:
        return sum(p.numel() for p in module.parameters()) >= plugin.min_num_params and not isinstance(
            module, torch.nn.ModuleList
        )
    named = plugin.transformer_cls_names_to_wrap or getattr(denoiser, "_no_split_modules", None) or ()
    return type(module).__name__ in named
