"""Reads compiled GPU code: registers, stack, instructions and the widths of global loads and stores, from cubins."""

import pathlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache

from benchmarks.ops.machine import ROOT

#: Instructions by what they keep busy; the rest counts as "other".
_KINDS = {
    "global": r"LDG|STG|LD|ST|ATOMG|ATOM|RED",
    "shared": r"LDS|STS|LDSM|ATOMS",
    "local": r"LDL|STL",
    "float": r"FADD|FMUL|FFMA|FSEL|FSETP|FMNMX|HADD2|HMUL2|HFMA2|DADD|DMUL|DFMA|DSETP",
    "special": r"MUFU",
    "convert": r"F2F|F2FP|F2I|I2F|I2FP|FRND",
    "integer": r"IMAD|IADD3|IADD|LEA|LOP3|SHF|ISETP|IMNMX|VIADD|VIMNMX|PRMT|SEL|UIMAD|UIADD3|ULEA|ULOP3|USHF|UISETP",
    "control": r"BRA|EXIT|BSSY|BSYNC|BAR|CALL|RET|WARPSYNC|BREAK",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split("|")}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)")
_USAGE = re.compile(r"Function (\S+?):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from PATH, from /usr/local/cuda, or the one that comes with triton."""
    for candidate in (name, f"/usr/local/cuda/bin/{name}"):
        found = shutil.which(candidate)
        if found:
            return found
    try:
        import triton
    except ImportError:
        return None
    return shutil.which(str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name))


def find_nvcc() -> str | None:
    """nvcc, from PATH or from /usr/local/cuda."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_cubin(arch: int, source: pathlib.Path, nvcc: str, *flags: str) -> tuple[bytes, str]:
    """(The cubin of a .cu file of csrc compiled for `arch`, what nvcc said on stderr).

    Raises RuntimeError with nvcc's first error.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", *flags, "-I", str(ROOT / "csrc"), str(source),
             "-o", str(cubin)],
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError((errors or done.stderr.splitlines() or ["nvcc failed"])[0])
        return cubin.read_bytes(), done.stderr


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{pathlib.Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def listing(text: str) -> dict[str, str]:
    """cuobjdump's SASS cut into {function: its lines}."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def instructions(text: str) -> dict:
    """{"instructions": how many (padding left out), "kinds": by what they use, "access": {"LDG.128": how many, ...}}"""
    kinds, access = Counter(), Counter()
    total = 0
    for name, modifiers in _INSTRUCTION.findall(text):
        if name == "NOP":
            continue
        total += 1
        kinds[_KIND_OF.get(name, "other")] += 1
        if name in ("LDG", "STG", "LDL", "STL"):
            access[f"{name}.{_width(modifiers)}"] += 1
    return {"instructions": total, "kinds": dict(kinds), "access": dict(sorted(access.items()))}


def _width(modifiers: str) -> int:
    """Bits that one lane moves."""
    for part in modifiers.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


@lru_cache(maxsize=2)  # a cubin is looked at for its registers and for its cases
def _dumped(cubin: bytes) -> tuple[str, dict[str, str]]:
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump was found neither on PATH, nor in /usr/local/cuda, nor in triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(tool, "-res-usage", file.name), listing(_run(tool, "-sass", file.name))


def listings(cubin: bytes) -> tuple[dict[str, str], dict[str, int]]:
    """({function: its lines}, {function: registers}) of a cubin; raises as `describe` does."""
    usage, code = _dumped(cubin)
    return code, {name: int(registers) for name, registers, *_ in _USAGE.findall(usage)}


def describe(cubin: bytes) -> dict[str, dict]:
    """{function: {"registers", "stack", "shared", "local" (bytes), "instructions", "kinds", "access"}} of a cubin.

    Raises RuntimeError where cuobjdump is missing or fails.
    """
    usage, code = _dumped(cubin)
    found = {}
    for name, registers, stack, shared, local in _USAGE.findall(usage):
        found[name] = {
            "registers": int(registers),
            "stack": int(stack),
            "shared": int(shared),
            "local": int(local),
            **instructions(code.get(name, "")),
        }
    return found
