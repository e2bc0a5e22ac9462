"""What users' folders hold: odd picture modes and names, full disks, folders that another process is at work in."""

import json
import os
import re
import urllib.parse
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdoctor.data.codec import decode
from diffdoctor.data.sources import find_sources
from diffdoctor.detector import ConvDetector
from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose
from diffdoctor.detector.commands.inject import InjectConfig, run_inject
from diffdoctor.detector.commands.train import TrainDetectorConfig, run_train_detector
from diffdoctor.evaluate.detector.command import EvaluateDetectorConfig, run_evaluate_detector
from diffdoctor.repairs.command import run_repair
from diffdoctor.repairs.config import RepairConfig
from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.lock import locked_folder
from diffdoctor.treat.command import OfflineFolder
from support.pictures import picture, tree, write_pictures

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")


@pytest.fixture
def detector(tmp_path):
    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    return str(tmp_path / "detector")


def saved(path, image, **options):
    image.save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "LA", "L", "1", "I;16"])
def test_every_mode_of_a_png_is_read_as_what_it_shows(tmp_path, mode):
    colours = picture()
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    expected = np.repeat(grey[..., None], 3, axis=2) if mode in ("LA", "L", "1", "I;16") else colours
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "1":
        expected = np.where(expected > 127, 255, 0)
        image = Image.fromarray(expected[..., 0].astype(np.uint8)).convert("1")
    elif mode == "P":
        image = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        image = Image.fromarray(colours).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.arange(24 * 32).reshape(24, 32).astype(np.uint8)))
    data = saved(tmp_path / "a.png", image)
    assert np.array_equal(decode(data, "RGB"), expected)
    assert decode(data, "L").shape == (24, 32)
    if mode in ("L", "I;16"):
        assert np.array_equal(decode(data, "L"), grey)


def test_a_photograph_is_turned_upright_and_printers_inks_are_read(tmp_path):
    colours = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(saved(tmp_path / "a.jpg", Image.fromarray(colours), exif=exif, quality=100, subsampling=0), "RGB")
    assert turned.shape == (32, 24, 3)
    assert np.abs(turned.astype(int) - np.rot90(colours, -1)).mean() < 3
    inks = decode(saved(tmp_path / "b.jpg", Image.fromarray(colours).convert("CMYK"), quality=100), "RGB")
    assert np.abs(inks.astype(int) - colours).mean() < 8


NAMES = ["plain.png", "ünï 日本 🎨.png", "quote'\"<b>&.png", "UPPER.PNG", "two.png", "two.jpg"]


@pytest.fixture
def odd_names(tmp_path):
    """A folder of pictures with odd names, one of them no Unicode, and of things that are no pictures."""
    folder = tmp_path / "pictures"
    (folder / "folder.png").mkdir(parents=True)
    for index, name in enumerate(NAMES):
        Image.fromarray(picture(seed=index)).save(folder / name)
    try:
        with open(os.fsencode(folder) + b"/bytes-\xff.png", "wb") as file:
            Image.fromarray(picture(seed=9)).save(file, format="PNG")
    except OSError:
        pytest.skip("this file system takes no such name")
    (folder / "empty.png").write_bytes(b"")
    os.symlink("nowhere.png", folder / "dangling.png")
    return folder


def test_pictures_of_any_name_go_through_every_command(odd_names, tmp_path, detector):
    names = ["bytes-\\udcff", "plain", "quote'\"<b>&", "two.jpg", "two.png", "UPPER", "ünï 日本 🎨"]
    found = [source.name for source in find_sources([odd_names])]
    assert sorted(found) == sorted([*names, "empty"])
    out = tmp_path / "diagnosis"
    metrics = run_diagnose(DiagnoseConfig([str(odd_names)], detector, str(out)))
    assert metrics["pictures"] == 7
    assert metrics["skipped"] == {"a broken picture": 1, "a name that leads to no file": 1}
    records = [json.loads(line) for line in (out / "diagnosis.jsonl").read_text().splitlines()]
    assert sorted(record["name"] for record in records) == sorted(names)
    assert sorted(path.name for path in (out / "maps").iterdir()) == sorted(f"{name}.png" for name in names)
    page = (out / "gallery.html").read_text(encoding="utf-8")
    assert "日本" in page
    assert "quote&#39;&#34;&lt;b&gt;&amp;" in page
    links = [urllib.parse.unquote(link, errors="surrogateescape") for link in re.findall('href="([^"]+)"', page)]
    pictures = [Path(link.removeprefix("file://")) for link in links if link.startswith("file://")]
    assert sorted(link for link in links if not link.startswith("file://")) == sorted(
        f"{folder}/{name}.png" for folder in ("maps", "overlays") for name in names
    )
    assert len(pictures) == 7
    assert all((out / link).is_file() for link in links if not link.startswith("file://"))
    assert all(picture.is_file() for picture in pictures)
    # Again: nothing is diagnosed twice.
    assert run_diagnose(DiagnoseConfig([str(odd_names)], detector, str(out)))["pictures"] == 7
    metrics = run_inject(InjectConfig([str(odd_names)], str(tmp_path / "set"), kinds=["tint"]))
    assert metrics["kinds"] == {"clean": 7, "tint": 7}
    config = EvaluateDetectorConfig(detector, [str(tmp_path / "set")], str(tmp_path / "evaluation"), bootstrap=2)
    assert run_evaluate_detector(config)["overall"]["pictures"] == 14


