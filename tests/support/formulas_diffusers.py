"""Losses of diffusers' scripts; support/all_formulas.py says who runs them."""

import torch
import torch.nn.functional as F

import diffdoctor
from diffdoctor import Packed, Target, prior_preservation_weights, snr_weights
from support.formulas import B, C, Formulas, H, W, b4, check

FORMULAS = Formulas()
formula = FORMULAS.add


@formula(v_prediction={"eps": False, "v": True})
def diffusers_min_snr(batch, backend, v_prediction):
    s, p = batch["snr"], batch["pred"]
    weights = torch.minimum(s, torch.full_like(s, 5.0)) / (s + 1 if v_prediction else s)

    def formula(x):
        return (F.mse_loss(x, batch["target"], reduction="none").mean((1, 2, 3)) * weights).mean()

    ours = snr_weights(batch["timesteps"], batch["acp"], 5.0, "v_prediction" if v_prediction else "epsilon")
    check(p, formula, lambda x: diffdoctor.weighted_loss(x, batch["target"], weighting=ours, backend=backend))


@formula()
def diffusers_dreambooth_sdxl_v_min_snr_plus_one(batch, backend):
    s = batch["snr"]
    weights = torch.minimum(s, torch.full_like(s, 5.0)) / s + 1

    def formula(x):
        return (F.mse_loss(x, batch["target"], reduction="none").mean((1, 2, 3)) * weights).mean()

    ours = snr_weights(batch["timesteps"], batch["acp"], 5.0) + 1
    check(
        batch["pred"], formula, lambda x: diffdoctor.weighted_loss(x, batch["target"], weighting=ours, backend=backend)
    )


@formula()
def diffusers_edm_preconditioned(batch, backend):
    s = batch["sigmas"]

    def eps(x):
        return (b4(s**-2.0) * (x * b4(-s) + batch["noisy"] - batch["latents"]) ** 2).mean()

    target = Target.preconditioned(batch["latents"], batch["noisy"], -s, 1.0)
    check(batch["pred"], eps, lambda x: diffdoctor.weighted_loss(x, target, weighting=s**-2.0, backend=backend))

    def v(x):
        denoised = x * b4(-s / (s**2 + 1).sqrt()) + batch["noisy"] / b4(s**2 + 1)
        return (b4(s**-2.0) * (denoised - batch["latents"]) ** 2).reshape(B, -1).mean(1).mean()

    target = Target.preconditioned(batch["latents"], batch["noisy"], -s / (s**2 + 1).sqrt(), 1 / (s**2 + 1))
    check(batch["pred"], v, lambda x: diffdoctor.weighted_loss(x, target, weighting=s**-2.0, backend=backend))


@formula(reversed={"forward": False, "reversed": True})
def diffusers_flux_weighted_flow_on_packed_tokens(batch, backend, reversed):
    layout, s = Packed(H, W), batch["sigmas"]
    weighting = b4(2 / (torch.pi * (1 - 2 * s + 2 * s**2)))
    tokens = layout.pack(batch["pred"])
    flow = batch["noise"] - batch["latents"]

    def formula(x):
        d = layout.unpack(x) - (-flow if reversed else flow)
        return (weighting * d**2).reshape(B, -1).mean(1).mean()

    target = Target.flow(batch["latents"], batch["noise"], reversed=reversed)
    check(
        tokens,
        formula,
        lambda x: diffdoctor.weighted_loss(x, target, weighting=weighting, layout=layout, backend=backend),
    )


@formula()
def diffusers_flux2_patched_latents_with_a_map(batch, backend):
    # a latent of the script has the 2 x 2 pixels of a patch as channels "c ph pw"; the map acts on the pixels
    latents, noise = (F.pixel_unshuffle(batch[name], 2) for name in ("latents", "noise"))
    patches = Packed(H // 2, W // 2, patch_size=1)
    keep = 1 - F.interpolate(batch["mask"], size=(H, W), mode="area")

    def formula(x):
        loss = (patches.unpack(x) - (noise - latents)) ** 2
        return (F.pixel_unshuffle(keep.expand(B, C, H, W), 2) * loss).mean()

    target = Target.flow(F.pixel_shuffle(latents, 2), F.pixel_shuffle(noise, 2))
    check(
        patches.pack(torch.randn_like(latents)),
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, target, batch["mask"], artifact_weight=0.0, layout=Packed(H, W), backend=backend
        ),
    )


