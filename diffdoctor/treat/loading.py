"""Loading a diffusers pipeline, and refusing what is none in one line."""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.runs.files import unicode_path
from diffdoctor.runs.hub import is_hub_id, local_path, near
from diffdoctor.treat.quantization import check_available, quantization_config

# option -> dtype
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The key under which diffusers looks for adapter configurations in a safetensors header.
METADATA_KEY = "lora_adapter_metadata"
# Among them, of a LoRA of another component than the first denoiser: that component.
COMPONENT = "diffdoctor.component"
_SECOND = "transformer_2"
# The schedulers that know nothing else are called so.
_FLOW = "FlowMatch"


def load_pipeline(
    option: str,
    source: str,
    *,
    dtype: str = "fp32",
    vae: str | None = None,
    quantize: str | None = None,
    device: torch.device | None = None,
):
    """A diffusers pipeline from a folder or a hub id, on the CPU.

    Args:
        option: the command line's name for it, for messages.
        source: the folder or id.
        dtype: of `DTYPES`, what its parts are loaded in.
        vae: likewise, of the VAE; None: as the rest.
        quantize: of `QUANTIZED`, how the denoiser's linear layers are held; None: in dtype.
        device: the GPU to which the pipeline is to go, on which bitsandbytes makes its weights; None: the current one.

    Raises:
        UserError: if there is none or it cannot be loaded, or not so quantized here.
    """
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "stages") from None
    folder = local_path(source)
    if not folder.is_dir() and not is_hub_id(source):
        raise UserError(f"--{option} {source}: no such folder{near(source)}")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"--{option} {source}: holds no diffusers pipeline (no model_index.json)")
    check_available(quantize)
    wanted = DTYPES[dtype] if vae in (None, dtype) else {"vae": DTYPES[vae], "default": DTYPES[dtype]}
    # the argument's name changes with diffusers 1.0; 0.42 already knows both and warns of the old one
    name = "dtype" if int(diffusers.__version__.split(".")[0]) >= 1 else "torch_dtype"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            options = {"trust_remote_code": False, "local_files_only": folder.is_dir(), name: wanted}
            is_gpu = quantize is not None and device is not None and device.type == "cuda"
            current = torch.cuda.device(device) if is_gpu else nullcontext()
            with current, unicode_path(folder if folder.is_dir() else source) as origin:
                if quantize is not None:
                    found = diffusers.DiffusionPipeline.load_config(str(origin), local_files_only=folder.is_dir())
                    options["quantization_config"] = quantization_config(quantize, found, DTYPES[dtype])
                return diffusers.DiffusionPipeline.from_pretrained(str(origin), **options)
    except Exception as error:  # each component's loader raises its own
        raise UserError(f"--{option} {source}: cannot be loaded ({first_line(error)})") from error


def replace_scheduler(pipeline, name: str | None) -> None:
    """Put a diffusers scheduler with the configuration of the pipeline's own in its place.

    Where that is one of flow matching, a solver that can be one becomes one, with the same shift.

    Args:
        pipeline: that gets it.
        name: its class; None: the pipeline keeps its own.

    Raises:
        UserError: if diffusers has no such class, or of the two only one is, or can be, of flow matching.
    """
    if not name:
        return
    import diffusers

    scheduler = getattr(diffusers, name, None)
    if scheduler is None or not hasattr(scheduler, "from_config"):
        raise UserError(expected("--scheduler", "a diffusers scheduler such as DDIMScheduler", name))
    own, changes = pipeline.scheduler, {}
    flows, options = type(own).__name__.startswith(_FLOW), inspect.signature(scheduler.__init__).parameters
    if flows or own.config.get("use_flow_sigmas"):
        shift = own.config.get("shift" if flows else "flow_shift", 1.0)
        if "use_flow_sigmas" in options:
            changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        elif name.startswith(_FLOW):
            changes = {"shift": shift}
        else:
            raise UserError(expected("--scheduler", f"one of flow matching, as {type(own).__name__} is here", name))
    elif name.startswith(_FLOW):
        raise UserError(expected("--scheduler", f"none of flow matching, as {type(own).__name__} is not", name))
    pipeline.scheduler = scheduler.from_config(own.config, **changes)


def read_lora(pipeline, source: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a LoRA by diffusers' names, as the pipeline's own loader reads them from any layout.

    Args:
        pipeline: whose loader reads them.
        source: a folder, a file or a hub id.

    Raises:
        UserError: there is none, or the pipeline takes none.
    """
    return _read_lora(pipeline, source)[0]


def _read_lora(pipeline, source: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A LoRA's weights, and what its file says of itself."""
    path, options = _lora_location(source)
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(expected("--lora", "a pipeline that takes a LoRA", type(pipeline).__name__))
    try:
        with unicode_path(path) as place:
            found = pipeline.lora_state_dict(str(place), **options, return_lora_metadata=True)
    except Exception as error:  # diffusers, peft and safetensors raise their own
        raise UserError(f"--lora {source}: does not fit this pipeline ({first_line(error)})") from error
    return found[0], found[-1] or {}


def load_lora(pipeline, source: str | Path, *, adapter: str | None = None, component: str | None = None) -> None:
    """Add a LoRA to a pipeline.

    Args:
        pipeline: to load into.
        source: a folder, a file or a hub id.
        adapter: the adapter's name; None: diffusers chooses one.
        component: the denoiser that it is for; None: the one that the file names, else the first.

    Raises:
        UserError: there is none, it is another component's, or any of its matrices has no layer in the pipeline.
    """
    state, metadata = _read_lora(pipeline, source)
    path, options = _lora_location(source)
    before = _adapters_in_layers(pipeline)
    try:
        with unicode_path(path) as place:
            named = {} if adapter is None else {"adapter_name": adapter}
            # the component that the file says it is for, where it is not the first denoiser
            found = metadata.get(COMPONENT)
            if None not in (found, component) and found != component:
                raise UserError(f"it is for {found}, not for {component}")
            if (component or found) == _SECOND:
                named["load_into_transformer_2"] = True
            pipeline.load_lora_weights(str(place), **options, **named)
    except Exception as error:  # diffusers, peft and safetensors raise their own
        raise UserError(f"--lora {source}: does not fit this pipeline ({first_line(error)})") from error
    wanted = sum(".lora_B" in name or "lora_up" in name or "lora.up" in name for name in state)
    found = _adapters_in_layers(pipeline) - before
    # For matrices without a layer diffusers only warns, and generates untreated pictures.
    if wanted == 0 or found < wanted:
        raise UserError(f"--lora {source}: does not fit this pipeline: {found} of its {wanted} matrices were loaded")


def _lora_location(source: str | Path) -> tuple[str, dict[str, str]]:
    """The folder or hub id of a LoRA, and the options that name its file where it is one."""
    source, path = str(source), local_path(source)
    if not path.exists() and not is_hub_id(source):
        what = "a file, a folder or a hub id such as owner/name"
        raise UserError(expected(f"--lora {source}", what, f"none of these{near(source)}"))
    if path.is_file():
        return str(path.parent), {"weight_name": path.name}
    return (str(path) if path.exists() else source), {}


def _adapters_in_layers(pipeline) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [component for component in pipeline.components.values() if isinstance(component, torch.nn.Module)]
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer))
    return sum(len(getattr(layer, "lora_A", ())) for layer in layers)
