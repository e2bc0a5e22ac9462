"""The benchmarks themselves: honest inputs, a gate that refuses, a history that compares, GPU parts that fail apart."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import (
    bar,
    compare,
    formulas,
    gate,
    gpu,
    gpu_build,
    gpu_probe,
    history,
    launches,
    measure,
    memory,
    plot,
    registry,
    run,
    sass,
    sides,
    static_report,
    step,
    table,
    timing,
)

CPU = torch.device("cpu")
EVERY = {case.key: case for device in ("cuda", "cpu") for case in registry.cases(device)}


def tiny(key="latents/fp32"):
    return registry.shrunken(EVERY[key])


@pytest.fixture(autouse=True)
def _threads():
    """`run` sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(**changes):
    """A timed row of the history."""
    base = {
        "run": "r1", "commit": "a" * 40, "device": "cpu", "op": "weighted_loss", "case": "latents", "backend": "cpu",
        "dtype": "fp32", "shape": [2, 3], "map": "grid", "tags": ["bar"], "ours": True, "reason": None, "rounds": 9,
        "p20_us": 10.0, "p50_us": 10.5, "p80_us": 11.0, "gb_per_s": 5.0, "copy_share": 0.8, "least_bytes": 800,
        "gradient_bytes": 100, "held_bytes": 100, "peak_bytes": 120, "machine": {"cpu": "x", "threads": 2},
    }  # fmt: skip
    return base | changes


# ---- registry


def test_names_are_unique_on_each_device():
    for device in ("cpu", "cuda"):
        keys = [case.key for case in registry.cases(device)]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("key", EVERY)
def test_every_case_passes_its_gate_on_the_reference(key):
    case = registry.shrunken(EVERY[key])
    tensors = case.inputs(case, CPU)
    backend = "reference"

    def fused(**given):
        return case.fused(given, backend)

    want = gate.expected(case, tensors)
    assert gate.check(case, gate.run(case, tensors, fused), want, ours=True)["reason"] is None
    assert gate.check(case, gate.run(case, tensors, case.formula), want, ours=False)["reason"] is None


