"""One picture never ends a run of diagnose or inject, nor costs more than its pixels; what is left out is named."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.data import source_index
from diffdoctor.detector import ConvDetector, PreprocessConfig
from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose
from diffdoctor.detector.commands.inject import InjectConfig, run_inject
from diffdoctor.detector.damage.stats import InjectStats
from diffdoctor.detector.models.preprocess import MAX_NETWORK_PIXELS
from diffdoctor.detector.predict import in_batches
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import file_name
from diffdoctor.runs.journal import Journal
from support.pictures import picture, write_pictures

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made") / "detector"
    ConvDetector((8, 16)).save_pretrained(folder)
    return str(folder)


def records_of(output):
    return {record["name"]: record for record in map(json.loads, (output / "diagnosis.jsonl").open())}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flat_png(height, width):
    """A valid black picture, of a bit a pixel: a megapixel in 200 bytes."""
    data = zlib.compress(bytes(height * (1 + -(-width // 8))), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_each_bad_picture_is_counted_and_named(tmp_path, detector, capsys):
    pictures = tmp_path / "pictures"
    write_pictures(pictures, 3)
    Image.fromarray(picture(8, 3000)[:1]).save(pictures / "thin.png")
    (pictures / "cut.png").write_bytes((pictures / "00.png").read_bytes()[:90])
    (pictures / "wide.png").write_bytes(flat_png(4100, 4100))
    (pictures / "00.txt").write_bytes("caf\xe9".encode("cp1252"))
    (pictures / "photo.heic").write_bytes(b"x")
    reasons = {"a broken picture", "a caption that cannot be read", "a file of a format that is not read"}
    whole = "a picture that is too large to be diagnosed whole (give tile)"
    metrics = run_diagnose(DiagnoseConfig([str(pictures)], detector, str(tmp_path / "out"), overlays=False))
    assert metrics["skipped"] == dict.fromkeys(reasons | {whole}, 1)
    assert list(records_of(tmp_path / "out")) == ["00", "01", "02", "thin"]
    line = capsys.readouterr().err.splitlines()[-1]
    for name in ("cut.png", "wide", "00.txt (line 1", "photo.heic"):
        assert name in line
    metrics = run_inject(InjectConfig([str(pictures)], str(tmp_path / "set"), kinds=["tint"], longest=64))
    small = "a picture of less than 16 pixels"
    assert metrics["skipped"] == dict.fromkeys(reasons | {small}, 1)
    assert metrics["kinds"] == {"clean": 4, "tint": 4}
    line = capsys.readouterr().err.splitlines()[-1]
    for name in ("cut.png", "thin", "00.txt (line 1", "photo.heic"):
        assert name in line


def test_a_picture_is_damaged_only_where_there_is_room_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdoctor.detector.commands.inject_pictures._MAX_PIXELS", 500)
    write_pictures(tmp_path / "pictures", 1)
    Image.fromarray(picture(16, 16)).save(tmp_path / "pictures" / "small.png")
    options = {"kinds": ["tint"], "damaged": 0}
    metrics = run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "set"), **options))
    assert metrics["pictures"] == 1
    assert metrics["skipped"] == {"a picture of more than 500 pixels to damage (give longest)": 1}
    assert "00.png" in next(iter(metrics["skipped_examples"].values()))
    metrics = run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "shrunk"), longest=24, **options))
    assert metrics["pictures"] == 2


def test_where_nothing_can_be_read_the_exit_code_says_so(tmp_path, detector, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"no picture")
    with tarfile.open(pictures / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.md"), io.BytesIO())
    for argv in (["diagnose", str(pictures), "--detector", detector], ["inject", str(pictures)]):
        assert main([*argv, "--output", str(tmp_path / argv[0])]) == 2
        error = capsys.readouterr().err
        assert "1 x a broken picture" in error
        assert "a.png" in error
        assert "1 x a shard without pictures" in error


def test_names_of_any_length_and_shape_are_diagnosed_once(tmp_path, detector):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = io.BytesIO()
    Image.fromarray(picture()).save(data, "PNG")
    for name in ("a.jpg", "a.png", "a.png.png", "s/x.png", "k" * 251 + ".png", "k" * 250 + ".jpeg"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(data.getvalue())
    keys = ("x", "dir/x", "k" * 240, "l" * 255, "m/" * 20 + "n" * 252)
    with tarfile.open(pictures / "s.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in keys:
            info = tarfile.TarInfo(f"./{key}.PNG")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    config = DiagnoseConfig([str(pictures)], detector, str(tmp_path / "out"))
    metrics = run_diagnose(config)
    names = ["a.jpg", "a.png", "a.png.png", "s/x", "k" * 251, "k" * 250, *(f"s.tar/{key}" for key in keys)]
    assert metrics["skipped"] == {}
    assert sorted(records_of(tmp_path / "out")) == sorted(names)
    for folder in ("maps", "overlays"):
        assert all((tmp_path / "out" / folder / file_name(name, ".png")).is_file() for name in names)
    assert (tmp_path / "out" / "gallery.html").read_text().count("overlays/") == len(names)
    # Again: all are known to be done.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "maps").rglob("*.png")}
    assert run_diagnose(config)["pictures"] == len(names)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "maps").rglob("*.png")}


def test_two_names_that_exclude_each_other_cost_one_picture(tmp_path, detector):
    write_pictures(tmp_path / "pictures", 1)
    data = (tmp_path / "pictures" / "00.png").read_bytes()
    with tarfile.open(tmp_path / "pictures" / "s.tar", "w") as tar:
        for name in ("a.png", "a.png/b.png", "c.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    metrics = run_diagnose(DiagnoseConfig([str(tmp_path / "pictures")], detector, str(tmp_path / "out")))
    assert list(records_of(tmp_path / "out")) == ["00", "s/a", "s/c"]
    assert metrics["skipped"] == {"a name that no file can have here": 1}


def test_names_that_differ_in_letter_case_alone(tmp_path, detector, monkeypatch):
    """On a file system that takes them for one, none replaces another's files."""
    write_pictures(tmp_path / "pictures", 1)
    data = (tmp_path / "pictures" / "00.png").read_bytes()
    with tarfile.open(tmp_path / "pictures" / "s.tar", "w") as tar:
        for name in ("Cat.png", "cat.png", "dog.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = DiagnoseConfig([str(tmp_path / "pictures")], detector, str(tmp_path / "out"))
    monkeypatch.setattr(source_index, "ignores_case", lambda folder: True)
    for _ in range(2):  # the second attempt counts them again
        metrics = run_diagnose(config)
        assert list(records_of(tmp_path / "out")) == ["00", "s/Cat", "s/dog"]
        assert metrics["skipped"] == {source_index.CASE_ALONE: 1}
        assert metrics["skipped_examples"] == {source_index.CASE_ALONE: "s/cat (s/Cat)"}
    for name in ("A.png", "a.png"):
        (tmp_path / "pictures" / name).write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png: differs from .*A\.png in letter case alone"):
        run_diagnose(config)
    monkeypatch.undo()
    assert run_diagnose(config)["pictures"] == 6


def test_an_output_below_its_input_is_not_diagnosed(tmp_path, detector):
    write_pictures(tmp_path, 2)
    for _ in range(2):
        metrics = run_diagnose(DiagnoseConfig([str(tmp_path)], detector, str(tmp_path / "out")))
        assert metrics["pictures"] == 2
    assert metrics["skipped"] == {"an output folder of diagnose": 1}
    with pytest.raises(UserError, match="expected a folder of pictures, got an output folder of diagnose"):
        run_diagnose(DiagnoseConfig([str(tmp_path / "out")], detector, str(tmp_path / "other")))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate 9 GB")], ids=["memory", "runtime"])
def test_what_the_detector_cannot_take_is_one_picture(tmp_path, detector, monkeypatch, error):
    write_pictures(tmp_path / "pictures", 3)
    Image.fromarray(np.full((24, 32, 3), 255, np.uint8)).save(tmp_path / "pictures" / "01.png")
    network = ConvDetector.network

    def failing(self, pixels):
        if (pixels.std((2, 3)) < 1e-3).any():
            raise error
        return network(self, pixels)

    # Opened before: the probe of a fresh detector is flat too.
    monkeypatch.setattr("diffdoctor.detector.commands.diagnose.open_detector", opened(detector))
    monkeypatch.setattr(ConvDetector, "network", failing)
    metrics = run_diagnose(DiagnoseConfig([str(tmp_path / "pictures")], detector, str(tmp_path / "out")))
    assert list(records_of(tmp_path / "out")) == ["00", "02"]
    assert metrics["skipped"] == {"a picture on which the detector failed": 1}
    assert "01" in metrics["skipped_examples"]["a picture on which the detector failed"]


def opened(folder):
    loaded = ConvDetector.from_pretrained(folder)
    return lambda *_, **__: loaded


def test_a_thin_picture_is_enlarged_by_its_area():
    config = PreprocessConfig(min_side=64)
    assert config.network_size(16, 16) == (64, 64)
    assert config.network_size(16, 1024) == (64, 4096)
    for height, width, most in ((1, 3000, 2**20), (3000, 1, 2**20), (1, 100_000, 2**23)):
        rows, columns = config.network_size(height, width)
        assert rows * columns < most
    detector = ConvDetector((8,))
    assert not detector.takes(5000, 5000)
    assert detector.takes(5000, 5000, tile=512)
    with pytest.raises(ValueError, match=r"images: expected at most 16,777,216 pixels for the network"):
        detector.preprocess(torch.zeros(1, 3, 1, 1).expand(1, 3, 1, 2 * MAX_NETWORK_PIXELS))


def test_large_pictures_are_batched_by_their_area(monkeypatch):
    monkeypatch.setattr("diffdoctor.detector.predict._BATCH_PIXELS", 3 * 24 * 32)
    samples = [{"picture": picture()}] * 5 + [{"picture": picture(80, 80)}] * 2
    assert [len(batch) for batch in in_batches(samples, 16)] == [3, 2, 1, 1]


@pytest.mark.parametrize("size", [(40, 70), (16, 90), (33, 16)])
def test_tiles_are_blended_as_over_the_whole_picture(size):
    """Against the sum over the whole picture, which costs tiles times its area."""
    import torch.nn.functional as F

    from diffdoctor.detector.models.base import _ramp, _tile_starts

    torch.manual_seed(0)
    detector = ConvDetector((8, 16)).eval()
    images = torch.rand(2, 3, *size, requires_grad=True)
    found = detector.confidence(images, tile=24, overlap=0.3)
    total = weight = 0.0
    for y in _tile_starts(size[0], 24, 0.3):
        for x in _tile_starts(size[1], 24, 0.3):
            crop = images[:, :, y : y + 24, x : x + 24]
            h, w = crop.shape[2:]
            blend = torch.minimum(_ramp(h, 24 * 0.3, images)[:, None], _ramp(w, 24 * 0.3, images))
            padding = (x, size[1] - x - w, y, size[0] - y - h)
            total = total + F.pad(detector.confidence(crop) * blend, padding)
            weight = weight + F.pad(blend, padding)
    assert torch.equal(found, total / weight)
    weights = torch.rand_like(found)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), images)[0] for each in (found, total / weight))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_later_record_is_known_by_number_not_by_time(tmp_path):
    import os

    for attempt, share in enumerate((0.1, 0.2, 0.3)):
        with Journal(tmp_path) as journal:
            journal.append([{"name": "a", "path": "a.png", "share": share}])
        newest = max(tmp_path.glob("part-*"), key=lambda path: path.stat().st_mtime_ns)
        # The clock goes back before each attempt.
        os.utime(newest, (10**9 - attempt, 10**9 - attempt))
    assert [record["share"] for record in Journal(tmp_path).read()] == [0.3]


