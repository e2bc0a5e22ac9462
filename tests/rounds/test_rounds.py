"""Rounds of labelling and training: a simulated one, people over HTTP, kills, and what is refused."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from diffdoctor.annotate.project import Project, picture_uid
from diffdoctor.cli import main
from diffdoctor.data.shards import ShardData
from diffdoctor.detector import load_detector
from diffdoctor.rounds.config import RoundConfig
from diffdoctor.rounds.state import BEGUN, STAGES, Rounds
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.ledger import Ledger
from support.annotation import Client, serving
from support.paths import ROOT
from support.rounds import make_world, options, write_yaml

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def simulated(world):
    """The YAML file and the output folder of a round that is done."""
    file = write_yaml(world / "round.yaml", **options(world, world / "loop"))
    assert main(["round", "run", str(file)]) == 0
    return file, world / "loop"


def ledger(output):
    return [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]


def outputs(output):
    return {(e["round"], e["stage"]): e["outputs"] for e in ledger(output) if e["state"] == "done"}


def weights(folder):
    return torch.cat([value.flatten() for value in load_detector(folder).state_dict().values()])


def test_a_simulated_round_makes_a_better_detector(simulated, world, capsys):
    file, output = simulated
    found = outputs(output)
    assert [stage for _, stage in found] == list(STAGES)
    measured = found[1, "evaluate"]["test"]
    low, high = measured["map50"]["difference_interval"]
    assert measured["pictures"] == 120 and 0.1 < low < measured["map50"]["difference"] < high
    assert found[1, "decide"]["adopted"] and torch.equal(
        weights(output / "detector"), weights(output / "round-01" / "detector" / "detector")
    )
    assert not torch.equal(weights(output / "detector"), weights(world / "detector"))
    # what is measured with is not trained on, and both came from files and from shards
    sets = [ShardData(output / "round-01" / name) for name in ("human", "audit")]
    human, audit = ({picture_uid(data[index]["picture"]) for index in range(len(data))} for data in sets)
    assert len(human) == found[1, "export"]["human"] == 85 and len(audit) == 15 and not human & audit
    places = [json.loads(row[0]) for row in Project(output / "labels").store.all("SELECT place FROM picture")]
    assert {"key" in place for place in places} == {True, False}
    wanted = [json.loads(line) for line in (output / "round-01" / "prompts-wanted.jsonl").read_text().splitlines()]
    abnormal = {each["category"] for each in found[1, "select"]["categories"]}
    assert len(wanted) == found[1, "select"]["prompts_wanted"] and {each["category"] for each in wanted} == abnormal
    labels = Project(output / "labels").store.all("SELECT active_ms FROM annotation")
    assert len(labels) == found[1, "annotate"]["labels"] and found[1, "annotate"]["seconds"] > 4 * len(labels)
    # the same again does nothing
    before = (output / "ledger.jsonl").read_bytes()
    assert main(["round", "run", str(file)]) == 0 and (output / "ledger.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main(["round", "status", str(file)]) == 0
    said = capsys.readouterr().out
    assert "1 round finished, the detector of round 1 is the best" in said
    assert [line.split()[1] for line in said.splitlines()[1:9]] == list(STAGES)
    page = (output / "status.html").read_text()
    assert f"{measured['map50']['after']:.3f}" in page and "data:image/png" in page


@pytest.mark.study
def test_a_second_round_begins_where_the_first_ended(simulated, world, tmp_path):
    file, output = tmp_path / "round.yaml", tmp_path / "loop"
    shutil.copytree(simulated[1], output)
    write_yaml(file, **options(world, output, rounds=2, budget=50))
    assert main(["round", "run", str(file)]) == 0
    found = outputs(output)
    assert len(found) == 16 and found[2, "evaluate"]["test"]["map50"]["before"] == pytest.approx(
        found[1, "evaluate"]["test"]["map50"]["after"]
    )
    events = Project(output / "labels").store.all("SELECT detail FROM event WHERE kind = 'add' ORDER BY id")
    asked = [json.loads(row[0])["config"] for row in events]
    assert [each["previous"] for each in asked] == [None, str(output / "round-01" / "diagnosis")]
    assert found[2, "export"]["human"] > found[1, "export"]["human"]


def test_killed_anywhere_a_round_ends_the_same(world, tmp_path):
    short = {"steps": 8, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "checkpoint_every": 2}
    values = {"pool": [str(world / "pool" / "shards")], "budget": 30, "audit_share": 0.4, "training": short, "test": []}
    values |= {"precision": 0.01, "most_pseudo": 5}  # far less than anybody would accept
    whole, output = tmp_path / "whole", tmp_path / "killed"
    assert main(["round", "run", str(write_yaml(tmp_path / "whole.yaml", **options(world, whole, **values)))]) == 0
    file = write_yaml(tmp_path / "killed.yaml", **options(world, output, **values))
    program = [sys.executable, str(ROOT / "tests" / "programs" / "rounds_killed.py"), str(file), str(output)]
    points = [80, 140, 40, 24]  # while it diagnoses, while raters answer, between two checkpoints, while it measures
    done = subprocess.run([*program, *map(str, points)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    killed = done.stdout.split()
    assert len(killed) == len(points) and len({*killed}) >= 3, killed
    counts = Counter((e["stage"], e["state"]) for e in ledger(output))
    assert set(counts.values()) == {1} and len(counts) == 2 * len(STAGES)
    # the detector's own maps were trained on too
    pseudo = outputs(output)[1, "accept"]["pseudo"]
    assert 0 < pseudo <= 5 and pseudo == len(ShardData(output / "round-01" / "pseudo"))
    assert outputs(output)[1, "train"]["pictures"] == outputs(output)[1, "export"]["human"] + pseudo + 160
    trained = "round-01/detector/detector"
    assert torch.equal(weights(output / trained), weights(whole / trained))
    first, second = outputs(whole), outputs(output)
    for key in [(1, stage) for stage in STAGES if stage != "decide"]:
        assert first[key] == second[key], key
    tasks = [
        Project(each / "labels").store.all("SELECT id, done, state FROM task ORDER BY id") for each in (whole, output)
    ]
    assert [tuple(row) for row in tasks[0]] == [tuple(row) for row in tasks[1]]


def test_people_do_their_part_and_no_better_detector_leaves_the_old_one(world, tmp_path, capsys):
    short = {"steps": 1, "batch_size": 4, "learning_rate": 1e-6, "warmup_steps": 0}
    values = options(world, tmp_path / "loop", pool=[str(world / "pool" / "shards")], test=[], training=short)
    values |= {"annotator": "people", "budget": 12, "audit_share": 0.5, "double_share": 0.3, "rounds": 3, "seed": 3}
    file = write_yaml(tmp_path / "round.yaml", **values)
    assert main(["round", "run", str(file)]) == 0
    said = capsys.readouterr().err
    wanted = Project(tmp_path / "loop" / "labels").store.one("SELECT sum(needed) FROM task")[0]
    assert wanted > 12
    assert f"0 of {wanted} labels are there; run `diffdoctor annotate serve {tmp_path / 'loop' / 'labels'}`" in said
    label_over_http(Project(tmp_path / "loop" / "labels"))
    assert main(["round", "run", str(file)]) == 0
    waiting = capsys.readouterr().err
    assert f"{wanted} of {wanted} labels are there, " in waiting and "conflicts wait for a reviewer" in waiting
    assert main(["round", "status", str(file)]) == 0
    assert f"{wanted} of {wanted} labels are there, " in capsys.readouterr().out
    review_over_http(Project(tmp_path / "loop" / "labels"))
    # the second round begins with the same detector, its tasks are other ones; then no third is begun
    write_yaml(file, **values | {"annotator": "simulated"})
    assert main(["round", "run", str(file)]) == 0
    found = outputs(tmp_path / "loop")
    assert [found[number, "decide"]["adopted"] for number in (1, 2)] == [False, False] and len(found) == 16
    assert found[2, "decide"]["detector"] == values["detector"] and not (tmp_path / "loop" / "detector").exists()
    assert found[2, "export"]["human"] > found[1, "export"]["human"] and found[1, "evaluate"]["decides"] == "audit"
    assert "no detector was better than the first" in capsys.readouterr().err
    assert Project(tmp_path / "loop" / "labels").store.verify() == []


def label_over_http(project):
    """Two people answer every open task by the page's requests; where both are asked, they do not agree."""
    tokens = [project.store.add_person(name, "annotator") for name in ("ann", "ben")]
    with serving(project) as url:
        for number, client in enumerate([Client(url, token) for token in tokens]):
            while (task := client.json("POST", "/api/next")[1])["task"] is not None:
                mask = np.zeros((task["height"], task["width"]), np.uint8)
                mask[2:6, 2 + 8 * number : 8 + 8 * number] = 255
                assert client.submit(task, mask, active_ms=2000, wall_ms=2000)[0] == 200


