"""What a round asks about: the budget's parts, the strategies, the caps, and that it can be stopped and resumed."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from diffdoctor.annotate.add import run_annotate_add, tiles_of
from diffdoctor.annotate.config import AnnotateAddConfig
from diffdoctor.annotate.intake import NewTask
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.queue import Queue
from diffdoctor.annotate.select import Candidate, Caps, composition, ranked, shares
from diffdoctor.data.codec import encode_picture
from diffdoctor.data.identity import picture_hash
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.detector.predict import describe_map
from diffdoctor.runs.errors import UserError
from diffdoctor.viz.draw import map_png
from support.annotation import picture, proposal, spot


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Sixty pictures of three categories and five generators, their diagnosis, thirty of known truth, one shard."""
    root = tmp_path_factory.mktemp("pool")
    (root / "pool").mkdir()
    (root / "diagnosis" / "maps").mkdir(parents=True)
    records = []

    def diagnose(name, path, seed):
        confidence = proposal(seed) / 255 * (1.2 if seed % 3 == 0 else 0.3)
        (root / "diagnosis" / "maps" / f"{name}.png").parent.mkdir(exist_ok=True, parents=True)
        (root / "diagnosis" / "maps" / f"{name}.png").write_bytes(map_png(confidence, 8))
        texts = {"category": "abc"[seed % 3], "generator": f"g{seed % 5}", "prompt": f"prompt {seed // 2}"}
        records.append(describe_map(name, confidence) | {"path": str(path), "stamp": "x", **texts})

    for seed in range(60):
        path = root / "pool" / f"{seed:03d}.png"
        path.write_bytes(encode_picture(picture(seed), "png"))
        diagnose(f"{seed:03d}", path, seed)
    write_shards(({"key": f"k{seed}", "picture": picture(seed)} for seed in range(100, 104)), root / "pool" / "set")
    for seed in range(100, 104):
        diagnose(f"set/shard-000000/k{seed}", root / "pool" / "set" / "shard-000000.tar", seed)
    known = (
        {"key": f"g{i}", "picture": picture(500 + i), "mask": (spot(500 + i) > 0) * 1.0 * (i % 2)} for i in range(30)
    )
    write_shards(known, root / "gold")
    (root / "diagnosis" / "diagnosis.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def add(pool, project, **options):
    values = {"diagnosis": str(pool / "diagnosis"), "gold": [str(pool / "gold")], "budget": 40} | options
    run_annotate_add(AnnotateAddConfig(str(project), [str(pool / "pool")], **values))
    return Project(project)


def tasks(project):
    return [
        dict(row)
        for row in project.store.all(
            "SELECT task.*, category, generator, prompt FROM task JOIN picture ON picture.id = picture ORDER BY task.id"
        )
    ]


def test_the_budget_has_its_parts(pool, tmp_path, capsys):
    project = add(pool, tmp_path / "project")
    assert "28 selected, 6 audit, 2 gold, 4 new, 10 training" in capsys.readouterr().err
    found = tasks(project)
    assert Counter(task["kind"] for task in found) == {"normal": 32, "audit": 6, "gold": 2, "training": 10}
    assert len({task["picture"] for task in found}) == 50
    for task in found:
        truth = task["kind"] in ("gold", "training")
        assert (task["truth"] is not None) == truth and task["needed"] == (
            2 if task["needed"] == 2 and not truth else 1
        )
        assert project.picture(task["picture"]).shape == (48, 64, 3)
        # a task of known truth has no proposal here, and so is blind as others are
        assert (task["proposal"] is None) == truth and (not truth or task["blind"])
    # in no order: what is asked first has the whole budget's composition
    first = [task["kind"] for task in sorted(found, key=lambda task: -task["priority"])[:20]]
    assert {"normal", "training"} <= {*first} and first.count("audit") <= 5
    project.store.add_person("ann", "annotator")
    assert Queue(project).take(project.store.one("SELECT * FROM annotator"))["training"]


def test_the_same_command_again_goes_on(pool, tmp_path):
    whole = tasks(add(pool, tmp_path / "whole"))
    part = Project(tmp_path / "part", create=True)
    add(pool, tmp_path / "part")
    part.store.connection.execute("DELETE FROM task WHERE id > 17")  # as if it had been killed there
    again = tasks(add(pool, tmp_path / "part"))
    keys = ("kind", "reason", "priority", "blind", "needed", "prompt")
    assert [[task[key] for key in keys] for task in again] == [[task[key] for key in keys] for task in whole]
    assert [[t["priority"]] for t in tasks(add(pool, tmp_path / "other", seed=1))] != [[t["priority"]] for t in whole]


def test_a_second_round_asks_for_others_and_its_gold_was_reviewed(pool, tmp_path):
    project = add(pool, tmp_path / "project", budget=10, gold=None, audit_share=0, gold_share=0.4, new_share=0.5)
    assert Counter(task["reason"] for task in tasks(project)) == {"new generator": 5, "paper": 5}
    from diffdoctor.annotate.review import decide

    project.store.add_person("rev", "reviewer")
    for task in (1, 2):
        decide(project, task, 1, "edit", verdict="damaged", mask=spot(task))
    project = add(pool, tmp_path / "project", budget=10, gold=None, round=2, audit_share=0, gold_share=0.2)
    second = [task for task in tasks(project) if task["round"] == 2]
    gold = [task for task in second if task["kind"] == "gold"]
    assert {task["picture"] for task in gold} == {1, 2} and all(task["truth"] for task in gold)
    labelled = {task["picture"] for task in tasks(project) if task["round"] == 1}
    known = {task["generator"] for task in tasks(project) if task["round"] == 1}
    assert all(task["generator"] not in known for task in second if task["reason"] == "new generator")
    # what was asked is not asked again but as gold
    assert not labelled & {task["picture"] for task in second if task["kind"] == "normal"}


def test_a_pool_without_a_diagnosis_is_drawn_at_random(pool, tmp_path):
    options = {"diagnosis": None, "gold": None, "strategy": "random", "budget": 64}
    found = tasks(add(pool, tmp_path / "project", **options, look_distance=0))
    assert len(found) == 64 and {task["proposal"] for task in found} == {None}
    with pytest.raises(UserError, match="diagnosis: expected a folder for the strategy paper"):
        add(pool, tmp_path / "project", diagnosis=None)
    with pytest.raises(UserError, match="audit_share"):
        add(pool, tmp_path / "project", audit_share=0.9, new_share=0.2)


def candidates(count, **values):
    return [Candidate(f"{i}", "", **{name: value(i) for name, value in values.items()}) for i in range(count)]


def test_animations_are_left_out_and_counted(tmp_path, capsys):
    from PIL import Image

    frames = [Image.fromarray(picture(seed)) for seed in range(2)]
    (tmp_path / "pool").mkdir()
    frames[0].save(tmp_path / "pool" / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pool" / "stands.gif")
    project = add(tmp_path, tmp_path / "project", diagnosis=None, gold=[], budget=5, strategy="random")
    (task,) = project.store.all("SELECT place FROM picture JOIN task ON task.picture = picture.id")
    assert json.loads(task["place"])["file"] == str(tmp_path / "pool" / "stands.gif")
    assert "an animation, which would be judged by its first frame (first: " in capsys.readouterr().err


def test_abnormal_categories_get_more_of_the_budget():
    pool = candidates(
        300,
        category=lambda i: "abcdef"[i % 6],
        mean=lambda i: 0.6 if i % 6 == 2 else 0.1 + 0.01 * (i % 6),
        uncertainty=lambda i: i / 300,
    )
    order = ranked(pool, "paper", 60, np.random.default_rng(0))
    assert sorted(each.name for each in order) == sorted(each.name for each in pool)
    share = Counter(each.category for each in order[:60])
    assert share["c"] > 2 * max(share[name] for name in "abdef") and min(share.values()) > 3
    assert next(each.name for each in order if each.category == "c") == "296"  # the most uncertain of them
    # further measures decide among the undecided
    last = ranked(pool, "paper", 60, np.random.default_rng(0), lambda each: [float(each.name == "200")] * 9)
    assert next(each.name for each in last if each.category == "c") == "200"
    # so does what the mirrored picture says, where that is known
    odd = [dataclasses.replace(each, uncertainty=0.5, disagreement=float(each.name == "200")) for each in pool]
    assert (
        next(each.name for each in ranked(odd, "paper", 60, np.random.default_rng(0)) if each.category == "c") == "200"
    )


def test_uncertainty_and_random():
    pool = candidates(50, uncertainty=lambda i: (i * 7) % 50)
    order = ranked(pool, "uncertainty", 10, np.random.default_rng(0))
    assert [each.uncertainty for each in order] == sorted(range(50), reverse=True)
    drawn = [tuple(each.name for each in ranked(pool, "random", 10, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    mixed = ranked(pool, "mixed", 10, np.random.default_rng(0))
    assert {*mixed} == {*pool} and len(mixed) == 50
    assert {each.uncertainty for each in mixed[:20]} >= {*range(42, 50)} and {each.name for each in mixed[:6]} >= {
        *drawn[0][:3]
    }


def test_shares_are_whole_and_within_what_there_is():
    assert shares(10, {"a": 1, "b": 1, "c": 2}, {"a": 99, "b": 99, "c": 99}) == {"a": 3, "b": 2, "c": 5}
    assert shares(10, {"a": 1, "b": 9}, {"a": 99, "b": 2}) == {"a": 8, "b": 2}
    assert shares(10, {"a": 1, "b": 9}, {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert composition(1000, 0.15, 0.05, 0.1) == {"selected": 700, "audit": 150, "gold": 50, "new": 100}


def test_prompts_generators_and_look_alikes_are_capped():
    caps = Caps(per_prompt=2, per_generator=3, per_look=1, distance=4)
    same, other = picture_hash(picture(0)), picture_hash(picture(7))
    noisy = picture_hash(
        np.clip(picture(0).astype(int) + np.random.default_rng(0).integers(-3, 4, (48, 64, 3)), 0, 255).astype(np.uint8)
    )
    first = Candidate("a", "", prompt="p", generator="g")
    assert caps.has_room(first) and caps.take(first, same)
    assert not caps.take(first, noisy) and caps.take(first, other)  # nearly the same picture; another one
    assert not caps.has_room(first) and caps.has_room(Candidate("b", "", prompt="q", generator="g"))
    assert caps.has_room(Candidate("c", "")) and caps.take(Candidate("c", ""), ~same)


def test_pictures_too_large_for_a_page_are_cut():
    shape = (70, 130)
    truth = (np.arange(70 * 130).reshape(shape) % 3 == 0) * np.uint8(255)
    task = NewTask(np.repeat(truth[..., None], 3, 2), {"file": "x"}, truth=truth, proposal=truth)
    assert tiles_of(task, 130) == [task]
    tiles = tiles_of(task, 64)
    assert len(tiles) == 6 and all(max(tile.picture.shape[:2]) <= 64 for tile in tiles)
    again = np.zeros(shape, np.uint8)
    for tile in tiles:
        x0, y0, x1, y1 = tile.place["crop"]
        np.testing.assert_array_equal(tile.picture[..., 0], tile.truth)
        again[y0:y1, x0:x1] = tile.proposal
    np.testing.assert_array_equal(again, truth)
