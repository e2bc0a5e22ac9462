"""The study of many prompts, with few of them."""

import json
import sys

import pytest

from benchmarks.studies import many_prompts


@pytest.mark.study
def test_memory_does_not_grow_and_nothing_is_encoded_twice(tmp_path, monkeypatch, capsys):
    arguments = ["many_prompts", "--output", str(tmp_path), "--counts", "20", "120", "--long", "4", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert many_prompts.main() == 0
    assert "0 were encoded again; the same losses: True" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["killed"]["written"] > 4
    assert [row["count"] for row in found["rows"]] == [20, 120, 4, 8]
