"""Builds csrc/cuda as host C++ (tests/cuda_shim) and puts it in the place of the native module."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.cache import digest, kept, native_headers, native_sources
from support.paths import ROOT, TESTS

SHIM = TESTS / "cuda_shim"
SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
BINDINGS = tuple(sorted((ROOT / "csrc" / "bind" / "cuda").glob("*.cpp")))
# A Raw copies words that its element type does not fill, which GCC takes for a mistake.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
# A GPU faults on a vector that is not aligned; a CPU does not, and is made to.
ALIGNED = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
FLAGS = ("-std=c++17", *WARNINGS, "-fno-strict-aliasing", "-pthread")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler (looked at CXX and for g++, c++)")
    return found


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def compile_objects(sources, *flags) -> list[pathlib.Path]:
    """One object per source, two at a time; one whose source and headers have not changed is kept."""
    cxx = compiler()
    shared = [run(cxx, "--version"), *FLAGS, *flags, *native_headers(ROOT / "csrc", SHIM)]

    def one(source: pathlib.Path) -> pathlib.Path:
        name = f"{source.name}.o"

        def build(folder: pathlib.Path) -> pathlib.Path:
            command = (cxx, *FLAGS, *flags, f"-I{SHIM}", f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", source)
            run(*command, "-o", folder / name)
            return folder / name

        return kept(name, digest(*shared, str(source.relative_to(ROOT)), source), build)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def sources_key(*flags: str) -> str:
    """The hash of all that a build of the sources depends on."""
    return digest(run(compiler(), "--version"), *FLAGS, *flags, *native_sources(ROOT / "csrc", SHIM))


def build_module():
    """The native module's CUDA half, its kernels running on the CPU; built where the sources have changed."""
    pybind11 = pytest.importorskip("pybind11")
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    if not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("Python.h is not installed")
    flags = ("-O1", "-fPIC", "-fvisibility=hidden", *ALIGNED, *includes)
    name = f"_cuda_shim{sysconfig.get_config_var('EXT_SUFFIX')}"

    def build(folder: pathlib.Path) -> pathlib.Path:
        objects = compile_objects(SOURCES, *flags)
        # In one file, since pybind11's headers are most of each; it takes twice the time to optimise, and is not what
        # is tested.
        together = folder / "bindings.cpp"
        together.write_text("".join(f'#include "{path}"\n' for path in (*BINDINGS, SHIM / "module.cpp")))
        command = (compiler(), *FLAGS, *flags, "-O0", f"-I{SHIM}", f"-I{ROOT / 'csrc'}", "-c", together)
        run(*command, "-o", folder / "bindings.o")
        run(compiler(), "-shared", "-pthread", *objects, folder / "bindings.o", "-o", folder / name)
        return folder / name

    library = kept(name, sources_key(*flags, pybind11.__version__), build)
    spec = importlib.util.spec_from_file_location("_cuda_shim", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_race(*flags: str) -> pathlib.Path:
    """A program that launches the kernels from several threads; the first of the flags is given to the linker too."""

    def build(folder: pathlib.Path) -> pathlib.Path:
        # race.cpp has no policy loss, which would be a third of the compiler's work
        launched = [source for source in SOURCES if not source.name.startswith("policy_")]
        objects = compile_objects((*launched, SHIM / "race.cpp"), *flags)
        run(compiler(), *flags[:1], "-pthread", *objects, "-o", folder / "race")
        return folder / "race"

    return kept("race", sources_key(*flags), build)
