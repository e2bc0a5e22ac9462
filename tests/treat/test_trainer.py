"""The treatment as a whole: it learns, notices what goes wrong, and keeps what was good."""

import numpy as np
import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat import treat
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import lora_state
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.monitor import EarlyStopping, Measurement
from diffdoctor.treat.offline import offline_term, prepare_offline, resized_images
from diffdoctor.treat.rows import RowStore
from diffdoctor.treat.sampling import Sampling
from diffdoctor.treat.schedulers import Sampler
from support.tiny_pipelines import FAMILIES, PROMPTS, tiny_pipeline
from support.treatment import BrightDetector, gradient_norms, pairs, random_detector, run, small

# A U-Net, embedded guidance and guidance by token meet every method, with guidance or without in turns; the others one
# with a gradient and one without.
THOROUGH = ("sd", "flux", "qwen_image")


@pytest.mark.parametrize(
    ("name", "method", "scale"),
    [
        *(
            (name, method, (1.0, 5.0)[(family + number) % 2])
            for family, name in enumerate(THOROUGH)
            for number, method in enumerate(METHODS)
        ),
        *((name, method, 5.0) for name in FAMILIES if name not in THOROUGH for method in ("draft_k", "nft")),
    ],
)
def test_every_family_by_every_method(name, method, scale):
    sizes = {"steps": 1, "batch_size": 2, "group_size": 2, "sampling_steps": 2}
    result = run(tiny_pipeline(name), method=method, guidance_scale=scale, **sizes)
    row = result.history[0]
    assert result.skipped == 0
    assert row["grad_norm"] > 0
    assert row["replayed"] == (0 if method == "weighted" else 2)
    state = lora_state(family_of(result.pipeline))
    assert result.best_step == 0 or any(float(v.abs().max()) > 0 for k, v in state.items() if "lora_B" in k)


@pytest.mark.parametrize("method", ["draft_k", "drtune"])
def test_treatment_lowers_the_detectors_confidence(method):
    result = run(
        detector=BrightDetector(), method=method, steps=20, batch_size=4, learning_rate=2e-2, rank=4,
        evaluate_pictures=8, offline_weight=0.0, max_grad_norm=0.0, min_diversity=0.0, min_sharpness=0.0,
        modulate="none",
    )  # fmt: skip
    first, last = result.measurements[0], result.measurements[-1]
    assert last.mean_confidence < 0.85 * first.mean_confidence
    assert result.best_step == 20


def test_offline_term_alone_learns_the_pairs():
    picture, prompts = np.full((4, 16, 16, 3), 200, np.uint8), [PROMPTS[0]] * 4
    result = run(
        method="weighted", steps=25, batch_size=8, learning_rate=2e-2, rank=8, offline=(picture, prompts),
        offline_confidence=1.0, min_diversity=0.0, min_sharpness=0.0,
    )  # fmt: skip
    losses = [row["loss"] for row in result.history]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.cpu
