"""The study of all methods at toy lengths: every part runs, is stored, and is measured; the table says what misses."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.studies.treatment.__main__ import main, parser, parts
from benchmarks.studies.treatment.region_dpo import injected_pairs, train
from benchmarks.studies.treatment.study import METHODS, Settings, treat_options
from benchmarks.studies.treatment.table import END, START, markdown, missed, put_into
from diffdoctor.demo.data import make_demo_data
from diffdoctor.runs.errors import UserError
from support.demo import metrics_of
from support.paths import ROOT

DEMO = dict.fromkeys(("classifier_steps", "autoencoder_steps", "base_steps"), 8) | {
    "detector_steps": 3,
    "judge_steps": 3,
}
TOY = {
    "flow_steps": 4,
    "demo": DEMO,
    "treat": {"steps": 2, "evaluate_pictures": 10, "batch_size": 4},
    "guide": {"rewinds": 1, "iterations": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A toy study of two methods: its parts one by one in this process, the last one by the command itself."""
    output = tmp_path_factory.mktemp("study")
    arguments = ["--output", str(output), "--pictures", "20", "--methods", "nft-alone,guide", "--threads", "1"]
    arguments += ["--settings", json.dumps(TOY)]
    for part in parts(parser().parse_args(arguments))[:-1]:
        assert main([*arguments, "--part", part]) == 0
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("stages/*/stage.json")}
    page = output / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main([*arguments, "--docs", str(page)]) == 0
    return output, arguments, stamps


@pytest.mark.study
def test_every_method_is_measured_on_both_pipelines(finished):
    record = json.loads((finished[0] / "treatment.json").read_text())
    rows = {(row["pipeline"], row["method"]): row for row in record["rows"]}
    assert set(rows) == {(kind, method) for kind in ("sd", "flux") for method in ("nft-alone", "guide")}
    for row in rows.values():
        low, high = row["artifact_rate"]["judge"]["after_interval"]
        assert 0 <= low <= row["artifact_rate"]["judge"]["after"] <= high <= 1
        assert row["seconds"] > 0
        assert row["peak_mib"] >= 0
        assert row["fid"]["after"] > 0
    before = {kind: rows[kind, "nft-alone"]["artifact_rate"]["judge"]["before"] for kind in ("sd", "flux")}
    assert all(rows[kind, "guide"]["artifact_rate"]["judge"]["before"] == before[kind] for kind in before)
    table = (finished[0] / "treatment.md").read_text()
    assert len(table.strip().splitlines()) == 2 + len(rows)


@pytest.mark.study
def test_the_last_part_was_made_by_the_command_and_no_other_twice(finished):
    output, _, stamps = finished
    methods = ("nft-alone", "guide")
    assert {path.parent.name for path in output.glob("stages/*/stage.json")} == {
        "flux-pipeline", *(f"{kind}-{name}" for kind in ("sd", "flux") for name in ("before", *methods)),
    }  # fmt: skip
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert "flux-guide" not in {path.parent.name for path in stamps}


@pytest.mark.study
def test_the_lora_of_a_part_can_be_loaded(finished):
    from diffusers import DiffusionPipeline

    stages = finished[0] / "stages"
    pipeline = DiffusionPipeline.from_pretrained(stages / "flux-pipeline" / "pipeline")
    pipeline.load_lora_weights(stages / "flux-nft-alone" / "lora")
    assert pipeline.get_active_adapters()


def test_pairs_of_damaged_regions():
    known = make_demo_data(0).training.where(np.arange(40))
    clean, damaged, masks, prompts = injected_pairs(known, seed=0)
    changed = (clean != damaged).any(3)
    assert len(prompts) == len(clean) == int((~known.damaged).sum())
    assert bool(changed.any((1, 2)).all())
    assert not changed[masks == 0].any()


