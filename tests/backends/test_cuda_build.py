"""csrc/cuda compiled by nvcc: nothing spills, and the contiguous path moves 16 bytes at a time."""

import json
import re
import subprocess

import pytest

from support.cache import digest, kept, native_sources
from support.paths import ROOT
from tools.gpu import sass, static_report

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ANY_TERMS, POLICY = (ROOT / "csrc" / "cuda" / name for name in ("any_terms.cu", "policy_loss.cu"))
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
    name = f"sm_{arch}.json"
    names = [source.name for source in sources]

    def build(folder):
        rows = [row for source in sources for row in static_report.nvcc_rows(arch, source, NVCC)]
        (folder / name).write_text(json.dumps(rows))
        return folder / name

    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    key = digest(version, *names, *native_sources(ROOT / "csrc"))
    return json.loads(kept(name, key, build).read_text())


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_neither_spill_nor_move_less_than_they_could(arch):
    # These two cost as much to compile as all the rest: once is enough.
    sources = [source for source in SOURCES if arch == 90 or source not in (ANY_TERMS, POLICY)]
    rows = compiled(arch, sources)
    assert {row["file"] for row in rows} == {source.name for source in sources}
    spilling = [row["kernel"] for row in rows if row["spills"] != 0 or row["stack"] or row["local"]]
    assert not spilling
    assert not [row["kernel"] for row in rows if "LDL.32" in row["access"] or "STL.32" in row["access"]]

    loss = {row["kernel"]: row for row in rows if row["file"] in ("weighted_loss.cu", ANY_TERMS.name)}
    kinds = 2 if arch == 90 else 1
    assert len(loss) == 8 * kinds  # model_pred's dtypes, contiguous and strided; the rest is a branch at run time
    vectorised = [row for name, row in loss.items() if re.search(r"Config<\d, true|ILi\dELb1E", name)]
    assert len(vectorised) == 4 * kinds
    for row in vectorised:
        # model_pred and each term's dtype, for each of the vectors that a thread has under way.
        assert row["access"]["LDG.128"] >= 4, row
        assert row["access"]["STG.128"] >= 1, row
        # Two blocks of 256 threads on a multiprocessor; one for what few targets have in fp64.
        rare = row["file"] == ANY_TERMS.name and re.search(r"Config<3, |ILi3E", row["kernel"])
        assert row["registers"] <= (255 if rare else 128), row
    scale = [
        row
        for row in rows
        if row["file"] == "scale_gradient.cu" and ("true" in row["kernel"] or "ELb1E" in row["kernel"])
    ]
    assert len(scale) == 6
    assert all(row["access"].get("STG.128", 0) >= 1 and row["access"].get("LDG.128", 0) >= 1 for row in scale)