def test_same_seed_same_lora_and_another_seed_another():
    states = [lora_state(family_of(run(seed=seed, max_skipped=3).pipeline)) for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


class BrokenDetector(torch.nn.Module):
    """Gives NaN logits in the graph from one call on, for a number of calls."""

    def __init__(self, first, count):
        super().__init__()
        self.inner, self.first, self.count, self.calls = random_detector(), first, count, 0

    def confidence(self, pictures):
        return self.inner.confidence(pictures)

    def forward(self, pictures):
        self.calls += 1
        broken = self.first <= self.calls < self.first + self.count
        return self.inner(pictures) * (float("nan") if broken else 1.0)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    result = run(detector=BrokenDetector(2, 1), steps=3)
    assert result.skipped == 1
    assert result.history[1]["grad_norm"] is None
    assert all(torch.isfinite(value).all() for value in lora_state(family_of(result.pipeline)).values())


def test_too_many_skipped_steps_end_the_treatment():
    with pytest.raises(UserError, match="4 steps in a row"):
        run(detector=BrokenDetector(2, 100), steps=9, max_skipped=4)


@pytest.mark.cpu
def test_collapse_is_noticed_and_good_weights_kept():
    result = run(
        detector=BrightDetector(), steps=60, learning_rate=3.0, evaluate_every=2, max_grad_norm=0.0,
        offline_weight=0.0, evaluate_pictures=9, warmup_steps=0, max_skipped=100,
    )  # fmt: skip
    assert result.stopped.startswith("collapse")
    assert len(result.history) < 60
    first = result.measurements[0]
    best = next(m for m in result.measurements if m.step == result.best_step)
    assert best.diversity >= 0.5 * first.diversity
    assert best.sharpness >= 0.5 * first.sharpness


def test_a_monitor_that_sees_more_artifacts_stops_the_treatment():
    class DarkDetector(BrightDetector):
        def forward(self, pictures):
            return -super().forward(pictures)

    options = {"steps": 30, "learning_rate": 5e-2, "evaluate_every": 3, "offline_weight": 0.0, "max_grad_norm": 0.0,
               "min_diversity": 0.0, "min_sharpness": 0.0, "modulate": "none"}  # fmt: skip
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    result = treat(
        pipeline, BrightDetector(), PROMPTS, small(**options), monitor=DarkDetector(), progress=False
    )  # fmt: skip
    assert result.stopped.startswith("reward hacking")
    assert len(result.history) < 30
    best = next(m for m in result.measurements if m.step == result.best_step)
    assert best.monitor_area <= 1.25 * result.measurements[0].monitor_area + 1e-3


def test_a_measured_quality_chooses_the_weights_in_place_of_the_detector():
    asked = []

    def darkest_in_the_middle(pictures, prompts):
        assert len(pictures) == len(prompts) == 3
        asked.append(prompts)
        return [-abs(len(asked) - 3.0)] * len(prompts)

    options = {"detector": BrightDetector(), "steps": 4, "evaluate_every": 1, "evaluate_pictures": 3}
    result = run(**options, min_diversity=0.0, min_sharpness=0.0, quality=darkest_in_the_middle)
    assert [measurement.quality for measurement in result.measurements] == [-2, -1, 0, -1, -2]
    assert result.best_step == 2
    assert asked[0] == [PROMPTS[i % len(PROMPTS)] for i in range(3)]
    with pytest.raises(UserError, match="quality: expected finite numbers"):
        run(**options, quality=lambda pictures, prompts: [float("nan")] * len(prompts))


def best_of(*scores, quality=None):
    """The number of the measurement whose weights are kept, of pictures with these scores."""
    early_stopping = EarlyStopping(small())
    for step, each in enumerate(scores):
        measurement = Measurement(step, 0.0, 0.0, 0.0, 1.0, 1.0, quality=quality and -float(each.mean()))
        early_stopping.add(measurement, each, dict)
    return early_stopping.best.step


def test_the_last_of_equally_good_weights_is_kept():
    scores = [torch.full((4,), score) for score in (0.1, 0.02, 0.01, 0.0105, 0.04)]
    assert best_of(*scores) == 3
    assert best_of(*scores, quality=True) == 2  # whose numbers are not close for being small


@pytest.mark.parametrize("quality", [None, True])
def test_weights_are_equally_good_where_the_same_pictures_cannot_tell_them_apart(quality):
    generator = torch.Generator().manual_seed(0)
    before = 0.2 + 0.1 * torch.rand(64, generator=generator)
    noise = torch.randn(64, generator=generator)
    good = 0.3 * before
    # a mean that is 20 % higher: by three pictures that were sound and now are not, or by the same amount in all
    few = good + torch.where(torch.arange(64) < 3, 0.2 * 64 / 3 * good.mean(), torch.zeros(64))
    assert best_of(before, good, few, quality=quality) == 2
    assert best_of(before, good, 1.2 * good, quality=quality) == 1
    # picture by picture: what each has of its own in both says nothing
    own = good + noise.abs()
    assert best_of(before + 2, own, own + 0.2 * own.mean(), quality=quality) == 1


def test_a_checkpoint_keeps_what_later_weights_are_compared_with():
    early_stopping, resumed = EarlyStopping(small()), EarlyStopping(small())
    early_stopping.add(Measurement(0, 0.1, 0.0, 0.0, 1.0, 1.0), torch.full((4,), 0.1), dict)
    early_stopping.add(Measurement(1, 0.01, 0.0, 0.0, 1.0, 1.0), torch.full((4,), 0.01), dict)
    resumed.load_state_dict(early_stopping.state_dict())
    resumed.add(Measurement(2, 0.05, 0.0, 0.0, 1.0, 1.0), torch.full((4,), 0.05), dict)
    assert resumed.best.step == 1


def test_uniform_maps_leave_the_offline_term_alone():
    result = run(map_source="uniform", steps=2)
    assert [row["artifact_loss"] for row in result.history] == [0.0, 0.0]
    assert all(row["offline_loss"] > 0 for row in result.history)
    assert result.best_step == 2


def test_options_that_save_memory_change_no_gradient():
    plain = gradient_norms(batch_size=4, map_source="detector")
    for options in ({"merge_rollout": False}, {"micro_batch_size": 1}, {"micro_batch_size": 3, "vae_slicing": True}):
        assert gradient_norms(batch_size=4, **options) == pytest.approx(plain, rel=1e-3)


def test_a_vae_that_gives_nan_in_its_dtype_is_noticed_at_once():
    pipeline = tiny_pipeline("sd")
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e6)
        pipeline.vae.decoder.conv_in.bias.add_(1e5)
    pipeline.vae.half()
    with pytest.raises(
        UserError, match="the VAE decodes pictures with values that are not finite in float16: load the VAE in float32"
    ):
        run(pipeline, steps=1)
    with torch.no_grad():
        pipeline = tiny_pipeline("sd")
        pipeline.vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(
        UserError, match="the VAE encodes the offline pictures with values that are not finite in float32"
    ):
        run(pipeline, steps=1)


