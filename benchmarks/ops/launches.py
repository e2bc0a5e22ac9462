"""How many device operations a call is made of: counted ATen calls on a CPU, kernels seen by the profiler on a GPU."""

import contextlib
import json
import pathlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: They launch nothing: views, allocation, metadata.
_FREE = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach", "aten::alias",
    "aten::view", "aten::_unsafe_view", "aten::expand", "aten::permute", "aten::transpose", "aten::t",
    "aten::unsqueeze", "aten::squeeze", "aten::select", "aten::slice", "aten::split", "aten::unbind",
    "aten::as_strided", "aten::lift_fresh", "aten::is_same_size",
}  # fmt: skip
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero"}


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in _WAITS:
            self.waits += 1
        elif name not in _FREE and not func.is_view:
            self.ops += 1
        return func(*args, **(kwargs or {}))


def counted(call) -> dict[str, int]:
    """{"ops": ATen calls of forward and backward that compute, a lower bound of a GPU's launches; "waits": of them,
    reads to the host}. Diffdoctor's own kernels are no ATen calls: add the calls into a backend, see `own_calls`."""
    counter = _Counter()
    with counter:
        call()
    return {"ops": counter.ops, "waits": counter.waits}


@contextlib.contextmanager
def own_calls(module):
    """Yields a list of the names of a backend module's functions as they are called; each is one launch on a GPU."""
    names: list[str] = []
    usual = ("weighted_loss", "weight_mean", "scale_gradient", "artifact_loss", "artifact_loss_backward")
    kept = {name: getattr(module, name) for name in getattr(module, "LAUNCHES", usual) if hasattr(module, name)}

    def watched(name):
        def function(*arguments):
            names.append(name)
            return kept[name](*arguments)

        return function

    for name in kept:
        setattr(module, name, watched(name))
    try:
        yield names
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


#: {case: {implementation: what `seen_by_profiler` found}}, where another process has looked: once loaded, the
#: profiler slows every later launch of its process down.
_known: dict[str, dict[str, dict]] = {}


def load(path: pathlib.Path) -> None:
    """Take from a file what `of_call` is to answer."""
    _known.update(json.loads(path.read_text()))


def of_call(case: str, call) -> dict:
    """Launches and waits of a call on a GPU: known, or seen now, or the waits alone where the profiler sees nothing."""
    known = _known.get(case, {}).get(call.implementation.name, {})
    if known and "error" not in known:
        return known
    try:
        return seen_by_profiler(call)
    except Exception as error:
        waits = {} if call.implementation.name == "compile" else {"waits": counted(call)["waits"]}
        return waits | {"launches_error": f"{type(error).__name__}: {str(error)[:200]}"}


def seen_by_profiler(call) -> dict[str, int]:
    """{"launches": kernels, copies and fills on the GPU of one call, "waits": of them, copies to the host}."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in on_device if not getattr(event, "is_user_annotation", False)]
    if not names:
        raise RuntimeError("the profiler saw nothing on the GPU")
    return {"launches": len(names), "waits": sum("DtoH" in name for name in names)}