def review_over_http(project):
    client_token = project.store.add_person("eva", "reviewer")
    with serving(project) as url:
        client = Client(url, client_token)
        while (task := client.json("GET", "/api/review/next")[1])["task"] is not None:
            path = f"/api/tasks/{task['task']}"
            answers = client.json("GET", f"{path}/annotations")[1]["annotations"]
            assert len(answers) == 2
            fields = {"decision": "accept", "annotation": answers[0]["id"]}
            assert client.put(f"{path}/review", fields)[1]["state"] == "reviewed"


def test_a_stage_that_was_begun_otherwise_is_refused(simulated, world, tmp_path):
    rounds = Rounds(RoundConfig([], "d", str(tmp_path)))

    def fails():
        raise UserError("not now")

    with pytest.raises(UserError, match="not now"):
        rounds.run(1, "select", {"budget": 10}, fails)
    with pytest.raises(UserError, match=r"select of round 1 was begun with another budget \(expected 10, got 20\)"):
        rounds.run(1, "select", {"budget": 20}, fails, lambda: True)
    with pytest.raises(UserError, match="not now"):
        rounds.run(1, "select", {"budget": 20}, fails)  # of which there is nothing yet
    assert rounds.entry(1, "select", BEGUN)["inputs"] == {"budget": 20}
    rounds.run(1, "select", {"budget": 10}, lambda: {"line": "done"})
    rounds.run(1, "select", {"budget": 20}, fails)  # what is done is done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotator": "robot"}, "annotator: expected people or simulated, got 'robot'"),
        ({"annotator": "simulated", "truth": []}, "truth: expected labelled shards"),
        ({"annotator": "simulated", "truth": ["x"], "raters": 1}, "raters: expected at least 2"),
        ({"strategy": "luck"}, "strategy: expected one of paper, uncertainty, random, mixed"),
        ({"test": [], "audit_share": 0.0}, "test: expected labelled shards, or an audit_share"),
        ({"precision": 1.0}, "precision: expected a share"),
        ({"human_share": 0.9, "pseudo_share": 0.2}, "human_share, pseudo_share: expected shares"),
        ({"data": ["x"], "human_share": 0.8}, "human_share, pseudo_share: expected less than 1 together with data"),
        ({"architecture": "b9"}, "architecture: expected one of"),
        ({"rounds": 0}, "rounds: expected >= 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RoundConfig(["pool"], "detector", "out", **({"test": ["t"]} | changes))


def test_the_file_on_the_page_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")
    (tmp_path / "round.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1])
    for words in (["round.yaml"], ["round.yaml", "--rounds", "2"]):
        assert main(["round", "status", *words]) == 2
        assert "runs/rounds: expected the output folder of `diffdoctor round run`" in capsys.readouterr().err
    assert {*re.findall(r"--(\w+)", page)} - {"help", "prompts"} <= {
        field.name for field in dataclasses.fields(RoundConfig)
    }


def test_what_is_no_round_is_one_line(world, tmp_path, capsys):
    file = write_yaml(tmp_path / "round.yaml", **options(world, tmp_path / "loop", detector="no/such/detector"))
    for words, message in (
        (["status", str(file)], "expected the output folder of `diffdoctor round run`, got no ledger.jsonl"),
        (["run", str(tmp_path / "none.yaml")], "none.yaml"),
        (["run", str(file)], "no/such/detector"),
    ):
        assert main(["round", *words]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "loop" / "ledger.jsonl").exists()
    detector = tmp_path / "mine.py"
    detector.write_text("def zero(pictures):\n    return pictures[:, :1] * 0\n")
    values = options(world, tmp_path / "loop", detector=f"{detector}:zero")
    assert main(["round", "run", str(write_yaml(file, **values))]) == 2
    assert "architecture: expected one to train" in capsys.readouterr().err


def test_tasks_that_were_drawn_hold_for_their_options_alone(world, tmp_path, capsys):
    values = options(world, tmp_path / "loop", pool=[str(world / "pool" / "shards")], budget=4, audit_share=0.25)
    file = write_yaml(tmp_path / "round.yaml", **values | {"gold": [str(tmp_path / "none")]})
    assert main(["round", "run", str(file)]) == 2 and "none" in capsys.readouterr().err
    write_yaml(file, **values | {"annotator": "people"})
    assert main(["round", "run", str(file)]) == 0  # nothing was drawn with that gold set
    drawn = [e for e in ledger(tmp_path / "loop") if (e["stage"], e["state"]) == ("select", "done")]
    assert len(drawn) == 1
    # as if it had been killed before it was done
    later = {("select", "done"), ("annotate", "begun")}
    lines = [entry for entry in ledger(tmp_path / "loop") if (entry["stage"], entry["state"]) not in later]
    (tmp_path / "loop" / "ledger.jsonl").unlink()
    for line in lines:
        Ledger(tmp_path / "loop" / "ledger.jsonl").append(line)
    assert main(["round", "run", str(file), "--budget", "5"]) == 2
    assert "select of round 1 was begun with another budget (expected 4, got 5)" in capsys.readouterr().err
    assert main(["round", "run", str(file)]) == 0
