"""Labels out and back: shards, Label Studio, COCO, folders of masks."""

import json

import numpy as np
import pytest

from diffdoctor.annotate.config import AnnotateExportConfig, AnnotateImportConfig
from diffdoctor.annotate.export import run_annotate_export
from diffdoctor.annotate.imports import run_annotate_import
from diffdoctor.annotate.label_studio import check_config, decode_rle, encode_rle, region
from diffdoctor.annotate.labels import key_of, labels_of
from diffdoctor.annotate.queue import Queue, Submission
from diffdoctor.annotate.review import decide
from diffdoctor.data.codec import encode_mask
from diffdoctor.data.shards import ShardData
from diffdoctor.runs.errors import UserError
from support.annotation import make_project, picture, proposal, spot

# What label-studio-sdk 2.1.2 writes for these masks, each value four times: (mask, bytes).
VECTORS = {
    "empty": (np.zeros((5, 7)), [0, 0, 0, 140, 57, 27, 254, 139, 0, 0]),
    "square": (
        np.pad(np.full((2, 4), 255), ((1, 2), (2, 1))),
        [0, 0, 0, 140, 57, 27, 254, 35, 0, 191, 255, 108, 2, 255, 254, 59, 0, 0],
    ),
    "soft": (
        np.array([[95, 130, 194, 217, 207], [235, 15, 163, 33, 215], [217, 130, 248, 189, 16]]),
        list(bytes.fromhex("0000003c391bfc6bf1c147851ecc79f1f5c61f1d1c6431ebc7b31c147f11dec620")),
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_run_lengths_are_those_of_label_studio(name):
    mask, rle = VECTORS[name]
    assert encode_rle(mask.astype(np.uint8)) == rle
    np.testing.assert_array_equal(decode_rle(rle, *mask.shape), mask)


def test_run_lengths_of_any_mask_come_back():
    rng = np.random.default_rng(0)
    masks = [(rng.uniform(size=(31, 17)) < share) * np.uint8(255) for share in (0.01, 0.5, 1)]
    # a run of more than 65,536 values, and lengths at the edges of the sizes (4, 8, 16, 256 values and one more)
    masks += [
        np.eye(300, 300, 5, np.uint8) * 255,
        np.repeat(np.arange(9, dtype=np.uint8), [1, 2, 3, 4, 5, 64, 65, 99, 7])[None],
    ]
    for mask in masks:
        np.testing.assert_array_equal(decode_rle(encode_rle(mask), *mask.shape), mask)
    # single values together, as the browser writes them: 12 values, 0 00 011 and four of 8 bits, three times
    bits = (
        f"{12:032b}{7:05b}"
        + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
        + 3 * ("000011" + "".join(f"{value:08b}" for value in (1, 2, 3, 200)))
    )
    data = [int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)]
    np.testing.assert_array_equal(decode_rle(data, 1, 3), [[200, 200, 200]])


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ([0, 0, 0, 140, 57], "end early"),
        ([0, 0, 0, 140, 57, 27, 254], "end early"),
        ([0, 0, 1, 140, 57, 27, 254, 139, 0, 0], "expected 140 values of 8 bits, got 396"),
        ([0, 0, 0, 140, 57, 27, 255, 255, 0, 0, 0, 0], "runs of 140 values"),
        ([300], "a list of bytes"),
    ],
)
def test_broken_run_lengths_are_refused(rle, message):
    with pytest.raises(UserError, match=message):
        decode_rle(rle, 5, 7)


def answer(project, task, rater, mask, ignore=None):
    queue = Queue(project)
    project.store.add_person(rater, "annotator")
    me = project.store.one("SELECT id FROM annotator WHERE name = ?", rater)[0]
    marked = mask is not None and mask.any()
    done = Submission(
        1, "damaged" if marked else "clean", mask=mask if marked else None, ignore=ignore, active_ms=5000, wall_ms=9000
    )
    assert queue.take_answer(task, me, done)
    return me