def test_a_pattern_that_matches_only_folders_stands_for_them(tmp_path, detector, monkeypatch):
    for name, seeds in (("animals/cats", (0, 1)), ("animals/dogs/small", (2,)), ("animals/dogs", ()), ("empty/a", ())):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            Image.fromarray(picture(seed=seed)).save(tmp_path / name / f"{seed}.png")
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in find_sources(["animals/*"])] == ["0", "1", "small/2"]
    assert [source.name for source in find_sources(["animals/**/"])] == ["cats/0", "cats/1", "dogs/small/2"]
    assert [source.name for source in find_sources(["animals/**/*.png"])] == ["0", "1", "2"]
    assert run_diagnose(DiagnoseConfig(["animals/*"], detector, "out"))["pictures"] == 3
    with pytest.raises(UserError, match=r"empty/\*: expected pictures .* got none in the folders that match"):
        find_sources(["animals/*", "empty/*"])
    with pytest.raises(UserError, match="expected an existing file or folder, or a pattern that matches one, got none"):
        find_sources(["nothing/*"])


@contextmanager
def small_disk(size):
    """Inside, no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_the_disk_is_full_the_error_says_so_and_nothing_half_is_left(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    with small_disk(20_000), pytest.raises(OSError, match="could not be written; is the disk full"):
        checkpoints.save(1, {"weights": torch.zeros(50_000)})
    with small_disk(20_000), pytest.raises(OSError, match="weights could not be written"):
        ConvDetector((32, 32)).save_pretrained(tmp_path / "detector")
    assert not (tmp_path / "detector").exists()
    assert tree(tmp_path) == {}


def diagnosed(pictures, detector, output, **options):
    """Metrics of a run, {name: record} and {name: bytes of the map}."""
    metrics = run_diagnose(DiagnoseConfig([str(pictures)], detector, str(output), batch_size=2, **options))
    records = [json.loads(line) for line in (output / "diagnosis.jsonl").read_text().splitlines()]
    maps = {record["name"]: (output / "maps" / f"{record['name']}.png").read_bytes() for record in records}
    return metrics, {record["name"]: record for record in records}, maps


@pytest.mark.parametrize("change", ["the picture", "its prompt"])
def test_a_picture_that_was_replaced_is_diagnosed_again_and_no_other(tmp_path, detector, change):
    write_pictures(tmp_path / "pictures", 5)
    (tmp_path / "pictures" / "02.txt").write_text("a cat")
    diagnosed(tmp_path / "pictures", detector, tmp_path / "out")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "maps").iterdir()}
    if change == "the picture":
        Image.fromarray(picture(seed=99)).save(tmp_path / "pictures" / "02.png")
    else:
        (tmp_path / "pictures" / "02.txt").write_text("a dog in the rain")
    again = diagnosed(tmp_path / "pictures", detector, tmp_path / "out")
    assert again == diagnosed(tmp_path / "pictures", detector, tmp_path / "fresh")
    changed = [name for name, stamp in stamps.items() if (tmp_path / "out" / "maps" / name).stat().st_mtime_ns != stamp]
    assert changed == ["02.png"]
    assert (tmp_path / "out" / "gallery.html").read_bytes() == (tmp_path / "fresh" / "gallery.html").read_bytes()


def test_pictures_that_are_not_given_any_more_do_not_count(tmp_path, detector):
    write_pictures(tmp_path / "pictures", 5)
    assert diagnosed(tmp_path / "pictures", detector, tmp_path / "out")[0]["pictures"] == 5
    (tmp_path / "pictures" / "01.png").unlink()
    (tmp_path / "pictures" / "03.png").write_bytes(b"broken")
    metrics, records, _ = diagnosed(tmp_path / "pictures", detector, tmp_path / "out")
    assert (metrics["pictures"], list(records)) == (3, ["00", "02", "04"])
    assert "01:" not in (tmp_path / "out" / "gallery.html").read_text()
    assert (tmp_path / "out" / "maps" / "01.png").is_file()


def test_a_shard_that_was_replaced_is_diagnosed_again(tmp_path, detector, monkeypatch):
    from diffdoctor.detector.commands import diagnose_batches

    options = {"damaged": 0, "shard_size": 3}
    for name, count in (("set", 7), ("other", 5)):
        write_pictures(tmp_path / f"{name}-pictures", count, seed=count)
        run_inject(InjectConfig([str(tmp_path / f"{name}-pictures")], str(tmp_path / name), **options))
    diagnosed(tmp_path / "set", detector, tmp_path / "out")
    read = []
    monkeypatch.setattr(diagnose_batches, "read_source", lambda source, **_: read.append(source.name) or [])
    assert diagnosed(tmp_path / "set", detector, tmp_path / "out")[0]["pictures"] == 7
    assert read == []
    monkeypatch.undo()
    first, second = (tmp_path / "set" / f"shard-00000{number}.tar" for number in (0, 1))
    kept = first.read_bytes(), first.stat().st_mtime_ns
    # Of three pictures there are two left, and others.
    first.write_bytes((tmp_path / "other" / "shard-000001.tar").read_bytes())
    # The second one only looks replaced.
    os.utime(second, ns=(0, 0))
    result = diagnosed(tmp_path / "set", detector, tmp_path / "out")
    assert result[0]["pictures"] == 6
    assert result == diagnosed(tmp_path / "set", detector, tmp_path / "fresh")
    # The first one comes back as it was when it was done: its later maps are another's.
    first.write_bytes(kept[0])
    os.utime(first, ns=(kept[1], kept[1]))
    result = diagnosed(tmp_path / "set", detector, tmp_path / "out")
    assert result[0]["pictures"] == 7
    assert result == diagnosed(tmp_path / "set", detector, tmp_path / "fresh-again")


def test_maps_of_another_folders_pictures_are_refused_wherever_the_command_is_called(tmp_path, detector, monkeypatch):
    for index, name in enumerate("AB"):
        write_pictures(tmp_path / name, 3, seed=10 * index)
    monkeypatch.chdir(tmp_path / "A")
    diagnosed(".", detector, tmp_path / "out")
    before = tree(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    diagnosed("A", detector, tmp_path / "out")
    after = tree(tmp_path / "out")
    assert before.pop("config.yaml") != after["config.yaml"]
    assert before == {name: data for name, data in after.items() if name != "config.yaml"}
    monkeypatch.chdir(tmp_path / "B")
    with pytest.raises(UserError, match=r"holds a map 00 of .*A/00.png, not of .*B/00.png"):
        diagnosed(".", detector, tmp_path / "out")
    # What is refused changes nothing, not even the note of what was asked.
    with pytest.raises(UserError, match="device"):
        diagnosed(tmp_path / "A", detector, tmp_path / "out", device="nonsense")
    assert tree(tmp_path / "out") == after


@pytest.mark.parametrize("workers", [1, 2])
def test_inject_goes_on_where_it_was_stopped_to_the_same_files(tmp_path, workers, monkeypatch):
    from diffdoctor.data import resumable

    write_pictures(tmp_path / "pictures", 9)
    for name in ("03.png", "00.png", "06.png"):
        (tmp_path / "pictures" / name).write_bytes(b"broken")
    run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "shards"), damaged=0, shard_size=4))
    # Files and shards; the first member of a shard is broken too.
    shard = tmp_path / "shards" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600:640] = bytes(40)
    shard.write_bytes(data)
    places = [str(tmp_path / "pictures"), str(tmp_path / "shards")]
    options = {"damaged": 2, "benign": 1, "shard_size": 5, "kinds": ["tint", "pixelate"]}
    whole = run_inject(InjectConfig(places, str(tmp_path / "whole"), **options))
    assert whole["skipped"] == {"a broken picture": 4}
    assert whole["pictures"] == 11 * 4
    write = resumable.atomic_write_json

    def stopping(path, value):
        # A shard's rows are what is written last before the state.
        write(path, value)
        if int(path.stem) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(resumable, "atomic_write_json", stopping)
    config = InjectConfig(places, str(tmp_path / "set"), **options)
    for stop in (2, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            run_inject(config)
        assert not (tmp_path / "set").exists()
        shards = sorted((tmp_path / ".set.partial" / "set").glob("*.tar"))
        assert len(shards) == stop + 1
    monkeypatch.setattr(resumable, "atomic_write_json", write)
    stamp = shards[0].stat().st_mtime_ns
    # The number of processes is no part of what the set is made from.
    config.workers = workers
    result = run_inject(config)
    assert (tmp_path / "set" / shards[0].name).stat().st_mtime_ns == stamp
    left, expected = tree(tmp_path / "set"), tree(tmp_path / "whole")
    for name in ("output", "workers"):
        assert name in left["config.yaml"].decode()
    del left["config.yaml"], expected["config.yaml"]
    assert left == expected
    assert not (tmp_path / ".set.partial").exists()
    # What is there already is not made again.
    assert run_inject(config) == result
    assert (tmp_path / "set" / shards[0].name).stat().st_mtime_ns == stamp


def test_a_set_that_was_begun_otherwise_is_begun_anew(tmp_path, monkeypatch, capsys):
    from diffdoctor.data import resumable

    write_pictures(tmp_path / "pictures", 4)
    options = {"damaged": 1, "shard_size": 2, "kinds": ["tint"]}
    whole = run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "whole"), seed=1, **options))
    finish = resumable.ResumableSet.finish
    monkeypatch.setattr(resumable.ResumableSet, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "set"), seed=0, **options))
    monkeypatch.setattr(resumable.ResumableSet, "finish", finish)
    assert (tmp_path / ".set.partial" / "state.npz").is_file()
    capsys.readouterr()
    result = run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "set"), seed=1, **options))
    assert "unfinished set of a run with another seed (expected 0, got 1); starting again" in capsys.readouterr().err
    assert result == whole
    left, expected = tree(tmp_path / "set"), tree(tmp_path / "whole")
    del left["config.yaml"], expected["config.yaml"]
    assert left == expected


def test_a_folder_where_another_process_is_at_work_is_left_alone(tmp_path, detector):
    pytest.importorskip("fcntl")
    write_pictures(tmp_path / "pictures", 4)
    pictures, output = [str(tmp_path / "pictures")], str(tmp_path / "out")
    run_inject(InjectConfig(pictures, str(tmp_path / "set"), kinds=["tint"]))
    with locked_folder(output):
        for run, config in (
            (run_diagnose, DiagnoseConfig(pictures, detector, output)),
            (run_train_detector, TrainDetectorConfig([str(tmp_path / "set")], output)),
            (run_evaluate_detector, EvaluateDetectorConfig(detector, [str(tmp_path / "set")], output)),
        ):
            with pytest.raises(UserError, match="another process is at work"):
                run(config)
    assert not any((tmp_path / "out").iterdir())
    with locked_folder(tmp_path / ".other.partial"), pytest.raises(UserError, match="another process is at work"):
        run_inject(InjectConfig(pictures, str(tmp_path / "other"), kinds=["tint"]))


def test_pictures_do_not_become_an_output_folder(tmp_path, detector, monkeypatch):
    """It would be refused as a folder of pictures from then on."""
    write_pictures(tmp_path / "pictures", 4)
    run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "set"), kinds=["tint"]))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path / "pictures")
    for given, output in (("../pictures", "."), ("*.png", "../pictures"), ("00.png", str(tmp_path / "pictures"))):
        with pytest.raises(UserError, match="output: expected a folder that holds no picture of the input, got "):
            run_diagnose(DiagnoseConfig([given], detector, output))
        with pytest.raises(UserError, match="output: expected a folder that holds no picture"):
            run_repair(RepairConfig([given], "no pipeline", detector, output))
    with pytest.raises(UserError, match="output: expected a folder that holds no picture"):
        OfflineFolder("../pictures", output="../pictures")
    with pytest.raises(UserError, match="output: expected another folder than a set's"):
        run_evaluate_detector(EvaluateDetectorConfig(detector, ["../set"], str(tmp_path / "set")))
    assert tree(tmp_path) == before
    run_diagnose(DiagnoseConfig(["."], detector, "found"))  # below is fine: it is known as an output folder
    assert len(find_sources(["."])) == 4
