"""Is a moving artifact found, does its map stay on it, and do `nft` and `draft_k` draw less of it?

`python -m benchmarks.studies.video --output runs/video` makes clips of five frames of 16 x 16 pixels, in which a digit
moves to the right and, in half of them, a red block to the left; trains a detector and a judge on frames, and a small
`WanPipeline` on the clips; diagnoses what it draws with `diffdoctor diagnose` (gallery.html shows strips and
animations); and treats it by each method. What is an artifact is also known by a rule: red pixels. Prints a table and
writes results.json. The trained networks are kept, so that a second call treats anew.

The autoencoder is no trained one: it packs two frames of 2 x 2 pixels into a latent one, and loses nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput

from diffdoctor.demo.flow_pipeline import MAX_SEQUENCE_LENGTH, build_t5_tokenizer
from diffdoctor.demo.pipeline import fit
from diffdoctor.detector import ConvDetector
from diffdoctor.detector.predict import diagnose_pictures
from diffdoctor.measures.pixels import flagged_share, is_flagged
from diffdoctor.ops.target import Target
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.runs.files import atomic_path, atomic_write_json
from diffdoctor.treat import TreatConfig, treat
from diffdoctor.treat.families import family_of
from diffdoctor.treat.text_to_image import sample_pictures

FRAMES, SIDE, BLOCK = 5, 16, 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a moving {name}" for name in NAMES)
RED = (230, 30, 30)
SAMPLING = {"sampling_steps": 8, "guidance_scale": 1.0, "height": SIDE, "width": SIDE, "num_frames": FRAMES}
COMMON = {
    **SAMPLING, "max_sequence_length": MAX_SEQUENCE_LENGTH, "batch_size": 16, "rank": 8, "evaluate_every": 0,
    "evaluate_pictures": 16, "sample_pictures": 4, "log_with": "none", "min_diversity": 0.0,
}  # fmt: skip
METHODS = {
    "nft": {"method": "nft", "learning_rate": 2e-3},
    "draft_k": {"method": "draft_k", "learning_rate": 1e-3, "offline_batch_size": 16},
}


class PackingAutoencoder(ModelMixin, ConfigMixin):
    """Two frames of 2 x 2 pixels as one latent; the first frame stands twice, since none is before it."""

    @register_to_config
    def __init__(
        self,
        latents_mean: tuple[float, ...] = (0.0,) * 24,
        latents_std: tuple[float, ...] = (1.0,) * 24,
        z_dim: int = 24,
        scale_factor_temporal: int = 2,
        scale_factor_spatial: int = 2,
    ):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # of which diffusers reads dtype and device

    def encode(self, frames: torch.Tensor):
        """Latents of (B, 3, T, H, W), as `.latent_dist.mode()`."""
        twice = torch.cat([frames[:, :, :1], frames], 2)
        b, c, t, h, w = twice.shape
        packed = twice.view(b, c, t // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
        self.mode = packed.reshape(b, 8 * c, t // 2, h // 2, w // 2).clone
        self.latent_dist = self
        return self

    def decode(self, latents: torch.Tensor, return_dict: bool = True):
        """The inverse of `encode`."""
        b, c, t, h, w = latents.shape
        frames = latents.view(b, c // 8, 2, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        frames = frames.reshape(b, c // 8, 2 * t, 2 * h, 2 * w)[:, :, 1:]
        return DecoderOutput(sample=frames) if return_dict else (frames,)


def make_clips(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 clips (N, T, H, W, 3), their masks (N, T, H, W) in {0, 1}, and prompts; half have an artifact."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(seed)
    clips = np.zeros((count, FRAMES, SIDE, SIDE, 3), np.uint8)
    masks, prompts = np.zeros((count, FRAMES, SIDE, SIDE), np.float32), []
    for clip, mask in zip(clips, masks, strict=True):
        row = int(rng.integers(len(digits.images)))
        prompts.append(PROMPTS[digits.target[row]])
        picture = (digits.images[row] * 255 / 16).astype(np.uint8)[..., None]
        top, left = rng.integers(0, SIDE - 8 + 1), rng.integers(0, SIDE - 8 - FRAMES + 2)
        block_top, block_left = rng.integers(0, SIDE - BLOCK + 1), rng.integers(FRAMES - 1, SIDE - BLOCK + 1)
        damaged = rng.random() < 0.5
        for t in range(FRAMES):
            clip[t, top : top + 8, left + t : left + t + 8] = picture
            if damaged:
                place = (slice(block_top, block_top + BLOCK), slice(block_left - t, block_left - t + BLOCK))
                clip[t][place], mask[t][place] = RED, 1
    return clips, masks, prompts


def by_rule(clips: torch.Tensor) -> torch.Tensor:
    """Where clips uint8 (N, 3, T, H, W) are red: (N, 1, T, H, W) in {0, 1}."""
    red, green, blue = clips.float().unbind(1)
    return ((red > 100) & (red > 2 * green) & (red > 2 * blue)).float()[:, None]


def overlap(maps: torch.Tensor, masks: torch.Tensor) -> float:
    """Mean IoU of what maps (N, 1, T, H, W) flag with masks, over the frames in which a mask has 4 pixels or more."""
    found, true = ((x >= 0.5).transpose(1, 2).flatten(0, 1).flatten(1) for x in (maps, masks))
    has = true.sum(1) >= 4
    return float(((found & true).sum(1) / (found | true).sum(1).clamp(min=1))[has].float().mean())


def train_detector(seed: int, steps: int) -> ConvDetector:
    """A detector of pictures, of frames of clips of its own."""
    clips, masks, _ = make_clips(400, 100 + seed)
    frames = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    truth = torch.from_numpy(masks).flatten(0, 1)[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = ConvDetector((16, 32))
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(_):
        index = torch.randint(len(frames), (64,), generator=generator)
        logits = detector(frames[index])
        wanted = torch.nn.functional.interpolate(truth[index], logits.shape[-2:], mode="area")
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)

    fit(detector, loss_of_step, steps, 3e-3)
    return detector.eval().requires_grad_(False)


def build_pipeline(seed: int = 0):
    """An untrained `WanPipeline` on packed clips, with random text encoder, and UniPC of flow matching."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = build_t5_tokenizer(PROMPTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = UMT5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0
        )
        transformer = WanTransformer3DModel(
            in_channels=24, out_channels=24, num_layers=4, attention_head_dim=24, num_attention_heads=4, text_dim=64,
            freq_dim=64, ffn_dim=256, rope_max_seq_len=64,
        )  # fmt: skip
        torch.nn.init.zeros_(transformer.proj_out.weight)
        encoder = UMT5EncoderModel(text).eval().requires_grad_(False)
    clips, _, _ = make_clips(400, 1)
    vae = PackingAutoencoder()
    packed = vae.encode(as_videos(clips) * 2 - 1).mode()
    mean, std = packed.mean((0, 2, 3, 4)), packed.std((0, 2, 3, 4))
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=PackingAutoencoder(tuple(mean.tolist()), tuple(std.tolist())).eval(),
        scheduler=scheduler,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_videos(clips: np.ndarray) -> torch.Tensor:
    """uint8 (N, T, H, W, 3) as (N, 3, T, H, W) in [0, 1]."""
    return torch.from_numpy(clips).movedim(-1, 1).float() / 255