def test_who_finds_damage_and_does_not_say_where_does_not_call_the_rest_sound(tmp_path):
    project = make_project(tmp_path, 2, needed=lambda seed: 2)
    for task, mask in ((1, spot(0)), (2, None)):
        answer(project, task, "ann", mask)
        project.store.add_person("ben", "annotator")
        ben = project.store.one("SELECT id FROM annotator WHERE name = 'ben'")[0]
        assert Queue(project).take_answer(task, ben, Submission(1, "damaged", tags=("hands",), active_ms=1, wall_ms=1))
    first, second = labels_of(project, conflicts=True)
    np.testing.assert_array_equal(first.mask, spot(0) > 0)
    assert second == "a damaged picture of which nothing is marked"


@pytest.fixture
def project(tmp_path):
    """Five tasks: one answer; clean; two alike; two that differ and were reviewed; open."""
    project = make_project(
        tmp_path, 5, needed=lambda seed: 1 + (seed in (2, 3)), kind=lambda seed: ["audit", "normal"][seed % 2]
    )
    undecided = np.zeros((48, 64), np.uint8)
    undecided[:4] = 255
    answer(project, 1, "ann", spot(0), undecided)
    answer(project, 2, "ann", None)
    answer(project, 3, "ann", spot(2))
    answer(project, 3, "ben", np.roll(spot(2), 1, axis=1))
    ann = answer(project, 4, "ann", spot(3))
    answer(project, 4, "ben", None)
    assert project.store.one("SELECT state FROM task WHERE id = 4")[0] == "conflict"
    mine = project.store.one("SELECT id FROM annotation WHERE task = 4 AND annotator = ?", ann)[0]
    decide(project, 4, ann, "accept", annotation=mine)
    return project


def export(project, output, **options):
    run_annotate_export(AnnotateExportConfig(str(project.folder), str(output), **options))


def test_shards_hold_what_people_said(project, tmp_path, capsys):
    export(project, tmp_path / "set")
    data = ShardData(tmp_path / "set")
    samples = [data[index] for index in range(len(data))]
    uids = [row[0] for row in project.store.all("SELECT uid FROM picture ORDER BY id")]
    assert [each["key"] for each in samples] == [key_of(uid, 1) for uid in uids[:4]]
    assert {each["label"] for each in samples} == {"human"} and {each["round"] for each in samples} == {1}
    two = (spot(2) > 0) / 2 + (np.roll(spot(2), 1, axis=1) > 0) / 2
    for sample, mask in zip(samples, [spot(0) > 0, np.zeros((48, 64)), two, spot(3) > 0], strict=True):
        np.testing.assert_allclose(sample["mask"], np.rint(255 * mask) / 255, atol=1e-6)
    for seed, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["picture"], picture(seed))
    assert samples[0]["ignore"][:4].all() and not samples[0]["ignore"][4:].any()
    assert [each["merge"] for each in samples] == ["single", "single", "mean", "reviewed"]
    assert [each["raters"] for each in samples] == [1, 1, 2, 2] and samples[2]["seconds"] == 10
    assert samples[0]["prompt"] == "a sign, number 0" and samples[0]["task_kind"] == "audit"
    export(project, tmp_path / "hard", merge="majority")
    hard = ShardData(tmp_path / "hard")
    np.testing.assert_array_equal(hard[2]["mask"], two == 1)
    export(project, tmp_path / "sure", merge="reviewed")
    assert len(ShardData(tmp_path / "sure")) == 3
    assert "a picture of several answers that nobody reviewed" in capsys.readouterr().err


