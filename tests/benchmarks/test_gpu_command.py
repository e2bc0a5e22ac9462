"""The GPU command and the static report: parts that fail apart, commands that end, counts that are added up."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.ops import formulas, implementations, launches, registry
from tools.gpu import __main__ as gpu
from tools.gpu import build as gpu_build
from tools.gpu import parts as gpu_parts
from tools.gpu import probe as gpu_probe
from tools.gpu import sass, static_report

CPU = torch.device("cpu")


def test_gpu_parts_fail_apart_and_results_are_written_each_time(tmp_path, capsys):
    context = gpu.Context(tmp_path, time.monotonic() + 60)

    def fails(context):
        raise gpu.PartError("no such tool", found={"passed": 3})

    def crashes(context):
        return {}["missing"]

    def works(context):
        assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == {"fails", "crashes"}
        return {"copy": 4.2}

    found = gpu.run(context, ({"fails": fails, "crashes": crashes}, {"works": works}))
    assert found["fails"]["reason"] == "no such tool"
    assert found["fails"]["passed"] == 3
    assert found["crashes"]["reason"] == "KeyError: 'missing'"
    assert found["works"]["copy"] == 4.2
    text = (tmp_path / "gpu.txt").read_text()
    assert "FAILED: no such tool" in text
    assert '{"copy": 4.2}' in text
    assert capsys.readouterr().out.count("\n") == 3


def test_gpu_commands_end_at_their_limit_with_what_they_said(tmp_path, monkeypatch):
    class Begun(subprocess.Popen):
        """Its limit counts from when it has said something."""

        def wait(self, timeout=None):
            while timeout == 2 and not (tmp_path / "begun").exists():
                time.sleep(0.01)
            return super().wait(timeout)

    context = gpu.Context(tmp_path, time.monotonic() + 600)
    with monkeypatch.context() as patched, pytest.raises(gpu.PartError, match=r"ran past its 2 s.*begun"):
        patched.setattr(subprocess, "Popen", Begun)
        context.run(["bash", "-c", f"echo begun; touch {tmp_path}/begun; sleep 600 & sleep 600"], 2)
    began = time.monotonic()
    assert context.run(["bash", "-c", "sleep 600 & echo left something behind"], 300).startswith("left")
    assert time.monotonic() - began < 300
    with pytest.raises(gpu.PartError, match="exit code 3: the reason"):
        context.run(["bash", "-c", "echo the reason; exit 3"], 60)
    assert "the reason" in (tmp_path / "gpu.log").read_text()
    late = gpu.Context(tmp_path, time.monotonic())
    with pytest.raises(gpu.PartError, match="lack of time"):
        late.run(["true"], 5)


def test_a_gpu_command_that_starts_while_the_run_is_stopped_is_ended(tmp_path, monkeypatch):
    context = gpu.Context(tmp_path, time.monotonic() + 600)

    class Late(subprocess.Popen):
        """The run is stopped before anybody knows of the process."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            context.deadline = 0.0
            context.end()

    monkeypatch.setattr(subprocess, "Popen", Late)
    began = time.monotonic()
    with pytest.raises(gpu.PartError, match="ran past"):
        context.run(["sleep", "300"], 300)
    assert time.monotonic() - began < 300


def test_gpu_commands_run_side_by_side_and_their_log_stays_small(tmp_path):
    context = gpu.Context(tmp_path, time.monotonic() + 600)
    meet = f"touch {tmp_path}/$0; until [ -e {tmp_path}/$1 ]; do sleep 0.05; done; echo met; head -c 2000000 /dev/zero"
    answers = context.run_all([["bash", "-c", meet, "a", "b"], ["bash", "-c", meet, "b", "a"], ["false"]], 120)
    assert [reason for _, reason in answers] == [None, None, "exit code 1: nothing was printed"]
    assert all(text.startswith("met") and len(text) > 2_000_000 for text, _ in answers[:2])
    assert (tmp_path / "gpu.log").stat().st_size < 1_200_000


