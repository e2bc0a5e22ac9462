"""`diffdoctor evaluate compare` without its page: pairs, sides, answers that stay, what they say, and who is let in."""

import errno
import itertools
import json

import numpy as np
import pytest

from diffdoctor.annotate.alpha import Tallies
from diffdoctor.cli import main
from diffdoctor.data.codec import decode, encode_picture
from diffdoctor.evaluate.compare.answers import Answers, People, Queue
from diffdoctor.evaluate.compare.command import run_evaluate_compare
from diffdoctor.evaluate.compare.config import EvaluateCompareConfig
from diffdoctor.evaluate.compare.pairs import chosen_pairs, find_pairs
from diffdoctor.evaluate.compare.server import build_app
from diffdoctor.evaluate.compare.summary import summarise
from diffdoctor.measures.agreement import nominal_alpha
from diffdoctor.runs.errors import UserError
from diffdoctor.web.bodies import Refused
from diffdoctor.web.serve import running
from support.annotation import Client, picture
from support.paths import ROOT

pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytest.importorskip("starlette")


@pytest.fixture
def folders(tmp_path):
    """Two folders and a table as `evaluate model` leaves them; b is better for the judge where the index is even."""
    rows = []
    for side, name in (("before", "a"), ("after", "b")):
        folder = tmp_path / "pictures" / side
        folder.mkdir(parents=True)
        for index in range(6):
            path = folder / f"{index:08d}.png"
            path.write_bytes(encode_picture(picture(index + 50 * (name == "b"), 24, 32), "png"))
            judge = 0.1 if (name == "b") == (index % 2 == 0) else 0.3
            file, category = str(path.relative_to(tmp_path)), "xy"[index % 2]
            rows.append({"file": file, "prompt": f"sign {index}", "category": category, "seed": index})
            rows[-1] |= {"flagged": True, "judge": np.float32(judge), "clip_score": 1.0}
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pictures.parquet")
    return tmp_path / "pictures" / "before", tmp_path / "pictures" / "after"


def queue_of(folders, path, **options):
    pairs = chosen_pairs(find_pairs(*map(str, folders)), None, 0)
    return Queue(pairs, Answers(path), **{"needed": 1, "overlap": 0.0, "seed": 0, **options})


def test_pictures_of_one_name_are_a_pair(folders, tmp_path):
    pairs = find_pairs(*map(str, folders))
    assert [pair.name for pair in pairs] == [f"{index:08d}" for index in range(6)]
    assert (pairs[3].prompt, pairs[3].category) == ("sign 3", "y")
    assert pairs[2].scores == {"judge": pytest.approx((0.3, 0.1)), "clip_score": (1.0, 1.0)}
    np.testing.assert_array_equal(pairs[1].b.read(), picture(51, 24, 32))
    assert chosen_pairs(pairs, 3, 1) == chosen_pairs(pairs, None, 1)[:3] != pairs[:3]
    with pytest.raises(UserError, match="pictures of the same names"):
        other = tmp_path / "other"
        other.mkdir()
        (other / "x.png").write_bytes(encode_picture(picture(0), "png"))
        find_pairs(str(folders[0]), str(other))
    listed = tmp_path / "list.parquet"
    row = {"path": "other/x.png", "name": "00000002", "prompt": "something else"}
    parquet.write_table(pa.Table.from_pylist([row]), listed)
    with pytest.raises(UserError, match="pictures of one prompt"):
        find_pairs(str(folders[0]), str(listed))


def test_sets_of_shards_are_paired_by_key(folders, tmp_path):
    from diffdoctor.data.shard_writer import write_shards

    for name in "ab":
        mask = np.zeros((24, 32), np.uint8)
        samples = [
            {"key": f"k{i}", "picture": picture(i + (name == "b"), 24, 32), "mask": mask, "prompt": f"sign {i}"}
            for i in range(3)
        ]
        write_shards(iter(samples), tmp_path / f"set-{name}")
    pairs = find_pairs(str(tmp_path / "set-a"), str(tmp_path / "set-b"))
    assert [(pair.name, pair.prompt) for pair in pairs] == [(f"k{i}", f"sign {i}") for i in range(3)]
    np.testing.assert_array_equal(pairs[2].b.read(), picture(3, 24, 32))


def test_nobody_is_asked_twice_and_no_more_people_than_needed(folders, tmp_path):
    queue = queue_of(folders, tmp_path / "c.jsonl")
    first = queue.take("ann", "tab")
    assert queue.take("ann", "tab") == first  # as after a reload
    others = {queue.take("ann", "second tab"), queue.take("ben", "t")}
    assert len(others) == 2 and first not in others
    seen = []
    for rater in itertools.cycle(["ann", "ben", "eva"]):
        if (index := queue.take(rater, "tab")) is None:
            break
        queue.put(rater, index, "left", 1, 5)
        seen.append(index)
    assert sorted(seen) == [index for index in range(6) if index not in others]  # which are looked at elsewhere
    doubled = queue_of(folders, tmp_path / "d.jsonl", overlap=1.0)
    for rater, expected in (("ann", 6), ("ben", 6), ("eva", 0)):
        given = 0
        while (index := doubled.take(rater, "tab")) is not None:
            doubled.put(rater, index, "neither", 1, 5)
            given += 1
        assert given == expected


