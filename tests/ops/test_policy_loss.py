"""policy_loss against the losses of published trainers, written out as their code computes them, and by its cases."""

import importlib
import math

import pytest
import torch

import diffdoctor
from diffdoctor.lowering.policy_loss import WRITE_LOG_PROB
from support import later_calls, policy
from support.backends import needs_cpu

F32, F64 = torch.float32, torch.float64

ETA, STEP = 0.7, 3


@pytest.mark.parametrize("kind", later_calls.POLICY_KINDS)
def test_later_calls_equal_the_reference(kind):
    later_calls.check_policy(kind)


def test_a_later_call_is_checked_where_it_is_not_the_same():
    x, advantage = torch.randn(2, 3, 4, 5), torch.randn(2)
    call = {"coefs": (0.9, 1.0, 0.3), "kl_weight": 1.0, "ref_pred": x}
    for _ in range(2):
        diffdoctor.policy_loss(x, x, x, None, advantage, **call)
    for changed, error in (
        ({"kl_weight": True}, TypeError), ({"coefs": (0.9, True, 0.3)}, TypeError), ({"level": "picture"}, ValueError),
        ({"clip_range": (-1.0, 0.1)}, ValueError), ({"ref_pred": x[..., :1]}, ValueError), ({"coefs": 3}, TypeError),
        ({"return_stats": 1}, TypeError), ({"backend": "gpu"}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            diffdoctor.policy_loss(x, x, x, None, advantage, **call | changed)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="forward-mode"):
            diffdoctor.policy_loss(dual, x, x, None, advantage, **call)


SIGMAS = torch.linspace(1, 0, 11, dtype=torch.float64)


def rollout(shape=(4, 3, 6, 5), step_noise=1.0, seed=0):
    """A step drawn by a policy, and the prediction of the policy a little later, with a graph."""
    generator = torch.Generator().manual_seed(seed)
    latents, old_pred, noise, change = torch.randn(4, *shape, dtype=torch.float64, generator=generator).unbind()
    coefs = diffdoctor.flow_sde_coefs(SIGMAS, STEP, ETA)
    a, b, sigma = coefs
    next_latents = a * latents + b * old_pred + step_noise * sigma * noise
    model_pred = (old_pred + 0.2 * change).requires_grad_()
    return model_pred, old_pred, latents, next_latents, coefs


def sde_step_with_logprob(model_output, latents, prev_sample):
    """Flow-GRPO's: the log-probability of every element, the step's mean, and its rate of noise."""
    sigma, dt = SIGMAS[STEP], SIGMAS[STEP + 1] - SIGMAS[STEP]
    std_dev_t = torch.sqrt(sigma / (1 - sigma)) * ETA
    mean = latents * (1 + std_dev_t**2 / (2 * sigma) * dt)
    mean = mean + model_output * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    std = std_dev_t * torch.sqrt(-1 * dt)
    log_prob = -((prev_sample - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_prob, mean, std_dev_t


def clipped_loss(log_prob, old, advantages, clip_range):
    ratio = torch.exp(log_prob - old)
    unclipped = -advantages * ratio
    return torch.maximum(unclipped, -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range))


def assert_same(loss, expected, model_pred):
    grad, wanted = (torch.autograd.grad(x, model_pred, retain_graph=True)[0] for x in (loss, expected))
    assert wanted.abs().max() > 0
    torch.testing.assert_close((loss, grad), (expected, wanted))


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["", "kl"])
def test_flow_grpo(beta):
    model_pred, old_pred, latents, next_latents, coefs = rollout()
    advantages, clip_range = torch.tensor([0.7, -6.0, 1.2, -0.3], dtype=torch.float64), 0.02
    everything = (1, 2, 3)
    log_prob, mean, std_dev_t = sde_step_with_logprob(model_pred, latents, next_latents)
    old, mean_ref, _ = sde_step_with_logprob(old_pred, latents, next_latents)
    clamped = torch.clamp(advantages, -5, 5)
    expected = clipped_loss(log_prob.mean(everything), old.mean(everything), clamped, clip_range).mean()
    expected = expected + beta * ((mean - mean_ref) ** 2).mean(everything).div(2 * std_dev_t**2).mean()

    old_log_prob = diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs)
    # The paper's code divides the KL by the noise's rate, not by the step's deviation.
    kl_weight = beta * (SIGMAS[STEP] - SIGMAS[STEP + 1]).item()
    for stored in (old_log_prob, old_log_prob.mean(everything)):
        loss = diffdoctor.policy_loss(
            model_pred, latents, next_latents, stored, advantages, coefs=coefs, level="sample",
            clip_range=(clip_range, clip_range), advantage_clip=5.0, ref_pred=old_pred, kl_weight=kl_weight,
        )  # fmt: skip
        assert_same(loss, expected, model_pred)