def test_a_kind_below_half_of_its_share_is_said(tmp_path, capsys):
    stats = InjectStats()
    stats.kinds.update({"tint": 21, "swirl": 11, "seam": 6, "clean": 40, "benign:blur": 9})
    stats.failed = 2
    assert stats.rare_kinds(["tint", "swirl", "seam"]) == ({"seam": 6}, 40 / 3)
    stats.kinds.update({"seam": 1})
    assert stats.rare_kinds(["tint", "swirl", "seam"])[0] == {}
    # Flat pictures: nothing can be permuted there.
    for index in range(4):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 40 * index, np.uint8)).save(tmp_path / "flat" / f"{index}.png")
    config = InjectConfig([str(tmp_path / "flat")], str(tmp_path / "set"), kinds=["tint", "pixelate"], damaged=4)
    metrics = run_inject(config)
    assert metrics["rare_kinds"] == {"pixelate": 0}
    line = capsys.readouterr().err.splitlines()[-1]
    assert "of each kind of damage 8 pictures are due, but there are of pixelate 0 (see --visible)" in line


def test_folders_whose_names_are_no_unicode_are_as_good_as_others(tmp_path):
    import os

    place = tmp_path / os.fsdecode(b"K\xe4se")
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    ConvDetector((8, 16)).save_pretrained(place / "detector")
    write_pictures(place / "in", 2)
    for argv in (
        ["inject", str(place / "in"), "--output", str(place / "set")],
        ["diagnose", str(place / "in"), "--detector", str(place / "detector"), "--output", str(place / "maps")],
        [
            "evaluate",
            "detector",
            str(place / "set"),
            "--detector",
            str(place / "detector"),
            "--output",
            str(place / "ev"),
        ],
    ):
        assert main(argv) == 0
    assert list(records_of(place / "maps")) == ["00", "01"]
