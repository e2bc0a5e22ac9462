"""What a training step of each detector costs, counted: `python -m benchmarks.studies.detector_cost [--size 512]`.

The networks are built on the meta device, so nothing is computed; operations are those of the matrix products and
convolutions of one picture's forward and backward, as `torch.utils.flop_counter` counts them (a multiply-add is two).
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffdoctor.detector import ArtifactDetector

SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")


def gflop_per_picture(detector: torch.nn.Module, size: int) -> float:
    """GFLOP of one picture's forward and backward, square, `size` pixels a side."""
    picture = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        detector.to("meta")(picture).sum().backward()
    return counter.get_total_flops() / 1e9


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command.add_argument("--size", type=int, default=512, help="side of the pictures in pixels (default: 512)")
    command.add_argument("--pictures", type=int, default=320_000, help="steps times batch size (default: 20,000 × 16)")
    options = command.parse_args()
    print(f"{'detector':<10}{'M parameters':>14}{'GFLOP/picture':>16}{'PFLOP in all':>14}")
    for name in SIZES:
        detector = ArtifactDetector.of_size(name)
        million = sum(p.numel() for p in detector.parameters()) / 1e6
        gflop = gflop_per_picture(detector, options.size)
        print(f"{name:<10}{million:>14.1f}{gflop:>16.0f}{gflop * options.pictures / 1e6:>14.0f}")


if __name__ == "__main__":
    main()
