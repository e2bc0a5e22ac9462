"""dpo_loss against Diffusion-DPO's loss, whole and of a region."""

import pytest
import torch
import torch.nn.functional as F

import diffdoctor
from diffdoctor import dpo_loss

SHAPE = (3, 4, 8, 8)


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    names = ("pred_w", "pred_l", "ref_w", "ref_l", "noise")
    made = {name: torch.randn(SHAPE, generator=g) for name in names}
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, :, 2:5, 1:7], mask[1, :, :3], mask[2] = 1, 0.5, 1
    return made | {"mask": mask}


@pytest.mark.parametrize("region", [False, True], ids=["whole", "region"])
def test_value_and_gradient_are_those_of_diffusion_dpo(pair, region):
    """As `train_diffusion_dpo.py` of diffusers writes it, with means over the region where there is one."""
    noise, mask, beta = pair["noise"], pair["mask"] if region else torch.ones(3, 1, 8, 8), 1.5
    plain = [pair[name].clone().requires_grad_() for name in ("pred_w", "pred_l")]

    def by_hand(prediction):
        return ((prediction - noise) ** 2 * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * SHAPE[1])

    model_diff = by_hand(plain[0]) - by_hand(plain[1])
    ref_diff = by_hand(pair["ref_w"]) - by_hand(pair["ref_l"])
    want = -1 * F.logsigmoid(-0.5 * beta * (model_diff - ref_diff)).mean()
    want.backward()

    ours = [pair[name].clone().requires_grad_() for name in ("pred_w", "pred_l")]
    options = {"reduction": "sample"} | ({"mask": mask, "normalize": "sample"} if region else {})
    losses = [diffdoctor.weighted_loss(x, noise, **options) for x in (*ours, pair["ref_w"], pair["ref_l"])]
    got = dpo_loss(*losses, beta=beta)
    got.backward()
    torch.testing.assert_close(got, want, rtol=3e-6, atol=0)
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=3e-5 * y.grad.abs().max().item())


def test_an_untrained_model_is_at_log_2_and_reductions_agree():
    losses = torch.rand(5, dtype=torch.float64)
    each = dpo_loss(losses, losses * 2, losses, losses * 2, reduction="sample")
    torch.testing.assert_close(each, torch.full((5,), 2.0, dtype=torch.float64).log())
    assert dpo_loss(losses, losses, losses, losses).dtype == torch.float64
    half = losses.bfloat16()
    assert dpo_loss(half, half, half, half).dtype == torch.float32
    total = dpo_loss(losses, losses * 2, losses, losses, 3.0, reduction="sum")
    torch.testing.assert_close(total, 5 * dpo_loss(losses, losses * 2, losses, losses, 3.0))


def test_a_large_preference_gives_no_infinity():
    far = torch.tensor([1e4], requires_grad=True)
    loss = dpo_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert far.grad.item() == pytest.approx(1250.0)


def test_the_reference_gets_no_gradient():
    ref = torch.rand(2, requires_grad=True)
    model = torch.rand(2, requires_grad=True)
    dpo_loss(model, model.detach(), ref, ref.detach()).backward()
    assert ref.grad is None


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "rejected: expected a floating-point tensor, got float", {"rejected": 1.0}),
        (ValueError, r"preferred: expected \(B,\), got \(\)", {"preferred": torch.ones(())}),
        (ValueError, r"rejected_ref: expected preferred's shape \(2,\), got \(3,\)", {"rejected_ref": torch.ones(3)}),
        (ValueError, "beta: expected", {"beta": 0.0}),
        (TypeError, "beta: expected", {"beta": "1"}),
        (ValueError, "reduction: expected", {"reduction": "none"}),
    ],
    ids=["kind", "number", "shape", "beta", "beta kind", "reduction"],
)
def test_bad_arguments(error, message, change):
    names = ("preferred", "rejected", "preferred_ref", "rejected_ref")
    with pytest.raises(error, match=message):
        dpo_loss(**{**dict.fromkeys(names, torch.ones(2)), **change})