class SquareDetector(torch.nn.Module):
    """Flags one square of every picture, by its place."""

    def confidence(self, pictures):
        maps = torch.zeros(len(pictures), 1, *pictures.shape[2:])
        maps[:, :, 4:8, 6:10] = 0.9
        return maps


def test_offline_pairs_teach_nothing_where_flagged():
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    family = family_of(pipeline)
    cpu = torch.device("cpu")
    config = small(offline_dilation=1)
    sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options={"num_inference_steps": 3})
    sampling = Sampling(family, sampler, detector=SquareDetector())
    options = {"height": 16, "width": 16, "device": cpu, "chunk": 4, "store": lambda name: RowStore(name, 2**20)}
    source = list(zip(*pairs(), strict=True))
    prepared = prepare_offline(sampling, source, config, **options)
    expected = torch.ones(16, 16)
    expected[3:9, 5:11] = 0
    assert torch.equal(prepared.take(torch.arange(6))[1], expected.expand(6, 1, 16, 16))

    def loss():
        return offline_term(sampling, prepared, draws=[1, 2, 3], total=3)

    with_flagged = float(loss().detach())
    # FSDP may keep a denoiser's weights elsewhere than where it computes
    family.denoiser.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(1, device="meta")))
    assert next(family.denoiser.parameters()).device.type == "meta"
    assert float(loss().detach()) == with_flagged
    uniform = prepare_offline(sampling, source, small(map_source="uniform"), **options)
    everywhere = float(offline_term(sampling, uniform, draws=[1, 2, 3], total=3).detach())
    assert with_flagged < everywhere
    shuffled = prepare_offline(sampling, source, small(map_source="shuffled"), **options)
    assert sorted(shuffled.mask_rows.tolist()) == list(range(6))
    assert not (shuffled.mask_rows == torch.arange(6)).any()
    # the residual in the flagged latents does not count: 4 x 4 latent pixels, less their partly flagged rim
    prepared = prepare_offline(sampling, source, small(offline_confidence=0.0), **options)
    assert float(loss().detach()) == 0.0


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (40, 40), (48, 32)])
def test_offline_pictures_of_other_proportions_are_cropped_at_their_centre(shape):
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in shape)
    disc = np.hypot(rows[:, None], columns) < min(shape[0] / 24, shape[1] / 16) * 6
    found = resized_images([np.repeat(disc[..., None] * np.uint8(255), 3, 2)], 24, 16)
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in (24, 16))
    assert np.abs(found[0, 0].numpy() - (np.hypot(rows[:, None], columns) < 6)).mean() < 0.05


def test_offline_pairs_as_samples():
    pictures, prompts = pairs(3)
    samples = [{"picture": picture, "prompt": prompt} for picture, prompt in zip(pictures, prompts, strict=True)]
    a, b = run(offline=samples), run(offline=(pictures, prompts))
    assert a.history == b.history
