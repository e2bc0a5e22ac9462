"""inject, train-detector, diagnose and evaluate detector as users run them: files in, files out, resumable."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from diffdoctor.data.manifest import read_manifest
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.data.sources import find_sources
from diffdoctor.detector import ConvDetector, DetectorTrainingConfig, load_detector
from diffdoctor.detector.balance import sampling_weights
from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose
from diffdoctor.detector.commands.inject import InjectConfig, run_inject
from diffdoctor.detector.commands.train import TrainDetectorConfig, run_train_detector
from diffdoctor.detector.samples import ArrayData
from diffdoctor.runs.errors import DoubtfulResult, UserError
from diffdoctor.runs.journal import Journal
from support.launch import environment, launched
from support.pictures import write_shapes

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")


@pytest.fixture
def pictures(tmp_path):
    write_shapes(tmp_path / "pictures")
    return tmp_path / "pictures"


def injected(pictures, output, **options):
    return run_inject(InjectConfig([str(pictures)], str(output), **{"area": (0.05, 0.2), **options}))


def test_inject_makes_shards_masks_a_sheet_and_records(pictures, tmp_path):
    metrics = injected(pictures, tmp_path / "out", damaged=3, benign=1)
    assert metrics["pictures"] == 8 * 5
    assert sum(metrics["kinds"].values()) == 40
    data = ShardData(tmp_path / "out")
    assert len(data) == 40
    labels = np.array(data.labels)
    assert (labels == "injected").sum() == 24
    assert (data.mask_max[labels == "injected"] == 1).all()
    assert (data.mask_max[labels == "real"] == 0).all()
    assert set(data.categories) == {"cats", "dogs"}
    assert data[0]["picture"].shape == (40, 56, 3)
    assert 0 < metrics["mask_area"]["median"] < 0.5
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 300
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["versions"]["numpy"] == np.__version__
    assert "damaged: 3" in (tmp_path / "out" / "config.yaml").read_text()


def test_inject_gives_the_same_whatever_the_number_of_workers(pictures, tmp_path):
    for workers in (1, 2):
        injected(pictures, tmp_path / str(workers), workers=workers)
    first, second = (list(read_shards(tmp_path / str(workers))) for workers in (1, 2))
    assert len(first) == len(second) == 16
    for one, two in zip(first, second, strict=True):
        assert one["key"] == two["key"]
        assert np.array_equal(one["picture"], two["picture"])
        assert np.array_equal(one["mask"], two["mask"])


def test_inject_reads_shards_and_leaves_out_what_is_broken_or_damaged(pictures, tmp_path):
    injected(pictures, tmp_path / "first")
    (pictures / "cats" / "broken.png").write_bytes(b"\x89PNG but not really")
    Image.new("RGB", (8, 8)).save(pictures / "cats" / "tiny.png")
    metrics = run_inject(
        InjectConfig([str(pictures), str(tmp_path / "first")], str(tmp_path / "second"), kinds=["tint"], clean=False)
    )
    assert metrics["kinds"] == {"tint": 16}
    assert metrics["skipped"] == {
        "a broken picture": 1,
        "a picture of less than 16 pixels": 1,
        "a picture that is damaged already": 8,
    }
    with pytest.raises(UserError, match=r"broken\.png: a broken picture"):
        injected(pictures, tmp_path / "third", strict=True)
    assert not (tmp_path / "third").exists()


def test_inject_refuses_what_it_cannot_do(pictures, tmp_path):
    injected(pictures, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        injected(pictures, tmp_path / "out", seed=4)
    injected(pictures, tmp_path / "out", overwrite=True, seed=5)
    with pytest.raises(UserError, match=r"kinds: expected some of .*, got melt"):
        injected(pictures, tmp_path / "other", kinds=["melt"])
    with pytest.raises(UserError, match="expected an existing file or folder"):
        injected(tmp_path / "nowhere", tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected pictures .* got none in this folder"):
        injected(tmp_path / "empty", tmp_path / "other")


@pytest.mark.parametrize("output", [".", "..", "../empty"])
def test_inject_does_not_replace_the_folder_that_it_stands_in(pictures, tmp_path, monkeypatch, output):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^output: expected a folder that is not the working folder nor above it"):
        injected(pictures, output)
    assert not list((tmp_path / "empty").iterdir())


def test_names_are_paths_below_the_folder_and_unique(pictures, tmp_path):
    names = [source.name for source in find_sources([pictures])]
    assert names[0] == os.path.join("cats", "00")
    assert len(set(names)) == 8
    assert find_sources([str(pictures / "**" / "0[0-3].png")])[0].category == ""
    assert len(find_sources([pictures, pictures])) == 8
    shutil.copytree(pictures, tmp_path / "copies")
    with pytest.raises(UserError, match="same name"):
        find_sources([pictures, tmp_path / "copies"])


def test_train_detector_makes_a_detector_and_goes_on_where_it_was(pictures, tmp_path):
    injected(pictures, tmp_path / "data", damaged=4)
    training = DetectorTrainingConfig(
        steps=6, batch_size=4, warmup_steps=1, checkpoint_every=2, validate_every=3, size=32
    )
    config = TrainDetectorConfig(
        [str(tmp_path / "data")], str(tmp_path / "run"), architecture="conv", validation_share=0.25, training=training
    )
    metrics = run_train_detector(config)
    assert metrics["steps"] == 6
    assert metrics["pictures"] + metrics["validation_pictures"] == 40
    assert metrics["validation_pictures"] == 2 * 5
    assert [entry["step"] for entry in metrics["validation"]] == [3, 6]
    assert {"map50", "iou", "false_positive_rate", "hit_rate"} <= set(metrics["validation"][0])
    assert isinstance(load_detector(tmp_path / "run" / "detector"), ConvDetector)
    assert run_train_detector(config)["validation"] == metrics["validation"]
    # So little training teaches nothing, which is said; by `strict` also with an error, whose exit code is 3.
    (doubt,), last = metrics["doubts"], metrics["validation"][-1]
    assert (last["hit_rate"] == 0) == doubt.startswith("the detector is blind: it flags none of the damaged pictures")
    assert (last["hit_rate"] != 0) == doubt.startswith("the detector is of no use: it flags all of the clean ones")
    with pytest.raises(DoubtfulResult, match=re.escape(doubt)):
        run_train_detector(dataclasses.replace(config, training=dataclasses.replace(training, strict=True)))
    config.initial = str(tmp_path / "run" / "detector")
    config.output, config.architecture = str(tmp_path / "more"), "tiny"
    config.training.steps = 2
    assert run_train_detector(config)["steps"] == 2


def test_versions_of_one_picture_stay_on_one_side_of_the_split(pictures, tmp_path):
    from diffdoctor.detector.commands.train import _data

    injected(pictures, tmp_path / "data", damaged=2, benign=1)
    train, validation = _data(TrainDetectorConfig([str(tmp_path / "data")], "", validation_share=0.5))
    sides = [{key.split("-")[0] for key in part.keys} for part in (train, validation)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) == len(sides[1]) == 4
    assert len(train) == len(validation) == 16
    assert train[3]["key"] == train.keys[3]


@pytest.fixture
def detector(tmp_path):
    import torch

    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


@pytest.mark.parametrize("bits", [8, 16])
def test_diagnose_writes_maps_records_and_a_gallery(pictures, tmp_path, detector, bits):
    import torch

    output = tmp_path / "out"
    config = DiagnoseConfig([str(pictures)], str(detector), str(output), batch_size=3, bits=bits, mirrored=bits == 8)
    metrics = run_diagnose(config)
    assert metrics["pictures"] == 8
    model = load_detector(detector)
    records = [json.loads(line) for line in (output / "diagnosis.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == [source.name for source in find_sources([pictures])]
    for record in records:
        picture = np.asarray(Image.open(pictures / f"{record['name']}.png"))
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            expected = model.confidence(image)[0, 0]
            mirrored = model.confidence(image.flip(-1)).flip(-1)[0, 0]
        difference = (expected - mirrored).abs().mean().item()
        assert record.get("disagreement") == (pytest.approx(difference, abs=1e-5) if bits == 8 else None)
        stored = np.asarray(Image.open(output / "maps" / f"{record['name']}.png"))
        assert stored.dtype == (np.uint8 if bits == 8 else np.uint16)
        assert np.abs(stored / (2**bits - 1) - expected.numpy()).max() < 0.51 / (2**bits - 1) + 2e-5
        assert record["max"] == pytest.approx(expected.max().item(), abs=1e-5)
        p = expected.double().clamp(1e-12, 1 - 1e-12)
        entropy = torch.special.entr(torch.stack([p, 1 - p])).sum(0).mean().item() / np.log(2)
        assert record["uncertainty"] == pytest.approx(entropy, abs=1e-5)
        assert record["flagged"] == (record["flagged_share"] >= 0.02)
        assert (output / "overlays" / f"{record['name']}.png").is_file()
    assert metrics["artifact_rate"] == np.mean([record["flagged"] for record in records])
    assert "cats" in (output / "gallery.html").read_text()
    assert metrics == json.loads((output / "metrics.json").read_text())


def test_diagnose_reads_shards_and_goes_on(pictures, tmp_path, detector):
    injected(pictures, tmp_path / "data")
    config = DiagnoseConfig([str(tmp_path / "data")], str(detector), str(tmp_path / "out"), gallery=0, overlays=False)
    assert run_diagnose(config)["pictures"] == 16
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "maps").rglob("*.png")}
    assert len(stamps) == 16
    # A record that a kill cut short counts as not done; everything else is left as it is.
    (part,) = (tmp_path / "out" / "records").glob("part-*")
    text = part.read_text()
    *_, last_record, whole_shard = text.splitlines(keepends=True)
    assert "shard" in json.loads(whole_shard)
    part.write_text(text[: -len(whole_shard) - len(last_record) // 2])
    assert run_diagnose(config)["pictures"] == 16
    changed = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert len(changed) == 1
    lines = (tmp_path / "out" / "diagnosis.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"].split("/")[1] for line in lines) == sorted(
        read_manifest(tmp_path / "data")["key"]
    )
    config.bits = 16
    with pytest.raises(UserError, match=r"another bits \(expected 8, got 16\)"):
        run_diagnose(config)


KILLED = """
import os, signal, sys
from diffdoctor.detector.commands import diagnose as diagnosing
real, limit = diagnosing.atomic_write_bytes, int(sys.argv[1])
def write(path, data):
    global limit
    limit -= 1
    if limit == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
