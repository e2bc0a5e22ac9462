"""Calls that are like an earlier one but for their tensors' values, which a backend may answer by a fast path."""

import torch

import diffdoctor
from diffdoctor import Target

SHAPE, MAP = (2, 3, 6, 8), (2, 6, 8)


def _draw(kind: str, generator: torch.Generator):
    """A prediction, a target and the options of a call."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    pred, target, weights = normal(*SHAPE), normal(*SHAPE), {"artifact_weight": 2.0, "artifact_grad": 0.5}
    if kind == "plain":
        return pred, target, {}
    if kind == "half":  # whose gradient is computed in backward
        target = Target.velocity(target, normal(*SHAPE), uniform(2))
        return pred.half(), target, {"confidence": uniform(*MAP), "weighting": uniform(2), **weights}
    if kind == "half contrastive":
        target = Target.contrastive(Target.flow(target, normal(*SHAPE)), normal(*SHAPE), artifact=-uniform(2))
        return pred.half(), target, {"confidence": uniform(*MAP), "normalizer": uniform(2) + 1}
    if kind == "half normalized":
        return pred.half(), target, {"confidence": uniform(*MAP), "normalize": "sample", **weights}
    if kind == "weighted":  # per sample and per element, under reductions of their own
        return pred, target, {"weighting": uniform(2), "normalizer": uniform(2) + 1, "reduction": "sample"}
    if kind == "everything":
        options = {"confidence": uniform(*MAP), "mask": uniform(1, 3, 4), "weighting": uniform(2, 1, 6, 8), **weights}
        return pred, Target.velocity(target, normal(*SHAPE), uniform(2)), {**options, "normalize": "sample"}
    assert kind == "contrastive"
    target = Target.contrastive(Target.flow(target, normal(*SHAPE)), normal(*SHAPE), clean=0.5, artifact=-uniform(2))
    return pred, target, {"confidence": uniform(*MAP), "normalize": "batch", **weights}


KINDS = ("plain", "weighted", "everything", "contrastive", "half", "half contrastive", "half normalized")


def check(kind: str) -> None:
    """Three calls of weighted_loss, the last with statistics, against the reference."""
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        pred, target, options = _draw(kind, generator)
        answers = []
        for backend in (None, "reference"):
            x = pred.clone().requires_grad_()
            options |= {"backend": backend, "return_stats": number == 2}
            found = diffdoctor.weighted_loss(x, target, **options)
            loss, stats = found if number == 2 else (found, None)
            (loss.sum() if number else loss.square().sum()).backward()
            answers.append((loss.detach(), x.grad, None if stats is None else stats.weight_sum))
        for got, want in zip(*answers, strict=True):
            rtol = 2**-10 if got is not None and got.dtype == torch.float16 else 3e-5
            torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6 if rtol > 1e-4 else 1e-8)


def _draw_policy(kind: str, generator: torch.Generator):
    """The tensors and the options of a policy_loss call."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    pred, latents, noise = normal(*SHAPE), normal(*SHAPE), normal(*SHAPE)
    sigma = 0.3 if kind == "policy" else torch.rand(2, generator=generator) + 0.2
    next_latents = 0.9 * latents - 0.2 * pred + 0.3 * noise
    old = -0.5 + 0.1 * normal(2, 1, 6, 8)
    options = {"clip_range": [0.05, 0.1], "coefs": (0.9, -0.2, sigma)}
    if kind == "policy":
        return pred, latents, next_latents, old, normal(2, 1, 6, 8), options
    if kind == "policy half":
        options |= {"mask": torch.rand(2, 3, 4, generator=generator), "reduction": "sample"}
        return pred.half(), latents, next_latents, None, normal(2), options | {"clip_range": (0.05, 0.1)}
    assert kind == "policy sample"
    options |= {"level": "sample", "ref_pred": normal(*SHAPE), "kl_weight": 0.1, "clip_range": (0.05, 0.1)}
    return pred, latents, next_latents, old.flatten(1).mean(1), normal(2), options


POLICY_KINDS = ("policy", "policy half", "policy sample")


def check_policy(kind: str) -> None:
    """Three calls of policy_loss, the last with statistics, against the reference."""
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        pred, *tensors, options = _draw_policy(kind, generator)
        answers = []
        for backend in (None, "reference"):
            x = pred.clone().requires_grad_()
            found = diffdoctor.policy_loss(x, *tensors, **options, backend=backend, return_stats=number == 2)
            loss, stats = found if number == 2 else (found, None)
            (3 * loss.sum()).backward()
            answers.append((loss.detach(), x.grad, None if stats is None else stats.ratio))
        for got, want in zip(*answers, strict=True):
            rtol = 2**-10 if got is not None and got.dtype == torch.float16 else 1e-4
            torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)
