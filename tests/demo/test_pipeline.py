"""The demo's pipeline learns, survives save and load, and is an ordinary diffusers pipeline."""

import numpy as np
import pytest
import torch

from diffdoctor.demo.pipeline import build_pipeline, build_tokenizer, encode_latents, train_autoencoder, train_base
from diffdoctor.evaluate.model import sample_pictures

PROMPTS = ("a dark square", "a bright square")
SAMPLING = {"num_inference_steps": 10, "guidance_scale": 1.0}


def squares(count=64):
    """Pictures whose lower half is dark or bright, as the prompt says, with some noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 40, (count, 16, 16, 3))
    labels = np.arange(count) % 2
    pictures[:, 8:, :, 0] += (labels * 200)[:, None, None]
    return pictures.astype(np.uint8), [PROMPTS[label] for label in labels]


@pytest.fixture(scope="module")
def trained():
    pictures, prompts = squares()
    pipeline = build_pipeline(PROMPTS, seed=0)
    first = train_autoencoder(pipeline, pictures, steps=60, seed=0)
    second = train_base(pipeline, pictures, prompts, steps=120, batch_size=16, seed=0)
    return pipeline, first, second, pictures


def test_size_is_as_stated():
    pipeline = build_pipeline(PROMPTS)
    assert 0.9e6 < sum(p.numel() for p in pipeline.unet.parameters()) < 1.1e6
    assert pipeline.vae_scale_factor == 2
    assert (pipeline.unet.config.sample_size, pipeline.unet.config.in_channels) == (8, 4)
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert not pipeline.scheduler.config.clip_sample


def test_same_seed_same_weights_and_the_random_state_is_kept():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    a, b, other = build_pipeline(PROMPTS, seed=3), build_pipeline(PROMPTS, seed=3), build_pipeline(PROMPTS, seed=4)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(a.unet.conv_in.weight, b.unet.conv_in.weight)
    assert not torch.equal(a.unet.conv_in.weight, other.unet.conv_in.weight)


def test_losses_fall_and_latents_are_standard(trained):
    pipeline, first, second, pictures = trained
    assert np.mean(first.losses[-10:]) < 0.3 * first.losses[0]
    assert np.mean(second.losses[-20:]) < 0.6 * np.mean(second.losses[:5])
    latents = encode_latents(pipeline, pictures)
    assert latents.shape == (64, 4, 8, 8)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_a_trained_pipeline_can_be_trained_on():
    pictures = np.random.default_rng(0).integers(0, 255, (8, 16, 40, 3)).astype(np.uint8)
    pipeline = build_pipeline(PROMPTS, picture_size=(16, 40))
    weights = pipeline.unet.conv_in.weight
    for _ in range(2):
        before = weights.clone()
        train_autoencoder(pipeline, pictures, steps=1, batch_size=4)
        train_base(pipeline, pictures, PROMPTS * 4, steps=2, batch_size=4)
        assert not torch.equal(weights, before)
        assert not weights.requires_grad
    drawn = sample_pictures(pipeline, PROMPTS, range(2), progress=False, num_inference_steps=2, guidance_scale=1.0)
    assert drawn.shape == (2, 3, 16, 40)


def test_prompts_that_would_be_cut_are_refused():
    with pytest.raises(ValueError, match=r"at most 8 tokens, got 1\d in 'a crimson square'; .*: crimson$"):
        train_base(build_pipeline(PROMPTS), squares(2)[0], ["a dark square", "a crimson square"], steps=1)


def test_draws_what_the_prompt_asks(trained):
    pictures = sample_pictures(trained[0], PROMPTS * 4, range(8), progress=False, **SAMPLING).float()
    red = pictures[:, 0, 9:, :].mean((1, 2))
    assert red[1::2].min() > red[0::2].max() + 40


def test_saved_and_loaded_draws_the_same(trained, tmp_path):
    from diffusers import DiffusionPipeline

    trained[0].save_pretrained(tmp_path / "pipeline")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    a, b = (sample_pictures(p, PROMPTS, (5, 6), progress=False, **SAMPLING) for p in (trained[0], loaded))
    assert (a.int() - b.int()).abs().max() <= 1
    assert loaded.tokenizer(list(PROMPTS)).input_ids == trained[0].tokenizer(list(PROMPTS)).input_ids


def test_folding_the_statistics_changes_no_picture():
    from diffdoctor.demo.pipeline import _fold_latent_statistics

    vae = build_pipeline(PROMPTS).vae
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        spread = (
            vae.encode(pictures).latent_dist.std / vae.encode(pictures).latent_dist.mean.std((0, 2, 3))[:, None, None]
        )
        _fold_latent_statistics(vae, vae.encode(pictures).latent_dist.mean)
        posterior = vae.encode(pictures).latent_dist
        torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(posterior.std, spread, atol=1e-5, rtol=1e-4)


def test_tokenizer_knows_its_words_and_copes_with_others():
    tokenizer = build_tokenizer(PROMPTS)
    assert len(tokenizer("a dark square").input_ids) == 5
    ids = tokenizer("Žluťoučký kůň 7").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_bad_pictures_are_refused():
    pipeline = build_pipeline(PROMPTS)
    with pytest.raises(ValueError, match="uint8"):
        train_autoencoder(pipeline, np.zeros((2, 16, 16, 3), np.float32), steps=1)
    with pytest.raises(ValueError, match="prompts"):
        train_base(pipeline, squares(4)[0], ["one"], steps=1)
    for size in (10, (16, 42), (4, 16)):
        with pytest.raises(ValueError, match="picture_size"):
            build_pipeline(PROMPTS, picture_size=size)