@pytest.mark.study
def test_region_dpo_prefers_the_clean_pictures(finished, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(finished[0] / "stages" / "flux-pipeline" / "pipeline")
    known = make_demo_data(0).training.where(np.arange(40))
    record = train(pipeline, known, tmp_path, seed=0, sampling_steps=10, max_sequence_length=8, steps=8)
    assert abs(record["losses"][0] - math.log(2)) < 1e-5  # the LoRA begins as the reference
    assert sum(record["losses"][-3:]) / 3 < math.log(2)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.study
def test_the_page_gets_the_table(finished, tmp_path):
    page = (finished[0] / "page.md").read_text()
    table = (finished[0] / "treatment.md").read_text()
    assert page.startswith(f"before\n{START}\n{table}\n20 pictures each; ")
    assert page.endswith(f"{END}\nafter\n")
    (tmp_path / "other.md").write_text("no place for it")
    for path in (tmp_path / "other.md", tmp_path / "none.md"):
        with pytest.raises(UserError, match="--docs"):
            put_into(path, "table")


@pytest.mark.study
def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    assert main([*finished[1], "--seed", "3"]) == 2
    assert "another seed" in capsys.readouterr().err


def test_unknown_methods_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--methods", "prayer"])
    assert "prayer" in capsys.readouterr().err


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("guide", "dpo")])
@pytest.mark.parametrize(("kind", "scale"), [("sd", 1.0), ("flux", 1.0), ("cfg4", 4.0)])
def test_options_are_those_of_a_treatment(kind, scale, method):
    from diffdoctor.treat import TreatConfig

    config = TreatConfig(**treat_options(kind, method, Settings()))
    assert (config.method, config.sampling_steps, config.guidance_scale) == (method.partition("-")[0], 10, scale)
    assert config.steps % config.evaluate_every == 0


def row_of(method="draft_k", **changes):
    metrics = metrics_of(**changes)
    metrics["accuracy"] = metrics.pop("digit_accuracy")
    return {"pipeline": "sd", "method": method, "seconds": 9.0, "sampling_seconds": 3.0, "peak_mib": 70.0, **metrics}


@pytest.mark.parametrize(
    ("method", "change", "faults"),
    [
        ("draft_k", {}, []),
        ("draft_k", {"artifact_rate__judge__after": 0.036}, ["ratio"]),
        ("drtune", {"artifact_rate__judge__after": 0.036}, ["ratio"]),
        ("guide", {"artifact_rate__judge__after": 0.036}, []),
        ("guide", {"artifact_rate__judge__after": 0.072}, ["ratio"]),
        ("weighted", {"artifact_rate__judge__after": 0.17, "fid__after": 2.1}, ["FID"]),
        ("drtune", {"digit_accuracy__after": 0.939}, ["accuracy"]),
        ("nft-alone", {"artifact_rate__judge__after": 0.036}, []),
        ("nft-alone", {"artifact_rate__judge__after": 0.044}, ["ratio"]),
        ("nft-alone", {"variance__after": 29.0}, ["variance"]),
        ("grpo-alone", {"artifact_rate__judge__after": 0.12}, []),
        ("full", {"artifact_rate__judge__after": 0.3}, []),
    ],
)
def test_what_a_method_misses(method, change, faults):
    row = row_of(method, **change)
    row["artifact_rate"]["judge"]["before_interval"] = [0.3, 0.4]
    assert missed(row) == faults
    assert ("missed" in markdown([row])) == bool(faults)


# In a process of its own, as every part of the study is measured: where the system keeps one mark for the process's
# whole life, a mark that earlier tests left would hide the block's.
HOLD_AND_FREE = """
import resource
import numpy as np
from benchmarks.studies.treatment.memory import PeakMemory

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with PeakMemory() as memory:
    held = np.ones(64 * 2**20 // 8)
    del held
print(memory.mib, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_sees_what_was_held_and_freed():
    done = subprocess.run([sys.executable, "-c", HOLD_AND_FREE], capture_output=True, text=True, cwd=ROOT, check=True)
    peak, grown = map(float, done.stdout.split())
    if not grown and not peak:
        pytest.skip("the system does not count a process's memory")
    assert 48 < peak < 200
