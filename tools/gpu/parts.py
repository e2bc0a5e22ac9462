"""What `tools.gpu` does on a GPU, part by part: each takes a `Context`, and returns what it found or raises."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable

from benchmarks.ops import history, machine
from tools.gpu.context import Context, PartError, json_lines, last_json

ROOT = machine.ROOT
PROBE = [sys.executable, "-m", "tools.gpu.probe"]
Part = Callable[[Context], dict]
#: What ncu looks at: bound by memory, without and with a map, a contrastive target, both forms of policy_loss.
COUNTED = "pixel-2048/bf16,pixel-2048-map/bf16,contrastive/bf16,policy/bf16,policy-flux-tokens/bf16"


def part_machine(context: Context) -> dict:
    """The GPU by name, its driver and its limits as they are; nothing is set."""
    found = dict(context.gpu())
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        with contextlib.suppress(PartError):
            text = context.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 30)
            found["nvidia_smi"] = text.strip()
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
        context.run(command, 110, DIFFDOCTOR_BUILD="cuda", CMAKE_CUDA_ARCHITECTURES=f"{arch}-real")
    except PartError as error:
        found = {"how": "nvcc alone", "not_cmake": str(error)}
        context.run([sys.executable, "-m", "tools.gpu.build", arch], 110)
    found["seconds"] = round(time.monotonic() - began, 1)
    code = "import diffdoctor, json; print(json.dumps(diffdoctor.available_backends()))"
    found["backends"] = last_json(context.run([sys.executable, "-c", code], 60))
    if found["backends"]["cuda"] is not None:
        raise PartError(f"built, but: {found['backends']['cuda']}")
    return found


def part_static(context: Context) -> dict:
    """Registers, spills, instructions: for this GPU's architecture, or without a GPU for all."""
    report = context.scratch / "static.json"
    command = [sys.executable, "-m", "tools.gpu.static_report", "--output", str(report)]
    with contextlib.suppress(PartError):
        command += ["--arch", context.arch()]
    try:
        context.run(command, 240)
    except PartError:
        if not report.exists():
            raise
    return json.loads(report.read_text())


