"""snr_weights, prior_preservation_weights, huber_schedule."""

import math

import pytest
import torch

from diffdoctor import huber_schedule, prior_preservation_weights, snr_weights

ACP = torch.cat([torch.tensor([1.0]), torch.linspace(0.999, 0.0, 100)])  # SNR infinity, then down to SNR 0
T = torch.arange(101)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.5, 5.0, math.inf])
def test_snr_weights_are_the_formula_and_finite_at_both_ends(kind, gamma):
    got = snr_weights(T, ACP, gamma, kind)
    assert torch.isfinite(got).all()
    assert got.dtype == torch.float32
    a = ACP.double()[1:-1]
    snr = a / (1 - a)
    capped = snr.clamp(max=gamma)
    want = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[kind]
    torch.testing.assert_close(got[1:-1].double(), want, rtol=2e-5, atol=1e-7)
    at_zero = {"epsilon": 1.0, "sample": 0.0, "v_prediction": 0.0}[kind]
    assert got[-1] == at_zero


def test_snr_weights_agree_with_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    t = torch.tensor([0, 10, 500, 999])
    snr = training_utils.compute_snr(scheduler, t)
    want = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    torch.testing.assert_close(snr_weights(t, scheduler.alphas_cumprod), want, rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_timesteps_of_any_integer_dtype_are_indices(dtype):
    t = torch.tensor([0, 1, 1, 100])
    assert torch.equal(snr_weights(t.to(dtype), ACP), snr_weights(t, ACP))
    expected = huber_schedule(t, 0.1, "snr", alphas_cumprod=ACP)
    assert torch.equal(huber_schedule(t.to(dtype), 0.1, "snr", alphas_cumprod=ACP), expected)


def test_weights_are_fp32_whatever_the_default_dtype_is():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [
            prior_preservation_weights(4, 0.3),
            snr_weights(T, ACP),
            *(huber_schedule(T, 0.1, kind, alphas_cumprod=ACP) for kind in ("constant", "exponential", "snr")),
        ]
    finally:
        torch.set_default_dtype(before)
    assert [weights.dtype for weights in found] == [torch.float32] * 5


@pytest.mark.parametrize("by", ["dtype", "table"])
def test_in_fp64_they_are_exact_in_fp64(by):
    """An fp64 prediction is not to be multiplied by what was rounded to fp32 on the way."""
    table = ACP.double() if by == "table" else ACP
    options = {} if by == "table" else {"dtype": torch.float64}
    t = T[1:-1]
    a = ACP.double()[t]
    snr = a / (1 - a)
    for kind, want in (("epsilon", 5 / snr), ("sample", snr), ("v_prediction", 5 / (snr + 1))):
        want = torch.where(snr < 5, {"epsilon": 1.0, "sample": snr, "v_prediction": a}[kind], want)
        want = want.clamp(max=5.0) if kind == "sample" else want
        torch.testing.assert_close(snr_weights(t, table, 5.0, kind, **options), want, rtol=1e-14, atol=0)
    want = 0.9 / (1 + ((1 - a) / a).sqrt()) ** 2 + 0.1
    got = huber_schedule(t, 0.1, "snr", alphas_cumprod=table, **options)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    given = t.double() if by == "table" else t
    want = torch.exp(t.double() * (math.log(0.1) / 1000))
    torch.testing.assert_close(huber_schedule(given, 0.1, "exponential", **options), want, rtol=1e-14, atol=0)
    assert huber_schedule(given, 0.1, "constant", **options)[0].item() == 0.1
    assert prior_preservation_weights(2, 0.35, dtype=torch.float64).tolist() == [2.0, 0.7]


def test_prior_preservation_weights():
    assert prior_preservation_weights(6, 0.5).tolist() == [2, 2, 2, 1, 1, 1]
    assert prior_preservation_weights(0).shape == (0,)
    with pytest.raises(ValueError, match="batch_size: expected an even number"):
        prior_preservation_weights(3)
    with pytest.raises(TypeError, match="batch_size: expected an int"):
        prior_preservation_weights(4.0)


def test_huber_schedules():
    t = torch.tensor([0, 500, 1000])
    torch.testing.assert_close(huber_schedule(t, 0.1, "constant", huber_scale=2.0), torch.full((3,), 0.2))
    torch.testing.assert_close(huber_schedule(t, 0.1, "exponential"), torch.tensor([1.0, 0.1**0.5, 0.1]))
    got = huber_schedule(T, 0.1, "snr", alphas_cumprod=ACP)
    assert torch.isfinite(got).all()
    assert got[-1] == pytest.approx(0.1)
    assert got[0] == pytest.approx(1.0)
    a = ACP.double()[1:-1]
    want = 0.9 / (1 + ((1 - a) / a).sqrt()) ** 2 + 0.1
    torch.testing.assert_close(got[1:-1].double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "timesteps: expected integers", lambda: snr_weights(T.float(), ACP)),
        (TypeError, "alphas_cumprod: expected a tensor", lambda: snr_weights(T, [1.0])),
        (ValueError, r"alphas_cumprod: expected shape \(steps,\)", lambda: snr_weights(T, ACP[None])),
        (ValueError, "prediction_type: .* got 'eps', which is 'epsilon' here", lambda: snr_weights(T, ACP, 5.0, "eps")),
        (ValueError, "prediction_type: .* 'v_prediction' here", lambda: snr_weights(T, ACP, 5.0, "velocity")),
        (ValueError, "schedule: .* got 'exp', which is 'exponential' here", lambda: huber_schedule(T, 0.1, "exp")),
        (ValueError, "dtype: expected None, torch.float32", lambda: snr_weights(T, ACP, dtype=torch.float16)),
        (ValueError, "gamma: expected a positive number", lambda: snr_weights(T, ACP, 0.0)),
        (ValueError, "gamma: expected a positive number, got nan", lambda: snr_weights(T, ACP, math.nan)),
        (TypeError, "gamma: expected a number, got NoneType", lambda: snr_weights(T, ACP, None)),
        (ValueError, "schedule: expected one of", lambda: huber_schedule(T, 0.1, "linear")),
        (ValueError, "huber_c: expected a positive and finite number", lambda: huber_schedule(T, 0.0)),
        (
            ValueError,
            "huber_c: expected a positive and finite number, got inf",
            lambda: huber_schedule(T, math.inf, "constant"),
        ),
        (TypeError, "huber_c: expected a number, got NoneType", lambda: huber_schedule(T, None)),
        (ValueError, "alphas_cumprod: expected a tensor for", lambda: huber_schedule(T, 0.1, "snr")),
        (TypeError, "timesteps: expected a tensor", lambda: huber_schedule(3, 0.1, "constant")),
    ],
    ids=range(16),
)
def test_bad_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()