def train_pipeline(pipeline, steps: int, seed: int = 0) -> list[float]:
    """Train the transformer on 2,000 clips by flow matching, times uniform; gives the losses."""
    clips, _, prompts = make_clips(2000, 2)
    family = family_of(pipeline)
    family.max_sequence_length, family.num_frames = MAX_SEQUENCE_LENGTH, FRAMES
    latents = family.encode(as_videos(clips))
    size = {"height": SIDE, "width": SIDE, "device": torch.device("cpu")}
    conditioning = family.encode_prompts(PROMPTS, guidance_scale=1.0, **size)
    rows = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    transformer = pipeline.transformer.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(_):
        index = torch.randint(len(latents), (32,), generator=generator)
        noise, sigmas = torch.randn(latents[index].shape, generator=generator), torch.rand(32, generator=generator)
        noisy = torch.lerp(latents[index], noise, sigmas.view(-1, 1, 1, 1, 1))
        prediction = family.denoise(noisy, 1000 * sigmas, conditioning.rows(rows[index]).positive)
        return weighted_loss(prediction, Target.flow(latents[index], noise))

    def report(step: int, loss: float) -> None:
        if step % 100 == 99:
            print(f"pipeline: step {step + 1} of {steps}, loss {loss:.3f}", flush=True)

    trained = fit(transformer, loss_of_step, steps, 2e-3, 0.99, report)
    transformer.eval().requires_grad_(False)
    return trained.losses


def measured(clips: torch.Tensor, judge) -> dict[str, float]:
    """Of clips uint8 (N, 3, T, H, W): what the judge and the rule flag, and how bright what is not red is."""
    red = by_rule(clips)
    maps = diagnose_pictures(judge, clips)
    sound = (clips.float().amax(1, keepdim=True) / 255) * (1 - red)
    return {
        "judge": float(is_flagged(flagged_share(maps)).float().mean()),
        "rule": float(is_flagged(flagged_share(red)).float().mean()),
        "overlap": overlap(maps, red),
        "brightness": float(sound.mean()),
    }


def draw(pipeline, count: int) -> torch.Tensor:
    """uint8 (count, 3, T, H, W) of prompts in turn and seeds from 0."""
    names = {"sampling_steps": "num_inference_steps"}
    options = {names.get(name, name): value for name, value in SAMPLING.items()}
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return sample_pictures(
        pipeline, prompts, range(count), batch_size=32, progress=False, max_sequence_length=MAX_SEQUENCE_LENGTH,
        **options,
    )  # fmt: skip


