"""What training code writes in plain PyTorch today, typed from the trainers' formulas: the peers of the benchmarks.

Every function takes the tensors of a case by name and returns the loss, computing in fp32 as the trainers do, or in
fp64 when it is given fp64 (which is how the correctness gate gets its expected values).
"""

import torch
import torch.nn.functional as F


def upcast(x):
    """fp32, as every trainer does before its loss; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(x, like):
    """(B,) viewed as (B, 1, ...) for broadcasting against `like`."""
    return x.view(-1, *[1] * (like.ndim - 1))


def sample_mean(loss):
    """Mean over everything but the batch."""
    return loss.mean(dim=list(range(1, loss.ndim)))


def to_grid(confidence, like, mode="area"):
    """A map (B, 1, H', W') on the grid of `like`: interpolated where its size differs, held over a video's frames."""
    size = like.shape[-2:]
    if confidence.shape[-2:] != size:
        confidence = F.interpolate(confidence, size=size, mode=mode)
    return confidence.unsqueeze(2) if like.ndim == 5 else confidence


def mse(model_pred, target):
    """The loss of most training scripts."""
    return F.mse_loss(upcast(model_pred), upcast(target))


def confidence_mse(model_pred, target, confidence):
    """Squared error weighted 1 where the map is clean and 2 where it shows an artifact: a mean of samples' means."""
    loss = F.mse_loss(upcast(model_pred), upcast(target), reduction="none")
    loss = loss * (1.0 + to_grid(upcast(confidence), loss))
    return sample_mean(loss).mean()


def contrastive_mse(model_pred, latents, noise, old_pred, confidence):
    """DiffusionNFT's loss with the map as reward: towards the old prediction minus u (flow - old prediction)."""
    old = upcast(old_pred)
    target = old - to_grid(upcast(confidence), old) * (upcast(noise) - upcast(latents) - old)
    return F.mse_loss(upcast(model_pred), target)


def min_snr_confidence_mse(model_pred, target, confidence, timesteps, alphas_cumprod):
    """`confidence_mse` times min(SNR, 5) / SNR, the min-SNR weight of noise prediction."""
    loss = F.mse_loss(upcast(model_pred), upcast(target), reduction="none")
    loss = loss * (1.0 + to_grid(upcast(confidence), loss))
    kept = alphas_cumprod[timesteps]
    snr = kept / (1.0 - kept)
    return (sample_mean(loss) * snr.clamp(max=5.0) / snr).mean()


