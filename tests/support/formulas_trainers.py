"""Losses of other trainers; support/all_formulas.py says who runs them."""

import torch
import torch.nn.functional as F

import diffdoctor
from diffdoctor import Packed, Target, huber_schedule
from support.formulas import B, C, Formulas, H, W, b4, check

FORMULAS = Formulas()
formula = FORMULAS.add


@formula(schedule=["constant", "exponential", "snr"], kind=["l2", "l1", "huber", "smooth_l1"])
def kohya_masked_scheduled_weighted(batch, backend, schedule, kind):
    t, a = batch["timesteps"], batch["a"]
    c0, scale = 0.1, 1.3
    if schedule == "exponential":
        c = torch.exp(torch.log(torch.tensor(c0)) / 1000 * t) * scale
    elif schedule == "snr":
        c = (1 - c0) / (1 + ((1 - a) / a).sqrt()) ** 2 + c0
    else:
        c = torch.full((B,), c0 * scale)
    sigma_weights, sample_weights = batch["sigmas"] ** -2.0, batch["weights"]

    def formula(x):
        d = (x - batch["target"]).double()
        cc = b4(c).double()
        elements = {
            "l2": lambda: d**2,
            "l1": lambda: d.abs(),
            "huber": lambda: 2 * cc * ((d**2 + cc**2).sqrt() - cc),
            "smooth_l1": lambda: 2 * ((d**2 + cc**2).sqrt() - cc),
        }[kind]()
        loss = elements * b4(sigma_weights)
        loss = loss * F.interpolate(batch["mask"], size=(H, W), mode="area")
        return (loss.mean((1, 2, 3)) * sample_weights).mean().float()

    ours = huber_schedule(t, c0, schedule, alphas_cumprod=batch["acp"], huber_scale=scale)
    torch.testing.assert_close(ours, c, rtol=1e-5, atol=1e-7)
    weighting = sigma_weights * sample_weights * (2 * ours if kind == "huber" else 2.0 if kind == "smooth_l1" else 1.0)
    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, batch["target"], mask=batch["mask"], weighting=weighting,
            loss_type={"huber": "pseudo_huber", "smooth_l1": "pseudo_huber"}.get(kind, kind), huber_c=c,
            backend=backend,
        ),
    )  # fmt: skip


@formula(weight=["min_snr", "scale_v_pred", "v_pred_like", "debiased_eps", "debiased_v", "p2"])
def kohya_and_onetrainer_snr_weights_after_the_sample_mean(batch, backend, weight):
    s = batch["snr"].clamp_max(1000)
    scale = s / (s + 1)
    factor = {
        "min_snr": torch.minimum(s, torch.full_like(s, 5.0)) / s,
        "scale_v_pred": scale,
        "v_pred_like": 1 + 0.1 / scale,
        "debiased_eps": s.rsqrt(),
        "debiased_v": 1 / (s + 1),
        "p2": (1 + s) ** -1.0,
    }[weight]

    def formula(x):
        return ((x - batch["target"]) ** 2).mean((1, 2, 3)).mul(factor).mean()

    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(x, batch["target"], weighting=factor, backend=backend),
    )

    def after(x):  # a trainer that overrides post_process_loss works on (B,) itself
        return (diffdoctor.weighted_loss(x, batch["target"], reduction="sample", backend=backend) * factor).mean()

    check(batch["pred"], formula, after)


@formula(normalize={"plain": None, "sample": "sample"})
def onetrainer_five_losses_with_unmasked_weight_and_prior(batch, backend, normalize):
    strengths = {"l2": 1.0, "l1": 0.4, "log_cosh": 0.3, "huber": 0.6}
    delta, floor, lam = 0.5, 0.1, 0.35
    m = batch["latent_mask"].clamp(floor, 1)

    def elements(x, t):
        d = x - t
        return (
            strengths["l2"] * F.mse_loss(x, t, reduction="none")
            + strengths["l1"] * F.l1_loss(x, t, reduction="none")
            + strengths["log_cosh"] * (d + F.softplus(-2 * d) - torch.log(torch.full_like(d, 2.0)))
            + strengths["huber"] * F.huber_loss(x, t, reduction="none", delta=delta)
        )

    def formula(x):
        masked, prior = elements(x, batch["target"]) * m, (1 - m) * lam * elements(x, batch["prior"])
        if normalize:
            masked = masked / m.mean((1, 2, 3), keepdim=True)
            prior = prior / (1 - m).mean((1, 2, 3), keepdim=True)
        return ((masked + prior).mean((1, 2, 3)) * batch["weights"]).mean()

    # clamp(mask, floor, 1) is a maximum, made by the caller on the small map; the prior is a second call.
    options = {"loss_type": strengths, "huber_c": delta, "normalize": normalize, "backend": backend}

    def call(x):
        loss = diffdoctor.weighted_loss(x, batch["target"], mask=m, weighting=batch["weights"], **options)
        return loss + lam * diffdoctor.weighted_loss(
            x, batch["prior"], m, artifact_weight=0.0, clean_weight=1.0, weighting=batch["weights"], **options
        )

    check(batch["pred"], formula, call)