def test_nothing_to_export_is_said(tmp_path):
    project = make_project(tmp_path, 1)
    with pytest.raises(UserError, match="labels to export"):
        export(project, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def copy_of(project, tmp_path):
    """A project of the same tasks without answers."""
    (tmp_path / "other").mkdir()
    return make_project(tmp_path / "other", 5)


@pytest.mark.parametrize("kind", ["label-studio", "coco"])
def test_labels_go_to_other_tools_and_come_back(project, tmp_path, kind, capsys):
    export(project, tmp_path / "out", format=kind)
    export(project, tmp_path / "out", format=kind)  # written anew
    other = copy_of(project, tmp_path)
    source = tmp_path / "out" / {"label-studio": "tasks.json", "coco": "annotations.json"}[kind]
    options = {"labelling": str(tmp_path / "out" / "labelling.xml")} if kind == "label-studio" else {}
    config = AnnotateImportConfig(str(other.folder), str(source), kind, rater="back", **options)
    run_annotate_import(config)
    first = {label.key: label for label in labels_of(project, merge="majority")}
    second = {label.key: label for label in labels_of(other)}
    assert first.keys() == second.keys()
    for key, label in first.items():
        if label.values["merge"] != "majority":  # of two that differ both tools get what either marked
            np.testing.assert_array_equal(second[key].mask, label.mask)
    if kind == "coco":
        key = next(iter(first))
        np.testing.assert_array_equal(second[key].ignore, first[key].ignore)
    # imported again, nothing is there twice
    before = other.store.one("SELECT count(*) FROM annotation")[0]
    run_annotate_import(config)
    assert other.store.one("SELECT count(*) FROM annotation")[0] == before == 4
    assert "4 were there already" in capsys.readouterr().err
    assert other.store.verify() == []


@pytest.mark.parametrize("kind", ["label-studio", "coco"])
def test_a_folder_of_somebody_elses_is_not_replaced(project, tmp_path, kind):
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    (tmp_path / "out" / "pictures" / "mine.txt").write_text("mine")
    with pytest.raises(UserError):
        export(project, tmp_path / "out", format=kind)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["pictures", "mine.txt"]


def test_open_tasks_go_to_label_studio_with_the_proposal(project, tmp_path):
    export(project, tmp_path / "out", format="label-studio", image_prefix="/data/local-files/?d=x/")
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert len(tasks) == 5 and "annotations" not in tasks[4]
    (found,) = tasks[4]["predictions"][0]["result"]
    np.testing.assert_array_equal(decode_rle(found["value"]["rle"], 48, 64) > 0, proposal(4) >= 128)
    assert found["image_rotation"] == 0 and (found["original_width"], found["original_height"]) == (64, 48)
    image = tasks[0]["data"]["image"]
    assert image.startswith("/data/local-files/?d=x/pictures/r01-")
    assert (tmp_path / "out" / image.partition("=x/")[2]).is_file()


def label_studio_file(tmp_path, annotations, name="0000"):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([{"data": {"image": f"/data/upload/1/{name}.png?token=1"}, "annotations": annotations}]))
    return path


def test_what_label_studio_holds_beside_the_brush_is_counted(tmp_path, capsys):
    project = make_project(tmp_path, 1)
    half = np.zeros((48, 64), np.uint8)
    half[:24] = 255
    box = {"type": "rectanglelabels", "value": {"x": 1}}
    annotations = [
        {
            "completed_by": {"id": 3, "email": "a@b.c"},
            "lead_time": 12.5,
            "result": [region(spot(0)), region(half), box],
        },
        {"completed_by": 4, "result": [box]},
        {"completed_by": 5, "result": []},
        {"completed_by": 6, "was_cancelled": True, "result": []},
    ]
    path = label_studio_file(tmp_path, annotations)
    run_annotate_import(AnnotateImportConfig(str(project.folder), str(path)))
    said = capsys.readouterr().err
    assert "2 labels" in said and "2 x a result that is not of the brush" in said and "was cancelled" in said
    rows = project.store.all(
        "SELECT name, verdict, mask, active_ms FROM annotation JOIN annotator ON annotator.id = annotator"
    )
    assert [tuple(row)[:2] for row in rows] == [("label-studio a@b.c", "damaged"), ("label-studio 5", "clean")]
    np.testing.assert_array_equal(project.store.mask(rows[0]["mask"]), np.maximum(spot(0), half))
    assert rows[0]["active_ms"] == 12500
    # somebody who only came in by import has no token
    assert project.store.one("SELECT min(disabled) FROM annotator")[0] == 1


