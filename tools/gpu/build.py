"""Build the native module with nvcc alone, where cmake is missing: `python -m tools.gpu.build ARCH [OUTPUT]`.

For `tools.gpu`, not for installing: one GPU architecture, the CPU backend for the least common instruction set.
pybind11's headers come from its package or from torch, which carries them.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

from benchmarks.ops.machine import ROOT
from tools.gpu.sass import find_nvcc


def pybind11_include() -> str:
    """The folder that holds pybind11/pybind11.h. Raises FileNotFoundError where neither package has it."""
    for package in ("pybind11", "torch"):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            folder = pathlib.Path(found.origin).parent / "include"
            if (folder / "pybind11" / "pybind11.h").exists():
                return str(folder)
    raise FileNotFoundError("pybind11/pybind11.h is neither in pybind11 nor in torch")


def build(arch: str, output: pathlib.Path) -> None:
    """Compile csrc/ for compute capability `arch` (90) into the module `output`. Raises RuntimeError as nvcc does."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was found neither on PATH nor in /usr/local/cuda")
    csrc = ROOT / "csrc"
    sources = [*sorted(csrc.rglob("*.cpp")), *sorted(csrc.rglob("*.cu"))]
    common = [
        nvcc, "-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{arch}",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-fopenmp",
        "-I", str(csrc), "-I", pybind11_include(), "-I", sysconfig.get_paths()["include"],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        objects = [pathlib.Path(folder) / f"{i}-{source.name}.o" for i, source in enumerate(sources)]

        def compile_one(pair):
            return run([*common, "-c", str(pair[0]), "-o", str(pair[1])])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(sources, objects, strict=True)))
        module = pathlib.Path(folder) / output.name
        run([nvcc, "-shared", "-cudart", "static", "-Xcompiler", "-fopenmp", *map(str, objects), "-o", str(module)])
        temporary = output.with_name(output.name + ".part")
        temporary.write_bytes(module.read_bytes())
        temporary.replace(output)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError((errors or done.stderr.strip().splitlines() or ["nvcc failed"])[0])


def main() -> int:
    arch = sys.argv[1]
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "diffdoctor"
    build(arch, folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    info = {"requested": "cuda", "built": ["cpu", "cuda"], "left_out": {}, "cuda_architectures": f"{arch}-real"}
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, FileNotFoundError) as error:
        sys.exit(f"the build with nvcc alone failed: {error}")