@formula()
def diffusers_qwen_image_one_frame_with_a_map(batch, backend):
    pred, target = batch["pred"].unsqueeze(2), batch["target"].unsqueeze(2)
    keep = 1 - F.interpolate(batch["mask"], size=(H, W), mode="area")
    weighting = batch["sigmas"] ** -2.0

    def formula(x):
        return (weighting.view(-1, 1, 1, 1, 1) * keep.unsqueeze(2) * (x - target) ** 2).mean()

    check(
        pred,
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, target, batch["mask"], artifact_weight=0.0, weighting=weighting, backend=backend
        ),
    )


@formula()
def diffusers_z_image_negated_output(batch, backend):
    def formula(x):
        return F.mse_loss(-x, batch["noise"] - batch["latents"])

    target = Target((batch["noise"], batch["latents"]), (1.0, -1.0), pred_scale=-1.0)
    check(batch["pred"], formula, lambda x: diffdoctor.weighted_loss(x, target, backend=backend))


@formula()
def diffusers_prior_preservation(batch, backend):
    def formula(x):
        instance, prior = F.mse_loss(x, batch["target"], reduction="none").chunk(2)
        return instance.mean() + 0.7 * prior.mean()

    w = prior_preservation_weights(B, 0.7)
    check(batch["pred"], formula, lambda x: diffdoctor.weighted_loss(x, batch["target"], weighting=w, backend=backend))


@formula()
def diffusers_cogvideox_x0_from_velocity(batch, backend):
    pred = torch.randn(B, 5, C, H, W)
    noisy, latents, a = torch.randn_like(pred), torch.randn_like(pred), batch["a"]
    root, rest = a.sqrt().view(-1, 1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1, 1)

    def formula(x):
        x0 = root * noisy - rest * x
        return ((x0 - latents) ** 2 / (1 - a).view(-1, 1, 1, 1, 1)).reshape(B, -1).mean(1).mean()

    target = Target.preconditioned(latents, noisy, -(1 - a).sqrt(), a.sqrt())
    # the weight 1 / (1 - a) reaches 1,000 here: the bound is relative
    check(pred, formula, lambda x: diffdoctor.weighted_loss(x, target, weighting=1 / (1 - a), backend=backend))


@formula()
def diffusers_cosmos_conditioned_frames_left_out(batch, backend):
    pred, target = torch.randn(2, C, 5, H, W), torch.randn(2, C, 5, H, W)
    condition = torch.zeros(2, 1, 5, 1, 1)
    condition[:, :, :2] = 1

    def formula(x):
        return F.mse_loss(target * condition + x * (1 - condition), target)

    check(
        pred,
        formula,
        lambda x: diffdoctor.weighted_loss(x, target, weighting=(1 - condition) ** 2, backend=backend),
    )


@formula()
def diffusers_custom_diffusion_area_normalised(batch, backend):
    m = batch["latent_mask"]

    def formula(x):
        loss = F.mse_loss(x, batch["target"], reduction="none") * m
        return (loss.sum((1, 2, 3)) / m.sum((1, 2, 3))).mean()

    # its mask has one channel and its loss C, so it is C times the masked mean
    check(
        batch["pred"],
        formula,
        lambda x: C * diffdoctor.weighted_loss(x, batch["target"], mask=m, normalize="sample", backend=backend),
    )


@formula()
def diffusers_realfill_nearest(batch, backend):
    m = F.interpolate(batch["mask"], size=(H, W))

    def formula(x):
        return (m * F.mse_loss(x, batch["target"], reduction="none")).mean()

    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, batch["target"], mask=batch["mask"], interpolation="nearest", backend=backend
        ),
    )


@formula(kind=["huber", "smooth_l1"])
def diffusers_scheduled_huber_and_lcm(batch, backend, kind):
    c = 0.05
    factor = 2 * c if kind == "huber" else 2.0

    def formula(x):
        d = (x - batch["target"]).double()
        return (factor * ((d**2 + c**2).sqrt() - c)).mean().float()

    check(
        batch["pred"],
        formula,
        lambda x: diffdoctor.weighted_loss(
            x, batch["target"], loss_type={"pseudo_huber": factor}, huber_c=c, backend=backend
        ),
    )
    check(
        batch["pred"],
        lambda x: ((((x - batch["target"]).double() ** 2 + 1e-6).sqrt()) - 1e-3).mean().float(),
        lambda x: diffdoctor.weighted_loss(x, batch["target"], loss_type="pseudo_huber", huber_c=1e-3, backend=backend),
    )
