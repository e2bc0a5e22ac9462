"""All GPU work in one command: `python -m benchmarks.gpu --output DIR`, what `make gpu` runs.

Builds the CUDA backend for this GPU, runs the GPU tests, the benchmarks, compute-sanitizer, ncu and the static report.
Needs Python, torch, triton, nvcc and this checkout. Each part is a process with a time limit of its own: one that fails
or is missing says so, and the others go on. gpu.json and gpu.txt in DIR are rewritten after every part.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import bar, history, machine, static_report, step, table

ROOT = machine.ROOT
DEFAULT_MINUTES = 8.75


class PartError(Exception):
    """Why a part has no result."""


@dataclasses.dataclass
class Context:
    """What the parts share: the folder, when the whole must end, and what was found so far."""

    output: pathlib.Path
    deadline: float
    commit: str | None
    found: dict
    described: dict | None = None

    def gpu(self) -> dict:
        """The GPU's machine row and the versions. Raises PartError where there is none."""
        if self.described is None:
            try:
                self.described = _json_line(self.run([sys.executable, "-m", "benchmarks.gpu_probe", "describe"], 120))
            except PartError as error:
                self.described = {"reason": f"needs a GPU: {error}"}
        if "reason" in self.described:
            raise PartError(self.described["reason"])
        return self.described

    def arch(self) -> str:
        """The compute capability as nvcc and Triton write it: 90."""
        return self.gpu()["machine"]["gpu_capability"].replace(".", "")

    def run(self, command: list[str], limit: float, **environment: str) -> str:
        """The command's output, also appended to gpu.log. Raises PartError: exit code, or out of time."""
        limit = min(limit, self.deadline - time.monotonic())
        if limit <= 1:
            raise PartError("left out for lack of time")
        log = self.output / "gpu.log"
        with log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
        try:
            text, _ = process.communicate(timeout=limit)
            late = False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            late = True
        with log.open("a") as file:
            file.write(text)
        if late:
            raise PartError(f"ran past its {limit:.0f} s; the end of what it said: {_tail(text)}")
        if process.returncode:
            raise PartError(f"exit code {process.returncode}: {_tail(text)}")
        return text


def _tail(text: str, length: int = 400) -> str:
    """The last line: where a traceback names its error."""
    return (text.strip().splitlines() or ["nothing was printed"])[-1].strip()[-length:]


def _json_line(text: str) -> dict:
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise PartError(f"printed no JSON: {_tail(text)}")
    return json.loads(lines[-1])


def part_machine(context: Context) -> dict:
    """The GPU by name, its driver and its limits as they are; nothing is set."""
    found = dict(context.gpu())
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        found["nvidia_smi"] = context.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 30).strip()
    return found


def part_build(context: Context) -> dict:
    """The native module with the CUDA backend for this GPU alone, in place: by cmake, else by nvcc alone."""
    arch = context.arch()
    began = time.monotonic()
    found = {"how": "cmake"}
    try:
        missing = [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
        if missing or shutil.which("cmake") is None:
            raise PartError(f"missing: {', '.join(missing) or 'cmake'}")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        context.run(command, 200, DIFFDOCTOR_BUILD="cuda", CMAKE_CUDA_ARCHITECTURES=f"{arch}-real")
        # An in-place build leaves its account in the build folder.
        accounts = sorted(
            (ROOT / "build").glob("lib*/diffdoctor/_build_info.json"), key=lambda path: path.stat().st_mtime
        )
        write(ROOT / "diffdoctor" / "_build_info.json", accounts[-1].read_text() if accounts else "{}")
    except PartError as error:
        found = {"how": "nvcc alone", "not_cmake": str(error)}
        context.run([sys.executable, "-m", "benchmarks.gpu_build", arch], 200)
    found["seconds"] = round(time.monotonic() - began, 1)
    code = "from diffdoctor.backends import backends; import json; print(json.dumps(backends()))"
    found["backends"] = _json_line(context.run([sys.executable, "-c", code], 60))
    if found["backends"]["cuda"] is not None:
        raise PartError(f"built, but: {found['backends']['cuda']}")
    return found


def part_limits(context: Context) -> dict:
    """What the benchmarks are held against."""
    context.gpu()
    return _json_line(context.run([sys.executable, "-m", "benchmarks.gpu_probe", "limits"], 60))


def part_tests(context: Context) -> dict:
    """The tests marked `gpu`; only files that carry the mark are collected, so that no other package is needed."""
    context.gpu()
    if importlib.util.find_spec("pytest") is None:
        raise PartError("pytest is not installed")
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"\bmark\.gpu\b", p.read_text())]
    if not files:
        raise PartError("no test carries the mark gpu")
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", "gpu", "-o", "addopts=", "-rfE"]
    text = context.run([*command, *(str(path.relative_to(ROOT)) for path in files)], 150)
    return {"summary": text.strip().splitlines()[-1], "files": [path.name for path in files]}


def part_benchmarks(context: Context) -> dict:
    """The registry on this GPU, graphs too; rows go to gpu.jsonl as they come."""
    context.gpu()
    rows = context.output / "gpu.jsonl"
    minutes = max(0.5, min(3.5, (context.deadline - time.monotonic()) / 60 - 1.2))
    command = [
        sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--graphs", "--seconds", "1.0",
        "--minutes", f"{minutes:.2f}", "--output", str(rows), "--plots", str(context.output), "--sides",
    ]  # fmt: skip
    if context.commit:
        command += ["--commit", context.commit]
    context.run(command, 60 * minutes + 60)
    return {"rows": len(history.read(rows))}


