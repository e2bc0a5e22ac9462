"""The loss inside training loops: accumulation, data parallelism, loss scaling, checkpointing, compile, LoRA.

docs/trainers.md names each test here beside the lines that it holds to their word.
"""

import ast
import os
import re
import tempfile
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import diffdoctor
from support.paths import ROOT

OPTIONS = {"artifact_weight": 3.0, "clean_weight": 0.5, "artifact_grad": 1.0, "clean_grad": 0.7}


def toy_model(seed=0):
    """Two convolutions that keep (B, 4, H, W); small enough that fp32 gradients can be compared to 1e-6."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))


def toy_batch(size=6, seed=1, dtype=torch.float32):
    """Inputs, targets (B, 4, 8, 8), maps (B, 1, 32, 32) whose covered area differs from picture to picture."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, size, 4, 8, 8, generator=generator).to(dtype)
    confidence = torch.zeros(size, 1, 32, 32)
    for i in range(size):
        confidence[i, :, : 4 * i + 1, : 5 * i] = 1.0
    return x, target, confidence


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).clone()


def full_batch_gradient(normalize, options=OPTIONS, **changes):
    model, (x, target, confidence) = toy_model(), toy_batch()
    loss = diffdoctor.weighted_loss(model(x), target, confidence, normalize=normalize, **options, **changes)
    loss.backward()
    return loss.detach(), gradients(model)


def test_the_batches_differ_enough_to_show_an_error():
    # Averaging the micro-batches' own normalised losses is what goes wrong: it is not the full batch's.
    full, _ = full_batch_gradient("batch")
    model, batch = toy_model(), toy_batch()
    parts = []
    for rows in ([0, 1], [2, 3], [4, 5]):
        x, target, confidence = (values[rows] for values in batch)
        parts.append(diffdoctor.weighted_loss(model(x), target, confidence, normalize="batch", **OPTIONS))
    assert abs(torch.stack(parts).mean() / full - 1) > 1e-3


@pytest.mark.parametrize("normalize", [None, "sample"])
@pytest.mark.parametrize("split", [[2, 2, 2], [1, 5]], ids=["equal", "unequal"])
def test_accumulated_micro_batches_equal_the_full_batch(normalize, split):
    full, gradient = full_batch_gradient(normalize)
    model, batch = toy_model(), toy_batch()
    total = 0.0
    for x, target, confidence in zip(*(values.split(split) for values in batch), strict=True):
        loss = diffdoctor.weighted_loss(model(x), target, confidence, normalize=normalize, **OPTIONS)
        loss = loss * (len(x) / 6)  # 1 / accumulation steps where the micro-batches are equal
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("split", [[2, 2, 2], [1, 5]], ids=["equal", "unequal"])
def test_accumulation_with_one_divisor_for_the_whole_step(split):
    """normalize="batch" over a whole step: sums are accumulated, and the gradient is divided once, before clipping."""
    full, gradient = full_batch_gradient("batch")
    model, batch = toy_model(), toy_batch()
    numerator, weight = 0.0, 0.0
    for x, target, confidence in zip(*(values.split(split) for values in batch), strict=True):
        loss, stats = diffdoctor.weighted_loss(
            model(x), target, confidence, reduction="sum", return_stats=True, **OPTIONS
        )
        loss.backward()
        numerator, weight = numerator + stats.numerator.sum(), weight + stats.weight_sum.sum()
    for parameter in model.parameters():
        parameter.grad /= weight
    assert (numerator / weight).item() == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-5, atol=1e-7)


def test_accumulation_with_the_divisor_known_beforehand():
    """The same with `normalizer=`, where the maps of the step are at hand before the first backward."""
    full, gradient = full_batch_gradient("batch")
    model, batch = toy_model(), toy_batch()
    micro_batches = list(zip(*(values.split([1, 5]) for values in batch), strict=True))
    weight = torch.zeros(())
    for _, target, confidence in micro_batches:  # any prediction does: only the maps are asked
        weight += diffdoctor.weighted_loss(target, target, confidence, return_stats=True, **OPTIONS)[1].weight_sum.sum()
    total = 0.0
    for x, target, confidence in micro_batches:
        loss = diffdoctor.weighted_loss(model(x), target, confidence, reduction="sum", normalizer=weight, **OPTIONS)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-5, atol=1e-7)


# Data parallel


