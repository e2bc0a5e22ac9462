"""What a treatment step keeps for backward, and that what saves memory changes no gradient."""

import functools
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.studies.treat_memory import real
from benchmarks.studies.treat_memory.counting import Kept
from benchmarks.studies.treat_memory.demo import Step
from diffdoctor.detector import ArtifactDetector, ConvDetector
from diffdoctor.runs.errors import UserError
from diffdoctor.training.ema import RunningAverage
from diffdoctor.treat import TreatConfig
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.offload import ResidentBlocks, resident_blocks
from diffdoctor.treat.prepare import memory_options, release_text_encoders, restore_text_encoders
from diffdoctor.treat.rollout import initial_latents, picture_generators, roll_out
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import artifact_term
from support.tiny_pipelines import FAMILIES, PROMPTS, tiny_pipeline
from support.treatment import BrightDetector, run


@functools.cache
def kept(*args, **options):
    """Bytes that a step keeps, by place; of the same step they are the same."""
    return Step(*args, grad_steps=3, **options).measured()["kept"]


def test_a_replay_of_three_steps_keeps_a_third():
    few, everything = kept(), kept(method="full")
    assert few["denoiser"] <= 0.31 * everything["denoiser"]
    assert sum(few.values()) <= 0.45 * sum(everything.values())
    assert min(few["denoiser"], few["vae"], few["detector"]) > 100_000


def test_more_sampling_steps_keep_no_more():
    assert sum(kept(20).values()) == pytest.approx(sum(kept().values()), rel=0.02)


def small_network(_):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    blocks = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    denoiser = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        **blocks,
    )
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(**kinds, **blocks)

    def predict(latents):
        return denoiser(latents, torch.full((1,), 500), torch.zeros(1, 7, 16), return_dict=False)[0]

    return denoiser, vae, predict, (4, 16, 16), ("to_q", "to_v")


def test_shapes_alone_are_counted():
    step = real.real_step(small_network, torch.float32, 1, "kl", True, True)
    assert min(step["kept"][place] for place in ("denoiser", "vae", "detector")) > 10_000
    assert sum(step["kept"].values()) < step["peak"] < 2 * sum(step["kept"].values())
    assert step["operations"] > 1e9


@pytest.mark.parametrize("detector", [ArtifactDetector.tiny(), ConvDetector((8, 8)), BrightDetector()])
def test_a_detector_is_recomputed_with_the_same_gradient(detector):
    detector = detector.eval().requires_grad_(False)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    config = TreatConfig(gradient_checkpointing=True)

    def kept_and_gradient():
        kept = Kept([detector])
        with kept.hooks():
            loss = detector(pictures).square().mean()
        held = sum(kept.now.values())
        return held, torch.autograd.grad(loss, pictures)[0]

    plain, expected = kept_and_gradient()
    with memory_options(family_of(tiny_pipeline("sd")), config, detector):
        less, gradient = kept_and_gradient()
    assert torch.equal(gradient, expected)
    if not isinstance(detector, BrightDetector):  # which has next to nothing to keep
        assert less < 0.6 * plain
    assert not any("forward" in vars(module) for module in detector.modules())


def test_options_keep_less():
    plain, sliced = kept(), kept(vae_slicing=True)
    assert sliced["vae"] + sliced["detector"] < 0.2 * (plain["vae"] + plain["detector"])
    assert sliced["denoiser"] == plain["denoiser"]
    checkpointed = kept(gradient_checkpointing=True)
    assert checkpointed["denoiser"] < 0.3 * plain["denoiser"]
    assert checkpointed["vae"] < plain["vae"]


