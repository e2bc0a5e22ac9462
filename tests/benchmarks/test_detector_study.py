"""The detector study: nothing that is trained on is tested on, and a finished part is not done again."""

import collections
import json

import numpy as np
import pytest

from benchmarks.studies.detector import __main__ as study
from benchmarks.studies.detector import drawing, parts, pictures, report
from diffdoctor.detector import damage_kinds
from diffdoctor.runs.errors import UserError

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{(part, group): names} of all pictures that the study writes."""
    folder = tmp_path_factory.mktemp("study") / "pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "TRAINING_PIECES", 30)
        patch.setattr(pictures, "TEST_PIECES", 10)
        patch.setattr(pictures, "DRAWN_PICTURES", 10)
        counts = pictures.write_pictures(folder)
    found = collections.defaultdict(list)
    for file in folder.rglob("*.png"):
        part, group, category, name = file.relative_to(folder).with_suffix("").parts
        found[part, group].append((category, name))
    assert counts == {f"{part}/{group}": len(names) for (part, group), names in found.items()}
    return found


def test_all_kinds_are_either_trained_on_or_kept_for_the_test():
    assert sorted(parts.SEEN + parts.UNSEEN) == sorted(damage_kinds())


def test_photographs_digits_and_faces_of_the_test_are_not_trained_on(places):
    def sources(part, group):
        return {name.rpartition("-")[0] for _, name in places[part, group]} - {"faces", "backgrounds"}

    training = sources("train", "photographs") | sources("skewed", "photographs")
    assert not sources("test", "photographs") & training
    assert sources("test", "pieces") == training
    for group in ("digits", "photographs"):
        names = places["test", group]
        assert not set(names) & set(places["train", group] + places["skewed", group])
    assert len(places["test", "digits"]) == round(0.3 * 1797)


def test_pieces_for_the_test_come_from_the_end_that_is_not_trained_on():
    photograph = np.arange(100)[None, :, None] * np.ones((60, 1, 3))
    training, test = pictures.ends(photograph)
    assert training.max() < test.min()
    assert test.shape[1] == 30
    assert pictures.ends(photograph.transpose(1, 0, 2))[1].shape[0] == 30


def test_the_skewed_categories_are_nearly_always_damaged(places):
    clean = collections.Counter(category for category, _ in places["train", "photographs"])
    damaged = collections.Counter(category for category, _ in places["skewed", "photographs"])
    assert set(damaged) == set(pictures.SKEWED)
    for category in pictures.SKEWED:
        assert clean[category] <= 0.15 * (clean[category] + damaged[category])


def test_pieces_are_what_the_seed_says_and_look_like_pictures():
    photograph = pictures._read("astronaut.png")
    first, again = (pictures.cut(photograph, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (pictures.SIDE, pictures.SIDE, 3)
    varied = [pictures.vary(first, np.random.default_rng(seed)) for seed in range(20)]
    assert all(picture.dtype == np.uint8 and picture.shape == first.shape for picture in varied)
    assert 0.3 < np.mean([picture.std(axis=2).max() > 0 for picture in varied]) < 1


@pytest.mark.parametrize("kind", drawing.KINDS)
def test_drawn_pictures_are_what_the_seed_says_and_differ(kind):
    drawn = [drawing.drawn(kind, np.random.default_rng(seed)) for seed in range(12)]
    assert np.array_equal(drawn[3], drawing.drawn(kind, np.random.default_rng(3)))
    assert all(picture.shape == (pictures.SIDE, pictures.SIDE, 3) and picture.dtype == np.uint8 for picture in drawn)
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)
    # not flat, and not all alike in light
    assert np.mean([picture.std() > 2 for picture in drawn]) > 0.8
    assert np.ptp([picture.mean() for picture in drawn]) > 30


def test_the_test_pictures_do_not_depend_on_how_many_are_trained_on(monkeypatch):
    monkeypatch.setattr(pictures, "TEST_PIECES", 4)
    monkeypatch.setattr(pictures, "DRAWN_PICTURES", 0)

    def tested(training):
        monkeypatch.setattr(pictures, "TRAINING_PIECES", training)
        return {place: picture.tobytes() for place, picture in pictures._all(0) if place.startswith("test/")}

    first = tested(2)
    assert first == tested(5)
    assert len(first) > 500


def test_a_turned_piece_shows_only_what_is_in_the_photograph():
    # a bright photograph: whatever lay outside of it would be black
    photograph = np.full((120, 300, 3), 200, np.uint8)
    pieces = [pictures.cut_turned(photograph, np.random.default_rng(seed), 180) for seed in range(40)]
    assert min(piece.min() for piece in pieces) >= 199


def test_a_finished_part_is_found_again_and_one_of_other_settings_refused(tmp_path):
    calls = []

    def made(seed, kinds):
        part = parts.part_of(tmp_path, "train", {"seed": seed, "kinds": kinds})
        return parts.made(part, lambda: {"pictures": len(calls), "calls": calls.append(seed)})

    assert made(0, ("warp",)) == made(0, ["warp"]) == {"pictures": 0, "calls": None}
    assert calls == [0]
    with pytest.raises(UserError, match=r"another seed \(expected 0, got 1\); choose another --output"):
        made(1, ["warp"])


@pytest.mark.study
def test_a_toy_run_writes_its_report_and_does_nothing_the_second_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "TRAINING_PIECES", 5)
    monkeypatch.setattr(pictures, "TEST_PIECES", 2)
    monkeypatch.setattr(pictures, "DRAWN_PICTURES", 4)
    few = {name: found[:20] for name, found in pictures._small_photographs().items()}
    monkeypatch.setattr(pictures, "_small_photographs", lambda: few)
    monkeypatch.setattr(pictures, "_digits", lambda take=pictures._digits: tuple(part[:30] for part in take()))
    monkeypatch.setattr(parts, "BOOTSTRAP", 5)
    # bf16 is emulated by processors without it, at twenty times the price
    monkeypatch.setitem(parts.TRAINING, "precision", "fp32")
    monkeypatch.setitem(parts.TRAINING, "batch_size", 8)
    # In this process, where the smaller numbers are.
    monkeypatch.setattr(study.concurrent.futures, "ProcessPoolExecutor", _Here)
    arguments = ["--output", str(tmp_path), "--steps", "4", "--ablation-steps", "2", "--jobs", "1"]
    assert study.main(arguments) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["runs"]) == len(parts.VARIANTS)
    assert set(metrics["acceptance"]) == {"map50", "false_positive_rate"}
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in parts.VARIANTS if variant != parts.DETECTOR)
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    assert report.text(metrics) == (tmp_path / "tables.md").read_text()

    monkeypatch.setattr(parts, "measures", None)
    assert study.main(arguments) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["runs"] == metrics["runs"]
    assert study.main([*arguments[:3], "5", *arguments[4:]]) == 2
    assert "of a run with another steps (expected 4, got 5)" in capsys.readouterr().err


class _Here:
    """An executor that does the work when it is handed in."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def submit(self, function, *arguments):
        future = study.concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except UserError as error:
            future.set_exception(error)
        return future