def _rank(rank, world_size, rows, init_file, outcome):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size)
    found = {}
    for normalize in (None, "sample", "batch"):
        model = toy_model()
        parallel = nn.parallel.DistributedDataParallel(model)
        x, target, confidence = (values[rows[rank]] for values in toy_batch())
        model_pred = parallel(x)
        if normalize == "batch":
            with torch.no_grad():
                stats = diffdoctor.weighted_loss(model_pred, target, confidence, return_stats=True, **OPTIONS)[1]
            weight = stats.weight_sum.sum()
            dist.all_reduce(weight)
            # DDP averages gradients over the ranks, so each rank divides by its share of the weight.
            loss = diffdoctor.weighted_loss(
                model_pred, target, confidence, reduction="sum", normalizer=weight / world_size, **OPTIONS
            )
        else:
            count = torch.tensor(float(len(x)))
            dist.all_reduce(count)
            loss = diffdoctor.weighted_loss(model_pred, target, confidence, normalize=normalize, **OPTIONS)
            loss = loss * (world_size * len(x) / count)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found[str(normalize)] = (mean / world_size, gradients(model))
    if rank == 0:
        torch.save(found, outcome)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks():
    """Losses and gradients of two gloo processes that hold 2 and 4 of the six pictures."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed with gloo is not built in")
    with tempfile.TemporaryDirectory() as folder:
        outcome = os.path.join(folder, "outcome.pt")
        arguments = (2, ([0, 1], [2, 3, 4, 5]), os.path.join(folder, "init"), outcome)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
        return torch.load(outcome, weights_only=True)


@pytest.mark.parametrize("normalize", [None, "sample", "batch"])
def test_unequal_ranks_equal_one_process(normalize, two_ranks):
    full, gradient = full_batch_gradient(normalize)
    loss, found = two_ranks[str(normalize)]
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


# Loss scaling, as DeepSpeed's fp16 and torch.amp do it


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scaled_loss_gives_the_scaled_gradient(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    model_pred = torch.randn(2, 16, 96, 96, generator=generator).to(dtype).requires_grad_()
    target = torch.randn(2, 16, 96, 96, generator=generator).to(dtype)
    confidence = torch.rand(2, 1, 96, 96, generator=generator)
    loss = diffdoctor.weighted_loss(model_pred, target, confidence, normalize="sample", **OPTIONS)
    (loss * scale).backward()

    exact = model_pred.detach().double().requires_grad_()
    expected = diffdoctor.weighted_loss(exact, target.double(), confidence, normalize="sample", **OPTIONS)
    expected.backward()
    error = (model_pred.grad.double() / scale - exact.grad).norm() / exact.grad.norm()
    # One rounding to the dtype. Unscaled fp16 gradients of about 1e-6 lie among the subnormals: that is what the scale
    # is for, and the loss must not lose it.
    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4 if scale > 1 else 5e-2}[dtype]
    assert error <= limit
    assert loss.dtype == torch.float32


def test_grad_scaler_skips_the_step_of_a_broken_batch_and_recovers():
    model, (x, target, confidence) = toy_model(), toy_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for broken in (True, False):
        optimizer.zero_grad()
        poisoned = target.clone()
        if broken:
            poisoned[0, 0, 0, 0] = float("inf")
        loss, stats = diffdoctor.weighted_loss(model(x), poisoned, confidence, return_stats=True, **OPTIONS)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert stats.nonfinite.item() == int(broken)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == broken
    assert scaler.get_scale() == 512.0


def test_a_broken_element_outside_the_map_reaches_nothing():
    model_pred, target, confidence = toy_batch()
    model_pred = model_pred.requires_grad_()
    confidence = F.interpolate(confidence, size=(8, 8), mode="nearest")
    target = torch.where(confidence.expand_as(target) > 0, target, torch.nan)
    loss, stats = diffdoctor.weighted_loss(
        model_pred, target, confidence, artifact_weight=1.0, clean_weight=0.0, return_stats=True
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(model_pred.grad).all()
    assert stats.nonfinite.item() == 0


# Checkpointing, compile, LoRA


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inside", ["model", "model and loss"])
def test_gradient_checkpointing_changes_nothing(reentrant, inside):
    from torch.utils.checkpoint import checkpoint

    full, gradient = full_batch_gradient("sample")
    model, (x, target, confidence) = toy_model(), toy_batch()
    x.requires_grad_()  # the reentrant form needs an input that wants a gradient

    def loss_of(x):
        return diffdoctor.weighted_loss(model(x), target, confidence, normalize="sample", **OPTIONS)

    if inside == "model":
        model_pred = checkpoint(model, x, use_reentrant=reentrant)
        loss = diffdoctor.weighted_loss(model_pred, target, confidence, normalize="sample", **OPTIONS)
    else:
        loss = checkpoint(loss_of, x, use_reentrant=reentrant)
    loss.backward()
    assert loss.item() == full.item()
    torch.testing.assert_close(gradients(model), gradient, rtol=0, atol=0)


@pytest.mark.parametrize("inside", ["model", "model and loss"])
def test_compiled_training_step_equals_the_eager_one(inside):
    full, gradient = full_batch_gradient("batch")
    model, (x, target, confidence) = toy_model(), toy_batch()
    torch._dynamo.reset()

    def step(x, target, confidence):
        return diffdoctor.weighted_loss(model(x), target, confidence, normalize="batch", **OPTIONS)

    if inside == "model":
        model_pred = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        loss = diffdoctor.weighted_loss(model_pred, target, confidence, normalize="batch", **OPTIONS)
    else:
        loss = torch.compile(step, backend="aot_eager", fullgraph=True)(x, target, confidence)
    loss.backward()
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-5, atol=1e-7)


def test_autocast_keeps_the_loss_in_fp32():
    model, (x, target, confidence) = toy_model(), toy_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model_pred = model(x)
        inside = diffdoctor.weighted_loss(model_pred, target, confidence, **OPTIONS)
    outside = diffdoctor.weighted_loss(model_pred, target, confidence, **OPTIONS)
    assert model_pred.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert inside.item() == outside.item()


def test_lora_gets_the_gradient_and_the_base_none():
    peft = pytest.importorskip("peft")
    base = toy_model()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config)
    x, target, confidence = toy_batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    loss = diffdoctor.weighted_loss(model(x), target, confidence, artifact_weight=3.0, clean_weight=0.5)
    found = torch.autograd.grad(loss, trained)
    level = F.interpolate(confidence, size=(8, 8), mode="area")
    expected = torch.autograd.grad(((0.5 + 2.5 * level) * (model(x) - target) ** 2).mean(), trained)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


# Lines of the pages, run as they are printed


def printed_lines(page, heading):
    """The first block of Python under a heading, as a function's body or a script."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return textwrap.dedent(re.search(r"```python\n(.*?)```", text.split(f"\n{heading}", 1)[1], re.DOTALL)[1])