def test_flow_grpo_per_pixel_is_that_of_imagedoctor_and_sdg():
    """The log-probability is averaged over channels alone; the reward is a map, its advantage without a deviation."""
    model_pred, old_pred, latents, next_latents, coefs = rollout()
    rewards = torch.rand(4, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    advantages = rewards - rewards.mean(0, keepdim=True)
    log_prob = sde_step_with_logprob(model_pred, latents, next_latents)[0].mean(1, keepdim=True)
    old = sde_step_with_logprob(old_pred, latents, next_latents)[0].mean(1, keepdim=True)
    expected = clipped_loss(log_prob, old, advantages, 0.02).mean()
    loss = diffdoctor.policy_loss(
        model_pred, latents, next_latents, diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs),
        diffdoctor.group_advantages(rewards, 4, scale=None), coefs=coefs, clip_range=(0.02, 0.02),
    )  # fmt: skip
    assert_same(loss, expected, model_pred)


def test_ddpo():
    """DDIM steps with noise, each sample at a timestep of its own."""
    model_pred, old_pred, latents, next_latents, _ = rollout()
    alphas_cumprod = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    timesteps, eta, clip_range = torch.tensor([981, 401, 201, 21]), 1.0, 1e-4
    current, before = (alphas_cumprod[t].reshape(-1, 1, 1, 1) for t in (timesteps, timesteps - 20))
    std = eta * torch.sqrt((1 - before) / (1 - current) * (1 - current / before))

    def log_prob(epsilon):
        original = (latents - torch.sqrt(1 - current) * epsilon) / torch.sqrt(current)
        mean = torch.sqrt(before) * original + torch.sqrt(1 - before - std**2) * epsilon
        value = -((next_latents - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        return value.mean((1, 2, 3))

    advantages = torch.tensor([0.7, -1.0, 1.2, -0.3], dtype=torch.float64)
    model_pred = (old_pred + 1e-6 * torch.tensor([1, 1, 2, 2]).reshape(-1, 1, 1, 1)).requires_grad_()
    expected = clipped_loss(log_prob(model_pred), log_prob(old_pred), advantages, clip_range).mean()
    coefs = diffdoctor.ddim_coefs(alphas_cumprod, timesteps, eta, num_inference_steps=50)
    loss = diffdoctor.policy_loss(
        model_pred, latents, next_latents, diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs),
        advantages, coefs=coefs, level="sample",
    )  # fmt: skip
    assert_same(loss, expected, model_pred)


CASES = policy.every_case()


@needs_cpu
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_cpus_kernels_equal_the_definition(case):
    inputs = policy.build(case)
    cpu = importlib.import_module("diffdoctor.backends.cpu.policy_loss")
    problem = policy.lower(inputs)
    cpu.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))
    problem = policy.lower(inputs | {"old_log_prob": None}, WRITE_LOG_PROB)
    cpu.policy_loss(problem)
    want = policy.log_prob_of(problem, case.options.get("layout"))
    torch.testing.assert_close(problem.log_prob.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["pixel", "sample"])
def test_the_definition_and_the_kernels_have_the_gradient_of_their_value(default_backend, level):
    options = {"level": level, "reduction": "sample", "clip_range": (0.3, 0.3)}
    case = policy.Case("", shape=(2, 3, 3, 4), dtype=F64, step_dtype=F64, ref=F64, mask=((2, 3, 4), F64),
                       advantage=((2, 1, 3, 4), F64), options=options)  # fmt: skip
    inputs = policy.build(case)
    pred = inputs.pop("model_pred").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diffdoctor.policy_loss(x, **inputs), (pred,))


