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
    if kind == "weighted":  # per sample and per element, under reductions of their own
        return pred, target, {"weighting": uniform(2), "normalizer": uniform(2) + 1, "reduction": "sample"}
    if kind == "everything":
        options = {"confidence": uniform(*MAP), "mask": uniform(1, 3, 4), "weighting": uniform(2, 1, 6, 8), **weights}
        return pred, Target.velocity(target, normal(*SHAPE), uniform(2)), {**options, "normalize": "sample"}
    assert kind == "contrastive"
    target = Target.contrastive(Target.flow(target, normal(*SHAPE)), normal(*SHAPE), clean=0.5, artifact=-uniform(2))
    return pred, target, {"confidence": uniform(*MAP), "normalize": "batch", **weights}


KINDS = ("plain", "weighted", "everything", "contrastive")


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
            torch.testing.assert_close(got, want, rtol=3e-5, atol=1e-8)
