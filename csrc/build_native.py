"""The setuptools commands that build the native module with CMake.

DIFFDOCTOR_BUILD says what is wanted: `auto` (what this machine can build, never failing), `cpu`, `cuda` (both must
succeed, the latter with nvcc) or `none`. What was built and what was left out, with the reason, is written to
`diffdoctor/_build_info.json`, which `diffdoctor env` shows: pip hides the output of a build.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHOICES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
INFO = "_build_info.json"
NOT_FOUND = "was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence):
        super().__init__(f"diffdoctor: {sentence}")


def requested():
    value = os.environ.get("DIFFDOCTOR_BUILD", "").strip().lower() or "auto"
    if value not in CHOICES:
        raise BuildError(f"DIFFDOCTOR_BUILD: expected one of {', '.join(CHOICES)}, got {value!r}")
    return value


def find_compiler():
    """The C++ compiler that CMake will take, or None: CXX with its arguments; others where it is not set.

    On Windows that is Visual Studio's, which CMake finds by itself: it is on PATH in its own command prompt alone.
    """
    chosen = os.environ.get("CXX", "").strip()
    if os.name == "nt" and not chosen and has_visual_studio():
        return "cl"
    for name in (chosen,) if chosen else ("c++", "g++", "clang++", "cl"):
        if shutil.which(name) or shutil.which(name.split()[0]):
            return name
    return None


def has_visual_studio():
    programs = os.environ.get("PROGRAMFILES(X86)", "")
    return pathlib.Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe").is_file()


def find_nvcc():
    """The path of nvcc, or None: CUDACXX, CUDA_HOME or CUDA_PATH, PATH, then /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = "nvcc.exe" if os.name == "nt" else "nvcc"
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/{nvcc}" for home in homes if home), "nvcc"]
    for candidate in [*candidates, "/usr/local/cuda/bin/nvcc"]:
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    return None


def cuda_architectures(nvcc):
    """CMAKE_CUDA_ARCHITECTURES: the user's, or our list trimmed to what nvcc knows, with PTX of the newest."""
    chosen = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
    if chosen:
        return chosen
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listing)}
    usable = [arch for arch in ARCHITECTURES if arch in known] if known else [80]
    return ";".join([*(f"{arch}-real" for arch in usable), f"{usable[-1]}-virtual"])


def write_info(folder, info):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).write_text(json.dumps(info, indent=2) + "\n")


def _version_line(command, pattern):
    try:
        output = subprocess.run([*command.split(), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return command
    found = re.search(pattern, output)
    return found.group(0) if found else command


def _first_error(output):
    """The first line that speaks of an error, and what follows it where it ends in a colon as CMake's headlines do."""
    lines = [line.strip() for line in output.splitlines()]
    start = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.I)), len(lines))
    found = lines[start : start + 1]
    if found and found[0].endswith(":"):
        for line in lines[start + 1 :]:
            if line:
                found.append(line)
            elif not found[-1].endswith(":"):
                break
    return " ".join(found)