@pytest.mark.parametrize("level", ["pixel", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_the_public_call_through_autograd(default_backend, dtype, level):
    case = policy.Case("", shape=(2, 4, 6, 5), dtype=dtype, view="channels_last", ref=dtype,
                       advantage=((2, 1, 12, 10), F32), options={"level": level, "reduction": "sample"})  # fmt: skip
    inputs = policy.build(case)
    want = policy.expected(inputs)
    pred = inputs.pop("model_pred").requires_grad_()
    loss, stats = diffdoctor.policy_loss(pred, **inputs, return_stats=True)
    g = policy.cotangent({"model_pred": pred, **inputs})
    (first,) = torch.autograd.grad(loss, pred, g, retain_graph=True)
    (second,) = torch.autograd.grad(loss, pred, g)
    again = diffdoctor.policy_loss(pred, **inputs)
    assert torch.equal(first, second)
    assert torch.equal(loss, again)
    assert first.dtype == dtype
    torch.testing.assert_close(loss.double(), want["loss"], rtol=1e-5, atol=1e-5)
    scale = want["grad"].abs().max()
    atol = scale * {F32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] + 2**-24
    torch.testing.assert_close(first.double(), want["grad"], rtol=0, atol=atol.item())
    counted, ratio, _, clipped, kl, nonfinite = want["sums"].sum(0).tolist()
    assert stats.ratio.item() == pytest.approx(ratio / counted, rel=1e-5)
    assert stats.ratio_max.item() == pytest.approx(want["sums"][:, 2].max().item(), rel=1e-5)
    assert stats.clipped.item() == pytest.approx(clipped / counted)
    assert stats.kl.item() == pytest.approx(kl / counted, rel=1e-4)
    assert stats.nonfinite == nonfinite == 0
    with torch.no_grad():
        assert not diffdoctor.policy_loss(pred, **inputs).requires_grad


def test_on_policy_the_ratio_is_1_and_the_gradient_is_not_0(default_backend):
    model_pred, _, latents, next_latents, coefs = rollout()
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0])
    loss, stats = diffdoctor.policy_loss(
        model_pred, latents, next_latents, None, advantage, coefs=coefs, return_stats=True
    )
    assert loss.item() == pytest.approx(-advantage.mean().item())
    assert stats.ratio == stats.ratio_max == 1
    assert torch.autograd.grad(loss, model_pred)[0].abs().min() > 0


@pytest.mark.parametrize("level", ["pixel", "sample"])
def test_what_is_left_out_reaches_neither_loss_nor_gradient(default_backend, level):
    model_pred, old_pred, latents, next_latents, coefs = rollout()
    old = diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs)
    mask, advantage = torch.ones(4, 1, 6, 5), torch.ones(4, 1, 6, 5)
    mask[:, :, 2, 3] = 0
    broken = model_pred.detach().clone()
    broken[:, :, 2, 3] = float("nan")
    if level == "pixel":  # an advantage of 0 leaves the pixel out; a sample's ratio has all of its pixels
        advantage[:, :, 0, 0] = 0
        broken[:, :, 0, 0] = float("inf")
    sigma = coefs[2].repeat(4)
    sigma[3] = 0  # nothing was drawn
    broken[3] = float("nan")
    options = {"coefs": (*coefs[:2], sigma), "mask": mask, "level": level, "reduction": "sample"}
    broken.requires_grad_()
    loss, stats = diffdoctor.policy_loss(
        broken, latents, next_latents, old.nan_to_num(), advantage, **options, return_stats=True
    )
    loss.sum().backward()
    want = diffdoctor.policy_loss(model_pred, latents, next_latents, old, advantage, **options)
    (wanted,) = torch.autograd.grad(want.sum(), model_pred)
    left_out = torch.isfinite(broken.detach())
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(broken.grad, torch.where(left_out, wanted, 0.0))
    assert loss[3] == 0
    assert stats.nonfinite == 0