def test_inputs_are_the_same_every_time():
    case = tiny("kohya/bf16")
    first, second = case.inputs(case, CPU), case.inputs(case, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_least_bytes_of_the_bar_are_prediction_target_gradient_and_map():
    case = EVERY["latents/bf16"]
    tensors = case.inputs(case, CPU)
    elements = math.prod(case.shape)
    assert registry.least_bytes(case, tensors) == 3 * 2 * elements + 4 * elements // case.shape[1]


def test_fp16_moves_five_passes_for_three():
    case = dataclasses.replace(EVERY["pixel-2048/fp16"], shape=(1, 3, 64, 64))
    tensors = case.inputs(case, CPU)
    assert registry.passes_bytes(case, tensors) * 3 == registry.least_bytes(case, tensors) * 5


def test_large_cases_are_large():
    large = [case for case in registry.cases("cuda") if "large" in case.tags]
    assert large
    assert all(math.prod(case.shape) >= 64e6 for case in large)


def test_tokens_unpack_as_the_layout_says():
    import diffdoctor

    tokens = torch.arange(2 * 12 * 8, dtype=torch.float32).view(2, 12, 8)
    assert torch.equal(formulas.unpack(tokens, 6, 8), diffdoctor.Packed(6, 8).unpack(tokens))


# ---- the gate


@pytest.mark.parametrize("fault", ["value", "gradient", "nan"])
def test_a_wrong_result_gets_no_speed(fault):
    case = tiny()

    def wrong(tensors, backend):
        loss = case.formula(**tensors)
        if fault == "value":
            return loss * 1.0001
        if fault == "gradient":
            return loss + 1e-4 * (tensors["model_pred"] - tensors["model_pred"].detach()).sum()
        return loss * float("nan")

    rows = measure.measure(
        dataclasses.replace(case, fused=wrong), CPU, seconds=0.02, compiled=False, backends=("reference",)
    )
    by_side = {row["backend"]: row for row in rows}
    assert by_side["reference"]["reason"].startswith("wrong result")
    assert "p50_us" not in by_side["reference"]
    assert by_side["eager"]["p50_us"] > 0


def test_a_side_that_raises_does_not_stop_the_others():
    def broken(tensors, backend):
        raise RuntimeError("no such kernel\nand more")

    rows = measure.measure(
        dataclasses.replace(tiny(), fused=broken), CPU, seconds=0.02, compiled=False, backends=("reference",)
    )
    by_side = {row["backend"]: row for row in rows}
    assert by_side["reference"]["reason"] == "RuntimeError: no such kernel"
    assert by_side["copy"]["copy_share"] == 1.0
    assert {"p20_us", "gb_per_s", "copy_share", "peak_bytes", "grad_error", "ops"} <= set(by_side["eager"])


def test_the_loss_scale_is_taken_out_of_the_error():
    case = dataclasses.replace(tiny("latents/fp16"), scale=2.0**16)
    tensors = case.inputs(case, CPU)
    assert (
        gate.check(case, gate.run(case, tensors, case.formula), gate.expected(case, tensors), False)["reason"] is None
    )


# ---- clocks and memory


class FakeClock:
    """A clock whose sides say how long they take."""

    smallest = 1.0

    def time(self, side, calls):
        return side()


def test_every_round_times_every_side():
    order = []
    sides_ = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    samples = timing.interleaved(sides_, FakeClock(), seconds=0.0, least_rounds=6)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = order[-18:]
    assert all(set(rounds[i : i + 3]) == set("abc") for i in range(0, 18, 3))
    assert [rounds[i] for i in range(0, 9, 3)] == ["a", "b", "c"]


def test_short_calls_are_repeated_and_averaged():
    calls = []
    clock = timing.HostClock()
    taken = timing.interleaved({"quick": lambda: calls.append(1)}, clock, seconds=0.0, least_rounds=2)["quick"]
    assert len(calls) > 200
    assert all(one < 1e-4 for one in taken)


def test_percentiles_are_numpys():
    import numpy

    samples = [5.0, 1.0, 9.0, 2.0, 2.5, 7.0]
    for share in (0.2, 0.5, 0.8):
        assert timing.percentile(samples, share) == pytest.approx(numpy.quantile(samples, share))


def test_memory_of_a_call_is_what_it_allocates():
    x = torch.zeros(1 << 16, requires_grad=True)
    size = x.numel() * 4

    def forward():
        return (x * x).square().sum()  # x² is kept for its square's gradient

    forward().backward()
    found = memory.forward_and_backward(forward, lambda result: torch.autograd.grad(result, x), CPU)
    assert size <= found["held_bytes"] < size + 4096
    assert 2 * size <= found["peak_bytes"] <= 5 * size


def test_operations_are_counted_forward_and_backward_without_views():
    x = torch.ones(4, 4, requires_grad=True)

    def call():
        y = (x.view(16) * 2).exp().sum()  # forward: mul, exp, sum
        return torch.autograd.grad(y, x)  # backward: ones_like, expand (free), mul, mul

    assert launches.counted(call) == {"ops": 6, "waits": 0}
    assert launches.counted(lambda: torch.ones(()).item())["waits"] == 1


def test_trainers_that_read_timesteps_are_seen_waiting():
    case = tiny("simpletuner/bf16")
    side = sides.Side("eager", case.formula, False)
    counted = launches.counted(sides.Call(case, case.inputs(case, CPU), side))
    assert counted["waits"] == case.shape[0]


# ---- running, keeping, comparing, drawing


def test_a_smoke_run_writes_rows_with_their_surroundings(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = ["--small", "--cases", "^(latents/fp32|detector-demo)", "--backends", "reference", "--no-compile"]
    assert (
        run.main([*arguments, "--threads", "1", "--seconds", "0.02", "--output", str(path), "--plots", str(tmp_path)])
        == 0
    )
    rows = history.read(path)
    assert {r["case"] for r in rows} == {"latents", "detector-demo"}
    timed = next(r for r in rows if r["backend"] == "reference")
    assert timed["p20_us"] <= timed["p50_us"] <= timed["p80_us"]
    assert timed["machine"]["threads"] >= 1
    assert timed["versions"]["torch"] == torch.__version__
    assert "latents" in capsys.readouterr().out


def test_a_run_ends_with_1_where_our_side_is_refused(tmp_path):
    arguments = ["--small", "--cases", "^latents/fp32", "--backends", "cuda", "--no-compile", "--no-plots"]
    assert run.main([*arguments, "--threads", "1", "--seconds", "0.02", "--output", str(tmp_path / "rows.jsonl")]) == 1


@pytest.mark.parametrize("arguments", [["--cases", "nothing-like-it"], ["--tags", "fast"]])
def test_a_run_without_cases_says_so(arguments, capsys):
    assert run.main([*arguments, "--small"]) == 2
    assert arguments[1] in capsys.readouterr().err


def test_no_case_starts_after_the_time_is_up(capsys):
    options = run.parser().parse_args(["--small", "--minutes", "0", "--no-step"])
    assert run.run(options) == []
    assert "left out for lack of time: latents/fp32" in capsys.readouterr().err


def test_history_names_the_line_that_is_not_a_row(tmp_path):
    path = tmp_path / "x.jsonl"
    history.append(path, [row()])
    with path.open("a") as file:
        file.write('{"case": \n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2 is not JSON"):
        history.read(path)


def test_results_are_found_by_file_commit_and_run(tmp_path):
    history.append(tmp_path / "m.jsonl", [row(), row(commit="b" * 40, run="r2")])
    assert len(history.select(str(tmp_path / "m.jsonl"), tmp_path)) == 2
    assert [r["run"] for r in history.select("bbbb", tmp_path)] == ["r2"]
    with pytest.raises(ValueError, match="cccc"):
        history.select("cccc", tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "same"),
        ({"p20_us": 10.4, "p50_us": 11.0, "p80_us": 11.5}, "same"),
        ({"p20_us": 12.0, "p50_us": 12.5, "p80_us": 13.0}, "slower"),
        ({"p20_us": 8.0, "p50_us": 8.5, "p80_us": 9.0}, "faster"),
        ({"p20_us": 10.9, "p50_us": 11.0, "p80_us": 13.0}, "noise"),
    ],
)
def test_compare_tells_a_change_from_noise(changes, expected):
    ((_, _, _, _, word),) = compare.compare([row()], [row(**changes)], threshold=5)
    assert word == expected


def test_compare_ends_with_1_for_a_slower_side_of_ours(tmp_path, capsys):
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    slower = {"p20_us": 12.0, "p50_us": 12.5, "p80_us": 13.0}
    history.append(tmp_path / "a.jsonl", [row(), row(backend="eager", ours=False)])
    history.append(tmp_path / "b.jsonl", [row(**slower), row(backend="eager", ours=False)])
    history.append(tmp_path / "c.jsonl", [row(), row(backend="eager", ours=False, **slower)])
    assert compare.main([a, b, "--threshold", "5"]) == 1
    assert "+20.0 %" in capsys.readouterr().out
    assert compare.main([a, b, "--threshold", "25"]) == 0
    assert compare.main([a, c]) == 0
    assert compare.main([a, str(tmp_path / "none.jsonl")]) == 2


def test_compare_warns_of_another_machine(tmp_path, capsys):
    history.append(tmp_path / "a.jsonl", [row()])
    history.append(tmp_path / "b.jsonl", [row(machine={"cpu": "y", "threads": 2})])
    compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert "Not measured on the same machine" in capsys.readouterr().out


def test_plots_show_every_side_against_size(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for size in (64, 4096, 1 << 20):
        for side in ("cpu", "eager", "compile", "copy"):
            rows.append(row(case=f"sweep-{size}", shape=[1, size], backend=side, ours=side == "cpu", tags=["sweep"]))
    rows += [row(backend=side, ours=side == "cpu", p20_us=speed) for side, speed in (("cpu", 9.0), ("eager", 50.0))]
    written = plot.draw(rows, tmp_path)
    assert sorted(path.name for path in written) == ["cpu-fp32-size.png", "cpu-speedup.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_the_bar_is_met_or_missed_by_the_rows():
    group = [
        row(p20_us=10.0),
        row(backend="cpu-kernel", copy_share=0.7),
        row(backend="eager", ours=False, p20_us=52.0),
        row(backend="compile", ours=False, p20_us=19.0),
    ]
    outcome = {check.what.split(": ")[1]: check.met for check in bar.checks(group)}
    assert outcome == {
        "eager / diffdoctor": True,
        "torch.compile / diffdoctor": False,
        "kernel, share of a copy's speed": False,
        "held between forward and backward": True,
    }
    assert "MISSED" in bar.text(group)


def test_the_table_has_both_sides_and_every_refusal():
    rows = [row(), row(backend="eager", ours=False, p20_us=50.0), row(backend="triton", reason="wrong result: x")]
    text = table.text(rows)
    assert "5.00" in text
    assert "latents fp32 triton: wrong result: x" in text
    assert table.markdown(table.lines(rows)).count("\n") == 3


# ---- the training step


def test_a_training_step_has_the_same_gradients_with_either_loss(monkeypatch):
    monkeypatch.setitem(step.OWN, "cpu", ("reference",))
    plain = next(one for one in step.STEPS if one.name == "plain-dit-latent")
    rows = step.measure(plain, CPU, small=True, seconds=0.05)
    assert [r["backend"] for r in rows] == ["eager", "reference"]
    assert all(r["loss_share"] > 0 for r in rows)
    assert all(r["peak_bytes"] > 0 for r in rows)
    assert "plain-dit-latent" in step.text(rows)


def test_a_side_that_waits_is_not_captured():
    rows = {"eager": {"ours": False, "waits": 2, "reason": None}}
    calls = {"eager": None, "cpu-kernel": None}
    measure._add_graphs(rows, calls)
    assert rows["eager+graph"]["reason"] == "cannot be captured: it waits for the device 2 times"
    assert set(calls) == {"eager", "cpu-kernel"}


def test_a_failed_side_figure_leaves_the_speed(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(memory, "forward_and_backward", broken)
    rows = measure.measure(tiny(), CPU, seconds=0.02, compiled=False, backends=("reference",))
    assert all(row["p50_us"] > 0 for row in rows)
    assert all("peak_bytes" not in row for row in rows)
    assert rows[0]["memory_error"] == "RuntimeError: no profiler"


def test_a_step_with_other_gradients_is_not_timed(monkeypatch):
    monkeypatch.setitem(step.OWN, "cpu", ("reference",))
    monkeypatch.setattr(step, "_fused", lambda backend: lambda p, t, c: 1.001 * formulas.confidence_mse(p, t, c))
    plain = next(one for one in step.STEPS if one.name == "plain-dit-latent")
    with pytest.raises(ValueError, match="other gradients"):
        step.measure(plain, CPU, small=True, seconds=0.05)


# ---- the GPU command and the static report


def test_gpu_parts_fail_apart_and_results_are_written_each_time(tmp_path, capsys):
    context = gpu.Context(tmp_path, time.monotonic() + 60, None, {})

    def fails(context):
        raise gpu.PartError("no such tool")

    def crashes(context):
        return {}["missing"]

    def works(context):
        assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == {"fails", "crashes"}
        return {"copy": 4.2}

    found = gpu.run(context, {"fails": fails, "crashes": crashes, "works": works})
    assert found["fails"]["reason"] == "no such tool"
    assert found["crashes"]["reason"] == "KeyError: 'missing'"
    assert found["works"]["copy"] == 4.2
    text = (tmp_path / "gpu.txt").read_text()
    assert "FAILED: no such tool" in text
    assert '{"copy": 4.2}' in text
    assert capsys.readouterr().out.count("\n") == 3


def test_gpu_commands_end_at_their_limit_with_what_they_said(tmp_path):
    context = gpu.Context(tmp_path, time.monotonic() + 60, None, {})
    with pytest.raises(gpu.PartError, match=r"ran past its 2 s.*begun"):
        context.run(["bash", "-c", "echo begun; sleep 60 & sleep 60"], 2)
    with pytest.raises(gpu.PartError, match="exit code 3: the reason"):
        context.run(["bash", "-c", "echo the reason; exit 3"], 5)
    assert "the reason" in (tmp_path / "gpu.log").read_text()
    late = gpu.Context(tmp_path, time.monotonic(), None, {})
    with pytest.raises(gpu.PartError, match="lack of time"):
        late.run(["true"], 5)


class Scripted(gpu.Context):
    """A machine with a GPU whose commands answer from a list of (word of the command, output or error)."""

    def __init__(self, folder, *answers):
        super().__init__(folder, time.monotonic() + 60, None, {}, {"machine": {"gpu_capability": "9.0"}})
        self.answers, self.said = answers, []

    def run(self, command, limit, **environment):
        self.said.append(command)
        answer = next(answer for word, answer in self.answers if word in command)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_gpu_build_falls_back_to_nvcc_alone(tmp_path):
    broken = gpu.PartError("exit code 1: no pyproject")
    context = Scripted(tmp_path, ("setup.py", broken), ("benchmarks.gpu_build", ""), ("-c", '{"cuda": null}'))
    found = gpu.part_build(context)
    assert found["how"] == "nvcc alone"
    assert context.said[-2][-2:] == ["benchmarks.gpu_build", "90"]
    unusable = Scripted(tmp_path, ("setup.py", broken), ("benchmarks.gpu_build", ""), ("-c", '{"cuda": "old driver"}'))
    with pytest.raises(gpu.PartError, match="old driver"):
        gpu.part_build(unusable)


def test_only_test_files_with_the_gpu_mark_are_run_there(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_marked.py").write_text("@pytest.mark.gpu\ndef test(): pass\n")
    (tmp_path / "tests" / "test_other.py").write_text("import diffusers\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    context = Scripted(tmp_path, ("pytest", "3 passed"))
    assert gpu.part_tests(context) == {"summary": "3 passed", "files": ["test_marked.py"]}
    assert context.said[0][-1] == "tests/test_marked.py"


def test_one_backend_without_counters_leaves_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    context = Scripted(tmp_path, ("cuda", gpu.PartError("exit code 9")), ("triton", '"ID","Metric"\nnoise\n'))
    assert gpu.part_ncu(context) == {"cuda": "no counters: exit code 9", "triton": ['"ID","Metric"']}


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
    assert gpu.main(["--output", str(tmp_path), "--parts", "machine,build,limits,benchmarks", "--minutes", "1"]) == 1
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
        [sys.executable, "-m", "benchmarks.static_triton", "90", "latents/fp32", "sd15/bf16"],
        cwd=static_report.ROOT, capture_output=True, text=True, timeout=300,
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
