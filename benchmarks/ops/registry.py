"""What is timed: for each case an operation, its inputs, the fused call and the PyTorch formula that it replaces."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import diffdoctor
from benchmarks.ops import formulas, inputs

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One line of the tables.

    Args:
        name: what it stands for, unique together with `dtype`.
        op: the public function of diffdoctor.
        shape: of the tensor that gets a gradient, latents or tokens as the model gives them.
        dtype: of that tensor.
        inputs: (case, device) to named tensors on that device; the same for the same case.
        fused: (tensors, backend) to the result of diffdoctor's call or calls.
        formula: the named tensors to the same result in plain PyTorch; also run in fp64 for the expected values.
        grad_of: name of the tensor that gets a gradient.
        map: how the spatial map comes: "none", "grid" (the latents' size) or "pixel" (the picture's).
        peer: whose formula it is.
        tags: groups a runner asks for; see `TAGS`.
        compiled: also time `torch.compile` of the formula.
        scale: the gradient of the loss that backward starts from; a loss scale for fp16.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[["Case", torch.device], Tensors]
    fused: Callable[[Tensors, str | None], Tensor]
    formula: Callable[..., Tensor]
    grad_of: str = "model_pred"
    map: str = "none"
    peer: str = "plain PyTorch"
    tags: frozenset[str] = field(default_factory=frozenset)
    compiled: bool = True
    scale: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.name}/{dtype_name(self.dtype)}"


TAGS = {
    "acceptance": "the sizes that `benchmarks.ops.acceptance` has a figure for",
    "latent": "latents of real models, bound by launches on a GPU",
    "large": "at least 64 million elements, bound by memory on a GPU",
    "peer": "the heaviest losses of real trainers",
    "sweep": "one formula over sizes, for the plots",
    "overhead": "a few elements: what a call costs at least",
}


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def least_bytes(case: Case, tensors: Tensors) -> int:
    """Bytes that any implementation moves: each input once, and the gradient once."""
    return sum(x.numel() * x.element_size() for x in tensors.values()) + gradient_bytes(case, tensors)


def gradient_bytes(case: Case, tensors: Tensors) -> int:
    x = tensors[case.grad_of]
    return x.numel() * x.element_size()


def passes_bytes(case: Case, tensors: Tensors) -> int:
    """Bytes of our own passes: fp16 keeps no gradient, it reads its inputs again in backward."""
    least = least_bytes(case, tensors)
    again = case.op in ("weighted_loss", "policy_loss") and case.dtype == torch.float16
    return 2 * least - gradient_bytes(case, tensors) if again else least


# ---- diffdoctor's calls


def _fused_pair(t, backend):
    return diffdoctor.weighted_loss(
        t["model_pred"], t["target"], t.get("confidence"), artifact_weight=2.0, backend=backend
    )


def _fused_stats(t, backend):
    loss, _ = diffdoctor.weighted_loss(
        t["model_pred"], t["target"], t["confidence"], artifact_weight=2.0, return_stats=True, backend=backend
    )
    return loss


def _fused_min_snr(t, backend):
    weighting = diffdoctor.snr_weights(t["timesteps"], t["alphas_cumprod"], 5.0, "epsilon")
    return diffdoctor.weighted_loss(
        t["model_pred"], t["target"], t["confidence"], artifact_weight=2.0, weighting=weighting, backend=backend
    )


def _fused_flow(t, backend):
    tokens = t["model_pred"].ndim == 3
    return diffdoctor.weighted_loss(
        t["model_pred"],
        diffdoctor.Target.flow(t["latents"], t["noise"]),
        t.get("confidence"),
        artifact_weight=2.0,
        weighting=t["weighting"],
        layout=diffdoctor.Packed(*t["latents"].shape[-2:]) if tokens else None,
        backend=backend,
    )


def _fused_contrastive(t, backend):
    target = diffdoctor.Target.contrastive(diffdoctor.Target.flow(t["latents"], t["noise"]), t["old_pred"])
    return diffdoctor.weighted_loss(t["model_pred"], target, t["confidence"], backend=backend)


def _fused_kohya(t, backend):
    kept = t["alphas_cumprod"][t["timesteps"]]
    c = 0.9 / (1.0 + ((1.0 - kept) / kept).sqrt()) ** 2 + 0.1
    weighting = diffdoctor.snr_weights(t["timesteps"], t["alphas_cumprod"], 5.0, "epsilon")
    return diffdoctor.weighted_loss(
        t["model_pred"],
        t["target"],
        mask=t["alpha_mask"],
        weighting=c * weighting * t["loss_weights"],
        loss_type={"pseudo_huber": 2.0},
        huber_c=c,
        backend=backend,
    )


def _fused_policy(t, backend):
    layout = diffdoctor.Packed(*t["advantage"].shape[-2:]) if t["model_pred"].ndim == 3 else None
    return diffdoctor.policy_loss(
        t["model_pred"], t["latents"], t["next_latents"], t["old_log_prob"], t["advantage"],
        coefs=formulas.POLICY_STEP, clip_range=(formulas.POLICY_CLIP,) * 2, layout=layout, backend=backend,
    )  # fmt: skip


_ONETRAINER = {"l2": 1.0, "l1": 0.5, "log_cosh": 0.25, "huber": 0.125}


def _fused_onetrainer(t, backend):
    inside = t["mask"].clamp(0.1, 1.0)
    options = {"loss_type": _ONETRAINER, "huber_c": 1.0, "normalize": "sample", "backend": backend}
    loss = diffdoctor.weighted_loss(t["model_pred"], t["target"], mask=inside, weighting=t["loss_weights"], **options)
    return loss + diffdoctor.weighted_loss(
        t["model_pred"], t["prior"], mask=1.0 - inside, weighting=0.5 * t["loss_weights"], **options
    )


def _fused_simpletuner(t, backend):
    # The picture's red channel holds the mask as [-1, 1]: shrunk first, so that little is shifted and scaled.
    mask = F.interpolate(t["conditioning"][:, :1], size=t["latents"].shape[-2:], mode="area") / 2.0 + 0.5
    s = t["timesteps"] / 1000.0
    c = 0.9 / (1.0 + ((1.0 - s) / (s + 1e-4)).sqrt()) ** 2 + 0.1
    return diffdoctor.weighted_loss(
        t["model_pred"],
        diffdoctor.Target.flow(t["latents"], t["noise"]),
        mask=mask,
        loss_type={"pseudo_huber": 2.0},
        huber_c=c,
        backend=backend,
    )


def _fused_artifact(size):
    def fused(t, backend):
        return diffdoctor.artifact_loss(t["logits"], size=size, backend=backend)

    return fused


def _artifact_formula(size):
    def formula(logits):
        return formulas.official_artifact_loss(logits, size)

    return formula


def _fused_modulation(t, backend):
    return diffdoctor.modulate_gradient(t["x"], t["confidence"], artifact_grad=1.0, clean_grad=0.2)


# ---- the list

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LOSS_SCALE = 65536.0


def _pair_case(name, shape, dtype, map, *tags, compiled=True):
    return Case(
        name=name,
        op="weighted_loss",
        shape=shape,
        dtype=dtype,
        inputs=inputs.pair,
        fused=_fused_pair,
        formula=formulas.mse if map == "none" else formulas.confidence_mse,
        map=map,
        peer="diffusers",
        tags=frozenset(tags),
        compiled=compiled,
        scale=LOSS_SCALE if dtype == FP16 else 1.0,
    )


def _flow_case(name, shape, dtype, map, *tags):
    return Case(
        name=name,
        op="weighted_loss",
        shape=shape,
        dtype=dtype,
        inputs=inputs.flow,
        fused=_fused_flow,
        formula=formulas.video_flow if len(shape) == 5 else formulas.flux_flow,
        map=map,
        peer="diffusers",
        tags=frozenset(tags),
    )


def _peer_case(name, shape, make, fused, formula, peer, map, dtype=torch.bfloat16):
    return Case(
        name=name,
        op="weighted_loss",
        shape=shape,
        dtype=dtype,
        inputs=make,
        fused=fused,
        formula=formula,
        map=map,
        peer=peer,
        tags=frozenset({"latent", "peer"}),
    )


def _contrastive_case(dtype):
    return _peer_case(
        "contrastive", (8, 16, 128, 128), inputs.contrastive, _fused_contrastive, formulas.contrastive_mse,
        "DiffusionNFT", "grid", dtype,
    )  # fmt: skip


def _policy_case(name, shape, dtype):
    case = _peer_case(name, shape, inputs.policy, _fused_policy, formulas.grpo_per_pixel, "SDG", "grid", dtype)
    return replace(case, op="policy_loss")


def _artifact_case(name, shape, size, dtype=FP32, *tags):
    return Case(
        name=name,
        op="artifact_loss",
        shape=shape,
        dtype=dtype,
        inputs=partial(inputs.logits, size=size),
        fused=_fused_artifact(size),
        formula=_artifact_formula(size),
        grad_of="logits",
        peer="the official treatment",
        tags=frozenset(tags),
    )


def _modulation_case(name, shape, dtype, *tags):
    return Case(
        name=name,
        op="modulate_gradient",
        shape=shape,
        dtype=dtype,
        inputs=inputs.modulation,
        fused=_fused_modulation,
        formula=formulas.hooked_modulation,
        grad_of="x",
        map="pixel",
        peer="a tensor hook",
        tags=frozenset(tags),
        compiled=False,
    )


def _real_shapes(batch):
    """Latents and pictures of real models at a batch size of `batch`."""
    yield _pair_case("sd15", (batch, 4, 64, 64), BF16, "none", "latent")
    yield _pair_case("sd15-map", (batch, 4, 64, 64), BF16, "grid", "latent")
    yield replace(
        _pair_case("sdxl-min-snr", (batch, 4, 128, 128), BF16, "pixel", "latent"),
        inputs=inputs.min_snr,
        fused=_fused_min_snr,
        formula=formulas.min_snr_confidence_mse,
    )
    yield _flow_case("flux-tokens", (batch, 4096, 64), BF16, "none", "latent")
    yield _flow_case("flux-tokens-map", (batch, 4096, 64), BF16, "grid", "latent")
    yield _pair_case("flux-unpacked", (batch, 16, 128, 128), BF16, "pixel", "latent")
    yield _flow_case("wan-720p", (1, 16, 21, 90, 160), BF16, "grid", "latent")
    yield _peer_case(
        "kohya", (batch, 4, 128, 128), inputs.kohya, _fused_kohya, formulas.kohya_masked_huber, "kohya", "pixel"
    )
    yield _peer_case(
        "onetrainer", (batch, 16, 128, 128), inputs.onetrainer, _fused_onetrainer,
        formulas.onetrainer_four_losses, "OneTrainer", "grid",
    )  # fmt: skip
    yield _peer_case(
        "simpletuner", (batch, 16, 128, 128), inputs.simpletuner, _fused_simpletuner,
        formulas.simpletuner_scheduled_smooth_l1, "SimpleTuner", "pixel",
    )  # fmt: skip
    yield _artifact_case("detector-512", (batch, 1, 128, 128), (512, 512), FP32, "latent")
    yield _artifact_case("detector-demo", (32, 1, 16, 16), (64, 64), FP32, "latent")
    yield _policy_case("policy-flux-tokens", (batch, 4096, 64), BF16)
    yield _policy_case("policy-wan-720p", (1, 16, 21, 90, 160), BF16)
    yield _modulation_case("modulate-flux", (batch, 16, 128, 128), BF16, "latent")


def _cpu_cases():
    for dtype in (FP32, BF16):
        yield _pair_case("latents", (8, 16, 128, 128), dtype, "grid", "acceptance")
        yield _pair_case("pictures", (4, 3, 512, 512), dtype, "grid", "acceptance")
        yield _contrastive_case(dtype)
        yield _policy_case("policy", (8, 16, 128, 128), dtype)
    yield _pair_case("latents", (8, 16, 128, 128), FP16, "grid", "acceptance", compiled=False)
    plain = _pair_case("latents-stats", (8, 16, 128, 128), FP32, "grid", "latent", compiled=False)
    yield replace(plain, fused=_fused_stats)
    yield _pair_case("elements-16", (1, 1, 4, 4), FP32, "none", "overhead", compiled=False)
    yield _pair_case("elements-16-map", (1, 1, 4, 4), FP32, "grid", "overhead", compiled=False)
    yield from _real_shapes(2)
    yield _pair_case("decoded-1024", (2, 3, 1024, 1024), FP32, "grid", "picture")
    yield _pair_case("pixel-2048", (1, 3, 2048, 2048), BF16, "grid", "picture")
    for side in (8, 32, 128, 512, 1024):
        for dtype in (FP32, BF16):
            yield _pair_case(f"sweep-{side}", (4, 4, side, side), dtype, "grid", "sweep")


def _cuda_cases():
    for dtype in (BF16, FP32, FP16):
        yield _pair_case("pixel-2048", (6, 3, 2048, 2048), dtype, "none", "large", "acceptance")
    yield _pair_case("pixel-2048-many", (24, 3, 2048, 2048), BF16, "none", "large", "acceptance")
    yield _pair_case("pixel-2048-map", (6, 3, 2048, 2048), BF16, "grid", "large", "acceptance")
    yield _pair_case("decoded-1024", (22, 3, 1024, 1024), BF16, "grid", "large")
    yield _flow_case("wan-720p-batch", (14, 16, 21, 90, 160), BF16, "grid", "large")
    yield from _real_shapes(4)
    yield _contrastive_case(BF16)
    yield _policy_case("policy", (8, 16, 128, 128), BF16)
    yield _pair_case("elements-16", (1, 1, 4, 4), FP32, "none", "overhead", compiled=False)
    for side in (32, 128, 512, 1024, 2048):
        yield _pair_case(f"sweep-{side}", (4, 4, side, side), BF16, "grid", "sweep")


def cases(device: str = "cpu") -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda", in the order in which they are run."""
    return list(_cuda_cases() if device == "cuda" else _cpu_cases())


def shrunken(case: Case, limit: int = 16) -> Case:
    """The same case with a batch of at most 2 and sides of at most `limit`, for tests and smoke runs."""
    shape = case.shape
    if len(shape) == 3:
        return replace(case, shape=(min(shape[0], 2), (limit // 2) ** 2, shape[2]))
    batch, *middle = shape[:-2]
    frames = [min(size, 5) if axis == 1 and len(shape) == 5 else size for axis, size in enumerate(middle)]
    sides = [min(size, limit) for size in shape[-2:]]
    return replace(case, shape=(min(batch, 2), *frames, *sides))
