"""Videos of Wan: drawn as the pipeline draws them, diagnosed frame by frame, treated and guided over all frames."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffdoctor
from diffdoctor.cli import main
from diffdoctor.data import video
from diffdoctor.data.shards import read_shards
from diffdoctor.detector import ConvDetector
from diffdoctor.detector.predict import diagnose_pictures
from diffdoctor.evaluate.model.store import PictureFiles
from diffdoctor.measures.pixels import flagged_share, is_flagged
from diffdoctor.ops.artifact_loss import artifact_loss
from diffdoctor.runs.errors import UserError
from diffdoctor.treat import TreatConfig
from diffdoctor.treat.command import OfflineFolder
from diffdoctor.treat.families import family_of
from diffdoctor.treat.loading import load_lora
from diffdoctor.treat.lora import add_lora
from diffdoctor.treat.offline import checked_pairs
from diffdoctor.treat.picture_loss import picture_loss
from diffdoctor.treat.prepare import memory_options
from diffdoctor.treat.rollout import initial_latents, picture_generators, replay, roll_out
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.text_to_image import sample_pictures
from support.model_evaluation import save_lora
from support.tiny_pipelines import PROMPTS, call_options, tiny_pipeline
from support.treatment import BrightDetector, random_detector, run
from support.videos import moving_square, write_animation

FRAMES, SEEDS = 3, (11, 12, 13)
CPU = torch.device("cpu")


def with_scheduler(pipeline, scheduler):
    changes = {"shift": 3.0} if scheduler.startswith("FlowMatch") else {}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **changes)
    return pipeline


def prepared(pipeline, scale=1.0, steps=4, dtype=torch.float32, detector=None):
    family = family_of(pipeline.to(dtype))
    family.max_sequence_length, family.num_frames = 32, FRAMES
    sampler = Sampler(pipeline.scheduler, device=CPU, timestep_options=family.timestep_options(steps, 16, 16))
    conditioning = family.encode_prompts(PROMPTS, guidance_scale=scale, height=16, width=16, device=CPU)
    sampling, generators = Sampling(family, sampler, Guidance(scale), detector), picture_generators(SEEDS)
    return sampling, conditioning, initial_latents(sampling, generators, 16, 16, CPU, dtype), generators


def draw(pipeline, scale, **more):
    return pipeline(
        prompt=list(PROMPTS), height=16, width=16, num_inference_steps=4, generator=picture_generators(SEEDS),
        **{"output_type": "pt", **call_options("wan", scale), "num_frames": FRAMES, **more},
    ).frames  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scheduler", "scale"),
    [
        ("wan", "UniPCMultistepScheduler", 1.0),
        ("wan", "UniPCMultistepScheduler", 5.0),
        ("wan", "FlowMatchEulerDiscreteScheduler", 5.0),
        ("wan22", "UniPCMultistepScheduler", 5.0),
        ("wan22-5b", "UniPCMultistepScheduler", 1.0),
    ],
)
def test_roll_out_draws_what_the_pipeline_draws_and_is_repeated(name, scheduler, scale):
    pipeline = with_scheduler(tiny_pipeline(name.removesuffix("22-5b")), scheduler)
    pipeline.register_to_config(expand_timesteps=name == "wan22-5b")
    sampling, conditioning, latents, generators = prepared(pipeline, scale)
    second = {"guidance_scale_2": 2.0} if name == "wan22" else {}
    sampling.family.guidance_scale_2 = second.get("guidance_scale_2")
    assert sampling.own_steps == ([0, 1] if second else [0, 1, 2, 3])
    assert latents.shape == (3, 4, 2, 8, 8)
    rollout = roll_out(sampling, conditioning, latents, generators, keep=(0, 2), chunk=2)
    theirs = draw(pipeline, scale, **second).transpose(1, 2)
    assert theirs.shape == (3, 3, FRAMES, 16, 16)
    assert (theirs - theirs[:, :, :1]).abs().max() > 1e-3  # it moves
    torch.testing.assert_close(sampling.family.decode(rollout.final).clamp(0, 1), theirs, atol=1e-5, rtol=1e-5)
    index = torch.tensor([2, 0])
    for first in (0, 2):
        again = replay(sampling, rollout, index, first=first).detach()
        torch.testing.assert_close(again, rollout.final[index], atol=2e-4, rtol=1e-4)


def test_replay_gradient_is_that_of_finite_differences():
    sampling, conditioning, latents, generators = prepared(tiny_pipeline("wan"), dtype=torch.float64)
    sampling.family.denoiser.requires_grad_(False)
    weight = sampling.family.denoiser.proj_out.weight.requires_grad_(True)
    rollout = roll_out(sampling, conditioning, latents, generators, keep=(2,))
    generator = torch.Generator().manual_seed(0)
    cotangent, direction = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (latents[:1].shape, weight.shape)
    )

    def value():
        return (replay(sampling, rollout, torch.tensor([1]), first=2) * cotangent).sum()

    gradient = torch.autograd.grad(value(), weight)[0]
    with torch.no_grad():
        weight += 1e-3 * direction
        above = value()
        weight -= 2e-3 * direction
        below = value()
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / 2e-3, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("method", "frames_per_call"), [("threshold", 2), ("max", None)])
def test_the_loss_is_that_of_all_frames_pixels_together(method, frames_per_call):
    detector = random_detector()
    sampling = Sampling(None, None, detector=detector, frames_per_call=frames_per_call)
    videos = torch.rand(2, 3, FRAMES, 16, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    config = TreatConfig(artifact_method=method)
    loss = picture_loss(sampling, videos, config)
    rows = [torch.cat([torch.logit(detector.confidence(v[:, t][None]))[0] for t in range(FRAMES)], 1) for v in videos]
    expected = artifact_loss(torch.stack(rows), method=method, reduction="sample")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(value.sum(), videos)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


def test_memory_options_change_no_gradient_of_videos():
    def gradient(**options):
        pipeline = tiny_pipeline("wan")
        parameters = add_lora(family_of(pipeline), rank=2, alpha=2.0, groups=("attention", "feed_forward"), seed=0)
        detector = random_detector().requires_grad_(False)
        sampling, conditioning, latents, generators = prepared(pipeline, detector=detector, steps=2)
        config, family = TreatConfig(**options), sampling.family
        with memory_options(family, config, detector):
            rollout = roll_out(sampling, conditioning, latents, generators, keep=(0,))
            final = replay(sampling, rollout, torch.tensor([0, 1]), first=0)
            pictures = family.decode(final)
            picture_loss(sampling, pictures, config).sum().backward()
        return torch.cat([p.grad.flatten() for p in parameters])

    plain = gradient()
    saving = gradient(gradient_checkpointing=True, vae_slicing=True)
    torch.testing.assert_close(saving, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("method", ["draft_k", "nft", "grpo"])
def test_every_kind_of_method_treats_videos(method, tmp_path):
    videos = torch.randint(0, 256, (3, FRAMES, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    result = run(
        tiny_pipeline("wan"), random_detector(), (videos.to(torch.uint8).numpy(), list(PROMPTS)), method=method,
        num_frames=FRAMES, frames_per_call=2, steps=1, batch_size=2, group_size=2, sampling_steps=2, vae_slicing=True,
        guidance_scale=5.0, output_dir=tmp_path / "run" if method == "nft" else None,
    )  # fmt: skip
    row = result.history[0]
    assert result.skipped == 0
    assert row["grad_norm"] > 0
    assert row["replayed"] == 2
    assert row["offline_loss"] > 0
    if method == "nft":
        with Image.open(tmp_path / "run" / "samples" / "step-00000000.webp") as moving:
            assert moving.n_frames == FRAMES
        loaded = tiny_pipeline("wan")
        loaded.load_lora_weights(tmp_path / "run" / "lora")
        torch.testing.assert_close(draw(loaded, 5.0), draw(result.pipeline.to("cpu"), 5.0), atol=1e-5, rtol=1e-4)


def test_a_pictures_pairs_teach_a_treatment_of_videos_and_lengths_do_not_mix():
    result = run(tiny_pipeline("wan"), method="nft", num_frames=FRAMES, steps=1, batch_size=2, sampling_steps=2)
    assert result.history[0]["offline_loss"] > 0
    mixed = [torch.zeros(*shape, 16, 16, 3, dtype=torch.uint8).numpy() for shape in ((), (FRAMES,))]
    with pytest.raises(UserError, match="offline: expected pictures alone, or videos of one length"):
        run(tiny_pipeline("wan"), offline=(mixed, list(PROMPTS[:2])), method="weighted", num_frames=FRAMES)


class LateDetector(BrightDetector):
    """What is bright is broken, in the left half of a video's last frame alone: the frames come in order."""

    def forward(self, pictures):
        logits = super().forward(pictures)
        left = torch.arange(logits.shape[-1]) < logits.shape[-1] // 2
        last = torch.arange(len(logits)) % FRAMES == FRAMES - 1
        return torch.where(left & last.view(-1, 1, 1, 1), logits, -20.0)


