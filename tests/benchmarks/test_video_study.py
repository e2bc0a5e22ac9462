"""The study of a moving artifact: its parts, what falls short, and the whole of it."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks.studies.video import PackingAutoencoder, as_videos, by_rule, main, make_clips, misses, overlap


def test_the_autoencoder_loses_nothing_and_the_rule_knows_the_artifact():
    clips, masks, prompts = make_clips(12, 0)
    videos, vae = as_videos(clips), PackingAutoencoder()
    latents = vae.encode(videos).latent_dist.mode()
    assert latents.shape == (12, 24, 3, 8, 8)
    torch.testing.assert_close(vae.decode(latents, return_dict=False)[0], videos)
    red = by_rule(torch.from_numpy(clips).movedim(-1, 1))
    assert torch.equal(red[:, 0], torch.from_numpy(masks))
    assert 0 < sum(mask.any() for mask in masks) < 12
    assert overlap(red, red) == 1
    moved = red.roll(2, -1)  # by half of the block
    assert overlap(moved, red) == pytest.approx(1 / 3)
    assert all(prompt.startswith("a moving ") for prompt in prompts)


def test_what_falls_short_is_said():
    before = {"judge": 0.4, "rule": 0.4, "brightness": 0.1}
    good = before | {"judge": 0.1, "rule": 0.1}
    results = {"overlap_held_out": 0.8, "before": before, "nft": good, "draft_k": good}
    assert misses(results) == []
    for change in ({"overlap_held_out": 0.2}, {"nft": good | {"rule": 0.3}}, {"draft_k": good | {"brightness": 0.01}}):
        assert len(misses(results | change)) == 1


@pytest.mark.study
def test_a_moving_artifact_is_found_followed_and_treated(tmp_path):
    assert main(["--output", str(tmp_path / "video")]) == 0
    page = (tmp_path / "video" / "diagnosis" / "gallery.html").read_text()
    assert page.count("5 frames") >= 24
    assert "data:image/webp" in page