def test_what_does_not_fit_is_refused_before_anything_is_imported(tmp_path):
    project = make_project(tmp_path, 2)
    config = tmp_path / "config.xml"
    config.write_text('<View><BrushLabels name="tag" toName="image"><Label value="hand"/></BrushLabels></View>')
    path = label_studio_file(tmp_path, [{"result": [region(spot(0))]}])
    with pytest.raises(UserError, match="hand, got tag, image"):
        run_annotate_import(AnnotateImportConfig(str(project.folder), str(path), labelling=str(config)))
    with pytest.raises(UserError, match="BrushLabels"):
        config.write_text("<View/>")
        check_config(config, [])
    turned = region(spot(0)) | {"image_rotation": 90}
    path = label_studio_file(tmp_path, [{"result": []}, {"result": [turned]}])
    with pytest.raises(UserError, match="not turned"):
        run_annotate_import(AnnotateImportConfig(str(project.folder), str(path)))
    assert project.store.one("SELECT count(*) FROM annotation")[0] == 0


def test_masks_are_taken_from_a_folder(tmp_path, capsys):
    project = make_project(tmp_path, 3)
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "0000.png").write_bytes(encode_mask(spot(0)))
    (folder / "0001.mask.png").write_bytes(encode_mask(np.zeros((48, 64), np.uint8)))
    (folder / "stranger.png").write_bytes(encode_mask(spot(0)))
    config = AnnotateImportConfig(str(project.folder), str(folder), "masks", rater="eva")
    run_annotate_import(config)
    assert "2 labels" in (said := capsys.readouterr().err) and "a name of no task (first: stranger)" in said
    first, second = labels_of(project)
    np.testing.assert_array_equal(first.mask, spot(0) > 0)
    assert not second.mask.any()
    (folder / "0002.png").write_bytes(encode_mask((spot(0) > 0).astype(np.uint8)))
    run_annotate_import(config)
    assert "a mask of 0 and 1, where 255 is marked (first: 0002.png)" in capsys.readouterr().err
    (folder / "0002.png").write_bytes(encode_mask(spot(0)[:10]))
    with pytest.raises(UserError, match="a mask of 64 x 48, got 64 x 10"):
        run_annotate_import(config)


def test_polygons_of_coco_are_read(tmp_path):
    project = make_project(tmp_path, 1)
    content = {
        "images": [{"id": 9, "file_name": "a/b/0000.png", "height": 48, "width": 64}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 1, "segmentation": [[10, 10, 20, 10, 20, 20, 10, 20]]},
            {"id": 2, "image_id": 9, "category_id": 2, "segmentation": {"size": [48, 64], "counts": [0, 48, 3024]}},
        ],
        "categories": [{"id": 1, "name": "artifact"}, {"id": 2, "name": "cat"}],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    run_annotate_import(AnnotateImportConfig(str(project.folder), str(path), "coco", label="artifact"))
    (label,) = labels_of(project)
    expected = np.zeros((48, 64))
    expected[10:20, 10:20] = 1
    np.testing.assert_array_equal(label.mask, expected)
    with pytest.raises(UserError, match="category: expected one of artifact, cat"):
        run_annotate_import(AnnotateImportConfig(str(project.folder), str(path), "coco", label="dog"))
    content["annotations"][1]["segmentation"]["counts"] = [1]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotation 2: expected a polygon or run lengths"):
        run_annotate_import(AnnotateImportConfig(str(project.folder), str(path), "coco"))
