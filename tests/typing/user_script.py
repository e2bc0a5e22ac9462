"""What a user's script looks like: every public name, used as the docs use it.

Never run, only type-checked (test_user_script.py): an editor must know each name here, its parameters and its result.
"""

from __future__ import annotations

import pathlib
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

import diffdoctor
from diffdoctor import maps
from diffdoctor.detector import (
    ArrayData,
    ArtifactDetector,
    AugmentConfig,
    ConvDetector,
    Detector,
    DetectorTrainingConfig,
    FunctionDetector,
    HttpDetector,
    Injected,
    JoinedData,
    PreprocessConfig,
    ShardData,
    ShardStream,
    TrainedDetector,
    benign,
    coco_pictures,
    damage_kind,
    damage_kinds,
    from_boxes,
    inject,
    load_detector,
    masked_pictures,
    read_shards,
    train_detector,
    write_coco,
    write_shards,
)
from diffdoctor.evaluate.model import (
    Comparison,
    artifact_rates,
    compare_pictures,
    diagnose_pictures,
    draw_pictures,
    sample_pictures,
)
from diffdoctor.repairs import RegionOutcome, Repaired, RepairOptions, Try, repair
from diffdoctor.treat import (
    Conditioning,
    Family,
    GuideLog,
    TreatConfig,
    TreatResult,
    autoguide,
    guide,
    register_family,
    save_lora,
    treat,
)


def training_step(
    unet: torch.nn.Module, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, confidence: torch.Tensor
) -> float:
    alphas_cumprod = torch.linspace(1, 0, 1000)
    model_pred: torch.Tensor = unet(latents, timesteps)
    target = diffdoctor.Target.epsilon(noise)
    weighting = diffdoctor.snr_weights(timesteps, alphas_cumprod, 5.0, "epsilon")
    weighting = weighting * diffdoctor.prior_preservation_weights(len(latents), 0.5, weighting.device)
    huber_c = diffdoctor.huber_schedule(timesteps, 0.1, "exponential")
    loss = diffdoctor.weighted_loss(
        model_pred,
        target,
        confidence,
        artifact_weight=0.0,
        weighting=weighting,
        loss_type={"l2": 1.0, "huber": 0.5},
        huber_c=huber_c,
        normalize="batch",
    )
    loss.backward()
    return loss.item()


def logged_step(model_pred: torch.Tensor, target: torch.Tensor, confidence: torch.Tensor) -> dict[str, float]:
    loss, stats = diffdoctor.weighted_loss(
        model_pred, target, confidence, artifact_weight=0.0, reduction="sum", return_stats=True
    )
    loss.backward()
    weight: diffdoctor.LossStats = stats
    return {
        "loss": loss.item(),
        "artifact_share": weight.artifact_share.mean().item(),
        "weight": weight.weight_sum.sum().item(),
    }