def test_a_folder_of_videos_teaches(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = moving_square(7, 16, 16)[0]
    write_animation(folder / "a.webp", frames[:5])
    write_animation(folder / "b.webp", frames[::-1])
    write_animation(folder / "short.webp", frames[:2])
    (folder / "broken.mp4").write_bytes(b"no video")
    for number, name in enumerate(("a", "b", "short", "broken")):
        (folder / f"{name}.txt").write_text(PROMPTS[number % 3])
    found = list(OfflineFolder(str(folder), FRAMES))
    assert [pair["prompt"] for pair in found] == list(PROMPTS[:2])
    assert np.array_equal([pair["picture"] for pair in found], [frames[:3], frames[::-1][:3]])
    assert "2 pictures" in caplog.text
    assert "a video of fewer than 3 frames" in caplog.text
    assert "a broken video" in caplog.text
    # where pictures are drawn a video is its first frame, as ever
    assert [pair["picture"].shape for pair in OfflineFolder(str(folder))] == [(16, 16, 3)] * 3
    tiny_pipeline("wan").save_pretrained(tmp_path / "pipeline")
    ConvDetector((8, 8)).save_pretrained(tmp_path / "detector")
    opened, open_video = [], video.open_video
    monkeypatch.setattr(video, "open_video", lambda path, **_: opened.append(path.name) or open_video(path))
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    options = {
        "pipeline": tmp_path / "pipeline", "detector": tmp_path / "detector", "prompts": tmp_path / "prompts.txt",
        "offline": folder, "output": tmp_path / "out", "method": "weighted", "num_frames": FRAMES, "steps": 1,
        "height": 16, "width": 16, "max_sequence_length": 32, "sampling_steps": 2, "evaluate_pictures": 2,
        "batch_size": 2, "log_with": "none", "sample_pictures": 0, "offline_confidence": 1.0,
    }  # fmt: skip
    assert main(["treat", *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert json.loads((tmp_path / "out" / "treat.json").read_text())["history"][0]["offline_loss"] > 0
    assert sorted(opened[:4]) == ["a.webp", "b.webp", "broken.mp4", "short.webp"]
    assert sorted(opened[4:]) == ["a.webp", "b.webp"]  # for the page of the ranking


def test_folders_of_videos_are_told_apart_without_decoding(tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = moving_square(7, 16, 16)[0]
    write_animation(folder / "a.webp", frames)
    (folder / "a.txt").write_text(PROMPTS[0])
    monkeypatch.setattr(video, "open_video", None)

    def digest(frames=FRAMES):
        config = TreatConfig(method="weighted", num_frames=frames)
        return checked_pairs(OfflineFolder(str(folder), frames), config).digest()

    first = digest()
    assert digest() == first != digest(FRAMES + 1)
    (folder / "a.txt").write_text(PROMPTS[1])
    assert digest() != first
    (folder / "a.txt").write_text(PROMPTS[0])
    assert digest() == first
    write_animation(folder / "a.webp", frames[::-1])
    assert digest() != first


def test_guide_moves_and_rewinds_videos():
    pipeline, detector = tiny_pipeline("wan"), BrightDetector()
    size = {"height": 16, "width": 16}
    before = draw(pipeline, 5.0)

    def score(videos):
        return detector.confidence(videos.flatten(0, 1)).unflatten(0, (3, FRAMES)).flatten(1).mean(1)

    moves = {"strength": 1.0, "start": 0.0, "stop": 1.0, "clean_grad": 1.0, "rewinds": 0}
    with diffdoctor.guide(pipeline, detector, frames_per_call=2, **moves, **size) as log:
        assert score(draw(pipeline, 5.0)).mean() < 0.95 * score(before).mean()
    assert len(log.flagged_area) == 4
    torch.testing.assert_close(draw(pipeline, 5.0), before, atol=0, rtol=0)
    plain = draw(pipeline, 5.0, output_type="latent")
    options = {"strength": 0.0, "rewinds": 2, "rewind_dilation": 0}
    with diffdoctor.guide(pipeline, LateDetector(), **options, **size) as log:
        held = draw(pipeline, 5.0, output_type="latent")
    assert log.rewound[0] == 3
    # the last latent frame is of the last two frames; what is before it, or right of it, is held
    torch.testing.assert_close(held[:, :, 0], plain[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held[..., 4:], plain[..., 4:], atol=1e-5, rtol=1e-5)
    assert (held[:, :, 1, :, :4] - plain[:, :, 1, :, :4]).abs().max() > 0.05


def test_numbers_of_frames_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="num_frames: expected 1 more than a multiple of 2, got 4"):
        run(tiny_pipeline("wan"), num_frames=4)
    with pytest.raises(UserError, match="num_frames: expected 1, since StableDiffusionPipeline draws pictures, got 5"):
        run(num_frames=5)
    assert family_of(tiny_pipeline("wan")).frame_count(None) == 81


@pytest.mark.cpu
def test_sets_and_evaluations_of_videos(tmp_path):
    tiny_pipeline("wan").save_pretrained(tmp_path / "wan")
    save_lora("wan", tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    for seed, name in enumerate(("detector", "judge")):
        torch.manual_seed(seed)
        ConvDetector((8, 8)).save_pretrained(tmp_path / name)
    drawing = {"num_inference_steps": 2, "height": 16, "width": 16, "num_frames": FRAMES, "max_sequence_length": 32}
    theirs = sample_pictures(tiny_pipeline("wan"), PROMPTS[:2], [5, 5], progress=False, **drawing)
    assert theirs.shape == (2, 3, FRAMES, 16, 16)

    def command(*words, **more):
        options = {"pipeline": tmp_path / "wan", "prompts": tmp_path / "prompts.txt", "sampling_steps": 2, **more}
        options |= {name: drawing[name] for name in ("height", "width", "num_frames", "max_sequence_length")}
        assert main([*words, *(f"--{name}={value}" for name, value in options.items())]) == 0

    command("sample", "--seeds", "5", "5", output=tmp_path / "set")
    samples = list(read_shards(tmp_path / "set", masks="ignored"))
    assert [s["key"] for s in samples] == [f"{row:06d}-000005-{i:04d}" for row in range(2) for i in range(FRAMES)]
    assert np.array_equal(np.stack([s["picture"] for s in samples[FRAMES:]]), theirs[1].permute(1, 2, 3, 0))

    networks = {name: tmp_path / name for name in ("lora", "detector", "judge")}
    output = tmp_path / "evaluation"
    command("evaluate", "model", **networks, output=output, pictures=2, seed=5, features="none", examples=1)
    pictures = PictureFiles(output / "pictures" / "before").load([0, 1])
    assert torch.equal(pictures[0], theirs[0])
    maps = diagnose_pictures(ConvDetector.from_pretrained(tmp_path / "judge"), pictures, frames_per_call=2)
    rate = json.loads((output / "metrics.json").read_text())["artifact_rate"]["judge"]["before"]
    assert rate == float(is_flagged(flagged_share(maps)).float().mean())
    assert len(list((output / "pictures" / "after").iterdir())) == 2 * FRAMES


def own_gradient(which, method, scale=3.0):
    """A treatment's step of one of two denoisers: which were called with a graph, at which times, and the result."""
    pipeline, calls = tiny_pipeline("wan22"), []

    def watch(module, args, kwargs, output):
        if torch.is_grad_enabled():
            name = "high" if module is pipeline.transformer else "low"
            calls.extend((name, time) for time in kwargs["timestep"].tolist())

    for module in (pipeline.transformer, pipeline.transformer_2):
        module.register_forward_hook(watch, with_kwargs=True)
    result = run(
        pipeline, random_detector(), denoiser=which, method=method, num_frames=FRAMES, steps=1, batch_size=2,
        group_size=2, sampling_steps=4, guidance_scale=scale, guidance_scale_2=1.5,
    )  # fmt: skip
    return result, calls


@pytest.mark.parametrize(
    ("which", "method"), [("high", "draft_k"), ("low", "draft_k"), ("high", "nft"), ("low", "grpo")]
)
def test_of_two_denoisers_one_is_taught_at_its_own_times(which, method, tmp_path):
    result, calls = own_gradient(which, method)
    assert result.history[0]["grad_norm"] > 0
    # roll-outs have no graph; the other denoiser is never in one
    assert {name for name, _ in calls} == {which}
    assert all((time >= 800) == (which == "high") for _, time in calls)
    pipeline = result.pipeline
    changed = [bool(getattr(part, "peft_config", None)) for part in (pipeline.transformer, pipeline.transformer_2)]
    assert changed == [which == "high", which == "low"]
    if method == "draft_k":
        result.save_lora(tmp_path / "lora")
        theirs, ours = tiny_pipeline("wan22"), tiny_pipeline("wan22")
        second = {"load_into_transformer_2": True} if which == "low" else {}
        theirs.load_lora_weights(tmp_path / "lora", **second)
        load_lora(ours, tmp_path / "lora")
        drawn = [draw(p, 5.0, guidance_scale_2=1.5) for p in (result.pipeline.to("cpu"), theirs, ours)]
        for other in drawn[1:]:
            torch.testing.assert_close(other, drawn[0], atol=1e-5, rtol=1e-4)
        assert (drawn[0] - draw(tiny_pipeline("wan22"), 5.0, guidance_scale_2=1.5)).abs().max() > 1e-6
        if which == "low":
            with pytest.raises(UserError, match="it is for transformer_2, not for transformer"):
                load_lora(tiny_pipeline("wan22"), tmp_path / "lora", component="transformer")


def test_two_denoisers_are_guided_and_what_they_cannot_is_refused():
    pipeline, options = tiny_pipeline("wan22"), {"height": 16, "width": 16, "strength": 0.0, "rewinds": 2}
    before = draw(pipeline, 5.0, guidance_scale_2=1.5, output_type="latent")
    with diffdoctor.guide(pipeline, LateDetector(), rewind_dilation=0, **options) as log:
        held = draw(pipeline, 5.0, guidance_scale_2=1.5, output_type="latent")
    assert log.rewound[0] == 3
    torch.testing.assert_close(held[..., 4:], before[..., 4:], atol=1e-5, rtol=1e-5)
    assert not any(part._forward_hooks for part in (pipeline.transformer, pipeline.transformer_2))
    for options, message in (
        ({}, "denoiser: expected high or low, since the pipeline has two and one is tuned at a time, got none"),
        ({"denoiser": "high", "method": "draft_lv"}, "denoiser: expected low with method draft_lv"),
        ({"denoiser": "low", "sampling_steps": 1}, "sampling_steps: expected so many that at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(tiny_pipeline("wan22"), **options)
    for options in ({"denoiser": "high"}, {"guidance_scale_2": 2.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))}: expected none, since WanPipeline"):
            run(tiny_pipeline("wan"), **options)
