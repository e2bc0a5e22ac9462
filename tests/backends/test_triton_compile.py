"""The Triton backend's launches compiled to machine code for sm_80, sm_90 and sm_100; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ops import host
from support.paths import PROGRAMS, ROOT
from tools.gpu import triton_budget

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.mark.timeout(1800)  # compiles from scratch where Triton has nothing cached
@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.study), 90, pytest.param(100, marks=pytest.mark.study)]
)
def test_launches_compile_without_spills_and_with_wide_accesses(arch):
    if not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton comes without ptxas or cuobjdump")
    few = [] if arch == 90 else ["few"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, PROGRAMS / "triton_compiled.py", str(arch), *few], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    by_call = {}
    for row in rows:
        by_call.setdefault(row["call"], []).append(row["kernel"])
        assert row["stack"] == 0, row
        assert row["local"] == 0, row
        assert row["registers"] <= 168, row  # three blocks of 128 threads on every multiprocessor
    for row in rows:
        if row["kernel"] == "weighted_loss_kernel" and row["call"] in triton_budget.LOOP:
            assert row["wide_loads"] >= 2, row
            assert row["wide_stores"] >= 1, row
        if row["kernel"] == "scale_gradient_kernel":
            assert row["wide_loads"] >= 1, row
            assert row["wide_stores"] >= 1, row
        if row["kernel"] == "weighted_loss_kernel" and row["call"] in triton_budget.LOOP:
            assert 0 < row["loop"] <= triton_budget.LOOP[row["call"]], row
        if row["kernel"] == "weighted_loss_kernel" and row["call"] in triton_budget.TILE:
            assert 0 < row["tile"] <= triton_budget.TILE[row["call"]], row
        for table, count in ((triton_budget.INNER, "inner"), (triton_budget.PASS, "pass")):
            if row[count] is not None:
                assert 0 < row[count] <= table[row["call"]][1], row
    counted = {row["call"] for row in rows if row["inner"] or row["pass"]}
    assert counted == {*triton_budget.INNER, *triton_budget.PASS} & by_call.keys()
    # One launch each; a mean spatial weight costs one more, a peak one more.
    assert by_call["plain-bf16"] == by_call["map-fp32"] == ["weighted_loss_kernel"]
    assert by_call["area-latents"] == ["weight_mean_kernel", "weighted_loss_kernel"]
    assert by_call["artifact-threshold"] == ["artifact_loss_kernel", "artifact_scale_kernel"]
    assert by_call["policy"] == ["policy_loss_kernel"]
    if not few:
        assert by_call["policy-sample"] == ["policy_loss_kernel"] * 2
        assert by_call["artifact-max-bf16"] == ["artifact_loss_kernel", "artifact_peak_kernel", "artifact_scale_kernel"]


def test_launches_past_the_binder_hand_over_what_it_does_and_hold_no_tensor():
    if not (TOOLS / "ptxas").exists():
        pytest.skip("this Triton comes without ptxas")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, PROGRAMS / "triton_direct.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found["launches"], found["kept"]) == (5 + 2 + 2 + 2 + 3 + 2 + 2 + 3, False)
    assert all(found["calls"][what] <= most for what, most in host.CALLS["triton"].items()), found["calls"]
