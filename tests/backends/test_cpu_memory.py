"""How the CPU kernels write a large gradient: past the caches, and to large pages."""

import pathlib
import re

import pytest
import torch

import diffdoctor
from diffdoctor.backends import native, select
from support import cases, policy
from support.backends import needs_cpu

pytestmark = needs_cpu
F32, BF16 = torch.float32, torch.bfloat16
LARGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def streams():
    """Sets from how many bytes of a call on its gradient is streamed."""
    module = native.load()
    before = module.set_stream_from(1 << 62)
    yield module.set_stream_from
    module.set_stream_from(before)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 13), (1, 3, 31, 33), (2, 16, 64, 40), (1, 4, 3, 1000)], ids=str)
@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
def test_a_streamed_gradient_has_the_same_bits(streams, dtype, shape, ref):
    inputs = policy.build(policy.Case("", shape=shape, dtype=dtype, step_dtype=dtype, ref=dtype if ref else None))
    moved = (5 if ref else 4) * inputs["model_pred"].numel() * dtype.itemsize
    answers = []
    for threshold in (moved + 1, moved):
        for elements in (0, 1, 2, 15, 31):
            streams(threshold)
            problem = policy.lower(inputs)
            problem.grad = cases.shifted(problem.grad, elements)
            before = problem.grad.as_strided((elements,), (1,), 0)
            select.pick("cpu", "policy_loss", "cpu").policy_loss(problem)
            assert before.isnan().all()
            answers.append(problem)
    policy.check(answers[-1], policy.expected(inputs))
    for problem in answers[1:]:
        for name in ("loss", "grad", "sums"):
            assert torch.equal(getattr(problem, name), getattr(answers[0], name))


def test_a_gradient_is_streamed_from_the_size_of_the_last_cache():
    sizes = [path.read_text().strip() for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    if not sizes or not all(size.endswith("K") for size in sizes):
        pytest.skip("this system says nothing of its caches, or in another unit")
    module = native.load()
    default = module.set_stream_from(1 << 62)
    module.set_stream_from(default)
    assert default == 1024 * max(int(size[:-1]) for size in sizes)


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="this system does not leave large pages to programs",
)
@pytest.mark.parametrize("op", ["weighted_loss", "policy_loss"])
def test_a_gradient_of_32_mib_asks_for_large_pages(op):
    # 36 MiB, whose memory is new: less may come from a heap for a part of which NumPy has asked
    x = torch.zeros(1).expand(1, 4, 1536, 1536).requires_grad_()
    target = x.detach()
    if op == "weighted_loss":
        loss = diffdoctor.weighted_loss(x, target, backend="cpu")
    else:
        coefs = (0.9, -0.1, 0.3)
        loss = diffdoctor.policy_loss(x, target, target, None, torch.ones(1), coefs=coefs, backend="cpu")
    (grad,) = torch.autograd.grad(loss, x)
    assert "hg" in _flags(grad.data_ptr() + (4 << 20))


def _flags(address: int) -> list[str]:
    """What the kernel says of the memory around an address of this process."""
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        area = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if area:
            inside = int(area[1], 16) <= address < int(area[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