def unpack(tokens, height, width):
    """Tokens (B, h·w, C·2·2) of FLUX as latents (B, C, 2h, 2w)."""
    batch, _, depth = tokens.shape
    grid = tokens.view(batch, height // 2, width // 2, depth // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, depth // 4, height, width)


def flux_flow(model_pred, latents, noise, weighting, confidence=None):
    """Flow matching on packed tokens: unpack the prediction, form the target in its own dtype, weigh, average."""
    model_pred = unpack(model_pred, *latents.shape[-2:])
    target = noise - latents
    loss = upcast(per_sample(weighting, latents)) * (upcast(model_pred) - upcast(target)) ** 2
    if confidence is not None:
        loss = loss * (1.0 + to_grid(upcast(confidence), loss))
    return loss.reshape(loss.shape[0], -1).mean(1).mean()


def video_flow(model_pred, latents, noise, weighting, confidence):
    """Flow matching on video latents (B, C, T, H, W), weighted per sample, by one map for all frames."""
    target = noise - latents
    loss = F.mse_loss(upcast(model_pred), upcast(target), reduction="none") * per_sample(weighting, latents)
    loss = loss * (1.0 + to_grid(upcast(confidence), loss))
    return loss.mean()


def _pseudo_huber(model_pred, target, c):
    return torch.sqrt((upcast(model_pred) - upcast(target)) ** 2 + c**2) - c


def kohya_masked_huber(model_pred, target, alpha_mask, timesteps, alphas_cumprod, loss_weights):
    """kohya's SDXL loss: pseudo-Huber with an SNR-scheduled c, a mask at picture size, min-SNR, per-sample weights.

    The weights are gathered sample by sample, as there, which on a GPU waits for the device once per sample.
    """
    kept = alphas_cumprod[timesteps]
    sigmas = ((1.0 - kept) / kept) ** 0.5
    c = per_sample((1.0 - 0.1) / (1.0 + sigmas) ** 2 + 0.1, model_pred)
    loss = 2.0 * c * _pseudo_huber(model_pred, target, c)
    mask = F.interpolate(upcast(alpha_mask).unsqueeze(1), size=loss.shape[2:], mode="area")
    loss = sample_mean(loss * mask) * loss_weights
    all_snr = alphas_cumprod / (1.0 - alphas_cumprod)
    snr = torch.stack([all_snr[t] for t in timesteps])
    return (loss * torch.minimum(snr, torch.full_like(snr, 5.0)) / snr).mean()


def _log_cosh(d):
    return d + F.softplus(-2.0 * d) - torch.log(torch.full(d.size(), 2.0, dtype=d.dtype, device=d.device))


def _four_losses(model_pred, target, mask):
    """OneTrainer's sum of MSE, MAE, log-cosh and Huber (δ = 1), each cast, masked and normalised by itself."""
    area = mask.mean(dim=(1, 2, 3), keepdim=True)
    total = sample_mean(F.mse_loss(upcast(model_pred), upcast(target), reduction="none") * mask / area)
    total = total + 0.5 * sample_mean(F.l1_loss(upcast(model_pred), upcast(target), reduction="none") * mask / area)
    total = total + 0.25 * sample_mean(_log_cosh(upcast(model_pred) - upcast(target)) * mask / area)
    huber = F.huber_loss(upcast(model_pred), upcast(target), reduction="none", delta=1.0)
    return total + 0.125 * sample_mean(huber * mask / area)


def onetrainer_four_losses(model_pred, target, prior, mask, loss_weights):
    """OneTrainer's four losses inside a mask (floor 0.1) over its area, and half of them, to a prior, outside it."""
    inside = upcast(mask).clamp(0.1, 1.0)
    loss = _four_losses(model_pred, target, inside)
    loss = loss + 0.5 * _four_losses(model_pred, prior, 1.0 - inside)
    return (loss * loss_weights).mean()


def simpletuner_scheduled_smooth_l1(model_pred, latents, noise, timesteps, conditioning):
    """SimpleTuner's flow loss: smooth-L1 with a c per sample, in a loop that reads each timestep to the host."""
    target = noise - latents
    losses = []
    for i in range(model_pred.shape[0]):
        s = timesteps[i].item() / 1000.0
        c = (1.0 - 0.1) / (1.0 + ((1.0 - s) / (s + 1e-4)) ** 0.5) ** 2 + 0.1
        losses.append(2.0 * _pseudo_huber(model_pred[i : i + 1], target[i : i + 1], c))
    loss = torch.cat(losses)
    mask = F.interpolate(upcast(conditioning[:, :1]), size=loss.shape[2:], mode="area") / 2.0 + 0.5
    return sample_mean(loss * mask).mean()


#: Of the official treatment: a confidence up to it does not count.
ARTIFACT_THRESHOLD = 0.1


def official_artifact_loss(logits, size):
    """The published treatment's reduction: up-sample, sigmoid, mean of what exceeds the threshold per picture."""
    confidence = torch.sigmoid(F.interpolate(upcast(logits), size=size, mode="bilinear", align_corners=False))
    counted = (confidence > ARTIFACT_THRESHOLD).to(confidence.dtype)
    weighted = (confidence * counted).sum(dim=(1, 2, 3)) / (counted.sum(dim=(1, 2, 3)) + 1e-5)
    return weighted.mean()


def hooked_modulation(x, confidence):
    """A gradient weight of 1 in artifacts and 0.2 elsewhere by a tensor hook."""
    weight = (0.2 + 0.8 * to_grid(upcast(confidence), x)).to(x.dtype)
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient * weight)
    return x


#: Of the policy's step: mean = POLICY_STEP[0] * latents + POLICY_STEP[1] * model_pred, and its deviation.
POLICY_STEP = (0.95, -0.1, 0.2)
POLICY_CLIP = 0.1


def grpo_per_pixel(model_pred, latents, next_latents, old_log_prob, advantage):
    """Flow-GRPO's clipped loss with a ratio and an advantage for each pixel, as SDG and ImageDoctor have it."""
    a, b, sigma = POLICY_STEP
    mean = a * upcast(latents) + b * upcast(model_pred)
    log_prob = -((upcast(next_latents) - mean) ** 2) / (2 * sigma**2)
    if log_prob.ndim == 3:  # packed tokens: the channels of each of a token's 2 x 2 pixels
        side = int(log_prob.shape[1] ** 0.5)
        patches = log_prob.unflatten(2, (-1, 2, 2)).mean(2).unflatten(1, (side, side))
        log_prob = patches.permute(0, 1, 3, 2, 4).reshape(-1, 1, 2 * side, 2 * side)
    else:
        log_prob = log_prob.mean(1, keepdim=True)
    ratio = torch.exp(log_prob - upcast(old_log_prob))
    advantage = to_grid(upcast(advantage), log_prob)
    clipped = torch.clamp(ratio, 1.0 - POLICY_CLIP, 1.0 + POLICY_CLIP)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()
