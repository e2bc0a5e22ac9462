"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, for every instruction set of this machine.

`python tests/programs/sanitize_cpu.py` (`make sanitize`) builds the native module with both in build/sanitize and runs
the tests of the CPU kernels on it, once per instruction set. As a pytest plugin it puts that module in the place of the
installed one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
MODULE = FOLDER / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
PLUGIN = "DIFFDOCTOR_SANITIZED"  # set for the processes that load this file as a plugin
SETS = ("avx512", "avx2", "generic")
TESTS = (
    "backends/test_cpu_blocks.py",
    "ops/test_artifact_loss.py",
    "ops/test_policy_loss.py",
    "ops/test_modulate_gradient.py",
    "ops/test_weighted_loss.py",
    "ops/test_weighted_loss_options.py",
)


def load() -> None:
    """Put the sanitized module in the place of diffdoctor._native."""
    spec = importlib.util.spec_from_file_location("diffdoctor._native", MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["diffdoctor._native"] = module


def configure(folder: pathlib.Path) -> None:
    """Let CMake prepare the build in a folder."""
    import pybind11

    command = [
        "cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Debug", "-DDIFFDOCTOR_SANITIZE=address,undefined",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DDIFFDOCTOR_OUTPUT_DIR={folder}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def build() -> None:
    configure(FOLDER)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", FOLDER, "--parallel", jobs], check=True, stdout=subprocess.DEVNULL)


def environment(instruction_set: str) -> dict[str, str]:
    """With the libraries that must be loaded first: the sanitizer's, and libstdc++ whose exceptions it watches."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch free little when they end
        "DIFFDOCTOR_CPU_ISA": instruction_set,
        "PYTHONPATH": str(ROOT / "tests"),
        "OMP_NUM_THREADS": "2",
        PLUGIN: "1",
    }


def chosen_set(env: dict[str, str]) -> str:
    code = "import programs.sanitize_cpu, diffdoctor.backends.native as n; print(n.load().instruction_set())"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]


def main() -> int:
    """Exit code 0 where no test failed and no sanitizer spoke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="limit of one instruction set's tests (default: 5)")
    options = parser.parse_args()
    start = time.monotonic()
    build()
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    failed = []
    for wanted in SETS:
        env = environment(wanted)
        if chosen_set(env) != wanted:
            print(f"{wanted}: this machine does not have it", flush=True)
            continue
        start = time.monotonic()
        command = [
            sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys",
            "-p", "programs.sanitize_cpu", "-p", "no:cacheprovider",
            *(ROOT / "tests" / name for name in TESTS),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60 * options.minutes
            )
            lines, code = (done.stdout + done.stderr).strip().splitlines(), done.returncode
            summary = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "no summary")
        except subprocess.TimeoutExpired:
            lines, code, summary = [], 1, f"did not end within {options.minutes:g} minutes"
        print(f"{wanted}: {summary} ({time.monotonic() - start:.0f} s)", flush=True)
        if code:
            failed.append(wanted)
            print("\n".join(lines[-60:]), flush=True)
    return int(bool(failed))


if os.environ.get(PLUGIN) and __name__ != "__main__":
    load()

if __name__ == "__main__":
    sys.exit(main())
