"""`diffdoctor treat` on files: what it writes, and what it says when something is wrong."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from diffdoctor.cli import main
from diffdoctor.detector import ConvDetector, write_shards
from diffdoctor.maps import PictureRanking
from diffdoctor.runs.lock import locked_folder
from diffdoctor.training import processes
from diffdoctor.treat.loading import load_pipeline
from diffdoctor.treat.lora import WEIGHTS_NAME
from diffdoctor.treat.treatment import Treatment
from support.tiny_pipelines import PROMPTS, tiny_pipeline


def error_line(captured):
    """The one line that says what is wrong."""
    lines = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("diffdoctor treat: error: ")
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("treat")
    tiny_pipeline("sd").save_pretrained(folder / "pipeline")
    ConvDetector((8, 8)).save_pretrained(folder / "detector")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, ""]), encoding="utf-8")
    rng = np.random.default_rng(0)
    samples = (
        {
            "picture": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
            "mask": np.zeros((16, 16), np.float32),
            "prompt": PROMPTS[i % 3],
            "category": "",
            "generator": "",
            "label": "real",
            "round": 0,
        }
        for i in range(4)
    )
    write_shards(samples, folder / "shards", shard_size=4)
    picture = {"picture": np.zeros((16, 16, 3), np.uint8), "mask": np.zeros((16, 16), np.float32)}
    write_shards([picture], folder / "silent")
    shutil.copytree(folder / "detector", folder / "copy")
    (folder / "blank.txt").write_text("\n\n")
    (folder / "long.txt").write_text(f"{PROMPTS[0]}\n{'red square ' * 60}\n")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "pipeline", folder / "broken")
    for path in (folder / "broken" / "unet").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    DDPMPipeline(
        UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
        DDPMScheduler(),
    ).save_pretrained(folder / "other")  # fmt: skip
    return folder


def arguments(files, output, **changes):
    options = {
        "pipeline": files / "pipeline",
        "detector": files / "detector",
        "prompts": files / "prompts.txt",
        "offline": files / "shards",
        "output": output,
        "height": 16,
        "width": 16,
        "steps": 1,
        "batch_size": 2,
        "sampling_steps": 2,
        "evaluate_pictures": 2,
        "rank": 2,
        **changes,
    }
    return ["treat", *(f"--{name}={value}" for name, value in options.items())]


def test_writes_a_lora_that_loads(files, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(arguments(files, output)) == 0
    assert "load_lora_weights" in capsys.readouterr().out
    found = ["checkpoints", "config.yaml", "logs", "lora", "ranking.html", "ranking.parquet"]
    found += ["run.json", "samples", "treat.json"]
    assert sorted(path.name for path in output.iterdir()) == found
    assert len(json.loads((output / "treat.json").read_text())["history"]) == 1
    tiny_pipeline("sd").load_lora_weights(output / "lora")


@pytest.mark.cpu
def test_two_processes_equal_one(files, commands, tmp_path):
    options = {"steps": 2, "batch_size": 4, "replay_area": 0.0, "learning_rate": 1e-2, "log_with": "none"}
    # as `evaluate model` reads them
    options["prompts"] = tmp_path / "prompts.jsonl"
    options["prompts"].write_text("\n".join(json.dumps({"prompt": text, "category": "dots"}) for text in PROMPTS))
    assert main(arguments(files, tmp_path / "one", **options)) == 0
    said = commands.run(*arguments(files, tmp_path / "two", **options), output=tmp_path / "said", count=2)
    # the main process alone says what became of it
    assert said.count("load_lora_weights") == 1
    assert "load_lora_weights" not in (tmp_path / "said.1.out").read_text()
    one, two = (load_file(tmp_path / name / "lora" / WEIGHTS_NAME) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)
    one, two = (PictureRanking.load(tmp_path / name / "ranking.parquet").rows() for name in ("one", "two"))
    by_key = {row["key"]: row for row in two}
    assert len(one) == len(two) and sum(row["visits"] for row in one) == 8
    for row in one:
        assert by_key[row["key"]]["visits"] == row["visits"]
        assert by_key[row["key"]]["loss"] == pytest.approx(row["loss"], rel=1e-3)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["treat", "--help"])
    text = capsys.readouterr().out
    for part in ("--pipeline", "one prompt per line", "--clean_grad", "at the denoiser", "default: 10"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "/nowhere"}, "--pipeline /nowhere: no such folder"),
        ({"pipeline": "{files}/empty"}, "holds no diffusers pipeline"),
        ({"pipeline": "{files}/broken"}, "cannot be loaded"),
        (
            {"pipeline": "{files}/other"},
            "DDPMPipeline cannot be treated yet: served are ChromaPipeline, Flux2KleinPipeline, Flux2Pipeline",
        ),
        ({"detector": "/nowhere"}, "/nowhere"),
        ({"detector": "{files}/empty"}, "empty"),
        ({"monitor": "{files}/copy"}, "monitor: expected a detector with other weights"),
        ({"prompts": "/nowhere.txt"}, "cannot be read"),
        ({"prompts": "{files}/blank.txt"}, "expected at least one prompt, got none"),
        ({"prompts": ""}, "--prompts: expected a name or a path, got an empty one; leave it out instead"),
        ({"offline": ""}, "--offline: expected a name or a path, got an empty one"),
        ({"offline": "null"}, "offline: expected (pictures, prompts) pairs, since offline_weight > 0, got None"),
        ({"offline": "{files}/empty"}, "empty"),
        ({"offline": "{files}/silent"}, "expected a `prompt` with every picture, got none with all 1"),
        ({"scheduler": "PNDMScheduler"}, "DDIMScheduler"),
        ({"scheduler": "Nonsense"}, "--scheduler"),
        ({"method": "magic"}, "method"),
        ({"dtype": "int8"}, "dtype: expected one of fp32, bf16, fp16"),
        ({"attention_backend": "flash"}, "attention_backend: expected native or xformers"),
        ({"steps": "many"}, "steps"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(files, tmp_path, capsys, changes, message):
    changes = {name: str(value).format(files=files) for name, value in changes.items()}
    assert main(arguments(files, tmp_path / "run", **changes)) == 2
    assert message in error_line(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_long_prompts_are_refused_when_strict(files, tmp_path, capsys):
    words = arguments(files, tmp_path / "run", prompts=files / "long.txt")
    assert main([words[0], "--strict", *words[1:]]) == 2
    assert "1 of 2 prompts are longer than 77 tokens" in error_line(capsys.readouterr())


@pytest.mark.parametrize("replay_area", [0.005, 0.0])
def test_a_treatment_that_flagged_nothing_says_so_and_is_kept(files, tmp_path, capsys, replay_area):
    torch.manual_seed(5)
    blind = ConvDetector((8, 8))
    with torch.no_grad():
        blind.head.weight.zero_()
        blind.head.bias.fill_(-5)
    blind.save_pretrained(tmp_path / "blind")
    words = arguments(files, tmp_path / "run", detector=tmp_path / "blind", replay_area=replay_area, log_with="none")
    replayed = ", and no step replayed a picture" if replay_area else ""
    sentence = (
        "nothing was flagged: the detector found no artifact in any of the 2 fixed pictures before the treatment"
        f"{replayed}; it may be blind to what this pipeline draws"
    )
    assert main(words) == 0
    assert f"warning: {sentence}\n" in capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "treat.json").read_text())
    assert found["doubts"] == [sentence]
    assert [bool(row["replayed"]) for row in found["history"]] == [not replay_area]
    words = [word.replace(f"{tmp_path}/run", f"{tmp_path}/strict") for word in words]
    assert main([words[0], "--strict", *words[1:]]) == 3
    assert capsys.readouterr().err.endswith(f"{sentence}\n")
    assert (tmp_path / "strict" / "lora" / WEIGHTS_NAME).is_file()


def test_a_treatment_that_flagged_something_has_no_doubt(files, tmp_path, capsys, monkeypatch):
    asked, process_state = [], processes.process_state
    monkeypatch.setattr(processes, "process_state", lambda device=None: asked.append(device) or process_state(device))
    words = arguments(files, tmp_path / "run", log_with="none", device="cpu")
    assert main([words[0], "--strict", *words[1:]]) == 0
    assert json.loads((tmp_path / "run" / "treat.json").read_text())["doubts"] == []
    assert "nothing was flagged" not in capsys.readouterr().err
    assert {*asked} == {"cpu"}  # of other processes this machine may have more than GPUs


def test_an_output_that_cannot_be(files, tmp_path, capsys):
    (tmp_path / "file").write_text("taken")
    assert main(arguments(files, tmp_path / "file")) == 2
    assert str(tmp_path / "file") in error_line(capsys.readouterr())
    assert (tmp_path / "file").read_text() == "taken"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.safetensors", "run/lora: would be replaced, but holds 'mine.safetensors'"),
        (WEIGHTS_NAME, "run: holds lora of another run"),
    ],
)
def test_a_lora_that_no_treatment_wrote_is_not_replaced(files, tmp_path, capsys, name, message):
    theirs = tmp_path / "run" / "lora" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    assert main(arguments(files, tmp_path / "run")) == 2
    assert f"{tmp_path}/{message}" in error_line(capsys.readouterr())
    assert names(tmp_path / "run") == [f"lora/{name}"]


def test_a_folder_where_another_run_is_at_work(files, tmp_path, capsys):
    output = tmp_path / "run"
    with locked_folder(output):
        (output / ".run.json.diffdoctor-tmp-abcd1234.json").write_text("half-written by the other")
        assert main(arguments(files, output)) == 2
        assert f"{output}: another process is at work there" in error_line(capsys.readouterr())
        assert names(output) == [".run.json.diffdoctor-tmp-abcd1234.json"]
    assert main(arguments(files, output, log_with="none", sample_pictures=0)) == 0
    state = "checkpoints/step-00000001/state.pt"
    rankings = ["ranking.html", "ranking.parquet"]
    assert names(output) == [state, "config.yaml", f"lora/{WEIGHTS_NAME}", *rankings, "run.json", "treat.json"]


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond this many bytes: what is written then fails as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.cpu
def test_a_full_disk_keeps_the_last_checkpoint(files, tmp_path, capsys, monkeypatch):
    options = {"steps": 3, "checkpoint_every": 1, "log_with": "none", "sample_pictures": 0}
    assert main(arguments(files, tmp_path / "whole", **options)) == 0
    checkpoint = Treatment._checkpoint

    def filling(self):
        with disk_of(20_000) if self.step == 2 else contextlib.nullcontext():
            checkpoint(self)

    monkeypatch.setattr(Treatment, "_checkpoint", filling)
    output = tmp_path / "run"
    capsys.readouterr()
    assert main(arguments(files, output, **options)) == 2
    line = error_line(capsys.readouterr())
    assert f"{output}: cannot be written" in line
    assert "MiB free" in line
    assert names(output) == ["checkpoints/step-00000001/state.pt", "config.yaml", "run.json"]
    monkeypatch.setattr(Treatment, "_checkpoint", checkpoint)
    # now the LoRA finds no room
    finished = Treatment.run

    def full_at_the_end(self, progress):
        stopped = finished(self, progress)
        resource = pytest.importorskip("resource")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return stopped

    monkeypatch.setattr(Treatment, "run", full_at_the_end)
    with disk_of(10_000_000):
        assert main(arguments(files, output, **options)) == 2
    assert "cannot be written" in error_line(capsys.readouterr())
    assert not (output / "lora").exists()
    assert not list(output.glob(".*"))
    monkeypatch.setattr(Treatment, "run", finished)
    assert main(arguments(files, output, **options)) == 0
    assert "was done after step 3 of 3" in capsys.readouterr().err
    ours, whole = (folder / "lora" / WEIGHTS_NAME for folder in (output, tmp_path / "whole"))
    assert ours.read_bytes() == whole.read_bytes()


def test_the_settings_can_be_read_from_another_working_folder(files, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(files)
    paths = {"pipeline": "pipeline", "detector": "detector", "prompts": "prompts.txt", "offline": "shards"}
    output = os.path.relpath(tmp_path / "run")
    assert main(arguments(files, output, log_with="none", sample_pictures=0, **paths)) == 0
    asked = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: asked[name] for name in paths} == {name: str(files / path) for name, path in paths.items()}
    assert asked["monitor"] is None


def test_options_from_a_file_and_what_was_asked(files, tmp_path, capsys):
    import yaml

    words = arguments(files, tmp_path / "run", log_with="none", lora_targets='["attention"]')
    options = dict(word[2:].split("=", 1) for word in words[1:])
    (tmp_path / "options.yaml").write_text(
        yaml.safe_dump({name: yaml.safe_load(value) for name, value in options.items()})
    )
    assert main(["treat", "--config", str(tmp_path / "options.yaml"), "--rank=3"]) == 0
    asked = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (asked["rank"], asked["lora_targets"], asked["steps"]) == (3, ["attention"], 1)
    assert asked["pipeline"] == str(files / "pipeline")


def test_weights_in_half_precision(files):
    pipeline = load_pipeline("pipeline", str(files / "pipeline"), dtype="bf16", vae="fp32")
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32