def targets(latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> list[diffdoctor.Target]:
    return [
        diffdoctor.Target.sample(latents),
        diffdoctor.Target.velocity(latents, noise, alphas_cumprod),
        diffdoctor.Target.flow(latents, noise, reversed=True),
        diffdoctor.Target.preconditioned(latents, noise, 0.5, torch.ones(len(latents))),
        diffdoctor.Target((latents, noise), (1.0, -1.0)),
        diffdoctor.Target.contrastive(diffdoctor.Target.flow(latents, noise), latents, clean=0.0, artifact=-1.0),
    ]


def flux_step(tokens: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    layout = diffdoctor.Packed(latents.shape[2], latents.shape[3], patch_size=2, order="c ph pw")
    unpacked: torch.Tensor = layout.unpack(layout.pack(latents))
    assert unpacked.shape == latents.shape
    return diffdoctor.weighted_loss(tokens, diffdoctor.Target.flow(latents, noise), mask=mask, layout=layout)


def preferences(losses: list[torch.Tensor]) -> torch.Tensor:
    preferred, rejected, *reference = losses
    return diffdoctor.dpo_loss(preferred, rejected, reference[0], reference[1], beta=2500.0)


def policy_step(transformer: torch.nn.Module, latents: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
    sigmas = torch.linspace(1, 0, 11)
    a, b, sigma = diffdoctor.flow_sde_coefs(sigmas, 3, eta=0.7, form="flow_grpo")
    next_latents = a * latents + b * transformer(latents) + sigma * torch.randn_like(latents)
    old: torch.Tensor = diffdoctor.policy_log_prob(transformer(latents), latents, next_latents, coefs=(a, b, sigma))
    advantage = diffdoctor.group_advantages(rewards, 4, scale=None, baseline="leave_one_out")
    arguments = (transformer(latents), latents, next_latents, old, advantage)
    loss = diffdoctor.policy_loss(*arguments, coefs=(a, b, sigma), clip_range=(1e-4, 1e-4))
    loss.backward()
    loss, stats = diffdoctor.policy_loss(*arguments, coefs=(0.9, -0.1, sigma), level="sample", return_stats=True)
    logged: diffdoctor.PolicyStats = stats
    return {"loss": loss.item(), "ratio": logged.ratio.item(), "clipped": logged.clipped.item()}


def ddpo_step(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return diffdoctor.ddim_coefs(alphas_cumprod, timesteps, 1.0, num_inference_steps=50, prediction_type="epsilon")


def reverse_process(latents: torch.Tensor, confidence: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    modulator = diffdoctor.GradientModulator(artifact_grad=1.0, clean_grad=0.2)
    latents = modulator(latents)
    modulator.set(confidence)
    latents = diffdoctor.modulate_gradient(latents, confidence, artifact_grad=1.0, clean_grad=0.2)
    loss = diffdoctor.artifact_loss(logits, size=(512, 512), threshold=0.1, method="threshold")
    return loss + latents.sum()


def definitions(model_pred: torch.Tensor, target: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    expected = diffdoctor.reference.weighted_loss(model_pred, target, confidence, artifact_weight=0.0)
    logits = diffdoctor.reference.modulate_gradient(model_pred, confidence, artifact_grad=1.0)
    expected = expected + diffdoctor.reference.policy_loss(
        model_pred, target, target, None, confidence, coefs=(1.0, 0.5, 0.3)
    )
    expected = expected + diffdoctor.reference.policy_log_prob(model_pred, target, target, coefs=(1, 1, 1)).sum()
    return expected + diffdoctor.reference.artifact_loss(logits[:, :1])


def environment() -> str:
    usable = [name for name, reason in diffdoctor.available_backends().items() if reason is None]
    return f"diffdoctor {diffdoctor.__version__}: {', '.join(usable)}"


def detect(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    detector: Detector = load_detector("runs/my-detector/detector")
    confidence: torch.Tensor = detector.confidence(images)
    logits: torch.Tensor = detector(images, value_range=(-1, 1))
    return confidence, logits


def other_detectors(images: torch.Tensor) -> list[torch.Tensor]:
    detectors = [
        FunctionDetector(lambda pictures: pictures.mean(1, keepdim=True)),
        from_boxes(lambda pictures: [[((0, 0, 8, 8), 0.5)] for _ in pictures], edge=4),
        HttpDetector("http://127.0.0.1:8765/map"),
    ]
    return [detector.confidence(images) for detector in detectors]


@damage_kind("black_hole")
def black_hole(picture: np.ndarray, region: Any, rng: np.random.Generator, strength: float) -> np.ndarray:
    return picture * (1 - strength)


def label(picture: np.ndarray) -> list[Injected]:
    rng = np.random.default_rng(0)
    return [inject(picture, rng, kinds=damage_kinds(), area=(0.05, 0.2)), benign(picture, rng)]


def exchange() -> int:
    write_shards(masked_pictures("pictures", "masks", unmasked="clean"), "data/annotated")
    write_shards(coco_pictures("instances.json", pathlib.Path("pictures")), "data/from-coco")
    return write_coco("data/annotated", "data/coco")


def train(folder: str) -> TrainedDetector:
    samples = list(read_shards(folder))
    write_shards(samples, "data/copy")
    stream = ShardStream(folder, buffer=1000, resampled=True, seed=0)
    config = DetectorTrainingConfig(steps=100, batch_size=8, balance=False)
    network = ConvDetector((8, 16), preprocess=PreprocessConfig())
    network.save_pretrained("runs/start")
    ArtifactDetector.tiny().save_pretrained("runs/tiny")
    return train_detector(config, stream, detector=network, output_dir=pathlib.Path("runs/detector"))


def a_few_labels_beside_clean_pictures(pictures: np.ndarray, masks: np.ndarray) -> TrainedDetector:
    labelled = ArrayData(pictures, masks, label=["human"] * len(pictures))
    data = JoinedData([labelled, ShardData("runs/clean")], shares=(1, 1))
    return train_detector(DetectorTrainingConfig(augment=AugmentConfig(inject_share=0.5)), data)


def cure(detector: Detector, pictures: np.ndarray, captions: list[str]) -> TreatResult:
    pipeline = DiffusionPipeline.from_pretrained("runs/my-pipeline")
    result = treat(
        pipeline,
        detector,
        prompts=["a handwritten seven", "a handwritten two"],
        config=TreatConfig(steps=60, method="draft_k"),
        offline=(pictures, captions),
        output_dir="runs/treated",
    )
    result.save_lora("runs/lora")
    assert result.best_step <= 60
    return result


@register_family
class MyFamily(Family):
    pipeline_classes = ("MyPipeline",)
    denoiser_name = "transformer"
    lora_targets: ClassVar = {"attention": ("to_q", "to_k", "to_v", "to_out.0")}

    def encode_prompts(self, prompts, *, guidance_scale, height, width, device):
        embeds, negative = self.pipeline.encode_prompt(list(prompts), device)
        return Conditioning({"encoder_hidden_states": embeds}, {"encoder_hidden_states": negative})

    def denoise(self, latents, timesteps, inputs):
        return self.denoiser(latents, timesteps, return_dict=False, **inputs)[0]


def guided(pipeline: Any, detector: Detector) -> list[float]:
    save_lora(MyFamily(pipeline), "runs/lora")
    with diffdoctor.guide(pipeline, detector) as log:
        pipeline("a handwritten seven")
    again: GuideLog = log
    with (
        diffdoctor.autoguide(pipeline),
        autoguide(pipeline, 3.0, adapters="style"),
        guide(pipeline, detector, rewinds=3),
    ):
        pipeline("a handwritten two")
    return again.final_area


def repaired(pictures: list[np.ndarray], pipeline: Any, detector: Detector) -> list[str]:
    options = RepairOptions(tries=2, method="resume")
    results: list[Repaired] = diffdoctor.repair(pictures, pipeline, detector, options, prompts="a handwritten seven")
    repair(["photo.png"], pipeline, lambda images: images.mean(1, keepdim=True))[0].save("mended.png")
    regions: list[RegionOutcome] = [region for result in results for region in result.regions if not region.kept]
    tries: list[Try] = [attempt for region in regions for attempt in region.tries]
    return [attempt.why_not for attempt in tries]


def evaluate(pipeline: Any, treated: Any, detector: Detector, judge: Detector, real: torch.Tensor) -> Comparison:
    prompts, seeds = ["a handwritten seven"] * 10, range(10)
    before = torch.cat(list(draw_pictures(pipeline, prompts, seeds, num_inference_steps=10)))
    after = sample_pictures(treated, prompts, seeds, num_inference_steps=10)
    flags = [diagnose_pictures(judge, pictures).flatten(1).amax(1) > 0.5 for pictures in (before, after)]
    print(artifact_rates(*flags)["before_interval"])
    return compare_pictures(
        before, after, torch.zeros(10), detector=detector, judge=judge, features=lambda x: x.flatten(1), real=real
    )


def training_set(folder: str) -> torch.utils.data.DataLoader:
    maps.write_metadata(folder, "diagnosis/maps")
    records: list[maps.Record] = maps.read_folder(folder, "diagnosis/maps")
    report: maps.MapReport = maps.check_maps(record.confidence for record in records)
    report.warn()
    transform = maps.PairedTransform(512, buckets=maps.aspect_buckets(512 * 512), flip=0.5)
    dataset = maps.MapDataset(records, transform)
    batches = maps.StepBatches(dataset, batch_size=4, batches=100, seed=0)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=maps.collate)


def rank_pictures(names: list[str], losses: torch.Tensor, pictures: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    ranking = maps.PictureRanking()
    ranking.update(names, losses, shares=torch.zeros_like(losses), levels=[0.5] * len(names))
    ranking.save("ranking.parquet")
    merged: maps.PictureRanking = ranking.merge(maps.PictureRanking.load("ranking.parquet"))
    merged.load_state_dict(ranking.state_dict())
    maps.write_ranking("runs", merged, lambda wanted: ((name, pictures[name]) for name in wanted), shown=8)
    return merged.rows()


def one_picture(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    picture, found = maps.read_picture(path), maps.find_map(path, "diagnosis/maps")
    confidence = None if found is None else maps.read_map(found)
    placement: maps.Placement = maps.PairedTransform(64).place(128, 128, np.random.default_rng(0))
    print(placement)
    if confidence is not None:
        maps.write_map("copy.mask.png", confidence)
        print(maps.map_stamp(confidence), maps.edit_map(path, picture, floor=0.05, spread=1).shape)
    try:
        clips: list[maps.Record] = maps.read_clips("clips", "diagnosis/maps")
        shape: tuple[int, int, int] = maps.clip_size("clip.mp4")
        frames = maps.read_clip("clip.mp4", start=4, stride=2, count=5)
        found_clip = maps.find_clip_map("clip.mp4", "diagnosis/maps")
        if found_clip is not None:
            print(maps.read_clip_map(found_clip, range(4, 13, 2)).shape, frames.shape, shape)
        maps.MapDataset(clips, maps.ClipTransform((480, 832), frames=17, stride=2, flip=0.5))
        moving: torch.Tensor = maps.causal_frames(torch.zeros(1, 1, 17, 8, 8), stride=4)
        print(moving.shape)
        four_bands = maps.attach_map(picture, confidence)
    except maps.MapWarning:
        raise
    pixels = torch.from_numpy(np.asarray(four_bands)).permute(2, 0, 1)
    return maps.detach_map(pixels)


def records_of_shards(folder: str) -> int:
    return len(maps.ShardRecords(folder))
