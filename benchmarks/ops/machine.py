"""What a row says about where it was measured: commit, machine, versions."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "diffusers")


def _git(*arguments) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def commit() -> dict:
    """{"commit": the hash or None outside git, "dirty": whether the code differs from it (docs do not count)}"""
    code = ("diffdoctor", "kernels", "csrc", "benchmarks/*.py", "tools/*.py", "CMakeLists.txt")
    changed = _git("status", "--porcelain", "--", *code)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cores() -> int:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    return found


def machine(device: torch.device) -> dict:
    """The device under test by name, with what else moves its figures."""
    described = {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": cpu_capability(),
        "os": platform.platform(terse=True),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["gpu_capability"] = f"{properties.major}.{properties.minor}"
    return described


def slug(device: torch.device) -> str:
    """The machine as part of a file name."""
    described = machine(device)
    name = described.get("gpu") or f"{described['cpu']} {described['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def context(device: torch.device) -> dict:
    """Everything that a row of the history carries about its surroundings."""
    return {**commit(), "machine": machine(device), "versions": versions()}
