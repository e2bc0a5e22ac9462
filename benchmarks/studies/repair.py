"""Does `repair` mend what the demo's pipeline draws, by a judge that took no part, and at what price?

`python -m benchmarks.studies.repair --demo runs/demo --output runs/repair-study` takes the trained stages of `make
demo` and repairs its measured pictures, steered by the demo's detector: those that the judge flags and as many that it
does not. For each method the judge's rate before and after, the share that shows the digit of the prompt, the pixels
changed outside the masks, and the gradient energy along the masks' rims, over that before. Last comes a detector that
lies: it flags the same places, and says of whatever was redrawn that it is worse. Prints a table and writes
results.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.signs.measures import repair_figures
from diffdoctor.runs.files import atomic_write_json

# The pictures are as small as what the detector marks on them: the whole is context, and flagged is what it doubts.
OPTIONS = {"context": 16.0, "threshold": 0.05, "grow": 3, "strength": 0.8, "tries": 8, "batch_size": 50}
SAMPLING = {"sampling_steps": 12, "guidance_scale": 1.0}
METHODS = ("inpaint", "resume")
ROWS = {"inpaint": "inpainting pipeline", "resume": "noise and resumed sampling", "lie": "resume, a detector that lies"}


class Liar:
    """A detector's maps of the pictures that it is given first; larger ones for whatever else comes.

    Args:
        detector: whose maps they are.
        pictures: (N, 3, H, W) uint8, the originals.
    """

    def __init__(self, detector, pictures: torch.Tensor):
        self.detector = detector
        self.known = {picture.numpy().tobytes() for picture in pictures}

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        maps = self.detector.confidence(pictures)
        for picture, confidence in zip(pictures, maps, strict=True):
            if (picture * 255).round().to(torch.uint8).numpy().tobytes() not in self.known:
                confidence.fill_(1.0)
        return maps


class Study:
    """The demo's networks and pictures.

    Args:
        demo: the folder of a finished demo.
        count: pictures that the judge flags, and that it does not, each.
    """

    def __init__(self, demo: Path, count: int):
        from safetensors.torch import load_file

        from diffdoctor.demo.classifier import DigitClassifier
        from diffdoctor.demo.data import prompt_of
        from diffdoctor.detector import load_detector
        from diffdoctor.evaluate.model import diagnose_pictures
        from diffdoctor.measures.pixels import flagged

        stages = demo / "stages"
        self.pipeline_folder = str(stages / "pipeline" / "pipeline")
        self.detector, self.judge = (load_detector(stages / name) for name in ("detector", "judge"))
        self.classifier = DigitClassifier().eval()
        self.classifier.load_state_dict(load_file(stages / "classifier" / "classifier.safetensors"))
        drawn = load_file(stages / "before" / "pictures.safetensors")["pictures"]
        self.is_flagged = lambda pictures: flagged(diagnose_pictures(self.judge, pictures))
        flags = self.is_flagged(drawn)
        self.sets = {}
        for name, wanted in (("damaged", flags), ("sound", ~flags)):
            indices = wanted.nonzero().flatten()[:count]
            digits = indices % 10
            prompts = [prompt_of(int(digit)) for digit in digits]
            self.sets[name] = drawn[indices], digits, prompts

    @torch.no_grad()
    def shows_digit(self, pictures: torch.Tensor, digits: torch.Tensor) -> float:
        """Share of the pictures in which the classifier sees the digit of the prompt."""
        return float((self.classifier(pictures.float() / 255).argmax(1) == digits).float().mean())

    def row(self, kind: str, name: str) -> dict:
        """The figures of one way to repair one set."""
        from diffdoctor.evaluate.model import artifact_rates
        from diffdoctor.repairs import RepairOptions, repair
        from diffdoctor.treat.loading import load_pipeline

        pictures, digits, prompts = self.sets[name]
        detector = Liar(self.detector, pictures) if kind == "lie" else self.detector
        options = RepairOptions(method="resume" if kind == "lie" else kind, **OPTIONS, **SAMPLING)
        started = time.process_time()
        arrays = list(pictures.permute(0, 2, 3, 1).numpy())
        done = repair(arrays, load_pipeline("pipeline", self.pipeline_folder), detector, options, prompts=prompts)
        seconds = time.process_time() - started
        after = torch.from_numpy(np.stack([each.pixels for each in done])).permute(0, 3, 1, 2)
        return {
            "way": kind,
            "set": name,
            "pictures": len(done),
            "judge": artifact_rates(self.is_flagged(pictures), self.is_flagged(after)),
            "digit_accuracy": [self.shows_digit(pictures, digits), self.shows_digit(after, digits)],
            **repair_figures(done, arrays),
            "cpu_seconds": seconds,
        }


def misses(rows: list[dict]) -> list[str]:
    """What the figures fall short of, in words."""
    found = []
    for row in rows:
        name = f"{row['way']}, {row['set']}"
        if row["changed_outside"]:
            found.append(f"{name}: {row['changed_outside']} pixels changed outside the masks")
        if row["way"] == "lie":
            if row["kept"]:
                found.append(f"{name}: {row['kept']} regions kept")
            continue
        if row["set"] == "damaged" and row["judge"]["after"] > row["judge"]["before"] / 4:
            found.append(f"{name}: the judge's rate fell to {row['judge']['after']:.3f} only")
        if row["seam"] is not None and row["seam"] > 1.1:
            found.append(f"{name}: the seam's energy is {row['seam']:.2f} of that before")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the study; 1 where the figures fall short."""
    from diffdoctor.runs.progress import quiet_loaders

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished `diffdoctor demo`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=500, help="of each set")
    options = parser.parse_args(argv)
    quiet_loaders()
    study = Study(options.demo, options.pictures)
    rows = [study.row(way, name) for way in METHODS for name in ("damaged", "sound")] + [study.row("lie", "damaged")]
    short = misses(rows)
    atomic_write_json(options.output / "results.json", {"options": OPTIONS | SAMPLING, "rows": rows, "misses": short})
    print("| method | pictures | judge's rate | shows the digit | changed outside | seam | kept of regions | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        rate, digit = row["judge"], row["digit_accuracy"]
        seam = "–" if row["seam"] is None else f"{row['seam']:.2f}"
        print(
            f"| {ROWS[row['way']]} | {row['pictures']} {row['set']} | {rate['before']:.1%} → {rate['after']:.1%} "
            f"| {digit[0]:.1%} → {digit[1]:.1%} | {row['changed_outside']} | {seam} "
            f"| {row['kept']} of {row['regions']} | {row['cpu_seconds']:.0f} |"
        )
    for each in short:
        print(f"falls short: {each}", file=sys.stderr)
    return bool(short)


if __name__ == "__main__":
    sys.exit(main())
