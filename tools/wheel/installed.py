"""Try a diffdoctor that pip installed: import, `diffdoctor env`, every operation on every CPU path.

It is run by the interpreter of a fresh environment, in a folder that is not the checkout, and imports nothing of it.
"""

import os
import platform
import subprocess
import sys

TOLERANCE = 3e-5


def instruction_sets() -> list[str]:
    """Those that this machine's wheel is to hold; what the processor lacks falls to the next one by itself."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ["generic", "avx2", "avx512"] if is_x86 and sys.platform != "win32" else ["generic"]


def equal(name, ours, expected):
    import torch

    difference = (ours.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    if not torch.isfinite(ours).all() or difference > TOLERANCE * scale:
        sys.exit(f"{name}: differs by {difference:.3g} of {scale:.3g}")


def call_everything() -> None:
    """Value and gradient of every operation on the `cpu` backend against `reference`."""
    import torch

    import diffdoctor

    torch.manual_seed(0)
    pred, noise, old = torch.randn(3, 2, 4, 32, 32).unbind()
    confidence = torch.rand(2, 1, 128, 128)
    target = diffdoctor.Target.contrastive(diffdoctor.Target.epsilon(noise), old)
    coefs = (0.9, 0.1, 0.3)
    calls = {
        "weighted_loss": lambda x, b: diffdoctor.weighted_loss(x, noise, confidence, artifact_weight=0.2, backend=b),
        "contrastive": lambda x, b: diffdoctor.weighted_loss(x, target, confidence, artifact_weight=1.0, backend=b),
        "artifact_loss": lambda x, b: diffdoctor.artifact_loss(x[:, :1], size=(64, 64), backend=b),
        "policy_loss": lambda x, b: diffdoctor.policy_loss(
            x, noise, old, None, torch.tensor([1.0, -1.0]), coefs=coefs, backend=b
        ),
    }
    for name, call in calls.items():
        values, gradients = [], []
        for backend in ("cpu", "reference"):
            x = pred.clone().requires_grad_()
            value = call(x, backend)
            value.backward()
            values.append(value.detach())
            gradients.append(x.grad)
        equal(name, *values)
        equal(f"{name}'s gradient", *gradients)
    print(f"{os.environ['DIFFDOCTOR_CPU_ISA']}: {', '.join(calls)} equal the reference", flush=True)


def main() -> None:
    """Run everything, each instruction set in a process of its own."""
    import diffdoctor

    folder = os.path.dirname(os.path.abspath(diffdoctor.__file__))
    if "site-packages" not in folder:
        sys.exit(f"diffdoctor: expected an installed one, got {folder}")
    shown = subprocess.run(
        [sys.executable, "-m", "diffdoctor", "env"], capture_output=True, text=True, check=True
    ).stdout
    if "cpu: usable" not in shown:
        sys.exit(f"the CPU backend is not usable:\n{shown}")
    for name in instruction_sets():
        environment = {**os.environ, "DIFFDOCTOR_CPU_ISA": name}
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--call"], env=environment, check=True)
    print(f"diffdoctor {diffdoctor.__version__} in {folder}: works")


if __name__ == "__main__":
    call_everything() if "--call" in sys.argv else main()
