"""Benchmark results: kept, found, compared, drawn and held against the bar."""

import pytest

from benchmarks.ops import (
    acceptance,
    compare,
    history,
    plot,
    table,
)


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


def test_what_a_gpu_alone_takes_is_listed_by_replays_of_graphs():
    times = {"eager": 90.0, "eager+graph": 50.0, "cuda": 80.0, "cuda+graph": 10.0, "triton+graph": 20.0, "copy": 8.0}
    rows = [row(backend=name, p20_us=time, ours=name[:4] in ("cuda", "trit")) for name, time in times.items()]
    broken = row(backend="compile+graph", p20_us=None, ours=False, reason="it waits for the device")
    head, line = table.device_lines([*rows, broken, row(case="elsewhere")])
    assert head == ("case", "shape", "eager µs", "cuda µs", "triton µs", "× eager", "of copy")
    assert line == ("latents fp32", "2×3", "50.0", "10.0", "20.0", "5.0", "80%")