@formula()
def simpletuner_flow_mask_and_segmentation(batch, backend):
    image = batch["mask"] * 2 - 1  # the R channel of a picture in [-1, 1]
    small = F.interpolate(image, size=(H, W), mode="area") / 2 + 0.5

    def formula(x):
        loss = F.mse_loss(x, batch["noise"] - batch["latents"], reduction="none") * small
        return loss.mean((1, 2, 3)).mean()

    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, Target.flow(batch["latents"], batch["noise"]), mask=image / 2 + 0.5, backend=backend
        ),
    )
    binary = (F.interpolate(batch["mask"], size=(H, W), mode="area") > 0.4).float()

    def segmented(x):
        return (F.mse_loss(x, batch["target"], reduction="none") * binary).mean((1, 2, 3)).mean()

    check(
        batch["pred"],
        segmented,
        lambda x: diffdoctor.weighted_loss(x, batch["target"], mask=binary.bool(), backend=backend),
    )


@formula()
def simpletuner_reflexflow_full_shape_weights(batch, backend):
    exposure = torch.rand(B, C, H, W)
    weights = 1 + 0.5 * exposure / exposure.abs().sum((1, 2, 3), keepdim=True)

    def formula(x):
        return (weights * F.mse_loss(x, batch["target"], reduction="none")).mean()

    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(x, batch["target"], weighting=weights, backend=backend),
    )


@formula()
def ai_toolkit_mask_divided_by_the_batch_mean(batch, backend):
    low = 0.2
    m = F.interpolate(batch["mask"].half(), size=(H, W)).float()
    lerped = low + (1 - low) * m

    def formula(x):
        weights = lerped.expand(B, C, H, W)
        return (F.mse_loss(x, batch["target"], reduction="none") * (weights / weights.mean())).mean()

    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, batch["target"], batch["mask"].half(), artifact_weight=1.0, clean_weight=low, interpolation="nearest",
            normalize="batch", backend=backend,
        ),
    )  # fmt: skip


@formula()
def ai_toolkit_pseudo_huber_unaugmented_t0_and_divergence(batch, backend):
    s = batch["sigmas"]
    check(
        batch["pred"],
        lambda x: ((((x - batch["target"]).double() ** 2 + 1e-4).sqrt()) - 0.01).mean().float(),
        lambda x: diffdoctor.weighted_loss(x, batch["target"], loss_type="pseudo_huber", huber_c=0.01, backend=backend),
    )
    check(
        batch["pred"],
        lambda x: (b4(1 / s.clamp_min(0.1) ** 2) * (x * b4(-s) + batch["noisy"] - batch["latents"]) ** 2).mean(),
        lambda x: diffdoctor.weighted_loss(
            x, Target.preconditioned(batch["latents"], batch["noisy"], -s, 1.0),
            weighting=1 / s.clamp_min(0.1) ** 2, backend=backend,
        ),
    )  # fmt: skip
    check(
        batch["pred"],
        lambda x: -F.mse_loss(x, batch["prior"]),
        lambda x: diffdoctor.weighted_loss(x, batch["prior"], loss_type={"l2": -1.0}, backend=backend),
    )


@formula()
def ai_toolkit_inverted_mask_prior(batch, backend):
    m = batch["latent_mask"]

    def formula(x):
        inverted = 1 - m
        masked = (F.mse_loss(x, batch["target"], reduction="none") * m / m.mean()).mean()
        prior = (F.mse_loss(x, batch["prior"], reduction="none") * inverted / inverted.mean()).mean()
        return masked + 0.5 * prior

    def call(x):
        a = diffdoctor.weighted_loss(x, batch["target"], mask=m, normalize="batch", backend=backend)
        b = diffdoctor.weighted_loss(
            x, batch["prior"], m, artifact_weight=0.0, clean_weight=1.0, normalize="batch", backend=backend
        )
        return a + 0.5 * b

    check(batch["pred"], formula, call)


@formula(kind=["huber", "smooth_l1", "l2"])
def diffusion_pipe_packed_with_nearest_exact_mask(batch, backend, kind):
    layout = Packed(H, W)
    tokens, target = layout.pack(batch["pred"]), layout.pack(batch["target"])
    m = batch["mask"][:, 0].half()
    small = F.interpolate(m[:, None].float(), size=(H, W), mode="nearest-exact").expand(B, C, H, W)
    packed_mask = layout.pack(small.contiguous())

    def formula(x):
        loss = {
            "huber": lambda: F.huber_loss(x, target, reduction="none", delta=0.4),
            "smooth_l1": lambda: F.smooth_l1_loss(x, target, reduction="none", beta=0.4),
            "l2": lambda: F.mse_loss(x, target, reduction="none"),
        }[kind]()
        return (loss * packed_mask).mean()

    check(
        tokens,
        formula,
        lambda x: diffdoctor.weighted_loss(
            x,
            target,
            mask=m,
            interpolation="nearest-exact",
            loss_type=kind,
            huber_c=0.4,
            layout=layout,
            backend=backend,
        ),
    )


