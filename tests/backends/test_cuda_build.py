"""csrc/cuda compiled by nvcc: nothing spills, the contiguous path moves 16 bytes at a time, and the fast kernels keep
within their budgets of instructions."""

import json
import re
import subprocess

import pytest

from support.cache import digest, kept, native_headers
from support.paths import ROOT
from tools.gpu import budget, kernel_cases, kernel_counts, sass, static_report
from tools.gpu.machine_code import Code

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
GENERIC, POLICY = (ROOT / "csrc" / "cuda" / name for name in ("weighted_loss.cu", "policy_loss.cu"))
FAST = [source.name for source in kernel_cases.SOURCES]
NVCC = static_report.find_nvcc()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc was found neither on PATH nor in /usr/local/cuda"),
    pytest.mark.skipif(sass.find_tool("cuobjdump") is None, reason="cuobjdump was found neither in CUDA nor in triton"),
]


def compiled(arch: int, sources) -> list[dict]:
    """What became of every kernel for `arch`. A second run over the same sources reads the first one's answer."""
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if f"sm_{arch}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    shared = (version, *native_headers(ROOT / "csrc"), *sorted((ROOT / "tools" / "gpu").glob("*.py")))
    rows = []
    for source in sources:
        name = f"sm_{arch}-{source.name}.json"

        def build(folder, source=source, name=name):
            (folder / name).write_text(json.dumps(static_report.nvcc_rows(arch, source, NVCC)))
            return folder / name

        rows += json.loads(kept(name, digest(*shared, source), build).read_text())
    return rows


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.study), 90])
def test_kernels_neither_spill_nor_move_less_than_they_could(arch):
    # These two cost as much to compile as all the rest: `-m study` compiles the policy's.
    sources = [source for source in SOURCES if source not in (GENERIC, POLICY) or (arch == 90 and source == GENERIC)]
    rows = compiled(arch, sources)
    assert {row["file"] for row in rows} == {source.name for source in sources}
    spilling = [row["kernel"] for row in rows if row["spills"] != 0 or row["stack"] or row["local"]]
    assert not spilling
    assert not [row["kernel"] for row in rows if "LDL.32" in row["access"] or "STL.32" in row["access"]]

    if arch == 90:
        loss = {row["kernel"]: row for row in rows if row["file"] == GENERIC.name}
        assert len(loss) == 8  # model_pred's dtypes, contiguous and strided; the rest is a branch at run time
        vectorised = [row for name, row in loss.items() if re.search(r"Config<\d, true|ILi\dELb1E", name)]
        assert len(vectorised) == 4
        for row in vectorised:
            assert row["access"]["LDG.128"] >= 4, row  # model_pred and each term's dtype
            assert row["access"]["STG.128"] >= 1, row
            # Two blocks of 256 threads on a multiprocessor, one in fp64.
            assert row["registers"] <= (255 if re.search(r"Config<3, |ILi3E", row["kernel"]) else 128), row
    scale = [
        row
        for row in rows
        if row["file"] == "scale_gradient.cu" and ("true" in row["kernel"] or "ELb1E" in row["kernel"])
    ]
    assert len(scale) == 6
    assert all(row["access"].get("STG.128", 0) >= 1 and row["access"].get("LDG.128", 0) >= 1 for row in scale)

    fast = [row for row in rows if row["file"] in FAST]
    # Five pairs of dtypes; for l2 one term or more, without and with maps, and with levels; for policy_loss without and
    # with a ref_pred, and of all but fp32 latents and tokens.
    assert [sum(row["file"] == name for row in fast) for name in FAST] == [25, 15, 5, 18]
    assert not [(row["kernel"], row["forbidden"]) for row in fast if row["forbidden"]]
    # Three blocks of 256 threads on a multiprocessor; two where coefficients change with u, for tokens, and for fp32 or
    # more terms than one at odd sizes.
    many = [sum(row["registers"] > 80 for row in fast if row["file"] == name) for name in FAST[:2]]
    assert many[0] <= 4 and many[1] <= 11
    assert all(row["registers"] <= 128 for row in fast)
    (logit,) = [kernel_counts.LogitCount(**row["logit"]) for row in rows if "logit" in row]
    assert logit.instructions <= kernel_cases.LOGIT_BUDGET, logit
    assert logit.registers <= 64, logit  # four blocks of 256 threads on a multiprocessor
    means = dict(row["mean"] for row in rows if "mean" in row)
    assert means.keys() == kernel_cases.MEAN_BUDGETS.keys()
    assert all(cost <= kernel_cases.MEAN_BUDGETS[together] for together, cost in means.items()), means
    counts = [kernel_counts.Count.of(count) for row in fast for count in row["cases"].values()]
    assert len(counts) == len(kernel_cases.CASES)
    for count in counts:
        assert count.instructions <= count.case.budget, count
        # Little's law at 4.3 TB/s, 750 ns and 132 multiprocessors: 24 KB, the gradient's third of them not read.
        assert count.loads_under_way >= 16384, count


def test_the_policy_kernel_passes_the_front_end(tmp_path):
    """Of the file that is compiled whole only by `-m study`: what nvcc refuses, it refuses here."""
    command = [NVCC, "-std=c++17", "-arch=sm_90", "--cuda", "-Xcicc", "-O0", "-I", str(ROOT / "csrc"), str(POLICY)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.ii")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.study
@pytest.mark.parametrize("arch", [80, 90])
def test_the_policy_kernel_does_not_spill(arch):
    assert not [row["kernel"] for row in compiled(arch, [POLICY]) if row["spills"] or row["stack"] or row["local"]]


@pytest.mark.study
@pytest.mark.parametrize("arch", budget.ARCHITECTURES)
def test_budgets_hold_on_every_architecture(arch):
    rows = compiled(arch, kernel_cases.SOURCES)
    counts = [kernel_counts.Count.of(count) for row in rows for count in row["cases"].values()]
    assert not [count for count in counts if count.instructions > count.case.budget]
    assert not any(row["forbidden"] or row["spills"] for row in rows)


def test_ways_through_machine_code_are_counted():
    """A loop of one vector with a branch that the case does not take, and a division's slow way that nothing takes."""
    lines = """
        LDC R1, c[0x0][0x28] ;
        @!P0 CALL.REL.NOINC 0x90 ;
        LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        @P1 BRA 0x50 ;
        FFMA R8, R4, R5, R8 ;
        FFMA R8, R6, R7, R8 ;
        STG.E.128 desc[UR4][R2.64], R8 ;
        @P2 BRA 0x20 ;
        ATOMG.E.INC.STRONG.GPU PT, R2, desc[UR6][R2.64], R5 ;
        EXIT ;
    """.strip().splitlines()
    code = Code("\n".join(f"/*{16 * k:04x}*/ {line.strip()}" for k, line in enumerate(lines)))
    head, body = code.main_loop
    assert code.at[head] == 0x20
    assert code.shortest([head], lambda b: b == head, (1, 1, 1), body) == 5
    assert code.shortest([head], lambda b: b == head, (1, 1, 2), body) == 6
    assert code.shortest([0], lambda b: b == head, (0, 0, 0)) == 2
    with pytest.raises(ValueError, match="no such way"):
        code.shortest([head], lambda b: b == head, (2, 1, 1), body)
