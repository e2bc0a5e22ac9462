"""`inject --engine`: the same set in units, whoever makes them, and what `inject` promises otherwise too."""

import collections
import json
import os

import numpy as np
import pytest

from diffdoctor.cli import main
from diffdoctor.data.manifest import read_manifest
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.detector.commands import inject_units
from diffdoctor.detector.commands.inject import InjectConfig, run_inject
from diffdoctor.detector.commands.inject_units import examples_of
from diffdoctor.detector.damage import registry
from diffdoctor.detector.damage.kinds import damage_kinds
from diffdoctor.engine.options import OptionalEngineConfig
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.lock import locked_folder
from support.pictures import picture, tree, write_pictures

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

# Ends its process the first time that it is asked for damage, unless that happened before.
PLUGIN = """
import os
from diffdoctor.detector import damage_kind

@damage_kind("ends-its-process")
def ends(picture, region, rng, strength):
    try:
        os.close(os.open(os.environ["ENDED"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return 1 - picture
    os._exit(9)
"""


@pytest.fixture
def kinds_of_this_test(monkeypatch):
    damage_kinds()
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@pytest.fixture
def clean(tmp_path):
    """Seven picture files, and a shard of four pictures, one of which is too small and one damaged."""
    write_pictures(tmp_path / "clean", 7)
    samples = [{"key": f"s{number}", "picture": picture(seed=20 + number)} for number in range(4)]
    samples[1]["picture"] = samples[1]["picture"][:8]
    samples[2]["mask"] = np.ones(samples[2]["picture"].shape[:2], np.float32)
    write_shards(samples, tmp_path / "clean" / "more")
    return tmp_path / "clean"


def made(clean, output, kind="none", actors=None, **options):
    """What metrics.json says of a set that was made in units."""
    engine = OptionalEngineConfig(kind=kind, actors=actors)
    options = {"kinds": ["tint"], "damaged": 2, "shard_size": 9, "engine": engine} | options
    return run_inject(InjectConfig([str(clean)], str(output), **options))


def files(output):
    """The files of a set but those that say by whom, when and with which engine it was made."""
    names = ("commits/", "config.yaml")
    return {name: data for name, data in tree(output).items() if not name.startswith(names)}


