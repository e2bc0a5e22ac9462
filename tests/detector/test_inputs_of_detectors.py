"""Where a detector is loaded from, and what is said of what is none; pictures as people have them."""

import json

import numpy as np
import pytest
import torch

from diffdoctor.detector import ConvDetector, FunctionDetector, load_detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.hub import is_hub_id
from support.pictures import picture, write_pictures

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training's output folder, and folders of other things."""
    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    ConvDetector((8, 8)).save_pretrained(folder / "run" / "detector")
    (folder / "run" / "config.yaml").write_text("")
    ConvDetector((8, 8)).save_pretrained(folder / "unfinished" / "best")
    (folder / "started" / "checkpoints").mkdir(parents=True)
    for name, file, value in (
        ("segformer", "config.json", {"model_type": "segformer"}),
        ("vit", "config.json", {"model_type": "vit"}),
        ("pipeline", "model_index.json", {}),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(value))
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("none")
    return folder


def test_the_output_folder_of_a_training_is_its_detector(folder):
    one, two = (load_detector(folder / name).state_dict() for name in ("run", "run/detector"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("load", [load_detector, open_detector])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"detector: expected a folder with a detector, .*, got ''"),
        ("  ", r"detector: expected a folder with a detector, .*, got '  '"),
        ("{f}/run/detector/model.safetensors", r"expected a folder with a detector, got a file; give .*/run/detector$"),
        ("{f}/run/detector/detector.json", r"expected a folder with a detector, got a file; give .*/run/detector$"),
        ("{f}/unfinished", r"not finished: the same command resumes it, and .*best is its best detector so far"),
        ("{f}/started", r"not a complete detector: a training that has not finished"),
        ("{f}/segformer", r"a plain SegFormer of transformers, which `train-detector --encoder` begins with"),
        ("{f}/vit", r"a model of transformers \(vit\)"),
        ("{f}/pipeline", r"a diffusers pipeline"),
        ("{f}/empty", r"not a complete detector: no detector.json"),
        ("{f}/rum", r"expected a folder .*, got neither \(.* holds run\)"),
        ("~nobody-of-this-name/detector", r"expected a folder with a detector"),
    ],
)
def test_what_is_no_detector_is_said_to_be_what_it_is(folder, source, message, load):
    with pytest.raises(UserError, match=message):
        load(source.format(f=folder))


def test_a_path_whose_parent_is_there_is_no_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert not is_hub_id("run/detectr")
    assert is_hub_id("nvidia/mit-b2")
    with pytest.raises(UserError, match=r"run/detectr: expected .*, got neither \(run holds detector\)"):
        load_detector("run/detectr")
    assert load_detector("run/detector").kind == "conv"


def test_pictures_of_any_kind_give_the_map_of_the_same_tensor(folder):
    detector = load_detector(folder / "run")

    def same(one, two):
        # other strides of the same pixels, another order of sums
        torch.testing.assert_close(detector.confidence(one), two, rtol=0, atol=1e-5)

    array = picture(24, 40)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    expected = detector.confidence(tensor)
    assert expected.shape == (1, 1, 24, 40)
    write_pictures(folder / "pictures", 1)
    Image.fromarray(array).save(path := folder / "one.png")
    for one in (array, array[None], Image.fromarray(array), path, str(path)):
        same(one, expected)
        if not (isinstance(one, np.ndarray) and one.ndim == 4):
            same([one, array], expected.repeat(2, 1, 1, 1))
    torch.testing.assert_close(detector.confidence(array, tile=16), detector.confidence(tensor, tile=16))
    # grey, palettes and transparency become RGB; a photo that lies on its side is put upright
    same(Image.fromarray(array[..., 0]), detector.confidence(np.repeat(array[..., :1], 3, axis=2)))
    turned = Image.fromarray(array)
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.jpg", quality=100, exif=turned.getexif())
    assert detector.confidence(folder / "turned.jpg").shape == (1, 1, 40, 24)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images: expected at least one picture, .*, got none"),
        ([picture(16, 16), picture(16, 24)], ValueError, r"got sizes \(16, 16\) and \(16, 24\); give them one by one"),
        (picture(16, 16).astype(np.float32), TypeError, "images: expected a float tensor .*, got an array of float32"),
        (picture(16, 16)[..., 0], TypeError, "images: expected a float tensor"),
        (3, TypeError, "images: expected a float tensor .*, got int"),
        ("nowhere.png", UserError, "nowhere.png: expected a picture that can be read, got No such file or directory"),
        (__file__, UserError, "expected a picture that can be read"),
    ],
)
def test_other_things_are_no_pictures(images, error, message):
    with pytest.raises(error, match=message):
        ConvDetector((8, 8)).confidence(images)


@pytest.mark.parametrize("make", [lambda: ConvDetector((8, 8)), lambda: FunctionDetector(lambda p: p.mean(1))])
def test_another_range_than_the_one_given_is_noticed_at_the_first_call(make):
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got -.* to .*; for .* pass value_range=\(-1, 1\)"):
        make().confidence(2 * pictures - 1)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got .* to 255"):
        make().confidence(255 * pictures)
    detector = make()
    # what a VAE decodes is a little outside of its range
    detector.confidence(2.6 * pictures - 1.3, value_range=(-1, 1))
