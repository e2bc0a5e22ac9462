"""No file of ours holds NaN, which is no JSON: numbers that are not finite become null, whoever writes."""

import json
import re

import numpy as np
import pytest
import torch

from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.journal import Journal
from diffdoctor.runs.record import RunFolder
from diffdoctor.runs.strict_json import dumps, nan_to_none
from support.paths import ROOT

ODD = {
    "nan": float("nan"),
    "inf": -float("inf"),
    "numpy": np.float32("nan"),
    "list": [1.5, (np.nan, 2)],
    3: np.int64(4),
}
PLAIN = {"nan": None, "inf": None, "numpy": None, "list": [1.5, [None, 2]], "3": 4}


def strict(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    assert strict(dumps(ODD)) == PLAIN
    atomic_write_json(tmp_path / "metrics.json", ODD)
    assert strict((tmp_path / "metrics.json").read_text()) == PLAIN
    Checkpoints(tmp_path / "checkpoints").save(1, {"weights": torch.zeros(1)}, ODD)
    assert strict((tmp_path / "checkpoints" / "step-00000001" / "record.json").read_text()) == PLAIN
    with Journal(tmp_path / "records") as journal:
        journal.append([{"name": "a", "path": "p"} | ODD])
    (part,) = (tmp_path / "records").iterdir()
    assert strict(part.read_text()) == {"name": "a", "path": "p"} | PLAIN


def test_a_run_with_such_a_number_in_its_identity_knows_itself_again(tmp_path):
    run = RunFolder(tmp_path / "run", "test", ODD, {})
    run.begin()
    strict((tmp_path / "run" / "run.json").read_text())
    assert run.check()


@pytest.mark.parametrize("folder", ["diffdoctor"])
def test_json_is_written_in_one_place(folder):
    # what prints, answers a client or puts words together for the parser writes no file
    others = {"config.py", "environment.py", "options.py", "serve.py", "strict_json.py"}
    writers = [
        path for path in (ROOT / folder).rglob("*.py")
        if path.name not in others and re.search(r"(?<!strict_)json\.dumps?\(", path.read_text(encoding="utf-8"))
    ]  # fmt: skip
    assert not writers


@pytest.mark.parametrize(
    "value",
    [
        ODD,
        {"a": np.float32(0.1), "b": np.int64(3), "c": [np.True_, {"d": np.float64(2)}]},
        {np.int64(1): 2},
        [np.longdouble(0.5), np.float16("inf")],
    ],
)
def test_numbers_of_numpy_are_written_as_python_s(value):
    assert dumps(value) == json.dumps(nan_to_none(value), allow_nan=False)


def test_what_is_no_json_is_refused():
    with pytest.raises(TypeError, match="set is not JSON"):
        dumps({"a": {1}})