diagnosing.atomic_write_bytes = write
diagnosing.run_diagnose(diagnosing.DiagnoseConfig([sys.argv[2]], sys.argv[3], sys.argv[4], batch_size=2))
"""


def test_diagnose_killed_at_any_moment_goes_on_to_the_same_files(pictures, tmp_path, detector):
    whole = tmp_path / "whole"
    run_diagnose(DiagnoseConfig([str(pictures)], str(detector), str(whole), batch_size=2))
    output = tmp_path / "killed"
    for limit in (1, 6):
        command = [sys.executable, "-c", KILLED, str(limit), str(pictures), str(detector), str(output)]
        assert subprocess.run(command, env=environment()).returncode == -signal.SIGKILL
    assert 0 < len(Journal(output / "records").read()) < 8
    run_diagnose(DiagnoseConfig([str(pictures)], str(detector), str(output), batch_size=2))
    for name in ("diagnosis.jsonl", "gallery.html", *(f"maps/cats/{i:02d}.png" for i in (0, 2, 4, 6))):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_diagnose_tiles_large_pictures(tmp_path, detector):
    write_shapes(tmp_path / "large", count=1, size=(150, 110))
    options = {"gallery": 0, "overlays": False}
    run_diagnose(DiagnoseConfig([str(tmp_path / "large")], str(detector), str(tmp_path / "out"), tile=64, **options))
    assert np.asarray(Image.open(tmp_path / "out" / "maps" / "cats" / "00.png")).shape == (150, 110)


def test_evaluate_detector_writes_measures_and_a_report(pictures, tmp_path, detector):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pycocotools")
    from diffdoctor.evaluate.detector.command import EvaluateDetectorConfig, run_evaluate_detector

    injected(pictures, tmp_path / "data", damaged=2)
    config = EvaluateDetectorConfig(str(detector), [str(tmp_path / "data")], str(tmp_path / "out"), bootstrap=20)
    result = run_evaluate_detector(config)
    assert result == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["overall"]["pictures"] == 24
    assert set(result["per_category"]) == {"cats", "dogs"}
    assert result["per_category"]["cats"]["damaged"] == 8
    assert [entry["pictures"] for entry in result["categories"]] == [4, 4]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Worst misses" in page
    assert "Per category" in page
    assert page.count("data:image/png;base64,") >= 3
    with pytest.raises(UserError, match="manifest"):
        run_evaluate_detector(EvaluateDetectorConfig(str(detector), [str(pictures)], str(tmp_path / "other")))


def test_curves_of_a_calibrated_detector_lie_on_the_diagonal():
    from diffdoctor.measures.curves import pixel_curves

    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=(40, 50, 50))
    result = pixel_curves(confidence, rng.uniform(size=confidence.shape) < confidence)
    assert result["expected_calibration_error"] < 0.01
    assert result["recall"][-1] == 1
    assert result["precision"][-1] == pytest.approx(0.5, abs=0.01)
    assert np.all(np.diff(result["recall"]) >= 0)
    assert pixel_curves(confidence, np.ones_like(confidence))["expected_calibration_error"] == pytest.approx(
        0.5, abs=0.01
    )


@pytest.mark.cpu
@pytest.mark.slow
def test_two_processes_share_the_diagnosis(pictures, tmp_path, detector):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run_diagnose(DiagnoseConfig([str(pictures)], str(detector), str(whole), batch_size=2))
    launched("diagnose", pictures, "--detector", detector, "--output", shared, "--batch_size", 2)
    assert len(list((shared / "records").glob("part-*"))) == 2
    records = [
        [json.loads(line) for line in (folder / "diagnosis.jsonl").read_text().splitlines()]
        for folder in (whole, shared)
    ]
    assert [r["name"] for r in records[0]] == [r["name"] for r in records[1]]
    assert records[0] == records[1]


def test_the_share_of_damaged_pictures_is_kept_within_every_category_that_has_both():
    categories = ["hand"] * 8 + ["tree"] * 2 + ["cat"] * 4
    masks = np.zeros((14, 16, 16), np.float32)
    masks[:7] = 1
    masks[10:11] = 1
    data = ArrayData(np.zeros((14, 16, 16, 3), np.uint8), masks, category=categories)
    weights = sampling_weights(data, damaged_share=0.25)
    damaged = masks.max(axis=(1, 2)) > 0
    for name, expected in (("hand", 0.25), ("tree", 0.0), ("cat", 0.25)):
        of = np.array(categories) == name
        assert weights[of].sum() == pytest.approx(1 / 3)
        assert weights[of & damaged].sum() == pytest.approx(expected / 3)
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match="damaged_share"):
            sampling_weights(data, damaged_share=share)
        with pytest.raises(ValueError, match="damaged_share"):
            DetectorTrainingConfig(damaged_share=share)


@pytest.mark.parametrize("clean", [True, False], ids=["with", "without"])
def test_pictures_on_which_no_damage_can_be_seen_are_counted(tmp_path, clean):
    place = tmp_path / "flat"
    place.mkdir()
    for index in range(3):
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(place / f"{index}.png")
    write_shapes(tmp_path / "pictures", count=2)
    places = [str(place), str(tmp_path / "pictures")]
    metrics = run_inject(InjectConfig(places, str(tmp_path / "out"), kinds=["warp"], damaged=2, clean=clean))
    assert metrics["without_visible_damage"] >= 6
    assert metrics["pictures"] + metrics["without_visible_damage"] == 5 * 2 + (5 if clean else 0)
