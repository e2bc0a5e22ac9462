"""`python -m benchmarks.scale` measures what it says, on a few units."""

import json

import pytest

from benchmarks import scale

pytest.importorskip("psutil")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")


def test_all_parts_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "SHARD", 10)
    words = ["--output", str(tmp_path), "--engine", "none", "--pictures", "40", "--units", "20"]
    results = scale.main(words)
    assert json.loads(json.dumps(results)) == json.loads((tmp_path / "results.json").read_text())
    assert results["rows"]["rows"] == 40
    assert 0 < results["unit"]["ms_a_unit"] < 1000
    assert [results["set"][name]["pictures"] for name in ("write", "label", "read")] == [40, 40, 40]
    assert results["set"]["labels_bytes_a_picture"] > 100
    assert "label: 40 pictures" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
