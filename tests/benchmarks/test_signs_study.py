"""The signs: the oracle on what is clean and on what is broken by construction, the rater, and a row's figures."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest

from benchmarks.studies.signs import calibration, pipelines, world
from benchmarks.studies.signs.__main__ import main, parser
from benchmarks.studies.signs.measures import entropy, hacking, measure
from benchmarks.studies.signs.oracle import TAU, TAUS, read_signs
from benchmarks.studies.signs.parts import Parts, record_of
from benchmarks.studies.signs.rater import Rater
from benchmarks.studies.signs.recipes import RECIPES
from benchmarks.studies.signs.study import SEEDS, Settings, Study
from benchmarks.studies.signs.table import markdown, pooled
from diffdoctor.data.shards import read_shards
from support.paths import ROOT


@pytest.fixture(scope="module")
def clean():
    return world.draw_signs(500, 3)


@pytest.fixture(scope="module")
def reading(clean):
    return read_signs(clean.pictures)


def test_no_two_letters_are_alike():
    letters = [world.dots(letter) for letter in world.LETTERS]
    assert min(np.abs(a - b).sum() for i, a in enumerate(letters) for b in letters[:i]) >= 11


def test_a_sign_depends_on_seed_and_place_alone(clean):
    again = world.draw_signs(5, 3)
    np.testing.assert_array_equal(again.pictures, clean.pictures[:5])
    assert again.prompts[0] == f"{clean.colours[0]} letters"
    assert not np.array_equal(world.draw_signs(5, 4).pictures, again.pictures)


def test_clean_signs_are_read_right_and_none_is_marked(clean, reading):
    np.testing.assert_array_equal(reading.words, clean.words)
    np.testing.assert_array_equal(reading.colours, clean.colours)
    assert reading.severity.max() < 0.01
    assert not reading.marked(min(TAUS)).any()


def test_letters_at_half_pixels_are_sound():
    letters = [world.dots(letter) for letter in "JKPY"]
    inks = [world.ink_of(letters, x, y) for x in range(-1, 6) for y in range(1, 10)]
    found = read_signs(np.stack([world.paint(ink, world.COLOURS["pink"], (9, 30, 55)) for ink in inks]))
    assert set(found.words) == {"JKPY"}
    assert found.severity.max() < 0.02


def test_noise_and_blur_of_an_autoencoder_are_no_artifacts(clean):
    rng = np.random.default_rng(0)
    pictures = clean.pictures + rng.normal(0, 8, clean.pictures.shape)
    pictures[:, :, 1:-1] = 0.9 * pictures[:, :, 1:-1] + 0.05 * (pictures[:, :, :-2] + pictures[:, :, 2:])
    found = read_signs(np.clip(pictures, 0, 255).astype(np.uint8))
    assert found.rate() <= 0.005
    assert (found.words == clean.words).mean() >= 0.995


@pytest.mark.parametrize(
    ("kind", "missed"),
    [
        ("dots flipped", [0.5, 0.2, 0.1, 0.05, 0.01]),
        ("mixed with another letter", [1, 1, 1, 0.6, 0.01]),
        ("faded", [1, 1, 0.8, 0.01, 0.01]),
        ("ghost beside it", [1, 1, 0.3, 0.2, 0.06]),
    ],
)
def test_what_is_known_to_be_broken_is_seen_by_its_degree(kind, missed):
    damage, degrees = calibration.DAMAGE[kind]
    for degree, most in zip(degrees, missed, strict=True):
        pictures, places = calibration.broken_signs(damage, degree, 100, 4)
        found = read_signs(pictures)
        broken = found.broken_letters()
        hit = broken[np.arange(len(places)), places]
        assert 1 - hit.mean() <= most
        if not (kind == "faded" and degree == 1):  # where a letter is gone, nobody can say how wide it was
            assert broken.sum() == hit.sum()
        if hit.any():
            # the mark covers most of the letter's own columns
            first = np.flatnonzero(hit)[0]
            columns = found.marked()[first].any(0)
            assert columns[10 * places[first] : 10 * places[first] + 10].sum() >= 7
    assert read_signs(pictures).broken(max(TAUS)).mean() <= read_signs(pictures).broken(min(TAUS)).mean()


def test_an_empty_sign_is_broken_and_its_colour_is_read_all_the_same():
    ground = np.full((1, world.HEIGHT, world.WIDTH, 3), 20, np.uint8)
    assert read_signs(ground).broken_letters().all()
    with pytest.raises(ValueError, match="pictures"):
        read_signs(ground[:, :8])


def test_the_rater_errs_as_much_as_is_said():
    pictures, _ = calibration.broken_signs(calibration.flipped, 6, 400, 5)
    found = read_signs(pictures)
    exact = Rater(wobble=0, missed=0, invented=0).marks(found, 1)[0]
    boxes = found.boxes[np.arange(400), found.broken_letters().argmax(1)]
    for mask, (left, top, right, bottom) in zip(exact, boxes, strict=True):
        assert mask[top:bottom, left:right].all()
        assert mask.sum() == (bottom - top) * (right - left)
    masks, seconds = Rater(invented=0).marks(found, 1)
    seen = masks.any((1, 2))
    assert 1 - seen.mean() == pytest.approx(0.1, abs=0.05)
    assert seconds == 2 * 400 + 3 * seen.sum()
    area = np.abs(masks.sum((1, 2)) - exact.sum((1, 2)))[seen]
    assert 0 < area.mean() < area.max() <= 2 * (8 + 12) + 4
    sound = read_signs(world.draw_signs(400, 8).pictures)
    assert Rater().marks(sound, 1)[0].any((1, 2)).mean() == pytest.approx(0.05, abs=0.03)
    np.testing.assert_array_equal(masks, Rater(invented=0).marks(found, 1)[0])


def test_a_row_counts_what_changed(clean, reading):
    """Half of the signs get a broken letter; the treatment mends two thirds of them and breaks none."""
    damaged, _ = calibration.broken_signs(calibration.faded, 1.0, 300, 9)
    before = read_signs(np.concatenate([damaged, clean.pictures[:300]]))
    after = read_signs(np.concatenate([clean.pictures[300:500], damaged[200:], clean.pictures[:300]]))
    row = measure(before, after, [f"{colour} letters" for colour in after.colours])
    rate = row["rates"][f"{TAU:.2f}"]
    assert rate["rate"] == pytest.approx(100 / 600)
    assert rate["ratio"] == pytest.approx(1 / 3)
    assert rate["ratio_interval"][0] < 1 / 3 < rate["ratio_interval"][1] < 0.5
    assert row["broke"] == 0
    assert row["mended"] == pytest.approx(2 / 3, abs=0.03)
    assert row["kept"] < 0.8  # other words were drawn in the first 200
    assert row["colour"] == 1
    assert row["entropy"] == pytest.approx(2.585, abs=0.02)
    same = measure(reading, reading, clean.prompts)
    assert (same["kept"], same["mended"], same["colour"]) == (1, None, 1)


def test_entropy_and_hacking():
    assert entropy(np.array(list("JKPSUY"))) == pytest.approx(np.log2(6))
    assert entropy(np.array(["J", "J"])) == 0
    assert hacking(0.5, 0.25, 0.6, 0.3) == pytest.approx(1)
    assert hacking(0.5, 0.45, 0.6, 0.24) == pytest.approx(6)
    assert hacking(0.5, 0.5, 0.6, 0.2) is None


def test_a_part_is_made_once_and_anew_from_other_settings(tmp_path):
    parts, made = Parts(tmp_path), []

    def make(folder):
        made.append(folder)
        (folder / "x").write_text("1")
        return {"found": len(made)}

    first = parts.made("a", {"seed": 0}, make)
    assert parts.made("a", {"seed": 0}, make) == first
    other = parts.made("a", {"seed": 1}, make)
    assert [record_of(path)["found"] for path in (first, other)] == [1, 2]
    assert record_of(first)["cpu_seconds"] >= 0
    assert json.loads((first / "part.json").read_text())["settings"] == {"seed": 0}
    with pytest.raises(ZeroDivisionError):
        parts.made("b", {}, lambda folder: 1 / 0)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", pipelines.KINDS)
def test_the_recipes_are_options_of_a_treatment(kind, tmp_path):
    from diffdoctor.treat import TreatConfig

    study = Study(tmp_path, Settings(seed=3))
    for name, recipe in RECIPES.items():
        for other in (recipe.after, recipe.trained_on):
            assert other is None or RECIPES[other].treat is not None, name
        base = RECIPES[recipe.before]
        assert (base.before, base.steps) == (recipe.before, recipe.steps), name
        if recipe.treat is not None:
            config = TreatConfig(**study.treat_options(kind, recipe))
            assert (config.sampling_steps, config.height, config.width, config.seed) == (10, 16, 40, 3)


def test_the_purposes_share_no_seed():
    first = sorted(SEEDS.values())
    assert np.diff(first).min() >= 1_000_000


def test_a_table_of_one_row():
    signs = world.draw_signs(200, 1)
    damaged, _ = calibration.broken_signs(calibration.faded, 1.0, 100, 9)
    before, after = (read_signs(np.concatenate([damaged, signs.pictures[:n]])) for n in (100, 100))
    found = measure(before, after, ["red letters"] * 200) | {"kind": "sd", "name": "nft", "cpu_seconds": 12.4}
    found |= {"compared_with": "before", "drawing": 3.0, "detector": {"before": 0.5, "after": 0.4, "hacking": None}}
    line = markdown([found]).splitlines()[-1]
    assert "| 50.0 % (43.1 to 56.9) | 1.00 (1.00 to 1.00) | – |" in line
    assert line.endswith("| 50.0 % → 40.0 % | – | 12, drawing x 3.0 |")


class Drawn:
    """A study that has drawn what it is given, by name."""

    def __init__(self, readings):
        self.readings = readings

    def reading(self, kind, name):
        return self.readings[name]


def test_seeds_are_pooled_picture_by_picture():
    """Of two seeds' 300 pictures: 1/3 and 2/3 broken before, none and 1/3 after; training on leaves 2/3 and 2/3."""
    damaged, _ = calibration.broken_signs(calibration.faded, 1.0, 200, 9)
    signs = world.draw_signs(300, 1).pictures

    def broken(count):
        return read_signs(np.concatenate([damaged[:count], signs[count:]]))

    studies = [Drawn({"before": broken(100), "nft": broken(0)}), Drawn({"before": broken(200), "nft": broken(100)})]
    rows = []
    for seed, study in enumerate(studies):
        study.readings["on"] = broken(200)
        found = measure(study.readings["before"], study.readings["nft"], ["red letters"] * 300)
        detector = {"before": 0.5, "after": 0.25 + 0.1 * seed, "hacking": None}
        found |= {"kind": "sd", "name": "nft", "seed": seed, "split": "test", "compared_with": "before"}
        found |= {"cpu_seconds": 10 + seed, "drawing": 1.0, "detector": detector, "observer": detector}
        rows.append(found | {"against_control": {"name": "on"}})
    one = pooled(studies, "sd", "nft", rows)
    rate = one["rates"][f"{TAU:.2f}"]
    assert (one["pictures"], one["seed"]) == (600, [0, 1])
    assert (rate["rate"], rate["ratio"]) == (pytest.approx(1 / 6), pytest.approx(1 / 3))
    assert one["against_control"]["ratio"] == pytest.approx(1 / 4)
    assert [seed["ratio"] for seed in one["seeds"]] == [0, pytest.approx(0.5)]
    assert one["mended"] == pytest.approx((rows[0]["mended"] + rows[1]["mended"]) / 2)
    assert one["detector"]["hacking"] == pytest.approx((1 - 0.3 / 0.5) / (2 / 3))
    line = markdown([one]).splitlines()[-1]
    assert "| 16.7 % (13.9 to 19.9): 0.0, 33.3 | 0.33 (" in line and "): 0.00, 0.50 | 0.25 (" in line
    assert line.endswith("| 0.60 | 10 |")
    assert pooled(studies[:1], "sd", "nft", rows[:1]) is rows[0]


