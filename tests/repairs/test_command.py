"""`diffdoctor repair` on files: what it writes, what it resumes, several processes, what it refuses."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffdoctor.cli import main
from diffdoctor.data import source_index
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.viz.draw import png_bytes
from support.paths import PROGRAMS, TESTS
from support.pictures import tree
from support.repairs import PROMPT, QUICK, blocks
from support.tiny_pipelines import tiny_pipeline

DETECTOR = f"{TESTS / 'support' / 'repairs.py'}:bright"
OPTIONS = {**QUICK, "method": "resume"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_pipeline("sd").save_pretrained(folder / "pipeline")
    pictures = folder / "pictures"
    (pictures / "sub").mkdir(parents=True)
    texts = PngInfo()
    texts.add_text("parameters", f"{PROMPT}\nNegative prompt: dull\nSteps: 3")
    rgba = Image.fromarray(blocks())
    rgba.putalpha(Image.fromarray(np.full((40, 56), 180, np.uint8)))
    rgba.save(pictures / "a1111.png", pnginfo=texts)
    Image.fromarray(blocks(30, 30, ((4, 5, 8, 9),))).save(pictures / "sub" / "photo.jpg", quality=98)
    (pictures / "sub" / "photo.txt").write_text("a photo of a green circle")
    Image.fromarray(blocks(30, 30, ())).save(pictures / "sound.png")
    Image.fromarray(blocks()).convert("CMYK").save(pictures / "print.jpg")
    (pictures / "broken.png").write_bytes(b"\x89PNG but broken")
    samples = ({"key": f"s{i}", "picture": blocks(24, 24, ((3, 3, 6, 6 + i),)), "prompt": f"sign {i}",
                "mask": np.zeros((24, 24), np.float32)} for i in range(3))  # fmt: skip
    write_shards(samples, folder / "set")
    return folder


def arguments(files, output, **changes):
    pictures = [str(files / "pictures"), str(files / "set" / "*.tar")]
    given = {"pictures": pictures, "pipeline": str(files / "pipeline"), "detector": DETECTOR, "output": str(output)}
    return {**given, **OPTIONS, **changes}


def run(files, output, **changes):
    values = arguments(files, output, **changes)
    return main(["repair", *values.pop("pictures"), *(f"--{name}={value}" for name, value in values.items())])


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "out"
    assert run(files, output) == 0
    return output


def lines(output):
    return {record["name"]: record for record in map(json.loads, (output / "repair.jsonl").read_text().splitlines())}


def test_pictures_keep_what_they_are_but_inside_the_masks(files, done):
    records = lines(done)
    shard = "shard-000000"
    assert set(records) == {"a1111", "sound", "sub/photo", *(f"{shard}/s{i}" for i in range(3))}
    for name, suffix in (("a1111", "png"), ("sub/photo", "jpg"), ("sound", "png")):
        before = np.asarray(Image.open(files / "pictures" / f"{name}.{suffix}"))
        after = np.asarray(Image.open(done / "pictures" / f"{name}.png"))
        path = done / "masks" / f"{name}.png"
        mask = np.asarray(Image.open(path)) > 0 if path.exists() else np.zeros(before.shape[:2], bool)
        assert before.dtype == after.dtype
        assert (before[~mask] == after[~mask]).all()
        assert (before[mask] != after[mask]).any() == (name != "sound")
        record = records[name]
        assert record["changed"] == mask.sum()
        assert record["changed_outside"] == 0
        assert (record["flagged_before"], record["flagged_after"]) == (name != "sound", False)
        for region in record["regions"]:
            assert region["kept"]
            assert region["score_after"] < region["score_before"]
            assert [attempt["why_not"] == "" for attempt in region["tries"]].count(True) == 1
    kept = Image.open(done / "pictures" / "a1111.png")
    assert kept.mode == "RGBA"
    assert set(kept.getchannel("A").tobytes()) == {180}
    assert kept.text["parameters"].startswith(PROMPT)
    prompts = {name: record["prompt"] for name, record in records.items()}
    assert prompts["a1111"] == PROMPT
    assert prompts["sub/photo"] == "a photo of a green circle"
    assert prompts[f"{shard}/s2"] == "sign 2"
    assert {path.name for path in (done / "maps" / "after").rglob("*.png")} == {
        f"{n.split('/')[-1]}.png" for n in records
    }


def test_the_figures_say_what_was_done_and_left_out(done):
    metrics = json.loads((done / "metrics.json").read_text())
    assert (metrics["pictures"], metrics["flagged_before"], metrics["flagged_after"]) == (6, 5, 0)
    assert metrics["kept"] == metrics["regions"] == 6
    assert metrics["changed_outside"] == metrics["without_prompt"] == 0
    assert metrics["method"] == "resume"
    assert min(metrics["seam_before"], metrics["seam_after"]) > 0
    assert sorted(metrics["skipped"].values()) == [1, 1]
    assert any("CMYK" in reason for reason in metrics["skipped"])
    page = (done / "before_after.html").read_text()
    assert page.count('type="range"') == 5
    assert "http" not in page.replace("http://www.w3.org", "")


def test_killed_and_shared_runs_end_in_the_same_files(files, done, commands, tmp_path):
    def results(output):
        return {name: data for name, data in tree(output).items() if not name.startswith(("records/", "config.yaml"))}

    said = {"output": tmp_path / "log", "program": PROGRAMS / "repair_killed.py"}
    commands.run(arguments(files, tmp_path / "killed"), [3, 19], **said)
    commands.run(arguments(files, tmp_path / "shared"), None, count=2, **said)
    for name in ("killed", "shared"):
        assert results(tmp_path / name) == results(done)


def test_a_finished_run_draws_nothing_again_and_a_replaced_picture_alone_is_repaired(files, tmp_path, monkeypatch):
    from diffdoctor.repairs.repairer import Repairer

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(png_bytes(blocks(30, 30, ((4, 5, 8, 9),))))
    given = {"pictures": [str(folder)], "batch_size": 1, "prompt": PROMPT, "gallery": 0}
    assert run(files, tmp_path / "out", **given) == 0
    before, jobs = tree(tmp_path / "out"), []
    plain = Repairer.__call__
    monkeypatch.setattr(Repairer, "__call__", lambda self, these: jobs.extend(these) or plain(self, these))
    assert run(files, tmp_path / "out", **given) == 0
    assert tree(tmp_path / "out") == before
    assert jobs == []
    (folder / "b.png").write_bytes(png_bytes(blocks(30, 30, ((6, 5, 8, 9),))))
    assert run(files, tmp_path / "out", **given) == 0
    assert len(jobs) == 1
    assert lines(tmp_path / "out")["b"]["regions"][0]["box"][1] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": ["nowhere"]}, "nowhere: expected an existing file or folder"),
        ({"pipeline": "nowhere"}, "--pipeline nowhere: no such folder"),
        ({"detector": "nowhere"}, "nowhere"),
        ({"dtype": "int8"}, "dtype: expected one of fp32, bf16, fp16, got 'int8'"),
        ({"scheduler": "PNDMScheduler"}, "the nearest that can is DDIMScheduler"),
        ({"lora": "nowhere"}, "--lora nowhere: expected a file"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"strict": "true", "pictures": ["{}/pictures/print.jpg"]}, "a CMYK picture"),
        ({"pictures": ["{}/pictures/print.jpg"]}, "no picture could be repaired (left out: 1 x a CMYK picture"),
        ({"output": "{}/pipeline"}, "holds"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_no_picture(files, tmp_path, capsys, changes, message):
    changes = {
        name: [each.format(files) for each in value] if name == "pictures" else value.format(files)
        for name, value in changes.items()
    }
    if "holds" in message:
        shutil.copytree(files / "set", tmp_path / "foreign" / "pictures")
        changes["output"] = str(tmp_path / "foreign")
    before = tree(tmp_path)
    assert run(files, changes.pop("output", tmp_path / "out"), **changes) == 2
    errors = capsys.readouterr().err.splitlines()
    assert sum(message in line for line in errors) == 1, errors
    assert "Traceback" not in "".join(errors)
    after = tree(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith("out/")} == before
    assert not any(name.startswith("out/pictures") for name in after)


def test_names_that_differ_in_letter_case_alone_are_repaired_once(files, tmp_path, monkeypatch):
    samples = ({"key": key, "picture": blocks(24, 24, ((3, 3, 6, 6),)), "prompt": "a sign",
                "mask": np.zeros((24, 24), np.float32)} for key in ("Sign", "sign"))  # fmt: skip
    write_shards(samples, tmp_path / "set")
    monkeypatch.setattr(source_index, "ignores_case", lambda folder: True)
    assert run(files, tmp_path / "out", pictures=[str(tmp_path / "set")]) == 0
    assert [name.rpartition("/")[2] for name in lines(tmp_path / "out")] == ["Sign"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["skipped"] == {source_index.CASE_ALONE: 1}
