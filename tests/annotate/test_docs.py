"""docs/annotate.md: its commands and its code, in order, with a small pool."""

import dataclasses
import re
import shlex

import numpy as np
import pytest

from diffdoctor.annotate import config
from diffdoctor.annotate.fit import fit
from diffdoctor.annotate.project import Project
from diffdoctor.cli import main
from diffdoctor.data.codec import encode_picture
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.detector import ConvDetector
from support.annotation import picture, spot
from support.paths import ROOT

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def truth_of(prompt):
    return spot(int(prompt or 0)) > 0


def test_the_pages_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool").mkdir()
    for seed in range(16):
        (tmp_path / "pool" / f"{seed}.png").write_bytes(encode_picture(picture(seed), "png"))
        (tmp_path / "pool" / f"{seed}.txt").write_text(str(seed))
    known = ({"picture": picture(s), "mask": (spot(s) > 0) * 1.0, "prompt": str(s)} for s in range(50, 62))
    write_shards(known, tmp_path / "data" / "test")
    ConvDetector((8, 8)).save_pretrained(tmp_path / "runs" / "detector" / "detector")
    page = (ROOT / "docs" / "annotate.md").read_text(encoding="utf-8")
    commands = [(kind, block) for kind, block in BLOCK.findall(page) if "skimage" not in block]
    order = [commands[0], commands[2], commands[1]]  # people label before they are counted
    assert [kind for kind, _ in order] == ["bash", "python", "bash"] and len(commands) == 3
    for kind, block in order:
        if kind == "python":
            exec(compile(block, "annotate.md", "exec"), {"__name__": "annotate", "truth_of": truth_of})
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line.replace("--budget 2000", "--budget 12 --double_share 0.5"))
            assert program == "diffdoctor"
            if words[:2] != ["annotate", "serve"]:  # test_serve.py runs it
                assert main(words) == 0, line
    said = capsys.readouterr()
    assert "labels are there" in said.out and "pixel alpha" in said.out
    labels = ShardData(tmp_path / "data" / "human-r1")
    assert len(labels) >= 8 and set(labels.labels) == {"human"}
    for index in range(len(labels)):
        sample = labels[index]
        truth = truth_of(sample["prompt"])
        if sample["mask"].any():
            assert np.abs((sample["mask"] > 0.5) & truth).sum() > 0.4 * truth.sum()
    for name in ("status.html", "agreement.html", "agreement.json", "guidelines.md", "config.yaml"):
        assert (tmp_path / "labels" / name).stat().st_size > 0
    assert 0 <= fit(Project("labels")).missed < 0.5


def test_every_option_on_the_page_is_one():
    page = (ROOT / "docs" / "annotate.md").read_text(encoding="utf-8")
    known = set()
    for kind in vars(config).values():
        if dataclasses.is_dataclass(kind):
            known |= {field.name for field in dataclasses.fields(kind)}
    assert {*re.findall(r"--(\w+)", page)} <= known | {"detector", "output", "mirrored"}


def test_the_program_for_a_click_marks_what_is_around_it():
    pytest.importorskip("skimage")
    page = (ROOT / "docs" / "annotate.md").read_text(encoding="utf-8")
    (block,) = [block for kind, block in BLOCK.findall(page) if "skimage" in block]
    names = {}
    exec(compile(block, "annotate.md", "exec"), names)
    shown, (y, x) = picture(3), np.argwhere(spot(3) > 0)[20].tolist()
    marked = names["superpixel"](shown, x, y)
    assert marked.shape == shown.shape[:2] and marked[y, x] and 0 < marked.sum() < 0.1 * marked.size