def test_seeds_of_which_one_had_nothing_to_repair_are_pooled():
    signs = read_signs(world.draw_signs(2, 1).pictures)
    repairs = [{"regions": 4, "kept": 3, "tries": 9, "changed_outside": 0, "changed_share": 0.2, "seam": 0.5}]
    repairs += [{"regions": 0, "kept": 0, "tries": 0, "changed_outside": 0, "changed_share": 0.0, "seam": None}]
    rows = []
    for seed, repaired in enumerate(repairs):
        found = measure(signs, signs, ["red letters"] * 2) | {"kind": "sd", "name": "repair", "seed": seed}
        found |= {"split": "test", "compared_with": "before", "cpu_seconds": 0.0, "drawing": 1.0, "repair": repaired}
        detector = {"before": 0.5, "after": 0.5, "hacking": None}
        rows.append(found | {"detector": detector, "observer": detector})
    one = pooled([Drawn({"before": signs, "repair": signs})] * 2, "sd", "repair", rows)
    assert [seed["ratio"] for seed in one["seeds"]] == [None, None]
    text = markdown([one])
    assert "| –: –, – |" in text
    assert "3 of 4 regions kept after 9 tries; 0 pixels changed outside the masks, which cover 10.0 %" in text
    assert text.endswith("over that before: 0.50.")


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs a checkout")
def test_the_docs_name_rows_that_there_are():
    pages = (ROOT / "docs" / name for name in ("signs.md", "detector.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = re.findall(r"^python -m benchmarks\.studies\.signs (.*)", text, re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        assert parser().parse_args(shlex.split(line, comments=True)).rows


def test_a_pipeline_is_trained_on_until_half_of_what_it_draws_is_broken(tmp_path, monkeypatch):
    legs, rates = [], [0.9, 0.7, 0.65]

    def leg(parts, settings, kind, vae, before, steps, rate, seed):
        legs.append((steps, rate, seed))
        return tmp_path / f"pipeline-{len(legs)}" / "pipeline"

    monkeypatch.setattr(pipelines, "autoencoder", lambda parts, settings: tmp_path)
    monkeypatch.setattr(pipelines, "_leg", leg)
    monkeypatch.setattr(pipelines, "_broken", lambda parts, kind, folder: rates[len(legs) - 1])
    settings = pipelines.BaseSettings(seed=3, flux_legs=((9, 2e-3),), further_leg=(4, 1e-3))
    assert pipelines.base_pipeline(Parts(tmp_path), settings, "flux").parent.name == "pipeline-3"
    assert legs == [(9, 2e-3, 3), (4, 1e-3, 1003), (4, 1e-3, 2003)]
    del legs[:]
    pipelines.base_pipeline(Parts(tmp_path), dataclasses.replace(settings, most_further=1), "flux")
    assert len(legs) == 2


TOY = {
    "labels": 4,
    "further_labels": 4,
    "held_out": 4,
    "calibration": 3,
    "clean_signs": 4,
    "detector_steps": 2,
    "base": {"signs": 8, "autoencoder_steps": 2, "sd_legs": [[1, 2e-3]], "further_leg": [1, 1e-3], "most_further": 1},
    "treat": {"steps": 1, "batch_size": 2, "evaluate_pictures": 2, "min_sharpness": 0.0, "min_diversity": 0.0},
}


def test_the_road_from_drawing_to_the_page(tmp_path):
    """At toy lengths: every part is made, stored, measured and shown."""
    rows = ["nft, second round", "trained on as long as nft", "nft, then repair"]
    rows += ["nft, 30 steps", "nft, autoguided, 30 steps"]
    command = ["--output", str(tmp_path), "--pictures", "4", "--pipelines", "sd", "--threads", "1"]
    command += ["--settings", json.dumps(TOY), "--rows", *rows]
    assert main(command) == 0
    record = json.loads((tmp_path / "signs.json").read_text())
    found = {row["name"]: row for row in record["rows"]}
    assert set(found) == {"before", "nft", "before, 30 steps", *rows}
    assert found[rows[3]]["compared_with"] == found[rows[4]]["compared_with"] == "before, 30 steps"
    assert found[rows[3]]["cpu_seconds"] == found[rows[4]]["cpu_seconds"]  # one treatment, drawn twice
    assert found["nft"]["against_control"]["name"] == rows[1]
    assert found[rows[0]]["cpu_seconds"] > found["nft"]["cpu_seconds"] > 0
    assert all(row["pictures"] == 4 for row in record["rows"])
    assert found[rows[2]]["repair"]["changed_outside"] == 0 and "repair" not in found["nft"]
    regions = found[rows[2]]["repair"]["regions"]
    assert f"of {regions} regions kept" in (tmp_path / "signs.md").read_text()
    page = (tmp_path / "signs.html").read_text()
    assert "the 24 worst of 4 signs of “before”" in page and "the 24 worst of 4 signs of “before, 30 steps”" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"signs-sd.png", "signs-sd-30-steps.png"}
    assert len([*(tmp_path / "parts").glob("sd-pipeline-*")]) == 2  # two steps teach nothing: one leg more, the last
    # the labels of the second round are of what the treated pipeline draws, and marked as a person's
    folders = sorted(tmp_path.glob("parts/sd-labels-*/shards"))
    samples = [sample for folder in folders for sample in read_shards(folder)]
    assert {sample["label"] for sample in samples} == {"human"}
    assert {sample["round"] for sample in samples} == {0, 1}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/part.json")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/part.json")} == stamps


@pytest.mark.slow
def test_the_treatment_heals_more_than_training_on(tmp_path):
    """By five points at least, where a treatment that does nothing, or the damage, is behind: seven CPU minutes."""
    assert main(["--output", str(tmp_path), "--quick", "--strict", "--threads", "1"]) == 0
