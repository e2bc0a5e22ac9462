"""Maps that stay on their pictures, and maps that cannot be right."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import diffdoctor
from support.maps import marked_pair

pytest.importorskip("PIL")
from PIL import Image

from diffdoctor.maps import (
    MapDataset,
    MapWarning,
    PairedTransform,
    aspect_buckets,
    attach_map,
    causal_frames,
    check_maps,
    detach_map,
    read_folder,
    write_map,
)

BUCKETS = [(32, 32), (24, 40), (40, 24), (16, 48)]


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


@pytest.mark.filterwarnings("ignore:pixels. nothing is below 0")
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


def test_detach_notices_another_range():
    picture, level = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32)
    level[2:4, 2:4] = 1
    values = torch.from_numpy(np.array(attach_map(picture, level))).permute(2, 0, 1) / 255
    with pytest.warns(MapWarning, match=r"pass value_range=\(0, 1\)"):
        detach_map(values)
    assert torch.equal(detach_map(values, (0, 1))[1][0], torch.from_numpy(level))
    for wrong, value_range in ((2 * values - 1, (0, 1)), (255 * values, (-1, 1))):
        with pytest.raises(ValueError, match="pixels: expected values in the value_range"):
            detach_map(wrong, value_range)


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
    for size in (16.0, None, (16, 8.0), "16", np.array([[16, 16]])):
        with pytest.raises(ValueError, match=r"size: expected a side or \(height, width\) in pixels, got"):
            PairedTransform(size)


@pytest.mark.parametrize("size", [np.int64(16), (np.int32(16), 16), np.array([16, 16]), torch.tensor(16)], ids=repr)
def test_sizes_may_be_any_integers(size):
    transform = PairedTransform(size)
    assert transform.buckets == [(16, 16)]
    assert {type(side) for side in transform.buckets[0]} == {int}
    assert transform(np.zeros((20, 30, 3), np.uint8))["pixel_values"].shape == (3, 16, 16)


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
        ([*(level.astype(np.uint8) for level in GOOD), None], "none of 16 maps has a value above 1/255"),
        ([1 - level for level in GOOD], "inverted"),
        ([0.55 + 0.45 * (1 - level) for level in GOOD[:4]], "inverted"),
        ([np.full((4, 4), 0.5, np.float32)] * 2, "same value everywhere"),
        ([blob(0)] * 9 + [blob(1)], "9 of 10 maps are the same"),
        ([*GOOD, None], "1 of 17 pictures have no map"),
    ],
    ids=["zero", "one one", "uint8 ones", "uint8 0 and 1", "inverted", "soft inverted", "constant", "same", "missing"],
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


@pytest.mark.parametrize("stride", [2, 4])
def test_a_videos_map_meets_the_frames_that_a_latent_frame_encodes(stride):
    generator = torch.Generator().manual_seed(0)
    latent_frames, frames = 3, 1 + 2 * stride
    pred, target = (torch.randn(2, 4, latent_frames, 4, 6, generator=generator) for _ in range(2))
    confidence = torch.rand(2, 1, frames, 8, 12, generator=generator)
    # the first frame alone, then so many at a time
    groups = [confidence[:, :, :1], *confidence[:, :, 1:].split(stride, 2)]
    weight = torch.stack([torch.nn.functional.avg_pool2d(group.mean(2), 2) for group in groups], 2)
    loss = diffdoctor.weighted_loss(pred, target, mask=causal_frames(confidence, stride))
    torch.testing.assert_close(loss, (weight * (pred - target).square()).mean())
    assert causal_frames(confidence[:, :, :1]).shape == (2, 1, 1, 8, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((np.zeros((5, 4, 4)),), TypeError, "maps: expected a tensor, got ndarray"),
        (
            (torch.zeros(4, 4),),
            ValueError,
            r"maps: expected shape .* of at least one frame, got \(4, 4\)",
        ),
        ((torch.zeros(0, 4, 4),), ValueError, "maps: expected shape"),
        ((torch.zeros(5, 4, 4), 0), ValueError, "stride: expected at least 1 frame, got 0"),
        ((torch.zeros(16, 4, 4),), ValueError, "maps: expected 1 frame more than a multiple of 4, got 16 frames"),
    ],
)
def test_frames_that_cannot_be_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        causal_frames(*arguments)
