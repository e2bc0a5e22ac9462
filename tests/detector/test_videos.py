"""`diagnose` of videos: a map for every frame, one record, and what people look at."""

import errno
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("jinja2")

from diffdoctor.cli import main
from diffdoctor.data.pictures import to_images
from diffdoctor.data.video import open_video
from diffdoctor.detector import ConvDetector
from diffdoctor.maps import find_clip_map, read_clip_map
from diffdoctor.measures.pixels import flagged_share, is_flagged
from diffdoctor.runs.errors import UserError
from support.pictures import tree
from support.videos import moving_square, write_animation, write_mp4

FRAMES = moving_square(frames=7, height=24, width=32)[0]


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """Videos of three formats, a still picture, two files that are no videos, and their diagnosis."""
    folder = tmp_path_factory.mktemp("videos")
    pool = folder / "pool"
    (pool / "a").mkdir(parents=True)
    write_mp4(pool / "a" / "one.mp4", FRAMES)
    write_animation(pool / "two.gif", FRAMES)
    write_animation(pool / "three.webp", FRAMES, fps=20)
    (pool / "three.txt").write_text("a square")
    Image.fromarray(FRAMES[0]).save(pool / "still.webp", lossless=True)
    (pool / "broken.mp4").write_bytes((pool / "a" / "one.mp4").read_bytes()[:200])
    # FFmpeg would follow a playlist to whatever it names
    (pool / "list.webm").write_text(f"#EXTM3U\n#EXTINF:1,\n{pool}/a/one.mp4\n#EXT-X-ENDLIST\n")
    torch.manual_seed(1)
    detector = ConvDetector((8, 8))
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.mul_(1.5)
    detector.save_pretrained(folder / "detector")
    assert main(command(folder)) == 0
    return folder, detector.eval()


def command(folder, *options, output="out"):
    words = ["diagnose", str(folder / "pool"), "--detector", str(folder / "detector"), "--output", f"{folder}/{output}"]
    return [*words, "--bits", "16", "--frames_per_call", "3", *options]


def test_every_frame_has_its_map_and_the_video_one_record(diagnosed):
    folder, detector = diagnosed
    records = {r["name"]: r for r in map(json.loads, (folder / "out" / "diagnosis.jsonl").read_text().splitlines())}
    assert sorted(records) == ["a/one", "still", "three", "two"]
    assert "frames" not in records["still"]
    for name, suffix, fps in (("a/one", ".mp4", 8), ("two", ".gif", 8), ("three", ".webp", 20)):
        path = folder / "pool" / f"{name}{suffix}"
        with open_video(path) as video:
            frames = list(video.frames)
        expected = detector.confidence(to_images(frames)).detach()[:, 0].numpy()
        found = read_clip_map(find_clip_map(path, folder / "out" / "maps", name))
        np.testing.assert_allclose(found, expected, atol=1 / 65535)
        record, shares = records[name], [float(share) for share in flagged_share(expected)]
        assert record["frames"] == 7
        assert record["fps"] == pytest.approx(fps, rel=0.05)
        assert record["frame_scores"]["flagged_share"] == pytest.approx(shares)
        assert record["flagged_share"] == pytest.approx(float((expected >= 0.5).mean()))
        assert record["flagged"] == bool(is_flagged(record["flagged_share"]))
        assert record["max"] == pytest.approx(float(expected.max()))
        assert record["mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert shares[record["worst_frame"]] == max(shares)
        with Image.open(folder / "out" / "overlays" / f"{name}.webp") as moving:
            assert moving.n_frames == 7
        with Image.open(folder / "out" / "overlays" / f"{name}.png") as strip:
            assert strip.size == (5 * 32 + 4 * 4, 24)
    assert records["three"]["prompt"] == "a square"


def test_what_is_no_video_is_counted_and_the_page_shows_the_rest(diagnosed):
    folder, _ = diagnosed
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["skipped"] == {"a broken video": 2}
    assert metrics["pictures"] == 4
    page = (folder / "out" / "gallery.html").read_text()
    for name in ("overlays/a/one.webp", "overlays/two.webp", "overlays/three.webp"):
        assert name in page
    assert page.count('src="data:image/webp') == 3


@pytest.mark.parametrize("name", ["a/one.mp4", "two.gif"])
def test_what_fails_beside_the_video_is_not_laid_to_the_file(diagnosed, name):
    path = diagnosed[0] / "pool" / name
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("out of memory"), UserError("NaN")):
        with pytest.raises(type(error)) as caught, open_video(path) as video:
            next(video.frames)
            raise error
        assert caught.value is error


def test_the_same_command_does_nothing_again_and_what_it_cannot_do_is_refused(diagnosed, capsys, monkeypatch):
    folder, _ = diagnosed
    before = tree(folder / "out" / "maps")
    assert main(command(folder)) == 0
    assert tree(folder / "out" / "maps") == before
    capsys.readouterr()
    assert main(command(folder, "--write", "shards", output="shards")) == 2
    assert "--write: expected maps with a video such as" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(command(folder, output="without")) == 2
    assert "av is not installed: run `pip install" in capsys.readouterr().err
