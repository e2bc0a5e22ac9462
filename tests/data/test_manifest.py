"""The manifest of a set of shards: a row for each picture, and what does not fit is named."""

import pytest

from diffdoctor.data.manifest import read_manifest
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.runs.errors import UserError
from support.shards import samples_of

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


def test_the_manifest_has_a_row_for_each_picture(tmp_path):
    write_shards(samples_of(6), tmp_path / "set", shard_size=4)
    rows = read_manifest(tmp_path / "set")
    assert rows["shard"] == ["shard-000000.tar"] * 4 + ["shard-000001.tar"] * 2
    assert rows["category"] == ["cat", "dog"] * 3
    assert [m > 0 for m in rows["mask_max"]] == [False, True] * 3
    assert set(rows["height"]) == {12}


def test_a_manifest_that_does_not_fit_is_named(tmp_path):
    write_shards(samples_of(3), tmp_path / "set", shard_size=2)
    (tmp_path / "set" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="shard-000001"):
        ShardData(tmp_path / "set")
    (tmp_path / "set" / "manifest.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="manifest"):
        ShardData(tmp_path / "set")
    with pytest.raises(UserError, match="elsewhere: expected a folder of shards or a shard, got nothing"):
        list(read_shards(tmp_path / "elsewhere"))


def write_manifest(folder, **changes):
    """The set's manifest with other columns."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(folder / "manifest.parquet")
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    parquet.write_table(pa.table(columns | changes), folder / "manifest.parquet")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"picture_offset": ["5"] * 3}, "numbers in the column picture_offset, got string"),
        ({"picture_offset": [None] * 3}, "numbers in the column picture_offset, got null"),
        ({"picture_offset": [1, None, 2]}, "a number in every row of the column picture_offset"),
        ({"picture_size": [[1]] * 3}, "numbers in the column picture_size"),
        ({"height": ["16"] * 3}, "numbers in the column height"),
        ({"shard": [5] * 3}, "text in the column shard, got int64"),
        ({"key": [b"\xff"] * 3}, "text in the column key, got binary"),
        ({"key": ["k" * 2_000_000, "b", "c"]}, "up to 1,024 characters in the column key"),
        ({"shard": [None] * 3}, "names the shard ''"),
    ],
)
def test_a_manifest_of_other_types_is_named(tmp_path, changes, words):
    write_shards(samples_of(3), tmp_path / "set")
    write_manifest(tmp_path / "set", **changes)
    with pytest.raises(UserError, match=words):
        ShardData(tmp_path / "set")


def test_a_manifest_of_more_rows_than_its_shards_hold_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    write_shards(samples_of(1), tmp_path / "set")
    table = parquet.read_table(tmp_path / "set" / "manifest.parquet")
    rows = pa.concat_tables([table] * 5000)
    parquet.write_table(rows, tmp_path / "set" / "manifest.parquet")
    with pytest.raises(UserError, match=r"expected up to \d+ rows, which its shards can hold, got 5,000"):
        ShardData(tmp_path / "set")
    parquet.write_table(pa.table([[1], [2]], names=["key", "key"]), tmp_path / "set" / "manifest.parquet")
    with pytest.raises(UserError, match="expected the columns"):
        read_manifest(tmp_path / "set")
