"""CONTRIBUTING's recipes name files that exist.

A recipe is a heading of the third level in the section "Recipes" and a numbered list, in which each item begins with a
path in backticks. `<op>` stands for any operation, `{a,b}` for both, and NAME for what is new, whose folder exists.
"""

import itertools
import re

import pytest

from support.paths import ROOT

EXAMPLES = {"<op>": "weighted_loss"}
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w<>{},.*-]*(/[\w<>{},.*-]*)+")
ITEM = re.compile(r"^\d+\. ")


def recipes(text):
    """{heading: its lines} of the section "Recipes"."""
    section = re.search(r"^## Recipes\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "there is no section of the name Recipes"
    parts = re.split(r"^### (.+)\n", section[1], flags=re.MULTILINE)
    return {heading: body.splitlines() for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def filled(path):
    """The paths that a pattern stands for; of a path with something new in it, the folder that is to hold it."""
    for placeholder, example in EXAMPLES.items():
        path = path.replace(placeholder, example)
    path = re.sub(r"[^/]*NAME.*", "", path)
    pieces = [piece[1:-1].split(",") if piece[:1] == "{" else [piece] for piece in re.split(r"(\{[^}]*\})", path)]
    return ["".join(choice) for choice in itertools.product(*pieces)]


def faults(lines, root=ROOT):
    """What is wrong with a recipe, as sentences."""
    found = []
    if not any(ITEM.match(line) for line in lines):
        found.append("there is no numbered item")
    for line in lines:
        spans = CODE.findall(line)
        paths = [span for span in spans if PATH.fullmatch(span)]
        if ITEM.match(line):
            if not re.match(r"\d+\. `", line):
                found.append(f"{line}: an item begins with a path in backticks")
            elif spans[0] not in paths:
                paths.append(spans[0])  # a file at the top of the checkout
        for path in paths:
            missing = [name for name in filled(path) if not exists(root, name)]
            found += [f"{path}: {name or 'its folder'} does not exist" for name in missing]
    return found


def exists(root, name):
    """Whether there is that file, that folder (with a slash at its end), or anything that the pattern matches."""
    if "*" in name:
        return any(root.glob(name))
    return (root / name).is_dir() if name.endswith("/") else (root / name).exists()


RECIPES = recipes((ROOT / "CONTRIBUTING.md").read_text())


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_names_files_that_exist(heading):
    assert faults(RECIPES[heading]) == []


def test_there_is_a_recipe():
    assert RECIPES


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1. `diffdoctor/reference/losses.py`: the formula", None),
        ("1. `CHANGELOG.md`: a line", None),
        ("1. `tests/ops/test_<op>.py`: its tests", None),
        ("1. `diffdoctor/backends/{cpu,cuda,triton}/<op>.py`: the launches", None),
        ("1. `diffdoctor/treat/families/NAME.py`: the family", None),
        ("1. `diffdoctor/reference/NAME/loss.py`: the formula", None),
        ("1. `csrc/c*/`: the kernels; `ELEMENT_LOSSES` is filled from `diffdoctor/reference/losses.py`", None),
        ("1. `diffdoctor/reference/loses.py`: the formula", "diffdoctor/reference/loses.py does not exist"),
        ("1. `CHANGES.md`: a line", "CHANGES.md does not exist"),
        ("1. `diffdoctor/ops/<kind>.py`: the op", "diffdoctor/ops/<kind>.py does not exist"),
        ("1. `diffdoctor/backends/{cpu,opencl}/<op>.py`", "diffdoctor/backends/opencl/weighted_loss.py does not exist"),
        ("1. `diffdoctor/nowhere/NAME.py`: the family", "diffdoctor/nowhere/ does not exist"),
        ("1. `csrc/x*/`: the kernels", "csrc/x*/ does not exist"),
        ("1. `CHANGELOG.md`: after `docs/nothing.md`", "docs/nothing.md does not exist"),
        ("1. The formula in `diffdoctor/reference/losses.py`", "an item begins with a path"),
        ("Edit everything.", "there is no numbered item"),
    ],
)
def test_a_wrong_path_is_found(line, fault):
    found = faults([line])
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1
        assert fault in found[0]
