"""What `import diffdoctor` imports, and what the CPU's backend says at the first calls of a process."""

import sys
import warnings

import torch

import diffdoctor

HEAVY = set(sys.modules) & {
    "accelerate", "diffdoctor._native", "diffusers", "matplotlib", "peft", "PIL", "scipy", "transformers", "triton",
}  # fmt: skip


def imports():
    """Print the heavy modules that came with `import diffdoctor`."""
    assert not torch.cuda.is_initialized()
    print(*sorted(HEAVY))


def instruction_set():
    """Print what `native.describe` says after three calls: what was ignored, and the instruction set."""
    from diffdoctor.backends import native

    warnings.simplefilter("always")
    x = torch.ones(1, 1, 2, 2)
    for _ in range(3):
        diffdoctor.weighted_loss(x, x)
    print(native.describe().get("ignored"))
    print(native.describe()["instruction_set"])


def without_module():
    """Call where there is no compiled module; print how its backend is refused."""
    sys.modules["diffdoctor._native"] = None
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = diffdoctor.weighted_loss(x, torch.zeros(1, 2, 4, 4))
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() / x.numel())
    assert diffdoctor.available_backends()["cpu"]
    try:
        diffdoctor.weighted_loss(x, torch.zeros(1, 2, 4, 4), backend="cpu")
    except RuntimeError as error:
        print(error)


def main(name):
    {"imports": imports, "instruction_set": instruction_set, "without_module": without_module}[name]()