@pytest.mark.usefixtures("kinds_of_this_test")
def test_all_engines_make_the_same_files_after_a_kill_too(clean, tmp_path, monkeypatch):
    (tmp_path / "kinds.py").write_text(PLUGIN)
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    options = {"plugins": [str(tmp_path / "kinds.py")], "kinds": ["ends-its-process", "tint"]}
    made(clean, tmp_path / "two", "processes", 2, **options)
    assert (tmp_path / "ended").exists()
    made(clean, tmp_path / "one", "processes", 1, **options)
    commits, interrupted = inject_units.save_state, []

    def interrupt(path, state):
        commits(path, state)
        interrupted.append(path)
        if len(interrupted) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(inject_units, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(clean, tmp_path / "none", **options)
    assert made(clean, tmp_path / "none", "ranks", **options)["units"] == 4
    assert len(interrupted) == 5
    assert files(tmp_path / "two") == files(tmp_path / "one") == files(tmp_path / "none")
    assert not list((tmp_path / "two" / ".attempts").iterdir())


def test_every_picture_has_the_versions_that_are_asked_for(clean, tmp_path):
    metrics = made(clean, tmp_path / "set", benign=1, visible=0.01)
    manifest = read_manifest(tmp_path / "set")
    # Two pictures of the shard are left out; of the nine others, four versions each.
    assert metrics["skipped"] == {"a picture of less than 16 pixels": 1, "a picture that is damaged already": 1}
    assert (metrics["pictures"], metrics["kinds"]["clean"], metrics["kinds"]["tint"]) == (36, 9, 18)
    assert (metrics["units"], metrics["failed_units"], metrics["without_visible_damage"]) == (5, {}, 0)
    assert collections.Counter(manifest["label"]) == {"real": 18, "injected": 18}
    assert collections.Counter(manifest["shard"])["shard-000000.tar"] == 8
    # By its key a picture stays on one side of a split with all of its versions.
    assert len(set(manifest["key"])) == 36
    assert set(collections.Counter(key.partition("-")[0] for key in manifest["key"]).values()) == {4}
    assert (tmp_path / "set" / "contact_sheet.png").is_file()
    areas = [np.mean(sample["mask"] >= 0.5) for sample in ShardData(tmp_path / "set") if sample["mask"].any()]
    assert metrics["mask_area"]["median"] == pytest.approx(np.median(areas))
    assert main(["set", "check", str(tmp_path / "set"), "--pixels", "true", "--hashes", "true"]) == 0


def test_damage_is_a_function_of_seed_and_picture_alone(clean, tmp_path):
    made(clean, tmp_path / "set")
    for path in (clean / "00.png", clean / "04.png"):
        path.unlink()
    made(clean, tmp_path / "fewer", shard_size=100)
    made(clean, tmp_path / "others", seed=1)

    def pictures(name):
        data = ShardData(tmp_path / name)
        return {
            (s["source"], s["key"].partition("-")[2]): s["picture"].tobytes()
            for s in map(data.__getitem__, range(len(data)))
        }

    whole, fewer, others = pictures("set"), pictures("fewer"), pictures("others")
    assert {source for source, _ in whole} - {source for source, _ in fewer} == {"00", "04"}
    assert all(whole[place] == data for place, data in fewer.items())
    assert [place for place, data in fewer.items() if others[place] == data] == [p for p in fewer if p[1] == "clean"]


def test_sets_of_the_two_ways_are_told_apart(clean, tmp_path):
    write_pictures(tmp_path / "few", 2)
    run_inject(InjectConfig([str(tmp_path / "few")], str(tmp_path / "set"), kinds=["tint"]))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"set: holds .* of a run with another .*engine.*plan"):
        made(tmp_path / "few", tmp_path / "set", damaged=1)
    assert tree(tmp_path) == before
    made(tmp_path / "few", tmp_path / "set", overwrite=True)
    assert len(ShardData(tmp_path / "set")) == 6
    with pytest.raises(UserError, match="set: exists already"):
        run_inject(InjectConfig([str(tmp_path / "few")], str(tmp_path / "set"), kinds=["tint"]))
    overwriting = InjectConfig([str(tmp_path / "few")], str(tmp_path / "set"), kinds=["tint"], overwrite=True)
    for notes in (tmp_path / "set" / "notes.txt", tmp_path / "set" / "parts" / "notes.txt"):
        notes.write_text("mine")
        with pytest.raises(UserError, match=r"would be replaced, but holds 'notes\.txt'"):
            run_inject(overwriting)
        notes.unlink()
    with locked_folder(tmp_path / "set"), pytest.raises(UserError, match="another process is at work there"):
        run_inject(overwriting)
    assert run_inject(overwriting)["pictures"] == len(ShardData(tmp_path / "set")) == 4
    assert not (tmp_path / "set" / "parts").exists()
    with pytest.raises(UserError, match=r"few: contains the input .*00\.png; choose another folder"):
        made(tmp_path / "few", tmp_path / "few")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 2}, "workers: expected none beside --engine"),
        ({"output": "memory://bucket/set", "overwrite": True}, "overwrite: expected false with an output in a store"),
        ({"output": "memory://bucket/set", "kind": None}, "output: expected a folder, or a URL with --engine"),
        (
            {"kind": None, "actors": 2},
            "engine: expected one of none, ranks, processes, ray beside engine.actors, got no engine",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(clean, tmp_path, options, match):
    options = {"clean": clean, "output": tmp_path / "set"} | options
    with pytest.raises(UserError, match=match):
        made(options.pop("clean"), options.pop("output"), **options)
    assert not (tmp_path / "set").exists()


def test_a_worker_with_other_kinds_of_damage_refuses_to_start(clean, tmp_path, monkeypatch):
    digests = iter("ab")
    monkeypatch.setattr(inject_units, "_digest", lambda config, plugins: next(digests))
    with pytest.raises(
        UserError, match="other plugins, kinds of damage or versions of libraries than those with which"
    ):
        made(clean, tmp_path / "set")


@pytest.mark.parametrize("units", [1, 3, 24, 47, 48, 95, 1000])
def test_enough_examples_of_each_kind_are_kept_and_not_too_many(units):
    kept = sum(examples_of(number, units) for number in range(units))
    assert 6 <= kept <= 96


def test_the_command_takes_an_engine(clean, tmp_path, capsys):
    words = ["inject", str(clean), "--output", str(tmp_path / "set"), "--kinds", "tint", "--engine", "none"]
    assert main(words) == 0
    assert "18 pictures" in capsys.readouterr().err
    said = json.loads((tmp_path / "set" / "metrics.json").read_text())
    assert (said["pictures"], said["units"]) == (18, 2)
    assert os.path.getsize(tmp_path / "set" / "manifest.parquet")
    assert main([*words, "--strict", "true"]) == 2
    assert "another strict" in capsys.readouterr().err