def lora_gradient(name, size=16, resident=None, **options):
    """Gradient of one replay of two pictures in two steps, all modules of the family's LoRA groups in one vector."""
    pipeline = tiny_pipeline(name)
    family = family_of(pipeline)
    family.max_sequence_length = 32
    config = TreatConfig(grad_steps=2, sampling_steps=2, replay_area=0.0, **options)
    parameters = add_lora(family, rank=2, alpha=2.0, groups=tuple(family.lora_targets), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        detector = ConvDetector((8, 8)).eval().requires_grad_(False)
    cpu = torch.device("cpu")
    sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options=family.timestep_options(2, size, size))
    conditioning = family.encode_prompts(PROMPTS[:2], guidance_scale=1.0, height=size, width=size, device=cpu)
    generators = picture_generators((1, 2))
    sampling = Sampling(family, sampler, Guidance(), detector)
    latents = initial_latents(sampling, generators, size, size, cpu, torch.float32)
    keep = METHODS["draft_k"].checkpointed_steps(config, range(2), torch.Generator())
    confidence = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    average = RunningAverage(parameters, 0)
    waiting = nullcontext() if resident is None else resident_blocks(family.denoiser, resident, cpu)
    with memory_options(family, config, detector), waiting:
        rollout = roll_out(sampling, conditioning, latents, generators, keep=keep)
        artifact_term(
            sampling, rollout, confidence, config,
            total=2, generator=torch.Generator(), seeds=(1, 2), old=average, initial=average,
        )  # fmt: skip
    # None: of a text's last layer, which nothing reads
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    family.detector = detector
    return torch.cat([gradient.flatten() for gradient in gradients]), family


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_and_slicing_change_no_gradient(name):
    plain, _ = lora_gradient(name)
    assert float(plain.norm()) > 0
    saving, family = lora_gradient(name, gradient_checkpointing=True, vae_slicing=True, attention_backend="native")
    torch.testing.assert_close(saving, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4)
    # and everything is as it was before
    assert not family.denoiser.is_gradient_checkpointing
    assert not family.vae.is_gradient_checkpointing
    assert not family.vae.use_slicing
    assert not any("forward" in vars(module) for module in (family.vae.decoder, *family.detector.modules()))


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_blocks_that_wait_elsewhere_change_no_gradient(name, monkeypatch):
    most, copies, fetch = [], [], ResidentBlocks._fetch

    def counted(self, block):
        comes = block not in self.resident
        fetch(self, block)
        for parameter, data in self._kept[block] if comes else ():
            parameter.data = data.clone()  # as on another device
            copies.append((block, StorageWeakRef(parameter.untyped_storage())))
        there = [b for b, kept in self._kept.items() if any(parameter.numel() for parameter, _ in kept)]
        assert set(there) == set(self.resident)
        most.append(len(there))
        if options:
            assert {b for b, copy in copies if not copy.expired()} == {block}

    monkeypatch.setattr(ResidentBlocks, "_fetch", counted)
    plain, family = lora_gradient(name)
    before = [parameter.clone() for parameter in family.denoiser.parameters()]
    for options in ({}, {"gradient_checkpointing": True}):
        copies.clear()
        waiting, family = lora_gradient(name, resident=1, **options)
        torch.testing.assert_close(waiting, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4)
    # a block that is not there has no weights at all, nor has a checkpointed graph, and they all come back
    assert max(most) == 1
    assert all(map(torch.equal, before, family.denoiser.parameters()))


def test_a_treatment_whose_blocks_wait_elsewhere_is_the_same():
    options = {"merge_rollout": False, "gradient_checkpointing": True}
    losses = [
        [row["loss"] for row in run(tiny_pipeline("flux"), resident_blocks=count, **options).history]
        for count in (None, 1)
    ]
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="gradient_checkpointing: expected true with resident_blocks"):
        TreatConfig(resident_blocks=1)


@pytest.mark.parametrize("name", ["sd", "flux", "qwen_image"])
def test_tiles_are_recomputed_with_the_gradient_of_tiles_kept(name, monkeypatch):
    calls = []

    def counting(function, *args, **kwargs):
        calls.append(tuple(args[0].shape[2:]))
        return function(*args)

    tiled, family = lora_gradient(name, size=32, vae_tiling=16)
    assert not family.vae.use_tiling
    assert "forward" not in vars(family.vae.decoder)
    # what a checkpoint recomputes, kept instead
    monkeypatch.setattr("diffdoctor.treat.prepare.checkpoint", counting)
    kept_whole, _ = lora_gradient(name, size=32, vae_tiling=16)
    assert len(calls) == 9
    assert calls[0][-2:] == (8, 8)
    torch.testing.assert_close(tiled, kept_whole, atol=1e-6 * float(tiled.abs().max()), rtol=1e-4)


def test_options_that_cannot_be_are_refused():
    for options, message in (
        ({"vae_tiling": 6}, "vae_tiling: expected a multiple of 8"),
        ({"attention_backend": "xformers"}, "xformers is not installed"),
        ({"attention_backend": "flash"}, "attention_backend: expected native or xformers"),
    ):
        with pytest.raises(UserError, match=message):
            lora_gradient("sd", **options)
    for backend in ("flash", "nonsense"):
        with pytest.raises(UserError, match=f"attention_backend: {backend} cannot be used here"):
            lora_gradient("flux", attention_backend=backend)


def test_text_encoders_are_really_gone_or_come_back():
    family = family_of(tiny_pipeline("sdxl"))
    encoders = [weakref.ref(encoder) for encoder in family.text_encoders]
    assert len(encoders) == 2
    release_text_encoders(family, "keep")
    release_text_encoders(family, "offload")
    assert len(family.text_encoders) == 2
    release_text_encoders(family, "free")
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None]
    assert family.pipeline.text_encoder is None


def test_text_encoders_that_no_longer_fit_stay_on_the_cpu(monkeypatch, caplog):
    family = family_of(tiny_pipeline("sdxl"))
    moved = []

    def full(self, device):
        moved.append((self, device))
        if device == "gpu" and self is family.text_encoders[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for encoder in family.text_encoders:
        monkeypatch.setattr(type(encoder), "to", full)
    restore_text_encoders(family, "gpu")
    first, second = family.text_encoders
    assert moved == [(first, "gpu"), (second, "gpu"), (first, "cpu"), (second, "cpu")]
    assert "the text encoders stay on the CPU" in caplog.text


def test_a_denoiser_from_a_gpu_waits_on_the_cpu(monkeypatch):
    denoiser, moved = family_of(tiny_pipeline("flux")).denoiser, []
    monkeypatch.setattr(denoiser, "to", lambda place: moved.append(str(place)))
    monkeypatch.setattr(ResidentBlocks, "_put_away", lambda self, block: moved.append("put away"))
    with resident_blocks(denoiser, 1, torch.device("cpu", 0)):
        pass
    assert moved[:2] == ["cpu", "put away"]