def part_tests(context: Context) -> dict:
    """The tests marked `gpu`, the two backends apart, since a kernel that faults ends all that its process does on the
    GPU. Only files that carry the mark are collected, so that no other package is needed."""
    context.gpu()
    if importlib.util.find_spec("pytest") is None:
        raise PartError("pytest is not installed")
    marked = re.compile(r"^(?:pytestmark = .*|@)pytest\.mark\.gpu\b", re.MULTILINE)
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if marked.search(path.read_text())]
    if not files:
        raise PartError("no test carries the mark gpu")
    command = [
        sys.executable, "-m", "pytest", "-v", "--no-header", "--tb=short", "--maxfail=20", "-rfE", "-m", "gpu",
        "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "tools.gpu.shard",
        *(str(path.relative_to(ROOT)) for path in files),
    ]  # fmt: skip
    jobs = context.jobs(3, 6)
    commands = []
    # Triton's half compiles as it goes and gets more processes.
    for words, parts in (("not triton", max(1, jobs // 3)), ("triton", max(1, jobs - jobs // 3))):
        commands += [[*command, "-k", words, "--shard", f"{k}/{parts}"] for k in range(parts)]
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    return _tested(context.run_all(commands, 200, **threads), [path.name for path in files])


def _tested(answers: list[tuple[str, str | None]], files: list[str]) -> dict:
    """The tests of several processes, added up. Raises PartError that names those that failed."""
    found = {"passed": 0, "failed": 0, "skipped": 0, "processes": len(answers), "files": files}
    names, broken = [], []
    for text, reason in answers:
        summary = (text.strip().splitlines() or [""])[-1]
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", summary)}
        if reason is not None and not counts:
            broken.append(reason)
        for word, n in counts.items():
            found[word if word in found else "failed"] += n
        names += re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", text, re.MULTILINE)
    if found["failed"] or broken or not found["passed"]:
        words = [f"{found['failed']} of {found['failed'] + found['passed']} failed", *broken, ", ".join(names[:12])]
        raise PartError("; ".join(word for word in words if word), found=found)
    return found


def part_small(context: Context) -> dict:
    """Every case of the benchmarks at a tiny size, its values checked."""
    context.gpu()
    try:
        return last_json(context.run([*PROBE, "small"], 150, OMP_NUM_THREADS="1"))
    except PartError as error:
        found = json_lines(error.text)
        raise PartError(f"{error}; {'; '.join(found[-1]['wrong'][:3])}" if found else str(error)) from None


def part_warm(context: Context) -> dict:
    """Every implementation of every case once: its launches counted, what it compiles left in the disk caches, so that
    the benchmarks spend their minutes on timing and the profiler is never loaded where something is timed."""
    jobs = context.jobs(2, 8)
    commands = [[*PROBE, "warm", f"{k}/{jobs}"] for k in range(jobs)]
    answers = context.run_all(commands, 170, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="4")
    rows = [row for text, _ in answers for row in json_lines(text) if row.get("implementations")]
    _launch_counts(context).write_text(json.dumps({row["case"]: row["implementations"] for row in rows}))
    failures = {
        f"{row['case']} {impl}": found["error"]
        for row in rows
        for impl, found in row["implementations"].items()
        if "error" in found
    }
    found = {"cases": len(rows), "failures": failures}
    broken = [reason for _, reason in answers if reason is not None]
    if broken:
        raise PartError("; ".join(broken), found=found)
    return found


def _launch_counts(context: Context) -> pathlib.Path:
    return context.scratch / "launches.json"


def part_limits(context: Context) -> dict:
    """What the benchmarks are held against."""
    context.gpu()
    return last_json(context.run([*PROBE, "limits"], 45))


def part_benchmarks(context: Context) -> dict:
    """The registry on this GPU, graphs too; rows go to gpu.jsonl as they come."""
    context.gpu()
    rows = context.output / "gpu.jsonl"
    # What comes after it gets two minutes and a half.
    minutes = max(0.5, min(4.0, context.seconds_left(reserve=150) / 60))
    command = [
        sys.executable, "-m", "benchmarks.ops.run", "--device", "cuda", "--graphs", "--seconds", "1.0",
        "--minutes", f"{minutes:.2f}", "--output", str(rows), "--plots", str(context.output), "--all",
    ]  # fmt: skip
    if _launch_counts(context).exists():
        command += ["--launches", str(_launch_counts(context))]
    if context.commit:
        command += ["--commit", context.commit]
    try:
        context.run(command, 60 * minutes + 30)
    except PartError as error:
        raise PartError(str(error), found={"rows": len(history.read(rows)) if rows.exists() else 0}) from None
    return {"rows": len(history.read(rows))}


def part_treatments(context: Context) -> dict:
    """Seconds and memory of treatment steps of networks of a real size, random weights; needs diffusers and peft."""
    context.gpu()
    _require("diffusers", "peft", "transformers")
    speed, memory = context.output / "treat-speed.json", context.output / "treat-memory.json"
    study = [sys.executable, "-m"]
    commands = {
        speed: [*study, "benchmarks.studies.treat_speed", "--networks", "sd", "sdxl", "--steps", "3"],
        memory: [
            *study, "benchmarks.studies.treat_memory", "--device", "cuda", "--repeats", "2", "--networks", "flux", "sd",
            "--families", "qwen_image", "z_image", "flux2", "sana",
        ],
    }  # fmt: skip
    found, wrong = {}, []
    for path, command in commands.items():
        path.unlink(missing_ok=True)
        try:
            context.run([*command, "--output", str(path)], 50)
        except PartError as error:
            # Each row is written as it comes.
            wrong.append(f"{path.stem}: {error}")
        if path.exists():
            found[path.stem] = json.loads(path.read_text())["rows"]
    if wrong:
        raise PartError("; ".join(wrong), found=found)
    return found


def sanitize(context: Context, backend: str, seconds: int) -> dict:
    """Every case at a tiny size under memcheck and racecheck; each allocation by itself, so that overruns show."""
    context.gpu()
    if shutil.which("compute-sanitizer") is None:
        raise PartError("compute-sanitizer is not on PATH")
    tools = ("memcheck", "racecheck")
    commands = [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *PROBE, "small", backend] for tool in tools
    ]
    answers = context.run_all(commands, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
    found, wrong = {}, []
    for tool, (text, reason) in zip(tools, answers, strict=True):
        summary = _matching(text, r"ERROR SUMMARY|RACECHECK SUMMARY")
        found[tool] = {**(json_lines(text) or [{}])[-1], "summary": summary}
        if reason is not None:
            wrong.append(f"{tool}: {reason}; {_matching(text, r'Error: |Invalid |hazard|Device not supported')}")
    if wrong:
        raise PartError("; ".join(wrong), found=found)
    return found


def part_sanitizer_cuda(context: Context) -> dict:
    """compute-sanitizer over the CUDA backend, for as long as the tests beside it may take."""
    return sanitize(context, "cuda", 200)


def part_sanitizer_triton(context: Context) -> dict:
    """compute-sanitizer over the Triton backend: late, when its kernels are in the cache on disk."""
    return sanitize(context, "triton", 150)


def part_ncu(context: Context) -> dict:
    """Hardware counters of `COUNTED`: throughput as a share of the peak, registers, occupancy."""
    context.gpu()
    if shutil.which("ncu") is None:
        raise PartError("ncu is not on PATH")
    metrics = (
        "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum,"
        "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,"
        "sm__warps_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum,"
        "smsp__issue_active.avg.pct_of_peak_sustained_active,launch__waves_per_multiprocessor"
    )
    found = {}
    for backend in ("cuda", "triton"):
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--metrics", metrics]
        try:
            text = context.run([*command, *PROBE, "once", COUNTED, backend], 45)
            found[backend] = [line for line in text.splitlines() if line.startswith('"')] or text[-400:]
        except PartError as error:
            found[backend] = f"no counters: {error}"
    if all(isinstance(lines, str) for lines in found.values()):
        raise PartError("; ".join(f"{backend}: {words}" for backend, words in found.items()))
    return found


def part_stages(context: Context) -> dict:
    """The tests of detector, treatment and evaluation with everything on the GPU; needs the packages of `stages`."""
    context.gpu()
    _require("pytest", "xdist", "diffusers", "peft", "jsonargparse")
    folders = [f"tests/{name}" for name in ("treat", "training", "detector", "evaluate", "repairs", "rounds", "demo")]
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-rfE", "-p", "no:cacheprovider",
        "-n", str(context.jobs(1, 14)), "--dist", "worksteal", *folders,
    ]  # fmt: skip
    environment = {
        "DIFFDOCTOR_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1",
        # The tests' programs fork; CUDA started by a mere question would be lost to the children.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    return _tested(context.run_all([command], 300, **environment), folders)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PartError(f"not installed: {', '.join(missing)}")


def _matching(text: str, pattern: str) -> str:
    return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), "")


#: Parts of one stage run side by side, stages one after another, in order of worth: what comes late is what is left out
#: when time runs short.
STAGES: tuple[dict[str, Part], ...] = (
    {"machine": part_machine},
    {"build": part_build, "static": part_static},
    {"tests": part_tests, "small": part_small, "warm": part_warm, "sanitizer-cuda": part_sanitizer_cuda},
    {"limits": part_limits},
    {"benchmarks": part_benchmarks},
    {"treatments": part_treatments},
    {"ncu": part_ncu},
    {"sanitizer-triton": part_sanitizer_triton},
    {"stages": part_stages},
)
PARTS = tuple(name for stage in STAGES for name in stage)
