"""The ranking of training pictures: its figures against plain means, its file, several processes, its page."""

import doctest
import os

import numpy as np
import pytest
import torch

from diffdoctor.data.columns import ParquetColumns
from diffdoctor.maps import PictureRanking, ranking, write_ranking
from diffdoctor.maps.ranking import BINS
from diffdoctor.runs.errors import UserError

pytest.importorskip("pyarrow")


def visits(count=400, seed=0):
    """Keys, losses, shares and noise levels: a loss is that of its level, times its picture's own factor."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 10, count)
    levels = rng.uniform(0, 1, count)
    losses = (0.02 + levels) * np.where(pictures == 7, 2.0, 1.0)
    return [f"{p}.png" for p in pictures], losses, np.where(pictures == 3, 0.25, 0.0), levels


def filled(keys, losses, shares, levels, batch=8):
    found = PictureRanking()
    for first in range(0, len(keys), batch):
        part = slice(first, first + batch)
        values = [torch.tensor(values[part]) for values in (losses, shares, levels)]
        found.update(keys[part], *values)
        for value in values:
            value.zero_()  # as by a trainer that writes each step's to the same place
    return found


def test_means_are_those_of_the_visits_and_the_odd_picture_comes_first():
    keys, losses, shares, levels = visits()
    found = {row["key"]: row for row in filled(keys, losses, shares, levels).rows()}
    for key, row in found.items():
        own = np.array(keys) == key
        assert row["visits"] == own.sum() and row["loss"] == pytest.approx(losses[own].mean())
        assert row["artifact_share"] == pytest.approx(shares[own].mean())
    assert next(iter(found)) == "7.png"  # by the loss itself chance would decide
    # by the definition: the mean of all losses of the level up to the end of the loss's own update
    bins, relative = (levels * BINS).astype(int), {key: [] for key in found}
    for number, (key, loss) in enumerate(zip(keys, losses, strict=True)):
        seen = slice(0, number // 8 * 8 + 8)
        relative[key].append(loss / losses[seen][bins[seen] == bins[number]].mean())
    assert {key: row["relative_loss"] for key, row in found.items()} == pytest.approx(
        {key: np.mean(values) for key, values in relative.items()}
    )


def test_the_order_in_a_batch_says_nothing():
    for keys, losses in ((["cat", "dog"], [0.1, 0.3]), (["dog", "cat"], [0.3, 0.1])):
        found = PictureRanking()
        found.update(keys, losses)
        relative = {row["key"]: row["relative_loss"] for row in found.rows()}
        assert relative == pytest.approx({"dog": 1.5, "cat": 0.5})


def test_names_and_folders_need_not_be_unicode(tmp_path):
    folder = tmp_path / os.fsdecode(b"K\xe4se")
    folder.mkdir()
    ranked = PictureRanking()
    ranked.update(["b\udce4.png", "b\\udce4.png", "a.png"], [0.3, 0.2, 0.1])
    write_ranking(folder, ranked)
    loaded = PictureRanking.load(folder / "ranking.parquet")
    assert [row["key"] for row in loaded.rows()] == ["b\udce4.png", "b\\udce4.png", "a.png"]
    with ParquetColumns(folder / "ranking.parquet") as table:
        assert table.texts("key", longest=99).tolist() == ["b\\udce4.png"] * 2 + ["a.png"]


def test_it_resumes_from_its_file_and_its_state_and_processes_add_up(tmp_path):
    keys, losses, shares, levels = visits()
    whole = filled(keys, losses, shares, levels).rows()
    half = filled(keys[:200], losses[:200], shares[:200], levels[:200])
    half.save(tmp_path / "half.parquet")
    again = PictureRanking()
    again.load_state_dict(half.state_dict())
    for resumed in (PictureRanking.load(tmp_path / "half.parquet"), again):
        for first in range(200, 400, 8):
            part = slice(first, first + 8)
            resumed.update(keys[part], losses[part], shares[part], levels[part])
        assert resumed.rows() == whole
    other = filled(keys[200:], losses[200:], shares[200:], levels[200:])
    merged = {row["key"]: row for row in half.merge(other).rows()}
    for row in whole:
        assert merged[row["key"]]["visits"] == row["visits"]
        assert merged[row["key"]]["loss"] == pytest.approx(row["loss"])
    (tmp_path / "other.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="other"):
        PictureRanking.load(tmp_path / "other.parquet")


def test_what_is_not_finite_is_no_visit_and_lengths_must_agree():
    found = PictureRanking()
    found.update(["a", "b", "a"], [float("nan"), 1.0, 3.0])
    rows = {row["key"]: (row["visits"], row["artifact_share"]) for row in found.rows()}
    assert rows == {"a": (1, None), "b": (1, None)}
    with pytest.raises(ValueError, match=r"shares: expected shape \(2,\)"):
        found.update(["a", "b"], torch.ones(2), torch.ones(3))
    assert doctest.testmod(ranking).failed == 0


def test_the_page_shows_the_pictures_that_it_names(tmp_path):
    found, asked = filled(*visits()), []

    def pictures(wanted):
        asked.append(wanted)
        for number in range(10):
            yield f"{number}.png", np.full((16, 24, 3), 20 * number, np.uint8)

    write_ranking(tmp_path, found, pictures, shown=2)
    page = (tmp_path / "ranking.html").read_text()
    assert "7.png: loss" in page and "artifact share 25.0%" in page and page.count("<img") == 5
    assert {"3.png", "7.png"} <= asked[0] and len(asked[0]) <= 5
    assert PictureRanking.load(tmp_path / "ranking.parquet").rows() == found.rows()
    write_ranking(tmp_path, PictureRanking())
    assert "0 pictures were visited" in (tmp_path / "ranking.html").read_text()