def part_sanitizer(context: Context) -> dict:
    """Every case at a tiny size under memcheck and racecheck; each allocation by itself, so that overruns show."""
    context.gpu()
    if shutil.which("compute-sanitizer") is None:
        raise PartError("compute-sanitizer is not on PATH")
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
        probe = [sys.executable, "-m", "benchmarks.gpu_probe", "small", "cuda"]
        text = context.run([*command, *probe], 75, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[tool] = {**_json_line(text), "summary": _matching(text, r"ERROR SUMMARY|RACECHECK SUMMARY")}
    return found


def part_ncu(context: Context) -> dict:
    """Hardware counters of one bandwidth-bound call: throughput as a share of the peak, registers, occupancy."""
    context.gpu()
    if shutil.which("ncu") is None:
        raise PartError("ncu is not on PATH")
    metrics = (
        "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum,"
        "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,"
        "sm__warps_active.avg.pct_of_peak_sustained_active"
    )
    found = {}
    for backend in ("cuda", "triton"):
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--metrics", metrics]
        probe = [sys.executable, "-m", "benchmarks.gpu_probe", "once", "pixel-2048/bf16", backend]
        try:
            text = context.run([*command, *probe], 60)
            found[backend] = [line for line in text.splitlines() if line.startswith('"')] or _tail(text)
        except PartError as error:
            found[backend] = f"no counters: {error}"
    if all(isinstance(lines, str) for lines in found.values()):
        raise PartError("; ".join(f"{backend}: {words}" for backend, words in found.items()))
    return found


def part_static(context: Context) -> dict:
    """Registers, spills, instructions: for this GPU's architecture, or without a GPU for all."""
    report = context.output / "static.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.static_report", "--output", str(report)]
    with contextlib.suppress(PartError):
        command += ["--arch", context.arch()]
    try:
        context.run(command, 240)
    except PartError:
        if not report.exists():
            raise
    return json.loads(report.read_text())


def _matching(text: str, pattern: str) -> str:
    return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), "")


#: In order of worth: what comes late is what is left out when time runs short.
PARTS: dict[str, Callable[[Context], dict]] = {
    "machine": part_machine,
    "build": part_build,
    "limits": part_limits,
    "tests": part_tests,
    "benchmarks": part_benchmarks,
    "sanitizer": part_sanitizer,
    "ncu": part_ncu,
    "static": part_static,
}


def report(found: dict, rows: list[dict]) -> str:
    """gpu.txt: every part with its outcome, then the tables."""
    outcome = [("part", "seconds", "outcome")]
    for name, part in found.items():
        good = {key: value for key, value in part.items() if key not in ("seconds_taken", "rows", "missing")}
        words = part.get("reason") or json.dumps(good, ensure_ascii=False)[:400]
        outcome.append((name, f"{part['seconds_taken']:.0f}", ("FAILED: " if "reason" in part else "") + words))
    parts = ["\n".join(f"{name:<11} {seconds:>8}  {words}" for name, seconds, words in outcome)]
    if rows:
        parts += [table.text(rows), table.text(rows, every_side=True)]
        steps = [row for row in rows if row["op"] == table.STEP]
        if steps:
            parts.append(step.text(steps))
        parts.append(bar.text([row for row in rows if row["op"] != table.STEP]))
    static = found.get("static", {})
    if "rows" in static:
        parts.append(static_report.text(static["rows"], static["missing"]))
    return "\n\n".join(parts) + "\n"


def write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def run(context: Context, parts: dict[str, Callable[[Context], dict]]) -> dict:
    """Run the parts one after another; {part: its result, or {"reason"}}, each with `seconds_taken`."""
    for name, part in parts.items():
        began = time.monotonic()
        try:
            found = part(context)
        except Exception as error:
            found = {"reason": str(error) if isinstance(error, PartError) else f"{type(error).__name__}: {error}"}
        context.found[name] = {**found, "seconds_taken": round(time.monotonic() - began, 1)}
        rows = context.output / "gpu.jsonl"
        measured = history.read(rows) if rows.exists() else []
        write(context.output / "gpu.json", json.dumps({"parts": context.found, "rows": measured}, indent=1) + "\n")
        write(context.output / "gpu.txt", report(context.found, measured))
        print(f"{name}: {'FAILED: ' + found['reason'] if 'reason' in found else 'done'} "
              f"({context.found[name]['seconds_taken']:.0f} s)", flush=True)  # fmt: skip
    return context.found


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 where every part has a result, else 1."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/gpu"), help="folder for the results")
    command.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="all parts together (default: 8.75)")
    command.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}")
    command.add_argument("--commit", help="what to write into the rows where the checkout has no .git")
    options = command.parse_args(arguments)
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        print(f"--parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.jsonl").unlink(missing_ok=True)
    (output / "gpu.log").unlink(missing_ok=True)
    context = Context(output, time.monotonic() + 60 * options.minutes, options.commit, {})
    found = run(context, {name: PARTS[name] for name in PARTS if name in options.parts.split(",")})
    print((output / "gpu.txt").read_text())
    return int(any("reason" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
