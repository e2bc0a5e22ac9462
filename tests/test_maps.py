"""Maps that stay on their pictures, and maps that cannot be right."""

import json
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("PIL")
from PIL import Image

from diffdoctor._errors import UserError
from diffdoctor.maps import (
    MapDataset,
    MapWarning,
    PairedTransform,
    Record,
    ShardRecords,
    StepBatches,
    aspect_buckets,
    attach_map,
    check_maps,
    collate,
    detach_map,
    find_map,
    read_folder,
    read_map,
    write_map,
    write_metadata,
)

BUCKETS = [(32, 32), (24, 40), (40, 24), (16, 48)]


def marked_pair(height, width, top, left, mark_height, mark_width, map_scale=1):
    """A black picture with a white rectangle, and the map that is one exactly there (at map_scale times its size)."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[top : top + mark_height, left : left + mark_width] = 255
    level = picture[:, :, 0].astype(np.float32) / 255.0
    return picture, level.repeat(map_scale, axis=0).repeat(map_scale, axis=1)


@st.composite
def pairs(draw):
    height, width = draw(st.integers(20, 90)), draw(st.integers(20, 90))
    mark_height, mark_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - mark_height)), draw(st.integers(0, width - mark_width))
    return marked_pair(height, width, top, left, mark_height, mark_width, draw(st.sampled_from([1, 1, 2, 3])))


@settings(max_examples=150, deadline=None)
@given(
    pair=pairs(),
    size=st.one_of(st.none(), st.tuples(st.integers(8, 64), st.integers(8, 64))),
    crop=st.sampled_from(["random", "center"]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_marker_in_picture_and_map_stay_together(pair, size, crop, flip, seed):
    picture, level = pair
    transform = PairedTransform(
        size or 32, buckets=None if size else BUCKETS, crop=crop, flip=flip, resample="bilinear"
    )
    sample = transform(picture, level, np.random.default_rng(seed))
    brightness = (sample["pixel_values"][:1] + 1) / 2
    confidence = sample["confidence"]
    assert brightness.shape == confidence.shape
    assert confidence.shape[1:] in ([size] if size else BUCKETS)
    if level.shape == picture.shape[:2]:
        # One filter for both: what differs is the picture's rounding to 8 bits, twice (columns, then rows).
        assert (brightness - confidence).abs().max() <= 1.01 / 255
    else:
        # Another resolution has another filter width at the edges, but not another place.
        enlarged = max(1.0, *(out / side for out, side in zip(confidence.shape[1:], picture.shape[:2], strict=True)))
        assert (brightness.mean() - confidence.mean()).abs() <= 0.02
        if brightness.mean() > 0.01:
            assert np.abs(centre(brightness) - centre(confidence)).max() <= 0.5 * enlarged


def centre(values):
    """The centre of mass (y, x) of (1, H, W), in pixels."""
    weight = values[0].double().numpy()
    return np.array([(weight.sum(1 - axis) * np.arange(weight.shape[axis])).sum() for axis in (0, 1)]) / weight.sum()


@settings(max_examples=60, deadline=None)
@given(pair=pairs(), seed=st.integers(0, 2**31))
def test_a_swapped_or_shifted_map_would_be_noticed(pair, seed):
    # The property above has teeth: the same check fails when the map gets a placement of its own.
    picture, level = pair
    if level.shape != picture.shape[:2] or level.mean() in (0.0, 1.0):
        return
    transform = PairedTransform((16, 16), crop="center", resample="bilinear")
    sample = transform(picture, np.ascontiguousarray(np.roll(level, level.shape[1] // 2, axis=1)[::-1]))
    straight = transform(picture, level)
    if (sample["confidence"] - straight["confidence"]).abs().max() > 0.1:
        assert ((sample["pixel_values"][:1] + 1) / 2 - sample["confidence"]).abs().max() > 1.01 / 255


def test_flip_one_mirrors_both():
    picture, level = marked_pair(32, 32, 4, 2, 6, 6)
    plain = PairedTransform(32, crop="center", resample="nearest")(picture, level)
    mirrored = PairedTransform(32, crop="center", flip=1.0, resample="nearest")(picture, level)
    torch.testing.assert_close(mirrored["pixel_values"], plain["pixel_values"].flip(-1))
    torch.testing.assert_close(mirrored["confidence"], plain["confidence"].flip(-1))
    assert not torch.equal(mirrored["confidence"], plain["confidence"])


def test_crop_numbers_describe_the_crop():
    # A wide picture cropped to a square at full height: the crop's left edge is where the gradient says.
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (32, 96, 3)).copy()
    for seed in range(5):
        sample = PairedTransform(32, resample="nearest")(ramp, None, np.random.default_rng(seed))
        first = (sample["pixel_values"][0, 0, 0] + 1) * 127.5
        assert abs(first.item() - sample["crop_top_left"][1].item()) <= 1
        assert sample["original_size"].tolist() == [32, 96]
        assert sample["target_size"].tolist() == [32, 32]
        assert sample["confidence"].abs().sum() == 0
        assert not sample["has_map"]


@settings(max_examples=60, deadline=None)
@given(pair=pairs(), seed=st.integers(0, 2**31), flip=st.booleans())
def test_attached_map_rides_through_foreign_transforms(pair, seed, flip):
    picture, level = pair
    rng = np.random.default_rng(seed)
    image = attach_map(picture, level)
    # A transform that knows nothing of maps: resize the short side to 24, crop 20 x 20, flip.
    scale = 24 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = rng.integers(image.width - 20 + 1), rng.integers(image.height - 20 + 1)
    image = image.crop((left, top, left + 20, top + 20))
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    pixel_values, confidence = detach_map(pixels[None])
    assert pixel_values.shape == (1, 3, 20, 20)
    assert confidence.shape == (1, 1, 20, 20)
    limit = 1.01 / 255 if level.shape == picture.shape[:2] else 0.75
    assert ((pixel_values[:, :1] + 1) / 2 - confidence).abs().max() <= limit


def test_attached_map_leaves_the_picture_alone():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    level = (rng.random((40, 50)) < 0.2).astype(np.float32)
    alone = np.asarray(Image.fromarray(picture).resize((20, 16), Image.Resampling.BICUBIC))
    with_map = np.asarray(attach_map(picture, level).resize((20, 16), Image.Resampling.BICUBIC))
    assert (with_map[:, :, :3] == alone).all()  # RGBA would differ here: its colours are multiplied by alpha


def test_detach_refuses_a_picture_that_lost_its_map():
    with pytest.raises(ValueError, match="converted to RGB"):
        detach_map(torch.zeros(2, 3, 8, 8))


def test_rotation_flag_is_carried_out_before_the_map_is_laid_on(tmp_path):
    upright, level = marked_pair(40, 20, 2, 3, 10, 8)
    image = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)  # stored lying on its side
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    write_map(tmp_path / "a.mask.png", level)
    data = MapDataset(read_folder(tmp_path), PairedTransform(buckets=[(40, 20), (20, 40)], resample="bilinear"))
    assert data.bucket_of(0) == 0
    sample = data[0]
    assert ((sample["pixel_values"][:1] + 1) / 2 - sample["confidence"]).abs().max() <= 1.01 / 255
    with pytest.raises(ValueError, match="turned by 90 degrees"):
        PairedTransform(16)(tmp_path / "a.png", np.ascontiguousarray(level.T))


def test_a_map_of_other_proportions_is_refused():
    with pytest.raises(ValueError, match=r"confidence: expected the proportions .* 32 x 64 pixels, got 32 x 32"):
        PairedTransform(16)(np.zeros((32, 64, 3), np.uint8), np.zeros((32, 32), np.float32))
    with pytest.raises(ValueError, match="cropped or squashed"):
        attach_map(np.zeros((32, 64, 3), np.uint8), np.zeros((32, 32), np.float32))


def test_transform_options_are_checked():
    with pytest.raises(ValueError, match="crop: expected 'random' or 'center', got 'left'"):
        PairedTransform(16, crop="left")
    with pytest.raises(ValueError, match="flip: expected a probability"):
        PairedTransform(16, flip=2)
    with pytest.raises(ValueError, match="size: expected a side"):
        PairedTransform((16, 0))
    with pytest.raises(ValueError, match="resample: expected one of"):
        PairedTransform(16, resample="cubic")


@pytest.mark.parametrize(("pixels", "multiple"), [(512 * 512, 64), (1024 * 1024, 64), (256 * 256, 32), (64, 8)])
def test_aspect_buckets(pixels, multiple):
    buckets = aspect_buckets(pixels, multiple=multiple)
    assert len(buckets) == len(set(buckets))
    side = int(pixels**0.5)
    assert (side, side) in buckets
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert height * width <= pixels
        assert max(height / width, width / height) <= 2
    assert {(w, h) for h, w in buckets} == set(buckets)


# Files


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


def test_folder_errors_name_the_path(tmp_path):
    with pytest.raises(UserError, match="found none"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="expected a folder of pictures"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"text": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: expected a JSON object with a file_name"):
        read_folder(tmp_path)


def test_what_diagnose_writes_is_found_and_fits(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from diffdoctor.detector import ArtifactDetector
    from diffdoctor.detector.diagnosing import DiagnoseConfig, run_diagnose

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
    from diffdoctor.detector.shards import write_shards

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


# The check


def blob(seed, side=32, share=0.1):
    rng = np.random.default_rng(seed)
    level = np.zeros((side, side), np.float32)
    edge = max(1, round(side * share**0.5))
    top, left = rng.integers(0, side - edge, 2)
    level[top : top + edge, left : left + edge] = 1.0
    return level


GOOD = [blob(seed) for seed in range(8)] + [np.zeros((32, 32), np.float32)] * 8


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ([np.zeros((4, 4), np.float32)] * 3, "all 3 maps are zero everywhere"),
        ([*GOOD, np.ones((4, 4), np.float32)], "1 of 17 maps are one everywhere"),
        ([np.full((4, 4), 255, np.uint8)] * 2, "2 of 2 maps are one everywhere"),
        ([1 - level for level in GOOD], "inverted"),
        ([0.55 + 0.45 * (1 - level) for level in GOOD[:4]], "inverted"),
        ([np.full((4, 4), 0.5, np.float32)] * 2, "same value everywhere"),
        ([blob(0)] * 9 + [blob(1)], "9 of 10 maps are the same"),
        ([*GOOD, None], "1 of 17 pictures have no map"),
    ],
    ids=["zero", "one one", "uint8 ones", "inverted", "soft inverted", "constant", "same", "missing"],
)
def test_what_cannot_be_right_is_said(maps, words):
    report = check_maps(maps)
    assert any(words in sentence for sentence in report.warnings), report
    with pytest.warns(MapWarning):
        report.warn()


@pytest.mark.parametrize(
    "maps",
    [GOOD, [blob(seed, share=0.4) for seed in range(5)], [0.3 * level for level in GOOD], [blob(0)]],
    ids=["half clean", "large artifacts", "faint", "a single map"],
)
def test_good_maps_pass_without_a_word(maps):
    assert check_maps(maps).warnings == []


def test_a_batch_can_be_checked_and_reported():
    batch = torch.from_numpy(np.stack(GOOD))[:, None]
    report = check_maps(batch)
    assert (report.count, report.zero, report.one) == (16, 8, 0)
    assert report.mean == pytest.approx(np.stack(GOOD).mean(), rel=1e-6)
    assert "16 maps" in str(report)
    assert "inverted" in str(check_maps((255 * (1 - batch)).to(torch.uint8)))
    with pytest.raises(ValueError, match=r"maps: expected \(B, 1, H, W\)"):
        check_maps(torch.zeros(2, 3, 4, 4))


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
    with pytest.raises(ValueError, match="no bucket has 4 pictures"):
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