def test_what_is_not_finite_is_counted(default_backend):
    model_pred, old_pred, latents, next_latents, coefs = rollout()
    old = diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs)
    advantage = torch.ones(4, 1, 6, 5)
    advantage[0, 0, 0, 0] = float("nan")  # is taken as 0
    old[1, 0, 2, 2] = -1000  # a ratio that is infinite, and clipped
    loss, stats = diffdoctor.policy_loss(
        model_pred, latents, next_latents, old, advantage, coefs=coefs, return_stats=True
    )
    assert stats.nonfinite == 1
    assert stats.ratio_max == float("inf")
    assert torch.isfinite(torch.autograd.grad(loss, model_pred)[0]).all()
    old[2, 0, 1, 1] = float("nan")
    loss, stats = diffdoctor.policy_loss(
        model_pred, latents, next_latents, old, advantage, coefs=coefs, return_stats=True
    )
    assert loss.isnan()
    assert stats.nonfinite == 2


def test_empty_batches(default_backend):
    x, old = torch.zeros(0, 4, 3, 3, requires_grad=True), torch.zeros(0, 1, 3, 3)
    arguments = (x, x.detach(), x.detach(), old, torch.zeros(0))
    loss, stats = diffdoctor.policy_loss(*arguments, coefs=(1.0, 1.0, 1.0), return_stats=True)
    assert loss == stats.ratio == stats.ratio_max == 0
    loss.backward()
    assert diffdoctor.policy_log_prob(*arguments[:3], coefs=(1.0, 1.0, 1.0)).shape == old.shape


X, OLD = torch.zeros(2, 4, 6, 6), torch.zeros(2, 1, 6, 6)
REFUSED = {
    "latents of another shape": ({"latents": X[:, :2]}, ValueError, "latents: expected model_pred's shape"),
    "next_latents that are a list": ({"next_latents": [1.0]}, TypeError, "next_latents: expected a tensor"),
    "two coefs": ({"coefs": (1.0, 1.0)}, TypeError, "coefs: expected (a, b, sigma)"),
    "a negative sigma": ({"coefs": (1.0, 1.0, -1.0)}, ValueError, "coefs' sigma: expected a finite number >= 0"),
    "a coef for each of three": ({"coefs": (torch.ones(3), 1.0, 1.0)}, ValueError, "coefs' a: expected shape"),
    "old_log_prob per sample at level pixel": ({"old_log_prob": torch.zeros(2)}, ValueError, "old_log_prob: expected"),
    "old_log_prob in bf16": ({"old_log_prob": OLD.bfloat16()}, TypeError, "old_log_prob: expected"),
    "an advantage for each of three": ({"advantage": torch.zeros(3)}, ValueError, "advantage: expected shape (2,)"),
    "an advantage in integers": ({"advantage": torch.zeros(2, dtype=torch.int64)}, TypeError, "advantage: expected"),
    "an advantage with a gradient": (
        {"advantage": torch.zeros(2, requires_grad=True)}, ValueError, "requires no gradient"
    ),
    "a map of another aspect": ({"advantage": torch.zeros(2, 1, 6, 12)}, ValueError, "aspect ratio"),
    "a clip_range of one number": ({"clip_range": 0.1}, TypeError, "clip_range: expected a pair"),
    "a low above 1": ({"clip_range": (1.5, 0.1)}, ValueError, "clip_range[0]: expected a number in [0, 1]"),
    "a kl_weight without ref_pred": ({"kl_weight": 0.1}, ValueError, "ref_pred: expected"),
    "a level": ({"level": "image"}, ValueError, "level: expected one of 'pixel', 'sample'"),
    "a stats that is no bool": ({"return_stats": 1}, TypeError, "return_stats: expected a bool"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    change, kind, message = REFUSED[case]
    arguments = {
        "model_pred": X, "latents": X, "next_latents": X, "old_log_prob": OLD, "advantage": torch.zeros(2),
        "coefs": (1.0, 1.0, 1.0), **change,
    }  # fmt: skip
    with pytest.raises(kind) as caught:
        diffdoctor.policy_loss(**arguments)
    assert message in str(caught.value)