def test_a_stopped_gpu_run_leaves_what_it_had_and_nothing_running(tmp_path):
    program = f"""
import sys, time
from tools.gpu import __main__ as gpu
gpu.STAGES = ({{"machine": lambda context: {{"gpu": "none"}}}},
              {{"build": lambda context: context.run(["bash", "-c", "echo $$ > {tmp_path}/pid; sleep 99; true"], 99)}})
sys.exit(gpu.main(["--output", "{tmp_path}", "--parts", "machine,build"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=gpu_parts.ROOT, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["machine"]["gpu"] == "none"
    assert "reason" in parts["build"]


class Scripted(gpu.Context):
    """A machine with a GPU whose commands answer from a list of (word of the command, output or error)."""

    def __init__(self, folder, *answers):
        machine = {"gpu_capability": "9.0", "cores": 16, "gpu_memory_gib": 139.8}
        super().__init__(folder, time.monotonic() + 60, None, {"machine": machine})
        self.answers, self.said = answers, []

    def run(self, command, limit, **environment):
        self.said.append(command)
        answer = next(answer for word, answer in self.answers if word in command)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_gpu_build_falls_back_to_nvcc_alone(tmp_path):
    broken = gpu.PartError("exit code 1: no pyproject")
    context = Scripted(tmp_path, ("setup.py", broken), ("tools.gpu.build", ""), ("-c", '{"cuda": null}'))
    found = gpu_parts.part_build(context)
    assert found["how"] == "nvcc alone"
    assert context.said[-2][-2:] == ["tools.gpu.build", "90"]
    unusable = Scripted(tmp_path, ("setup.py", broken), ("tools.gpu.build", ""), ("-c", '{"cuda": "old driver"}'))
    with pytest.raises(gpu.PartError, match="old driver"):
        gpu_parts.part_build(unusable)


def test_only_test_files_with_the_gpu_mark_are_run_there(tmp_path, monkeypatch):
    (tmp_path / "tests" / "backends").mkdir(parents=True)
    (tmp_path / "tests" / "backends" / "test_marked.py").write_text("@pytest.mark.gpu\ndef test(): pass\n")
    (tmp_path / "tests" / "backends" / "test_other.py").write_text("import diffusers\n")
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    context = Scripted(tmp_path, ("pytest", "==== 3 passed, 1 skipped in 2.0s ===="))
    found = gpu_parts.part_tests(context)
    assert found["files"] == ["test_marked.py"]
    assert len(context.said) == found["processes"] == 5
    assert (found["passed"], found["failed"], found["skipped"]) == (15, 0, 5)
    assert all("tests/backends/test_marked.py" in command for command in context.said)
    shards = [command[-3:] for command in context.said]
    assert sorted(shards) == [
        ["not triton", "--shard", "0/1"], *(["triton", "--shard", f"{k}/4"] for k in range(4))
    ]  # fmt: skip


def test_stages_are_tested_on_the_gpu_where_their_packages_are(tmp_path, monkeypatch):
    context = Scripted(tmp_path, ("pytest", "61 failed, 1588 passed, 8 skipped, 47 errors in 129.12s (0:02:09)"))
    with pytest.raises(gpu.PartError, match="108 of 1696 failed") as caught:
        gpu_parts.part_stages(context)
    assert caught.value.found["passed"] == 1588
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    for part in (gpu_parts.part_stages, gpu_parts.part_treatments):
        with pytest.raises(gpu.PartError, match=r"not installed: peft$"):
            part(context)


def test_treatments_keep_the_rows_of_a_study_that_did_not_end(tmp_path):
    class Studies(Scripted):
        def run(self, command, limit, **environment):
            output = pathlib.Path(command[-1])
            output.write_text(json.dumps({"rows": [{"step": 1.5}]}))
            if "treat_memory" in command[2]:
                raise gpu.PartError("ran past its 50 s")

    with pytest.raises(gpu.PartError, match=r"^treat-memory: ran past its 50 s$") as caught:
        gpu_parts.part_treatments(Studies(tmp_path))
    assert caught.value.found == {"treat-speed": [{"step": 1.5}], "treat-memory": [{"step": 1.5}]}


def test_failed_gpu_tests_are_named_and_the_others_counted(tmp_path):
    text = """
