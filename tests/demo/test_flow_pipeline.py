"""The demo's second pipeline learns by flow matching, survives save and load, and can be guided and treated."""

import numpy as np
import pytest
import torch

import diffdoctor
from diffdoctor.demo.flow_pipeline import MAX_SEQUENCE_LENGTH, build_flow_pipeline, build_t5_tokenizer, train_flow
from diffdoctor.demo.pipeline import build_pipeline, train_autoencoder
from diffdoctor.evaluate.model import sample_pictures

PROMPTS = ("a square to the left", "a square to the right")
SAMPLING = {
    "num_inference_steps": 8,
    "guidance_scale": 1.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}


def squares(count=128):
    """A grey square to the left or right, as the prompt says; below it a bright stripe in every second picture."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 20, (count, 16, 16, 3))
    sides = np.arange(count) % 2
    for picture, side, stripe in zip(pictures, sides, np.arange(count) // 2 % 2, strict=True):
        picture[3:7, 2 + 8 * side : 6 + 8 * side] += 120
        picture[11:14] += 230 * stripe
    return pictures.astype(np.uint8), [PROMPTS[side] for side in sides]


class StripeDetector(torch.nn.Module):
    """What is bright is broken."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, pictures):
        return self.scale * (pictures.mean(1, keepdim=True) - 0.7)

    def confidence(self, pictures):
        return self(pictures).sigmoid()


@pytest.fixture(scope="module")
def trained():
    pictures, prompts = squares()
    autoencoder = build_pipeline(PROMPTS, seed=0)
    train_autoencoder(autoencoder, pictures, steps=80, seed=0)
    pipeline = build_flow_pipeline(PROMPTS, autoencoder.vae, seed=0, width=64, layers=1, single=2)
    return pipeline, train_flow(pipeline, pictures, prompts, steps=350, batch_size=32, seed=0)


def stripes(pictures):
    return (pictures[:, :, 11:14].float().mean((1, 2, 3)) > 120).float().mean().item()


def left_and_right(pictures):
    grey = pictures[:, :, 3:7].float().mean((1, 2))
    return grey[:, 2:6].mean(1), grey[:, 10:14].mean(1)


def draw(pipeline, count=32):
    return sample_pictures(pipeline, PROMPTS * (count // 2), range(count), progress=False, **SAMPLING)


def test_size_and_kind_are_as_stated():
    pipeline = build_flow_pipeline(PROMPTS, build_pipeline(PROMPTS).vae)
    assert type(pipeline).__name__ == "FluxPipeline"
    assert 2.4e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 2.9e6
    assert not pipeline.transformer.config.guidance_embeds
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.arange(10, -1, -1) / 10)


def test_same_seed_same_weights_and_the_random_state_is_kept():
    vae = build_pipeline(PROMPTS).vae
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    a, b, other = (build_flow_pipeline(PROMPTS, vae, seed=seed, width=32, layers=1, single=1) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(2), expected)
    weights = [p.transformer.x_embedder.weight for p in (a, b, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_learns_what_the_prompts_ask_and_how_the_set_is_damaged(trained):
    pipeline, record = trained
    assert np.mean(record.losses[-30:]) < 0.5 * record.losses[0]
    pictures = draw(pipeline)
    left, right = left_and_right(pictures)
    assert (left - right)[0::2].mean() > 40
    assert (right - left)[1::2].mean() > 40
    assert 0.2 < stripes(pictures) < 0.8


def test_saved_and_loaded_draws_the_same(trained, tmp_path):
    from diffusers import DiffusionPipeline

    trained[0].save_pretrained(tmp_path / "pipeline")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert (draw(trained[0], 4).int() - draw(loaded, 4).int()).abs().max() <= 1


def test_guide_cures_a_trained_flow_pipeline_and_keeps_what_was_asked_for(trained):
    pipeline, detector = trained[0], StripeDetector()
    before = draw(pipeline)
    # whether there is a stripe is decided in the first steps
    with diffdoctor.guide(pipeline, detector, rewind_to=0.0, height=16, width=16) as log:
        guided = draw(pipeline)
    assert stripes(guided) <= 0.2 * stripes(before)
    assert log.rewound[0] > log.rewound[-1]
    assert len(log.final_area) == len(guided)
    left, right = left_and_right(guided)
    assert (left - right)[0::2].mean() > 40
    assert (right - left)[1::2].mean() > 40
    assert torch.equal(draw(pipeline), before)


def test_other_arguments_are_refused(trained):
    with pytest.raises(ValueError, match="width"):
        build_flow_pipeline(PROMPTS, trained[0].vae, width=48)
    with pytest.raises(ValueError, match="prompts"):
        train_flow(trained[0], squares(4)[0], PROMPTS, steps=1)


def test_t5_tokenizer_has_a_piece_for_each_word_and_ends_prompts():
    tokenizer = build_t5_tokenizer(PROMPTS)
    ids = tokenizer(PROMPTS[0]).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁square", "▁to", "▁the", "▁left", "</s>"]
    assert tokenizer.unk_token_id not in tokenizer("a trail to the left").input_ids
