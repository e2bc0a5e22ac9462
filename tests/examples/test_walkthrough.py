"""docs/walkthrough.md as it stands: every block of the page is run, in order; in the test with small numbers.

`python tests/examples/test_walkthrough.py FOLDER` runs the page at its own numbers.
"""

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "walkthrough.md"
# What the test makes small; each stands in the page.
SMALL = {
    "enumerate(zip(pictures, digits))": "enumerate(zip(pictures[:80], digits))",
    "--training.steps 400": "--training.steps 2 --training.batch_size 4",
    "--training.steps 500": "--training.steps 2 --training.batch_size 4",
    "train_autoencoder(pipeline, pictures, steps=1000)": "train_autoencoder(pipeline, pictures, steps=2)",
    "train_base(pipeline, pictures, prompts, steps=1500)": "train_base(pipeline, pictures, prompts, steps=2)",
    "--steps 80 --sampling_steps 10": "--steps 1 --sampling_steps 3 --batch_size 4 --evaluate_pictures 4",
    "--pictures 1000 --batch_size 100": "--pictures 12 --features none",
}


def blocks(page):
    """The page's fenced blocks as (language, text)."""
    return re.findall(r"^```(python|bash)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def run_page(page, folder):
    """Run every block in `folder`; returns the seconds of each command."""
    from diffdoctor.cli import main

    seconds, home = [], Path.cwd()
    os.chdir(folder)
    try:
        for language, text in blocks(page):
            commands = [text] if language == "python" else text.replace("\\\n", " ").splitlines()
            for command in commands:
                started = time.perf_counter()
                if language == "python":
                    exec(compile(command, "walkthrough.md", "exec"), {"__name__": "walkthrough"})
                else:
                    program, *arguments = shlex.split(command)
                    assert program == "diffdoctor"
                    assert main(arguments) == 0, command
                seconds.append((command.strip().splitlines()[0], time.perf_counter() - started))
    finally:
        os.chdir(home)
    return seconds


def test_the_page_runs(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("diffusers")
    page = PAGE.read_text(encoding="utf-8")
    for text, small in SMALL.items():
        assert text in page, text
        page = page.replace(text, small)
    run_page(page, tmp_path)
    metrics = json.loads((tmp_path / "runs" / "evaluation" / "metrics.json").read_text())
    assert metrics["pictures"] == 12
    assert metrics["sampling"]["num_inference_steps"] == 3
    assert metrics["real_pictures"] == 16
    for path in (
        "data/detector/contact_sheet.png",
        "runs/detector-report/report.html",
        "runs/diagnosis/gallery.html",
        "runs/treated/lora/pytorch_lora_weights.safetensors",
        "runs/evaluation/report.html",
        "seven.png",
    ):
        assert (tmp_path / path).stat().st_size > 0, path


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for first_line, took in run_page(PAGE.read_text(encoding="utf-8"), target):
        print(f"{took:6.0f} s  {first_line}")
