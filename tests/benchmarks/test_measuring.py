"""What benchmarks time, count and refuse: correctness first, then clocks, memory, launches and training steps."""

import dataclasses

import pytest
import torch

from benchmarks.ops import (
    correctness,
    formulas,
    implementations,
    launches,
    measure,
    memory,
    step,
    timing,
)
from benchmarks.studies import detector_cost
from support.benchmarks import tiny

CPU = torch.device("cpu")


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
