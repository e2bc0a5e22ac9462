"""Sets of pictures with maps: files, shards, batches."""

import json
import warnings

import numpy as np
import pytest
import torch

from support.maps import marked_pair

pytest.importorskip("PIL")
from PIL import Image

from diffdoctor.maps import (
    MapDataset,
    MapWarning,
    PairedTransform,
    Record,
    ShardRecords,
    StepBatches,
    collate,
    edit_map,
    find_clip_map,
    find_map,
    map_stamp,
    read_folder,
    read_map,
    write_map,
    write_metadata,
)
from diffdoctor.runs.errors import UserError


def test_folder_of_pictures_captions_and_maps(tmp_path):
    folder, maps = tmp_path / "set", tmp_path / "maps"
    (folder / "more").mkdir(parents=True)
    (maps / "more").mkdir(parents=True)
    picture = Image.fromarray(np.full((8, 8, 3), 128, np.uint8))
    for name in ("a.png", "b.jpg", "more/c.webp", "d.png"):
        picture.save(folder / name)
    (folder / "a.txt").write_text("a cat\n", encoding="utf-8")
    rows = [{"file_name": "b.jpg", "text": "a dog"}, {"file_name": "more/c.webp", "prompt": "a bird"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_map(folder / "a.mask.png", np.full((8, 8), 0.25, np.float32))
    write_map(maps / "b.png", np.ones((8, 8), bool))
    np.save(maps / "more" / "c.npy", np.full((8, 8), 0.5, np.float32))

    beside = read_folder(folder, caption="something")
    assert [(record.picture.name, record.caption) for record in beside] == [
        ("a.png", "a cat"),
        ("b.jpg", "a dog"),
        ("d.png", "something"),
        ("c.webp", "a bird"),
    ]
    assert [record.confidence and record.confidence.name for record in beside] == ["a.mask.png", None, None, None]
    apart = read_folder(folder, maps)
    assert [record.confidence and record.confidence.name for record in apart] == [None, "b.png", None, "c.npy"]
    assert find_map(folder / "a.png") == folder / "a.mask.png"
    assert read_map(maps / "more" / "c.npy").mean() == 0.5
    assert abs(read_map(folder / "a.mask.png") - 0.25).max() <= 0.5 / 255


def test_metadata_names_each_map_and_keeps_captions(tmp_path):
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b").mkdir()
    for name in ("a", "b/c"):
        picture.save(tmp_path / f"{name}.png")
        write_map(tmp_path / "maps" / f"{name}.png", np.zeros((8, 8), bool))
    (tmp_path / "a.txt").write_text("ein Bär", encoding="utf-8")
    expected = [
        {"file_name": "a.png", "confidence_file_name": "maps/a.png", "text": "ein Bär"},
        {"file_name": "b/c.png", "confidence_file_name": "maps/b/c.png", "text": ""},
    ]
    for _ in range(2):  # the second time the captions come from the file itself
        assert write_metadata(tmp_path, tmp_path / "maps") == 2
        lines = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == expected
    with pytest.raises(UserError, match="expected a folder inside"):
        write_metadata(tmp_path / "maps", tmp_path / "b")
    picture.save(tmp_path / "d.png")
    with pytest.raises(UserError, match=r"d\.png: expected a map"):
        write_metadata(tmp_path, tmp_path / "maps")


def pictures_with_maps(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{name}.png")
        write_map(folder / "maps" / f"{name}.png", np.zeros((8, 8), bool))


def test_metadata_keeps_the_rows_that_stand_there(tmp_path):
    pictures_with_maps(tmp_path, ["a", "b", "c", "d/e"])
    (tmp_path / "c.txt").write_text("from the file beside", encoding="utf-8")
    rows = [
        {"file_name": "./d/e.png", "prompt": "a\u2028b", "aesthetic": 6.25, "original_text": "old", "tags": ["x", 1]},
        {"file_name": "b.png", "caption": "unused", "text": "kept", "confidence_file_name": "elsewhere.png"},
        {"file_name": "c.png", "text": None},
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    expected = [
        {**rows[0], "confidence_file_name": "maps/d/e.png", "text": "a\u2028b"},
        {**rows[1], "confidence_file_name": "maps/b.png"},
        {**rows[2], "confidence_file_name": "maps/c.png", "text": "from the file beside"},
        {"file_name": "a.png", "confidence_file_name": "maps/a.png", "text": ""},
    ]
    for _ in range(2):
        assert write_metadata(tmp_path, tmp_path / "maps") == 4
        lines = metadata.read_text(encoding="utf-8").rstrip("\n").split("\n")
        assert [json.loads(line) for line in lines] == expected
    before = metadata.read_bytes()
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"metadata\.jsonl: expected a picture for each row, got none for b\.png"):
        write_metadata(tmp_path, tmp_path / "maps")
    assert metadata.read_bytes() == before


def test_pictures_that_rows_name_in_other_columns_need_no_map(tmp_path):
    pictures_with_maps(tmp_path, ["a", "b"])
    (tmp_path / "before").mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "before" / f"{name}.png")
    rows = [
        {"file_name": "a.png", "cond_image_file_name": "./before/a.png"},
        # a training picture itself, and named by another row
        {"file_name": "b.png", "reference_file_names": ["before/b.png", "before/c.png", "a.png"]},
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for _ in range(2):
        assert write_metadata(tmp_path, tmp_path / "maps") == 2
        written = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
        maps = [{"confidence_file_name": f"maps/{name}.png", "text": ""} for name in "ab"]
        assert written == [{**row, **columns} for row, columns in zip(rows, maps, strict=True)]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "before" / "d.png")
    with pytest.raises(UserError, match=r"d\.png: expected a map"):
        write_metadata(tmp_path, tmp_path / "maps")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet", "b/metadata.jsonl", "b/metadata.csv"])
def test_metadata_that_is_not_read_is_named(tmp_path, name):
    pictures_with_maps(tmp_path, ["a", "b/c"])
    (tmp_path / name).write_text("file_name,text\na.png,a cat\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: expected all captions in .*metadata\.jsonl"):
        write_metadata(tmp_path, tmp_path / "maps")
    assert not (tmp_path / "metadata.jsonl").exists()
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8")
    with pytest.warns(UserWarning, match=rf"1 of 2 pictures have no caption of their own, and .*{name} is not read"):
        read_folder(tmp_path, tmp_path / "maps")
    (tmp_path / "b" / "c.txt").write_text("a dog", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_folder(tmp_path, tmp_path / "maps")) == 2


def test_folder_errors_name_the_path(tmp_path):
    with pytest.raises(UserError, match=r"expected pictures \(.*\), got none"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="expected a folder of pictures"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: expected a folder of maps, got none"):
        find_map(tmp_path / "a.png", tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: expected a folder of maps, got none"):
        find_clip_map(tmp_path / "a.mp4", tmp_path / "nowhere")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"text": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: expected a JSON object with a file_name"):
        read_folder(tmp_path)


def test_what_diagnose_writes_is_found_and_fits(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from diffdoctor.detector import ArtifactDetector
    from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose

    ArtifactDetector.tiny().save_pretrained(tmp_path / "detector")
    (tmp_path / "set" / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 8
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "set" / "a.png")
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "set/more/b.jpg", exif=exif)
    places = {"detector": str(tmp_path / "detector"), "output": str(tmp_path / "diagnosis")}
    run_diagnose(DiagnoseConfig([str(tmp_path / "set")], **places, gallery=0, overlays=False))
    found = read_folder(tmp_path / "set", tmp_path / "diagnosis" / "maps")
    assert [read_map(record.confidence).shape for record in found] == [(32, 48), (48, 32)]
    for sample in MapDataset(found, PairedTransform(16), missing="error", check=False):
        assert sample["has_map"]


def test_shards_are_a_training_set(tmp_path):
    pytest.importorskip("pyarrow")
    from diffdoctor.data.shard_writer import write_shards

    pairs = [marked_pair(24, 24, i, i, 9, 8) for i in range(4)]
    samples = ({"picture": p, "mask": m, "prompt": f"picture {i}"} for i, (p, m) in enumerate(pairs))
    write_shards(samples, tmp_path / "shards")
    data = MapDataset(ShardRecords(tmp_path / "shards"), PairedTransform(24, resample="bilinear"))
    assert len(data) == 4
    for i in range(4):
        sample = data[i]
        assert sample["caption"] == f"picture {i}"
        assert ((sample["pixel_values"][:1] + 1) / 2 - sample["confidence"]).abs().max() <= 1.01 / 255


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (np.full((4, 4), 255.0), ValueError, "give 0..255 as uint8"),
        (np.full((4, 4), np.nan), ValueError, r"expected values in \[0, 1\]"),
        (np.full((4, 4), 3, np.int64), TypeError, "expected uint8, bool or floating-point"),
        (np.zeros((2, 4, 4), np.float32), ValueError, r"shape \(H, W\)"),
        (np.zeros((0, 4), np.float32), ValueError, r"shape \(H, W\)"),
    ],
    ids=["0..255 floats", "nan", "integers", "two maps", "empty"],
)
def test_map_arrays_are_checked(values, error, words):
    with pytest.raises(error, match=words):
        read_map(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_map_tensors_of_every_float_dtype(dtype):
    level = torch.tensor([[[0.0, 0.25], [0.5, 1.0]]], dtype=dtype, requires_grad=True)
    found = read_map(level)
    assert found.dtype == np.float32
    assert found.tolist() == [[0.0, 0.25], [0.5, 1.0]]


def test_map_files_of_every_depth_agree_and_colours_are_refused(tmp_path):
    level = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(np.rint(level * 255).astype(np.uint8)).save(tmp_path / "l.png")
    Image.fromarray(np.rint(level * 65535).astype(np.uint16)).save(tmp_path / "i16.png")
    Image.fromarray(np.rint(level * 255).astype(np.uint8)).convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(level > 0.5).save(tmp_path / "bit.png")
    for name, limit in (("l", 0.51 / 255), ("i16", 0.51 / 65535), ("rgb", 0.51 / 255), ("bit", 0.5)):
        assert abs(read_map(tmp_path / f"{name}.png") - level).max() <= limit
        with Image.open(tmp_path / f"{name}.png") as opened:
            assert (read_map(opened) == read_map(tmp_path / f"{name}.png")).all()
    heat = np.zeros((8, 8, 3), np.uint8)
    heat[..., 0] = 255
    Image.fromarray(heat).save(tmp_path / "heat.png")
    with pytest.raises(ValueError, match="expected a grey picture"):
        read_map(tmp_path / "heat.png")


# The set


def records(count=7, sizes=((24, 24), (24, 48), (48, 24))):
    found = []
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        picture, level = marked_pair(height, width, i % 5, i % 7, 9, 8)
        found.append(Record(picture, level, f"picture {i}"))
    return found


def test_dataset_warns_once_opened_and_refuses_missing_maps():
    bare = [Record(np.zeros((8, 8, 3), np.uint8), None, "x")]
    with pytest.warns(MapWarning, match="no map"):
        MapDataset(bare, PairedTransform(8))
    with pytest.raises(ValueError, match="a map for every picture"):
        MapDataset(bare, PairedTransform(8), missing="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MapDataset(records(), PairedTransform(8))


def test_items_depend_on_seed_epoch_and_index_alone():
    transform = PairedTransform(16, flip=0.5)
    first, second = MapDataset(records(), transform, seed=3), MapDataset(records(), transform, seed=3)
    for key in [(0, 1), (4, 1), (4, 2)]:
        a, b = first[key], second[key]
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a["confidence"], b["confidence"])
    assert not torch.equal(first[0, 1]["pixel_values"], first[4, 1]["pixel_values"])
    assert not torch.equal(first[0, 1]["pixel_values"], MapDataset(records(), transform, seed=4)[0, 1]["pixel_values"])


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_an_ordinary_loader_gets_other_crops_in_every_epoch_and_the_same_ones_again(workers):
    def epochs(data, count, set_epoch=False):
        loader = torch.utils.data.DataLoader(data, batch_size=None, **workers)
        for epoch in range(count):
            if set_epoch:
                data.set_epoch(epoch)
            yield torch.stack([item["pixel_values"] for item in loader])

    def fresh():
        return MapDataset(records(3), PairedTransform(16), seed=3)

    first, second, third = epochs(fresh(), 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    data = fresh()
    assert torch.equal(torch.stack([data[1, i]["pixel_values"] for i in range(3)]), second)
    for got, want in zip(epochs(fresh(), 3, set_epoch=True), (first, second, third), strict=True):
        assert torch.equal(got, want)
    data = fresh()
    data.set_epoch(2)  # a run that resumes
    assert torch.equal(next(epochs(data, 1)), third)
    with pytest.raises(ValueError, match="epoch: expected >= 0, got -1"):
        data.set_epoch(-1)


@pytest.mark.parametrize("last", ["fill", "short", "drop"])
def test_batches_have_one_size_and_cover_the_set(last):
    data = MapDataset(records(14), PairedTransform(buckets=[(16, 16), (16, 32), (32, 16)]))  # buckets of 5, 5, 4
    batches = list(StepBatches(data, 2, 40, seed=1, last=last))
    for batch in batches:
        assert len({data.bucket_of(index) for _, index in batch}) == 1
        assert len(batch) == 2 or last == "short"
    first = [index for batch in batches for epoch, index in batch if epoch == 0]
    assert len(first) == {"fill": 16, "short": 14, "drop": 12}[last]
    assert len(set(first)) == {"fill": 14, "short": 14, "drop": 12}[last]
    assert max(epoch for batch in batches for epoch, _ in batch) >= 4


def test_batches_resume_where_they_stopped_and_processes_share_them_out():
    data = MapDataset(records(9), PairedTransform(16))
    whole = list(StepBatches(data, 4, 24, seed=5))
    assert whole[9:] == list(StepBatches(data, 4, 24, start=9, seed=5))
    assert len(StepBatches(data, 4, 24, start=9)) == 15
    assert whole != list(StepBatches(data, 4, 24, seed=6))
    shares = [list(StepBatches(data, 4, 8, seed=5, process_index=rank, num_processes=3)) for rank in range(3)]
    assert [batch for batches in zip(*shares, strict=True) for batch in batches] == whole


def test_batch_options_are_checked():
    data = MapDataset(records(3), PairedTransform(16))
    with pytest.raises(ValueError, match="batch_size: expected <= 3 with last='drop', the largest bucket, got 4"):
        StepBatches(data, 4, 1, last="drop")
    with pytest.raises(ValueError, match="last: expected"):
        StepBatches(data, 4, 1, last="pad")
    with pytest.raises(ValueError, match=r"process_index: expected 0\.\.1, got 2"):
        StepBatches(data, 4, 1, process_index=2, num_processes=2)


def test_loader_with_workers_equals_the_loader_without():
    data = MapDataset(records(6), PairedTransform(buckets=[(16, 16), (16, 32), (32, 16)], flip=0.5), seed=2)
    batches = StepBatches(data, 2, 6, seed=2)
    plain = list(torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=collate))
    workers = list(torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=2))
    for a, b in zip(plain, workers, strict=True):
        assert a["caption"] == b["caption"]
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a["confidence"], b["confidence"])
    batch = plain[0]
    assert batch["has_map"].dtype == torch.bool
    assert batch["confidence"].shape == (2, 1, *batch["pixel_values"].shape[2:])
    assert batch["crop_top_left"].shape == (2, 2)


def test_an_edit_is_found_where_it_is(tmp_path):
    before = np.random.default_rng(0).integers(0, 200, (40, 60, 3)).astype(np.uint8)
    after = before.copy()
    after[10:20, 30:45, 1] += 51  # 0.2: fully
    after[30, 5, 0] += 10  # below the floor
    after[30, 50, 2] += 31  # 0.1216: in the middle of 0.04 .. 0.2
    found = edit_map(before, Image.fromarray(after), spread=0)
    expected = np.zeros((40, 60), np.float32)
    expected[10:20, 30:45], expected[30, 50] = 1, (31 / 255 - 0.04) / 0.16
    np.testing.assert_allclose(found, expected, atol=1e-6)
    wider = edit_map(before, after)
    assert wider[8:22, 28:47].min() == 1
    assert wider[7].max() == wider[22].max() == 0
    write_map(tmp_path / "map.png", found)
    with pytest.raises(ValueError, match=r"after: expected a picture of 40 x 60, got \(40, 59\)"):
        edit_map(before, after[:, 1:])
    with pytest.raises(ValueError, match=r"floor, full: expected 0 <= floor < full <= 1, got 0.3, 0.2"):
        edit_map(before, after, floor=0.3)


def test_a_stamp_is_that_of_the_values(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (6, 9)).astype(np.uint8)
    write_map(tmp_path / "map.png", levels / np.float32(255))
    stamps = {map_stamp(each) for each in (levels, levels / np.float32(255), tmp_path / "map.png")}
    assert len(stamps) == 1
    other = levels.copy()
    other[0, 0] ^= 1
    assert len(stamps | {map_stamp(other), map_stamp(levels.reshape(9, 6)), map_stamp(None)}) == 4


def test_maps_that_say_what_is_sound(tmp_path):
    picture, level = marked_pair(32, 32, 4, 4, 8, 8)
    sound = 1 - level if level.dtype != np.uint8 else 255 - level
    records = [Record(picture, sound), Record(picture)]
    inverted = MapDataset(records, PairedTransform(32), invert=True)
    plain = MapDataset([Record(picture, level), Record(picture)], PairedTransform(32))
    for one, other in zip((inverted[(0, i)] for i in range(2)), (plain[(0, i)] for i in range(2)), strict=True):
        torch.testing.assert_close(one["confidence"], other["confidence"], atol=1e-6, rtol=0)
    assert not inverted[(0, 1)]["confidence"].any()
