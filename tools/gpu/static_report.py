"""What the compilers made of the GPU kernels, no GPU needed: `python -m tools.gpu.static_report`.

Registers, spills, instructions and the widths of global accesses, from Triton's cubins and, where nvcc is, from those
of csrc/cuda; launches per call. Every part that cannot be had is named with its reason.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.ops.machine import ROOT
from benchmarks.ops.table import aligned
from tools.gpu import budget, kernel_cases, kernel_counts, sass
from tools.gpu.sass import find_nvcc

ARCHITECTURES = (80, 90, 100)
_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def triton_rows(arch: int) -> list[dict]:
    """The launches of the Triton backend compiled for `arch`. Raises RuntimeError with the reason."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu.static_triton", str(arch)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return json.loads(done.stdout)


def nvcc_rows(arch: int, source: pathlib.Path, nvcc: str) -> list[dict]:
    """The kernels of one .cu file compiled for `arch`. Raises RuntimeError with nvcc's first error."""
    cubin, said = sass.compile_cubin(arch, source, nvcc, "-Xptxas", "-v")
    spilled = {found["name"]: found for found in _PTXAS.finditer(said)}
    described = sass.describe(cubin)
    counted = _counted(arch, source, cubin)
    rows = []
    for name, row in described.items():
        told = spilled.get(name)
        spills = None if told is None else int(told["stores"]) + int(told["loads"])
        rows.append(
            {"backend": "cuda", "arch": arch, "file": source.name, "kernel": readable(name), "spills": spills, **row}
            | counted.get(name, {})
        )
    return rows


def _counted(arch: int, source: pathlib.Path, cubin: bytes) -> dict[str, dict]:
    """{kernel: its cases' counts and what may not stand in its main loop} of the fast kernels."""
    if source.name == kernel_cases.ARTIFACT_SOURCE.name:
        count = dataclasses.asdict(kernel_counts.count_logit(arch, cubin))
        return {name: {"logit": count} for name in sass.listings(cubin)[0] if "artifact_loss_kernelILi0E" in name}
    if source.name == kernel_cases.MEAN_SOURCE.name:
        return {name: {"mean": found} for name, found in kernel_counts.means_of(sass.listings(cubin)[0]).items()}
    if source.name not in {known.name for known in kernel_cases.SOURCES}:
        return {}
    by_kernel = kernel_counts.fast_kernels(cubin)
    found = {
        name: {"forbidden": kernel_counts.forbidden(kernel, listing), "cases": {}}
        for kernel, (name, listing, _) in by_kernel.items()
    }
    for row in kernel_counts.counts(arch, by_kernel):
        found[by_kernel[row.case.kernel][0]]["cases"][row.case.name] = dataclasses.asdict(row)
    return found


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without its parameters; mangled where c++filt is missing."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\((?:anonymous namespace|\w+)\)(?:::)?", lambda m: "" if "anon" in m[0] else m[0], name)
    name = re.sub(r"^void ", "", name)
    depth, end = 0, len(name)
    for position, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = position
            break
    return name[:end].replace("diffdoctor::cuda::", "").replace("diffdoctor::", "")


def collect(architectures=ARCHITECTURES, triton: bool = True, cuda: bool = True):
    """(rows, [what could not be had and why])."""
    rows, missing = [], []
    jobs = []
    if triton:
        jobs += [(f"triton sm_{arch}", triton_rows, (arch,)) for arch in architectures]
    if cuda:
        nvcc, sources = find_nvcc(), sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        if nvcc is None:
            missing.append("cuda: nvcc was found neither on PATH nor in /usr/local/cuda")
        elif not sources:
            missing.append("cuda: there is no csrc/cuda/*.cu")
        else:
            jobs += [
                (f"cuda sm_{arch} {source.name}", nvcc_rows, (arch, source, nvcc))
                for arch in architectures
                for source in sources
            ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, future in [(name, pool.submit(work, *arguments)) for name, work, arguments in jobs]:
            try:
                rows += future.result()
            except Exception as error:
                missing.append(f"{name}: {error}")
    return rows, missing


def text(rows: list[dict], missing: list[str]) -> str:
    """Two tables: Triton's launches by case, CUDA's kernels by file."""
    parts = []
    triton = [row for row in rows if row["backend"] == "triton"]
    if triton:
        cells = [
            (
                "triton",
                "dtype",
                "part",
                "kernel",
                "sm",
                "warps",
                "registers",
                "spills",
                "instr.",
                "B/elem",
                "global access",
            )
        ]
        for row in triton:
            cells.append((
                row["case"], row["dtype"], row["part"], row["kernel"], str(row["arch"]), str(row["warps"]),
                str(row["registers"]), str(row["spills"]), str(row["instructions"]),
                f"{row['least_bytes_per_element']:g}", _access(row),
            ))  # fmt: skip
        parts.append(aligned(cells, left=4))
        parts.append("launches per call, forward + backward:\n" + aligned(_launches(triton), left=2))
    cuda = [row for row in rows if row["backend"] == "cuda"]
    if cuda:
        cells = [("cuda", "kernel", "sm", "registers", "spilled bytes", "instr.", "global access")]
        cells += [
            (row["file"], row["kernel"], str(row["arch"]), str(row["registers"]), str(row["spills"]),
             str(row["instructions"]), _access(row))
            for row in cuda
        ]  # fmt: skip
        parts.append(aligned(cells, left=2))
        counts = [kernel_counts.Count.of(count) for row in cuda for count in row.get("cases", {}).values()]
        if counts:
            parts.append(budget.text(counts))
        logits = [kernel_counts.LogitCount(**row["logit"]) for row in cuda if "logit" in row]
        if logits:
            parts.append(budget.logit_text(logits))
        means: dict[int, list] = {}
        for row in cuda:
            if "mean" in row:
                means.setdefault(row["arch"], []).append(row["mean"])
        if means:
            parts.append(budget.mean_text(means))
    if missing:
        parts.append("Not to be had:\n  " + "\n  ".join(missing))
    return "\n\n".join(parts)


def _access(row):
    return " ".join(f"{count}×{name}" for name, count in row["access"].items())


def _launches(rows):
    one = [row for row in rows if row["arch"] == rows[0]["arch"]]
    counts: dict[tuple, list[int]] = {}
    for row in one:
        pair = counts.setdefault((row["case"], row["dtype"]), [0, 0])
        pair[row["part"] == "backward"] += 1
    return [("case", "dtype", "forward", "backward"), *((*key, str(a), str(b)) for key, (a, b) in counts.items())]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a kernel spills or a part could not be had."""
    command = argparse.ArgumentParser(prog="python -m tools.gpu.static_report", description=__doc__)
    command.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities (80 90 100)"
    )
    command.add_argument("--no-triton", action="store_true", help="leave out Triton")
    command.add_argument("--no-cuda", action="store_true", help="leave out nvcc")
    command.add_argument("--output", type=pathlib.Path, help="also write the rows there, as JSON")
    options = command.parse_args(arguments)
    rows, missing = collect(options.arch, not options.no_triton, not options.no_cuda)
    print(text(rows, missing))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"rows": rows, "missing": missing}, indent=1) + "\n")
    return int(bool(missing) or any(row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
