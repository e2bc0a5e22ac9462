"""Masks of one's own become a set of shards, and a set becomes COCO's files."""

import json

import numpy as np
import pytest

from diffdoctor.detector import ArrayData, coco_pictures, masked_pictures, read_shards, write_coco, write_shards
from diffdoctor.runs.errors import UserError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pyarrow")
pytest.importorskip("pycocotools")

BOX = {"x": 5, "y": 3, "width": 8, "height": 6}


@pytest.fixture
def painted(tmp_path):
    """A folder of two pictures of 24 x 32 pixels, of which one has a mask with a box."""
    rng = np.random.default_rng(0)
    for name in ("a/cat.jpg.png", "dog 1.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "dog 1.txt").write_text("a dog")
    mask = np.zeros((24, 32), np.uint8)
    mask[3:9, 5:13] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "dog 1.png")
    return tmp_path


def test_masks_become_a_set_and_the_set_becomes_coco(painted):
    samples = masked_pictures(painted / "pictures", painted / "masks", unmasked="clean")
    assert write_shards(samples, painted / "set") == 2
    cat, dog = read_shards(painted / "set")
    assert (cat["file"], dog["file"]) == ("a/cat.jpg.png", "dog 1.png")
    assert (cat["label"], dog["prompt"], cat["mask"].max()) == ("human", "a dog", 0)
    assert np.array_equal(dog["picture"], np.asarray(Image.open(painted / "pictures" / "dog 1.png")))
    assert (dog["mask"] > 0.5).sum() == BOX["width"] * BOX["height"]

    for _ in range(2):  # what was written before is replaced
        assert write_coco(painted / "set", painted / "coco") == 2
    dataset = json.loads((painted / "coco" / "annotations.json").read_text())
    (annotation,) = dataset["annotations"]
    assert annotation["bbox"] == list(BOX.values())
    assert annotation["area"] == BOX["width"] * BOX["height"]
    again = list(coco_pictures(painted / "coco" / "annotations.json", painted / "coco"))
    for one, other in zip((cat, dog), again, strict=True):
        assert np.array_equal(one["picture"], other["picture"])
        assert np.array_equal(one["mask"] > 0.5, other["mask"] > 0.5)


def test_masks_of_0_and_1_are_refused(painted):
    path = painted / "masks" / "dog 1.png"
    mask = (np.asarray(Image.open(path)) > 0).astype(np.uint8)
    Image.fromarray(mask).save(path)
    pictures = np.zeros((1, 24, 32, 3), np.uint8)
    for samples in (
        masked_pictures(painted / "pictures", painted / "masks", unmasked="clean"),
        [{"picture": pictures[0], "mask": mask}],
    ):
        with pytest.raises(ValueError, match="mask: expected 255 where a picture is broken"):
            write_shards(samples, painted / "set")
        assert not (painted / "set").exists()
    with pytest.raises(ValueError, match="masks: expected 255 where a picture is broken"):
        ArrayData(pictures, mask[None])
    assert write_shards([{"picture": pictures[0], "mask": mask / 255, "label": "pseudo"}], painted / "set") == 1


def test_polygons_of_other_tools_are_read(painted):
    x, y, w, h = BOX.values()
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    dataset = {
        "images": [{"id": 7, "file_name": "dog 1.png", "height": 24, "width": 32}],
        "categories": [{"id": 3, "name": "hand"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "segmentation": [polygon], "iscrowd": 0}],
    }
    (painted / "instances.json").write_text(json.dumps(dataset))
    (sample,) = coco_pictures(painted / "instances.json", painted / "pictures")
    rows, columns = np.nonzero(sample["mask"])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 8, 5, 12)


def refused(samples):
    with pytest.raises(UserError) as error:
        list(samples)
    return str(error.value)


def test_what_does_not_fit_is_named(painted):
    pictures, masks = painted / "pictures", painted / "masks"
    assert "cat.jpg.png: expected a mask" in refused(masked_pictures(pictures, masks))
    assert [s["file"] for s in masked_pictures(pictures, masks, unmasked="skip")] == ["dog 1.png"]
    assert "unmasked: expected refuse, skip or clean" in refused(masked_pictures(pictures, masks, unmasked="no"))
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(masks / "dog 1.png")
    message = refused(masked_pictures(pictures, masks, unmasked="clean"))
    assert "dog 1.png: expected a mask of (24, 32), as the picture dog 1.png, got (12, 16)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "expected a COCO file with"),
        ({"images": [{"id": 7}]}, "expected a COCO file with"),
        ({"images": [{"id": 7, "file_name": "../x.png", "height": 1, "width": 1}]}, "expected a path below"),
        ({"images": [{"id": 7, "file_name": "dog 1.png", "height": 9, "width": 9}]}, "expected 9 x 9 pixels"),
        ({"annotations": [{"id": 5, "image_id": 7, "segmentation": [["x"]]}]}, "annotation 5: expected a polygon"),
    ],
    ids=["no-images", "no-size", "outside", "other-size", "segmentation"],
)
def test_a_broken_coco_file_is_named(painted, change, message):
    dataset = {"images": [{"id": 7, "file_name": "dog 1.png", "height": 24, "width": 32}]}
    (painted / "instances.json").write_text(json.dumps(dataset | change))
    assert message in refused(coco_pictures(painted / "instances.json", painted / "pictures"))


def test_a_folder_of_something_else_is_not_replaced(painted):
    (painted / "coco").mkdir()
    (painted / "coco" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="got one that holds something else"):
        write_coco(painted / "pictures", painted / "coco")
    assert (painted / "coco" / "notes.txt").read_text() == "mine"