def test_sides_and_order_are_by_lot(folders, tmp_path):
    queue = queue_of(folders, tmp_path / "c.jsonl")
    sides = np.array([[queue.left(f"rater {r}", i) == "a" for i in range(6)] for r in range(200)])
    assert 0.44 < sides.mean() < 0.56 and len({tuple(row) for row in sides}) > 50
    firsts = [queue_of(folders, tmp_path / "c.jsonl").take(f"rater {r}", "t") for r in range(60)]
    assert {*firsts} == {*range(6)}


def test_an_answer_is_kept_once_and_survives_a_torn_line(folders, tmp_path):
    path = tmp_path / "c.jsonl"
    queue = queue_of(folders, path)
    index = queue.take("ann", "t")
    row = queue.put("ann", index, "left", 1, 7)
    assert queue.put("ann", index, "left", 1, 9) == row  # sent again
    with pytest.raises(Refused, match="in another tab"):
        queue.put("ann", index, "right", 1, 7)
    queue.put("ann", index, "right", 2, 7)  # corrected
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"pair": "0000')
    again = Answers(path)
    assert path.read_bytes() == whole and len(again.rows) == 2
    newest = again.of_pair(queue.pairs[index].name)["ann"]
    assert newest["version"] == 2 and newest["choice"] != row["choice"] and row["choice"] == row["left"]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="line 1"):
        Answers(path)