def prepared(output: Path, steps: int, detector_steps: int):
    """The detector, the judge and the pipeline, trained or from the output folder."""
    networks = []
    for seed, name in enumerate(("detector", "judge")):
        if not (output / name).is_dir():
            train_detector(seed, detector_steps).save_pretrained(output / name)
        networks.append(ConvDetector.from_pretrained(output / name).eval().requires_grad_(False))
    pipeline, path = build_pipeline(), output / "transformer.pt"
    if path.is_file():
        pipeline.transformer.load_state_dict(torch.load(path, weights_only=True))
        pipeline.transformer.eval().requires_grad_(False)
    else:
        losses = train_pipeline(pipeline, steps)
        print(f"pipeline: loss {np.mean(losses[:20]):.3f} -> {np.mean(losses[-20:]):.3f}", flush=True)
        with atomic_path(path) as temporary:
            torch.save(pipeline.transformer.state_dict(), temporary)
    return *networks, pipeline


def show(output: Path, clips: torch.Tensor) -> None:
    """Diagnose clips by the command, for its page: diagnosis/gallery.html."""
    from PIL import Image

    from diffdoctor.cli import main as command

    (output / "clips").mkdir(exist_ok=True)
    for number, clip in enumerate(clips):
        first, *rest = [Image.fromarray(frame) for frame in clip.permute(1, 2, 3, 0).contiguous().numpy()]
        options = {"lossless": True, "duration": 250, "loop": 0}
        first.save(output / "clips" / f"{number:03d}.webp", save_all=True, append_images=rest, **options)
    command(["diagnose", f"{output}/clips", "--detector", f"{output}/detector", "--output", f"{output}/diagnosis"])


def run(output: Path, *, steps: int, detector_steps: int, treatment_steps: int, count: int) -> dict:
    """The whole study; gives what results.json holds."""
    output.mkdir(parents=True, exist_ok=True)
    detector, judge, pipeline = prepared(output, steps, detector_steps)
    clips, masks, _ = make_clips(200, 3)
    held_out = torch.from_numpy(clips).movedim(-1, 1).contiguous()
    maps = diagnose_pictures(detector, held_out)
    results = {"overlap_held_out": overlap(maps, torch.from_numpy(masks)[:, None])}
    before = draw(pipeline, count)
    show(output, before[:24])
    results["before"] = measured(before, judge)
    del pipeline
    pairs, _, captions = make_clips(128, 2)
    for name, options in METHODS.items():
        _, _, pipeline = prepared(output, steps, detector_steps)
        started = time.process_time()
        config = TreatConfig(**{**COMMON, **options}, steps=treatment_steps)
        offline = None if name == "nft" else (pairs, captions)
        treat(pipeline, detector, list(PROMPTS), config, offline=offline, progress=False, output_dir=output / name)
        seconds = time.process_time() - started
        results[name] = {**measured(draw(pipeline, count), judge), "cpu_seconds": seconds}
    atomic_write_json(output / "results.json", results)
    return results


def misses(results: dict) -> list[str]:
    """What falls short, a sentence each."""
    before, found = results["before"], []
    if results["overlap_held_out"] < 0.5:
        found.append(f"held-out clips: IoU {results['overlap_held_out']:.2f} of the map and the artifact")
    for name in METHODS:
        after = results[name]
        for who in ("judge", "rule"):
            if after[who] > 0.5 * before[who]:
                found.append(f"{name}: {who} {before[who]:.1%} -> {after[who]:.1%}, more than half")
        if after["brightness"] < 0.5 * before["brightness"]:
            found.append(f"{name}: the digits fade, {before['brightness']:.3f} -> {after['brightness']:.3f}")
    return found


def table(results: dict) -> str:
    """The results as a table in Markdown."""
    lines = ["| | judge's rate | red by the rule | IoU of map and red | brightness of the rest | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for name in ("before", *METHODS):
        row = results[name]
        seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "–"
        shares = f"{row['judge']:.1%} | {row['rule']:.1%} | {row['overlap']:.2f} | {row['brightness']:.3f}"
        lines.append(f"| {name} | {shares} | {seconds} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the study; 1 if something falls short."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/video"))
    parser.add_argument("--steps", type=int, default=700, help="of the pipeline's training")
    parser.add_argument("--detector_steps", type=int, default=300)
    parser.add_argument("--treatment_steps", type=int, default=30)
    parser.add_argument("--clips", type=int, default=128, help="drawn before and after")
    options = parser.parse_args(arguments)
    sizes = {"steps": options.steps, "detector_steps": options.detector_steps, "count": options.clips}
    results = run(options.output, treatment_steps=options.treatment_steps, **sizes)
    print(f"held-out clips: IoU {results['overlap_held_out']:.2f}\n{table(results)}")
    for sentence in (found := misses(results)):
        print(f"falls short: {sentence}")
    print(json.dumps({"ok": not found}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