@formula()
def ltx_tokens_normalised_by_the_batch(batch, backend):
    tokens, target = torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    valid = torch.rand(2, 30) > 0.3

    def formula(x):
        weights = valid[:, :, None].float()
        return ((x - target) ** 2 * weights / weights.mean()).mean()

    check(
        tokens,
        formula,
        lambda x: diffdoctor.weighted_loss(x, target, mask=valid, normalize="batch", backend=backend),
    )


@formula()
def qflux_edit_weights_and_valid_tokens(batch, backend):
    tokens, target = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    edit, valid = (torch.rand(2, 12) > 0.5).float(), (torch.rand(2, 12) > 0.2).float()
    weights = 2.0 * edit + 1.0 * (1 - edit)

    def edited(x):
        return ((x - target) ** 2 * weights[:, :, None]).mean((1, 2)).mean()

    check(tokens, edited, lambda x: diffdoctor.weighted_loss(x, target, edit, artifact_weight=2.0, backend=backend))

    def with_valid(x):  # the valid tokens are in the denominator, the edit weights are not
        loss = ((x - target) ** 2).mean(2) * weights * valid
        return loss.sum() / valid.sum()

    check(
        tokens,
        with_valid,
        lambda x: diffdoctor.weighted_loss(
            x, target, mask=valid, weighting=weights[:, :, None], normalize="batch", backend=backend
        ),
    )


@formula()
def musubi_and_finetrainers_video_weights(batch, backend):
    pred, target = torch.randn(2, C, 4, H, W), torch.randn(2, C, 4, H, W)
    weighting = torch.rand(2, 1, 1, 1, 1) + 0.5
    check(
        pred,
        lambda x: (F.mse_loss(x, target, reduction="none") * weighting).mean(),
        lambda x: diffdoctor.weighted_loss(x, target, weighting=weighting, backend=backend),
    )


@formula()
def diffsynth_batch_weight_without_the_first_frame(batch, backend):
    pred, target = torch.randn(2, C, 4, H, W), torch.randn(2, C, 4, H, W)
    check(
        pred,
        lambda x: F.mse_loss(x[:, :, 1:], target[:, :, 1:]) * 0.37,
        lambda x: diffdoctor.weighted_loss(
            x[:, :, 1:], target[:, :, 1:], weighting=torch.tensor([0.37]), backend=backend
        ),
    )


@formula()
def cog_sdxl_face_mask_and_musubi_watermark(batch, backend):
    m = batch["latent_mask"]
    check(
        batch["pred"],
        lambda x: ((x - batch["noise"]).pow(2) * m).mean(),
        lambda x: diffdoctor.weighted_loss(x, Target.epsilon(batch["noise"]), mask=m, backend=backend),
    )

    def watermark(x):
        small = F.interpolate(batch["mask"], size=(H, W), mode="area").expand(B, C, H, W)
        loss = (x - batch["target"]).pow(2)
        return (loss * small).sum() / small.sum()

    check(
        batch["pred"],
        watermark,
        lambda x: diffdoctor.weighted_loss(x, batch["target"], mask=batch["mask"], normalize="batch", backend=backend),
    )


@formula()
def dpo_needs_a_loss_per_sample(batch, backend):
    def dpo(losses):
        winner, loser = losses.chunk(2)
        return -F.logsigmoid(-0.5 * (winner - loser)).mean()

    check(
        batch["pred"],
        lambda x: dpo((x - batch["noise"]).pow(2).mean((1, 2, 3))),
        lambda x: dpo(diffdoctor.weighted_loss(x, batch["noise"], reduction="sample", backend=backend)),
    )


@formula()
def one_global_denominator_over_accumulation_steps(batch, backend):
    m = batch["latent_mask"]

    def formula(x):
        loss = (x - batch["target"]) ** 2 * m
        return loss.sum() / m.expand_as(loss).sum()

    def call(x):
        total, loss = m.expand(B, C, H, W).sum(), 0.0
        for half in (slice(0, 1), slice(1, B)):  # uneven micro-batches
            loss = loss + diffdoctor.weighted_loss(
                x[half], batch["target"][half], mask=m[half], reduction="sum", normalizer=total, backend=backend
            )
        return loss

    check(batch["pred"], formula, call)
    stats = diffdoctor.weighted_loss(batch["pred"], batch["target"], mask=m, return_stats=True, backend=backend)[1]
    torch.testing.assert_close(stats.numerator.sum() / stats.weight_sum.sum(), formula(batch["pred"]))