=========================== short test summary info ============================
FAILED tests/backends/test_gpu.py::test_graph[cuda-bf16] - AssertionError
========================= 1 failed, 7 passed in 8.52s ==========================
"""
    with pytest.raises(gpu.PartError, match=r"1 of 12 failed; ran past its 170 s.*test_graph\[cuda-bf16\]") as caught:
        gpu_parts._tested([(text, "exit code 1: ..."), ("4 passed in 1s", None), ("tests/…", "ran past its 170 s")], [])
    assert caught.value.found["passed"] == 11


def test_every_shard_together_is_every_test(tmp_path):
    tests = tmp_path / "test_numbers.py"
    tests.write_text("import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test(n): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu.shard", "-p", "no:cacheprovider"]
    found = []
    for shard in ("0/2", "1/2"):
        done = subprocess.run([*command, "--collect-only", "--shard", shard, f"--rootdir={tmp_path}", tests],
                              cwd=gpu_parts.ROOT, capture_output=True, text=True)  # fmt: skip
        found.append([line.split("::")[1] for line in done.stdout.splitlines() if "::" in line])
    assert found == [["test[0]", "test[2]", "test[4]"], ["test[1]", "test[3]"]]


def test_launches_counted_before_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "_known", {})
    counts = {"cuda": {"launches": 2, "waits": 0}, "eager": {"error": "x"}}
    answer = json.dumps({"case": "sd15/bf16", "implementations": counts})
    context = Scripted(tmp_path, *((f"{k}/8", answer) for k in range(8)))
    found = gpu_parts.part_warm(context)
    assert found == {"cases": 8, "failures": {"sd15/bf16 eager": "x"}}
    launches.load(gpu_parts._launch_counts(context))
    case = registry.shrunken(next(case for case in registry.cases("cuda") if case.key == "sd15/bf16"))
    call = implementations.Call(
        case,
        case.inputs(case, CPU),
        implementations.Implementation("cuda", lambda **tensors: case.fused(tensors, "cpu"), True),
    )
    assert launches.of_call("sd15/bf16", call) == {"launches": 2, "waits": 0}
    monkeypatch.setattr(launches, "seen_by_profiler", lambda call: 1 / 0)
    unknown = launches.of_call("other/bf16", call)
    assert unknown["waits"] == 0
    assert "ZeroDivisionError" in unknown["launches_error"]


def test_the_sanitizer_names_the_tool_that_found_something(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: name)
    clean = '{"checked": 27, "wrong": []}\n========= ERROR SUMMARY: 0 errors\n'
    context = Scripted(tmp_path, ("memcheck", clean), ("racecheck", gpu.PartError("exit code 99: it", "= hazard at x")))
    with pytest.raises(gpu.PartError, match="racecheck: exit code 99: it; = hazard at x") as caught:
        gpu_parts.part_sanitizer_cuda(context)
    assert caught.value.found["memcheck"] == {
        "checked": 27,
        "wrong": [],
        "summary": "========= ERROR SUMMARY: 0 errors",
    }


def test_one_backend_without_counters_leaves_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: name)
    context = Scripted(tmp_path, ("cuda", gpu.PartError("exit code 9")), ("triton", '"ID","Metric"\nnoise\n'))
    assert gpu_parts.part_ncu(context) == {"cuda": "no counters: exit code 9", "triton": ['"ID","Metric"']}


@pytest.mark.parametrize("wrong", [False, True])
def test_the_small_gpu_check_counts_what_is_wrong(monkeypatch, wrong):
    """On the CPU and the reference: what it does with a GPU's results, not what a GPU gives."""
    monkeypatch.setattr(gpu_probe, "DEVICE", CPU)
    monkeypatch.setattr(gpu_probe, "own_backends", lambda op, device: ("reference",))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    if wrong:
        monkeypatch.setattr(
            registry, "_fused_pair", lambda t, backend: 2.0 * formulas.mse(t["model_pred"], t["target"])
        )
    found = gpu_probe.small("reference")
    assert found["checked"] == len(registry.cases("cuda"))
    assert bool(found["wrong"]) == wrong
    assert all("wrong result" in line for line in found["wrong"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_every_part_that_needs_one_says_so(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path), "--parts", "machine,build,limits,benchmarks"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all("sees no CUDA device" in part["reason"] for part in found.values())


def test_sass_is_counted_by_kind_and_width():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;   /* 0x0000df00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/                   FFMA.FTZ R0, R1, R2, R3 ;
        /*0040*/                   STG.E.128 desc[UR4][R4.64], R8 ;
        /*0050*/                   STL [R1], R8 ;
        /*0060*/                   NOP ;
    """
    found = sass.instructions(text)
    assert found["instructions"] == 6
    assert found["access"] == {"LDG.128": 1, "LDG.16": 1, "STG.128": 1, "STL.32": 1}
    assert found["kinds"]["global"] == 3


def test_triton_launches_once_forward_and_once_backward():
    pytest.importorskip("triton")
    if sass.find_tool("cuobjdump") is None:
        pytest.skip("cuobjdump is missing")
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu.static_triton", "90", "latents/fp32", "sd15/bf16"],
        cwd=static_report.ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    parts = [(row["case"], row["part"]) for row in rows]
    assert sorted(parts) == sorted((case, part) for case in ("latents", "sd15") for part in ("forward", "backward"))
    assert all(0 < row["registers"] <= 255 and row["local"] == 0 for row in rows)
    wide = next(row for row in rows if row["case"] == "latents" and row["part"] == "forward")
    assert {"LDG.128", "STG.128"} <= set(wide["access"])


def test_pybind11_comes_from_torch_where_its_package_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else found(name))
    assert (pathlib.Path(gpu_build.pybind11_include()) / "pybind11" / "pybind11.h").exists()
    assert "torch" in gpu_build.pybind11_include()


def test_the_static_report_names_what_it_could_not_get(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("ptxas is missing")

    monkeypatch.setattr(static_report, "triton_rows", broken)
    monkeypatch.setattr(static_report, "find_nvcc", lambda: None)
    rows, missing = static_report.collect((90,))
    assert rows == []
    assert missing == ["cuda: nvcc was found neither on PATH nor in /usr/local/cuda", "triton sm_90: ptxas is missing"]
    assert "ptxas is missing" in static_report.text(rows, missing)
