"""The benchmarks themselves: honest inputs, wrong results that are refused, a history that compares."""

import dataclasses
import math

import pytest
import torch

from benchmarks.ops import (
    acceptance,
    compare,
    correctness,
    formulas,
    history,
    implementations,
    inputs,
    launches,
    measure,
    memory,
    plot,
    registry,
    run,
    step,
    table,
    timing,
)
from benchmarks.studies import detector_cost

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
        "dtype": "fp32", "shape": [2, 3], "map": "grid", "tags": ["acceptance"], "ours": True, "reason": None,
        "rounds": 9, "p20_us": 10.0, "p50_us": 10.5, "p80_us": 11.0, "gb_per_s": 5.0,
        "copy_share": 0.8, "least_bytes": 800,
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

    want = correctness.expected(case, tensors)
    assert correctness.check(case, correctness.run(case, tensors, fused), want, ours=True)["reason"] is None
    assert correctness.check(case, correctness.run(case, tensors, case.formula), want, ours=False)["reason"] is None


def test_inputs_are_the_same_every_time():
    case = tiny("kohya/bf16")
    first, second = case.inputs(case, CPU), case.inputs(case, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_pixel_of_a_detectors_map_is_near_the_threshold(monkeypatch):
    monkeypatch.setattr(inputs, "NEAR", 2e-3)  # many would be
    case = dataclasses.replace(EVERY["detector-demo/fp32"], shape=(1, 1, 8, 8))
    tensors = case.inputs(case, torch.device("cpu"))
    enlarged = torch.nn.functional.interpolate(tensors["logits"], size=(64, 64), mode="bilinear")
    assert (enlarged.sigmoid() - 0.1).abs().min() > 1.9e-3


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


# ---- correctness


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
        correctness.check(
            case, correctness.run(case, tensors, case.formula), correctness.expected(case, tensors), False
        )["reason"]
        is None
    )


# ---- clocks and memory


class FakeClock:
    """A clock whose implementations say how long they take."""

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


def test_short_calls_are_repeated_and_averaged(monkeypatch):
    now, calls = [0.0], []

    def quick():
        calls.append(1)
        now[0] += 1e-6

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    taken = timing.interleaved({"quick": quick}, timing.HostClock(), seconds=0.0, least_rounds=2)["quick"]
    assert taken == pytest.approx([1e-6] * 2)
    # Four single calls, and two samples that last the clock's least 200 us.
    assert 4 + 2 * 200 <= len(calls) <= 4 + 2 * 201


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
    eager = implementations.Implementation("eager", case.formula, False)
    counted = launches.counted(implementations.Call(case, case.inputs(case, CPU), eager))
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
    outcome = {check.what.split(": ")[1]: check.met for check in acceptance.checks(group)}
    assert outcome == {
        "eager / diffdoctor": True,
        "torch.compile / diffdoctor": False,
        "kernel, share of a copy's speed": False,
        "held between forward and backward": True,
    }
    assert "MISSED" in acceptance.text(group)


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


def test_a_detectors_operations_are_counted_for_forward_and_backward():
    layer = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    products = 2 * 3 * 8 * 9 * 16 * 16  # of the forward; the weight's gradient takes as many, the picture needs none
    assert detector_cost.gflop_per_picture(layer, 16) == pytest.approx(2 * products / 1e9)