class BuildNative(build_ext):
    """Configures and builds CMakeLists.txt once, with as much as DIFFDOCTOR_BUILD and the machine allow."""

    def run(self):
        self._into_checkout = self.editable_mode or self.inplace  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext):
        mode = requested()
        info = {"requested": mode, "built": [], "left_out": {}}
        try:
            self._build(ext, mode, info)
        except BuildError:
            raise
        except Exception as error:
            if mode != "auto":
                raise BuildError(f"the native module did not build: {error}") from None
            info["left_out"]["cpu"] = info["left_out"]["cuda"] = f"the native module did not build: {error}"
        built = pathlib.Path(self.get_ext_fullpath(ext.name)).parent
        write_info(built, info)
        if self._into_checkout:
            # setuptools copies the module back into the checkout, and nothing else.
            write_info(ROOT / "diffdoctor", info)
            for library in built.glob("*diffdoctor_kernels.*"):
                if built.resolve() != ROOT / "diffdoctor":
                    shutil.copy2(library, ROOT / "diffdoctor" / library.name)
        for name, reason in info["left_out"].items():
            print(f"diffdoctor: {name} was left out: {reason}", file=sys.stderr)

    def _build(self, ext, mode, info):
        compiler = find_compiler()
        if compiler is None:
            chosen = os.environ.get("CXX", "").strip()
            usual = "looked at CXX and for c++, g++, clang++, cl on PATH"
            looked = f"CXX names {chosen!r}, which is not there" if chosen else usual
            reason = f"no C++ compiler was found ({looked})"
            if mode != "auto":
                raise BuildError(f"DIFFDOCTOR_BUILD={mode} needs a C++ compiler: {reason}")
            info["left_out"].update(cpu=reason, cuda=reason)
            return
        info["compiler"] = _version_line(compiler, r".+")
        nvcc = find_nvcc() if mode in ("auto", "cuda") else None
        if mode == "cuda" and nvcc is None:
            raise BuildError(
                f"DIFFDOCTOR_BUILD=cuda needs nvcc, which {NOT_FOUND}: install the CUDA toolkit or set CUDA_HOME, "
                "or use DIFFDOCTOR_BUILD=auto"
            )
        if nvcc is not None and list((ROOT / "csrc" / "cuda").glob("*.cu")):
            architectures = cuda_architectures(nvcc)
            try:
                self._cmake(
                    ext, "cuda", [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
                )
            except RuntimeError as error:
                if mode == "cuda":
                    raise BuildError(f"the CUDA build failed: {error}") from None
                info["left_out"]["cuda"] = f"the CUDA build failed: {error}"
            else:
                info["built"] = ["cpu", "cuda"]
                info["cuda_architectures"] = architectures
                info["nvcc"] = _version_line(nvcc, r"V[\d.]+")
                return
        elif mode == "cpu":
            info["left_out"]["cuda"] = "DIFFDOCTOR_BUILD=cpu was asked for"
        else:
            info["left_out"]["cuda"] = f"nvcc {NOT_FOUND}"
        self._cmake(ext, "cpu", [])
        info["built"] = ["cpu"]

    def _cmake(self, ext, kind, options):
        import pybind11

        source = ROOT
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        build = pathlib.Path(self.build_temp).resolve() / kind
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") and os.name != "nt" else []
        configure = [
            "cmake", "-S", str(source), "-B", str(build), *generator,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={pathlib.Path(sys.executable).as_posix()}",
            f"-Dpybind11_DIR={pathlib.Path(pybind11.get_cmake_dir()).as_posix()}",
            f"-DDIFFDOCTOR_CUDA={'ON' if kind == 'cuda' else 'OFF'}",
            f"-DDIFFDOCTOR_OUTPUT_DIR={target.parent.as_posix()}",
            *options,
        ]  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        self._run(configure)
        self._run(["cmake", "--build", str(build), "--config", "Release", "--parallel", jobs])

    @staticmethod
    def _run(command):
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
        except OSError as error:
            raise RuntimeError(f"{command[0]} could not be started: {error}") from None
        sys.stdout.write(done.stdout)
        if done.returncode:
            with tempfile.NamedTemporaryFile(
                "w", prefix="diffdoctor-build-", suffix=".log", delete=False, encoding="utf-8"
            ) as log:
                log.write(done.stdout)
            raise RuntimeError(f"{_first_error(done.stdout) or 'see the log'} (whole output in {log.name})")


class BuildPython(build_py):
    """Writes the build information of an installation without a native module."""

    def run(self):
        super().run()
        if requested() == "none":
            reason = "DIFFDOCTOR_BUILD=none was asked for"
            info = {"requested": "none", "built": [], "left_out": {"cpu": reason, "cuda": reason}}
            write_info(ROOT / "diffdoctor" if self.editable_mode else pathlib.Path(self.build_lib) / "diffdoctor", info)