def test_an_answer_that_the_disk_refuses_leaves_no_part_of_a_line(folders, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    queue = queue_of(folders, path)
    queue.put("ann", 0, "left", 1, 7)
    whole = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr("os.fsync", full)
        queue.put("ann", 1, "left", 1, 7)
    assert path.read_bytes() == whole and queue.counts("ann")["done"] == 1
    queue.put("ann", 1, "left", 1, 7)
    assert len(Answers(path).rows) == 2


def test_what_the_answers_say(folders, tmp_path):
    queue = queue_of(folders, tmp_path / "c.jsonl", needed=3)
    # b where the judge says so, but for one pair; ben agrees but for one, and ann is fond of the left picture there
    chosen = {0: "bb", 1: "aa", 2: "bn", 3: "ab", 4: "bb", 5: "b"}
    for index, pair in enumerate(queue.pairs):
        for rater, choice in zip(("ann", "ben"), chosen[int(pair.name)], strict=False):
            side = "neither" if choice == "n" else "left" if queue.left(rater, index) == choice else "right"
            queue.put(rater, index, side, 1, 2000)
    found = summarise(queue.pairs, queue.answers, ["judge"])
    assert (found["answered"], found["answers"]) == (6, 11)
    preference = found["preference"]
    assert (preference["b"], preference["a"], preference["ties"]) == (4, 1, 1)
    assert preference["rate"] == pytest.approx(4.5 / 6) and preference["p_value"] == pytest.approx(0.375)
    assert {name: group["rate"] for name, group in found["per_category"].items()} == {"x": 1.0, "y": 0.5}
    assert found["scores"]["judge"]["agreement"] == pytest.approx(4 / 5)  # all but 5; 3 is a tie
    assert found["scores"]["judge"]["pairs"] == 5
    assert (found["scores"]["clip_score"]["pairs"], found["scores"]["clip_score"]["equal"]) == (0, 5)
    agreement = found["agreement"]
    assert agreement["pairs"] == 5 and agreement["same"] == pytest.approx(3 / 5)
    counts = np.array([[0, 2, 0], [2, 0, 0], [0, 1, 1], [1, 1, 0], [0, 2, 0]])
    assert agreement["alpha"] == pytest.approx(nominal_alpha(counts))
    lefts = [row["left"] == row["choice"] for row in queue.answers.rows if row["rater"] == "ann"]
    left = pytest.approx(np.mean(lefts))
    assert found["raters"]["ann"] == {"a": 2, "b": 4, "neither": 0, "left": left, "seconds": 2.0}
    assert summarise(queue.pairs, Answers(tmp_path / "none"))["preference"]["interval"] == [0, 1]


def test_alpha_of_two_classes_is_that_of_the_closed_form():
    rng = np.random.default_rng(0)
    given = rng.integers(0, 5, 40)
    marked = rng.integers(0, given + 1)
    tallies = Tallies([{(int(m), int(k)): 1} for m, k in zip(given, marked, strict=True) if m >= 2])
    assert nominal_alpha(np.stack([marked, given - marked], 1)) == pytest.approx(tallies.alpha())
    assert nominal_alpha([[3, 0, 0], [0, 2, 0], [0, 0, 2]]) == 1
    assert np.isnan(nominal_alpha([[2, 0], [3, 0]]))


@pytest.fixture
def served(folders, tmp_path):
    queue = queue_of(folders, tmp_path / "c.jsonl")
    people = People(tmp_path / "people.json", ["ann", "ben"])
    tokens = people.new_tokens()
    with running(lambda hosts: build_app(queue, people, "Which?", hosts, comparison="c1")) as url:
        yield queue, {name: Client(url, token) for name, token in tokens.items()}


def test_the_page_never_hears_which_is_which(served, folders):
    queue, people = served
    ann = people["ann"]
    about = {"name": "ann", "question": "Which?", "comparison": "c1"}  # a page keeps its answers by the comparison
    assert ann.json("GET", "/api/me")[1] == {**about, "counts": {"done": 0, "left": 6}}
    shown = ann.json("POST", "/api/next", {"tab": "t"})[1]
    assert {*shown} == {"pair", "counts", "prompt"}
    path = f"/api/pairs/{shown['pair']}"
    pair, left = queue.pairs[shown["pair"]], queue.left("ann", shown["pair"])
    for side, which in (("left", left), ("right", "ab"[left == "a"])):
        status, headers, body = ann.call("GET", f"{path}/{side}")
        assert status == 200 and not {name for name in headers if name.lower() in ("etag", "last-modified")}
        np.testing.assert_array_equal(decode(body, "RGB"), getattr(pair, which).read())
    answer = {"choice": "right", "version": 1, "ms": 1200}
    assert ann.json("PUT", path, answer) == (200, {"version": 1, "counts": {"done": 1, "left": 5}})
    assert ann.json("PUT", path, {**answer, "choice": "left"})[0] == 409
    broken = ann.json("POST", "/api/next", {"tab": "t"})[1]["pair"]
    file = getattr(queue.pairs[broken], queue.left("ann", broken)).file
    file.write_bytes(b"no picture")
    status, fault = ann.json("GET", f"/api/pairs/{broken}/left")
    assert status == 422 and str(folders[0].parent) not in fault["error"]
    assert ann.json("POST", "/api/next", {"tab": "t"})[1]["pair"] != broken


def test_others_are_kept_out(served):
    _, people = served
    ann = people["ann"]
    own = {"Authorization": f"Bearer {ann.token}"}
    nobody = Client(ann.url)
    assert nobody.call("GET", "/")[0] == 200 and nobody.call("GET", "/static/base.css")[0] == 200
    assert nobody.call("GET", "/api/pairs/0/left")[0] == 401
    assert Client(ann.url, "wrong").call("POST", "/api/next", b"{}")[0] == 401
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert nobody.call("GET", "/api/me", headers={**own, **headers})[0] == 403
    assert ann.json("PUT", "/api/pairs/0", {"choice": "a", "version": 1, "ms": 0})[0] == 400
    assert ann.json("PUT", "/api/pairs/99", {})[0] == 404 and ann.call("GET", "/api/pairs/0/a")[0] == 404
    assert ann.call("PUT", "/api/pairs/0", b" " * 2**17, {"Content-Type": "application/json"})[0] == 413


def test_the_report_and_what_is_refused(folders, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["evaluate", "compare", *map(str, folders), "--output", str(output), "--serve", "false"]
    assert main(command) == 0 and "No pair of the 6 has been judged" in capsys.readouterr().out
    queue = queue_of(folders, output / "compare.jsonl")
    for index in range(6):
        queue.put("ann", index, "left", 1, 900)
    found = run_evaluate_compare(EvaluateCompareConfig(*map(str, folders), str(output), serve=False))
    assert found["names"] == ["before", "after"] and found["answers"] == 6
    assert found["doubts"] == ["raters chose the left picture too often for sides dealt by lot"]
    assert json.loads((output / "compare.json").read_text()) == found
    page = (output / "report.html").read_text()
    assert "after against before" in page and "sign 3" in page
    assert main([*command, "--question", "Which is worse?"]) == 2
    assert "another question" in capsys.readouterr().err
    for options, message in (
        ({"host": "0.0.0.0"}, "this machine's loopback"),
        ({"raters": ["a", "a"]}, "each once"),
        ({"names": ["x"]}, "two names"),
        ({"overlap": 2.0}, "a share"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluateCompareConfig("a", "b", "c", **options)


def test_an_output_folder_among_the_pictures_is_refused(folders):
    with pytest.raises(UserError, match="output: expected a folder that holds no picture"):
        run_evaluate_compare(EvaluateCompareConfig(*map(str, folders), str(folders[1]), serve=False))
    assert {path.suffix for path in folders[1].iterdir()} == {".png"}


def test_the_page_has_no_markup_from_texts():
    assert "innerHTML" not in (ROOT / "diffdoctor/evaluate/compare/static/app.js").read_text()
