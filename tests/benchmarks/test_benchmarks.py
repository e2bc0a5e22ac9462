"""The benchmark command: what it runs, writes and leaves out."""

import pytest
import torch

from benchmarks.ops import (
    history,
    run,
)


@pytest.fixture(autouse=True)
def _threads():
    """`run` sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
