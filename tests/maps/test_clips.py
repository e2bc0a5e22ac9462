"""Moving maps that stay on their clips: through crop, resize and flip, and in the choice of frames."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from diffdoctor.maps import (
    ClipTransform,
    MapDataset,
    StepBatches,
    clip_size,
    collate,
    find_clip_map,
    read_clip,
    read_clip_map,
    read_clips,
    write_map,
)
from diffdoctor.runs.errors import UserError
from support.videos import moving_square, write_animation, write_mp4

FRAMES, MAPS = moving_square()


@pytest.mark.parametrize("start", ["random", 1])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_moving_map_stays_on_its_clip(start, scale):
    # the map at another scale than the clip, and the clip as bright as its map: they must come out alike
    frames = FRAMES.repeat(scale, 1).repeat(scale, 2)
    transform = ClipTransform((16, 16), frames=4, stride=3, start=start, flip=0.5, resample="bilinear")
    firsts, flips = set(), set()
    for seed in range(12):
        sample = transform(frames, MAPS, np.random.default_rng(seed))
        assert sample["pixel_values"].shape == (3, 4, 16, 16)
        assert sample["confidence"].shape == (1, 4, 16, 16)
        near = 1e-2 if scale == 1 else 0.3  # twice as large, an edge is sharper by half a pixel
        torch.testing.assert_close(sample["pixel_values"][:1] / 2 + 0.5, sample["confidence"], atol=near, rtol=0)
        first = int(sample["frame_indices"][0])
        assert sample["frame_indices"].tolist() == [first, first + 3, first + 6, first + 9]
        columns = [float(c[0].sum(0).argmax()) for c in sample["confidence"].unbind(1)]
        flips.add(columns[0] > columns[-1])
        firsts.add(first)
    assert firsts == ({1} if start == 1 else {0, 1, 2})
    assert flips == {False, True}
    assert transform(frames, None)["confidence"].abs().max() == 0


def test_a_folder_of_clips_is_a_training_set(tmp_path):
    clips, maps = tmp_path / "clips", tmp_path / "maps"
    (clips / "a").mkdir(parents=True)
    write_mp4(clips / "a" / "one.mp4", FRAMES)
    write_animation(clips / "two.webp", FRAMES)
    write_animation(clips / "three.gif", FRAMES)
    Image.fromarray(FRAMES[0]).save(clips / "picture.png")
    (clips / "two.txt").write_text("a square")
    for number, values in enumerate(MAPS):
        write_map(maps / "a" / "one" / f"{number:06d}.png", values)
    np.save(clips / "two.mask.npy", MAPS)
    write_animation(clips / "three.mask.gif", FRAMES)
    assert clip_size(clips / "a" / "one.mp4") == clip_size(clips / "two.webp") == (12, 20, 30)
    assert np.abs(read_clip(clips / "a" / "one.mp4", 2, 3, 3).astype(int) - FRAMES[2:9:3]).max() <= 4
    assert (read_clip(clips / "two.webp", 2, 3, 3) == FRAMES[2:9:3]).all()
    for found in (find_clip_map(clips / "a" / "one.mp4", maps / "a"), clips / "two.mask.npy", clips / "three.mask.gif"):
        assert np.abs(read_clip_map(found, range(1, 12, 5)) - MAPS[1:12:5]).max() < 1e-6
    write_map(tmp_path / "still.png", MAPS[0])
    assert (read_clip_map(tmp_path / "still.png", [0, 7]) == MAPS[[0, 0]]).all()

    records = read_clips(clips)
    assert [record.picture.name for record in records] == ["one.mp4", "three.gif", "two.webp"]
    assert [record.confidence is None for record in records] == [True, False, False]
    assert records[2].caption == "a square"
    (record,) = (r for r in read_clips(clips, maps) if r.confidence)
    assert record.confidence == maps / "a" / "one"
    data = MapDataset([record, *records[1:]], ClipTransform((16, 24), frames=5, stride=2, resample="bilinear"))
    batches = StepBatches(data, batch_size=3, batches=1)
    batch = collate([data[key] for key in next(iter(batches))])
    assert batch["pixel_values"].shape == (3, 3, 5, 16, 24)
    torch.testing.assert_close(batch["pixel_values"][:, :1] / 2 + 0.5, batch["confidence"], atol=0.03, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path):
    transform = ClipTransform(16, frames=5, stride=3)
    for clip, confidence, message in (
        (FRAMES, None, "clip: expected at least 13 frames, got 12"),
        (np.tile(FRAMES, (2, 1, 1, 1)), MAPS, "confidence: expected a map for each of the 24 frames, got 12"),
        (np.tile(FRAMES, (2, 1, 1, 1)), MAPS[:1, :, :9], "the proportions of its picture"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(clip, confidence)
    with pytest.raises(ValueError, match="start: expected 'random' or a frame from 0"):
        ClipTransform(16, frames=5, start=-1)
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"no\.mp4: expected a video, got a broken video"):
        read_clip(tmp_path / "no.mp4")
    write_mp4(tmp_path / "whole.mp4", FRAMES)
    (tmp_path / "odd.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(UserError, match=r"odd\.mp4: expected a video, got a broken video"):  # of no known codec
        clip_size(tmp_path / "odd.mp4")
    for suffix in (".mp4", ".mkv"):  # which a player would show as far as they go
        write_mp4(tmp_path / f"cut{suffix}", FRAMES, options={"movflags": "faststart"})
        assert clip_size(tmp_path / f"cut{suffix}")[0] == len(FRAMES)
        whole = (tmp_path / f"cut{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(whole[: -len(whole) // 10])
        with pytest.raises(UserError, match=r"a broken video \(it breaks off\)"):
            clip_size(tmp_path / f"cut{suffix}")
    (tmp_path / "no.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"no\.npy: expected an \.npy file of numbers"):
        read_clip_map(tmp_path / "no.npy")
    with pytest.raises(ValueError, match="confidence: expected a map for one frame at least"):
        read_clip_map(MAPS[:0])
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        read_clip(FRAMES, stride=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected videos \(\.mp4"):
        read_clips(tmp_path / "empty")