def test_one_global_denominator_as_the_page_has_it():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 4, 16, 8, 8, generator=generator)
    mask = (torch.rand(4, 1, 32, 32, generator=generator) > 0.6).float()
    names = {"torch": torch, "diffdoctor": diffdoctor, "pred": pred, "target": target, "mask": mask}
    exec(printed_lines("ops.md", "## Statistics and one global denominator"), names)
    expected = diffdoctor.weighted_loss(pred, target, mask=mask, normalize="batch")
    assert names["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
def test_simpletuner_lines_give_its_losses(kind, schedule):
    model_pred, target, _ = toy_batch(size=4)
    timesteps = torch.tensor([10.0, 300.0, 650.0, 990.0])
    picture = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    s = timesteps / 1000
    c = {
        "constant": torch.tensor(0.2),
        "exponential": 0.2**s,
        "snr": (1 - 0.2) / (1 + ((1 - s) / (s + 1e-4)).sqrt()) ** 2 + 0.2,
    }[schedule]

    def formula(x):
        d, cc = (x - target).double(), c.double().view(-1, 1, 1, 1)
        loss = d**2 if kind == "l2" else 2 * ((d**2 + cc**2).sqrt() - cc) * (cc if kind == "huber" else 1.0)
        return (loss * (F.interpolate(picture[:, :1], size=(8, 8), mode="area") / 2 + 0.5)).mean().float()

    def as_a_mask(*arguments, artifact_weight, **options):  # the page leaves out what a map marks, the trainer the rest
        assert artifact_weight == 0.0
        return diffdoctor.weighted_loss(*arguments, artifact_weight=1.0, clean_weight=0.0, **options)

    names = {"diffdoctor": SimpleNamespace(weighted_loss=as_a_mask)}
    lines = printed_lines("trainers.md", "### SimpleTuner")
    given = "self, prepared_batch, model_pred, target, loss_type, apply_conditioning_mask"
    exec(f"def loss({given}):\n" + textwrap.indent(lines, "    "), names)
    trainer = SimpleNamespace(compute_scheduled_huber_c=lambda given: c if given is timesteps else None)
    batch = {"timesteps": timesteps, "conditioning_pixel_values": picture, "loss_mask_type": "mask"}

    x, y = model_pred.clone().requires_grad_(), model_pred.clone().requires_grad_()
    ours, theirs = names["loss"](trainer, batch, x, target, kind, True), formula(y)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=0)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=3e-5 * y.grad.abs().max().item())
    # a condition picture is no map, and a map counts only where masks are on
    whole = names["loss"](trainer, batch, model_pred, target, kind, False)
    condition = batch | {"loss_mask_type": None, "conditioning_type": "controlnet"}
    assert whole == names["loss"](trainer, condition, model_pred, target, kind, True) != ours


def test_the_page_names_tests_that_exist_and_shows_code_that_parses():
    text = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_[a-z_]*)…?`", text))
    assert len(named) >= 9
    assert not {name for name in named if not any(known.startswith(name) for known in globals())}
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 15
    for block in blocks:
        # Lines that belong inside somebody's function: dedented, they are a function's body.
        ast.parse("def lines():\n" + textwrap.indent(textwrap.dedent(block), "    "))
