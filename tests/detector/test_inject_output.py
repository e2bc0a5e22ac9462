"""inject's output: a set is replaced where asked for, and nothing else; options that make no sense are refused."""

import dataclasses
import os

import pytest

from diffdoctor.data.shard_writer import write_shards
from diffdoctor.detector import damage_kind, damage_kinds
from diffdoctor.detector.commands import inject as injecting
from diffdoctor.detector.commands.inject import InjectConfig, run_inject
from diffdoctor.detector.damage import registry
from diffdoctor.runs.errors import UserError
from support.pictures import picture, tree, write_pictures

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")


def overwriting(places, output, **options):
    options = {"kinds": ["tint"], "overwrite": True, **options}
    return run_inject(InjectConfig([str(place) for place in places], str(output), **options))


def test_overwriting_never_removes_a_source(tmp_path):
    write_pictures(tmp_path / "pictures", 3)
    before = tree(tmp_path)
    places = [tmp_path / "pictures"]
    for sources, output in (
        (places, tmp_path / "pictures"),
        (places, tmp_path),
        ([tmp_path / "pictures" / "00.png"], tmp_path / "pictures" / "00.png"),
    ):
        with pytest.raises(UserError, match=r"would be replaced, but contains the input"):
            overwriting(sources, output)
    os.symlink("pictures", tmp_path / "link")
    with pytest.raises(UserError, match="contains the input"):
        overwriting(places, tmp_path / "link")
    os.remove(tmp_path / "link")
    assert tree(tmp_path) == before
    # A set is not made from itself either, not even through links.
    overwriting(places, tmp_path / "set")
    os.rename(tmp_path / "set" / "shard-000000.tar", tmp_path / "real.tar")
    os.symlink(tmp_path / "real.tar", tmp_path / "set" / "shard-000000.tar")
    with pytest.raises(UserError, match="contains the input"):
        overwriting([tmp_path / "set"], tmp_path / "set")
    assert (tmp_path / "set" / "shard-000000.tar").is_symlink()


def test_overwriting_replaces_a_set_and_nothing_else(tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures", 3)
    places = [tmp_path / "pictures"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"work: would be replaced, but is no set of shards \(no manifest.parquet\)"):
        overwriting(places, tmp_path / "work")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: expected a folder or nothing, got a file"):
        overwriting(places, tmp_path / "file")
    overwriting(places, tmp_path / "set")
    overwriting(places, tmp_path / "set", seed=1)
    (tmp_path / "set" / "runs").mkdir()
    before = tree(tmp_path)
    with pytest.raises(UserError, match="set: would be replaced, but holds 'runs'"):
        overwriting(places, tmp_path / "set")
    with pytest.raises(UserError, match="holds 'runs'"):
        write_shards([{"picture": picture()}], tmp_path / "set")
    assert tree(tmp_path) == before
    # Put there while the set was made: the set is kept, and takes its name when the place is free.
    made = tmp_path / "made"
    finish = injecting.ResumableSet.write

    def write(*arguments):
        finish(*arguments)
        made.mkdir(exist_ok=True)
        (made / "mine.txt").write_text("mine")

    monkeypatch.setattr(injecting.ResumableSet, "write", write)
    with pytest.raises(UserError, match=r"holds 'mine\.txt'"):
        overwriting(places, made, overwrite=False)
    monkeypatch.undo()
    (made / "mine.txt").unlink()
    assert overwriting(places, made, overwrite=False)["pictures"] == 6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"longest": -5}, "longest: expected >= 16, got -5"),
        ({"longest": 0}, "longest: expected >= 16, got 0"),
        ({"visible": 5.0}, r"visible: expected a change in \[0, 1\], got 5"),
        ({"visible": float("inf")}, "visible"),
        ({"visible": float("nan")}, "visible"),
        ({"visible": -1.0}, "visible"),
        ({"seed": -1}, "seed: expected >= 0, got -1"),
        ({"damaged": -1}, "damaged: expected >= 0, got -1"),
        ({"workers": 0}, "workers: expected >= 1, got 0"),
        ({"area": (2.0, 3.0)}, "area: expected low <= high"),
        ({"damaged": 0, "clean": False}, "at least one version"),
    ],
)
def test_inject_refuses_what_makes_no_sense_by_name(tmp_path, options, match):
    write_pictures(tmp_path / "pictures", 1)
    with pytest.raises(UserError, match=match):
        run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "set"), **options))
    assert sorted(os.listdir(tmp_path)) == ["pictures"]


PLUGIN = """
from diffdoctor.detector import damage_kind

@damage_kind("{name}")
def hole(picture, region, rng, strength):
    return picture * 0
"""


@pytest.fixture
def kinds_of_this_test(monkeypatch):
    """What a test registers is not there for the next one, whose workers would not know it."""
    damage_kinds()
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@pytest.mark.usefixtures("kinds_of_this_test")
@pytest.mark.parametrize("workers", [1, 2])
def test_kinds_of_ones_own(tmp_path, workers):
    write_pictures(tmp_path / "clean", 2)
    name = f"hole-{workers}"
    (tmp_path / "kinds.py").write_text(PLUGIN.format(name=name))
    options = {"plugins": [str(tmp_path / "kinds.py")], "kinds": [name], "visible": 0.01, "workers": workers}
    for _ in range(2):
        metrics = run_inject(InjectConfig([str(tmp_path / "clean")], str(tmp_path / "set"), **options))
        assert metrics["kinds"] == {"clean": 2, name: 2}
    (tmp_path / "kinds.py").write_text(PLUGIN.format(name=f"{name}-b"))
    with pytest.raises(UserError, match="exists already"):
        run_inject(InjectConfig([str(tmp_path / "clean")], str(tmp_path / "set"), **options))


@pytest.mark.usefixtures("kinds_of_this_test")
def test_a_kind_that_the_workers_do_not_know_is_refused(tmp_path):
    write_pictures(tmp_path / "clean", 2)
    damage_kind("known-here-alone")(lambda picture, region, rng, strength: picture * 0)
    config = InjectConfig([str(tmp_path / "clean")], str(tmp_path / "set"), kinds=["known-here-alone"], workers=2)
    with pytest.raises(UserError, match="kinds: known-here-alone: not registered in the worker processes"):
        run_inject(config)
    run_inject(dataclasses.replace(config, workers=1))


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("gone.py", None, "plugins: .*gone.py: cannot be read"),
        ("bad.py", "1 / 0", "plugins: .*bad.py: ZeroDivisionError: division by zero"),
        ("exits.py", "raise SystemExit(0)", "plugins: .*exits.py: SystemExit: 0"),
        ("kinds.txt", "x", r"plugins: .*kinds.txt: expected a Python file \(.py\)"),
        (
            "twice.py",
            PLUGIN.format(name="warp"),
            "plugins: .*twice.py: ValueError: name: .* got 'warp'",
        ),
    ],
)
def test_files_that_are_no_plugins(tmp_path, file, text, match):
    write_pictures(tmp_path / "clean", 1)
    if text:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=match):
        run_inject(InjectConfig([str(tmp_path / "clean")], str(tmp_path / "set"), plugins=[str(tmp_path / file)]))
    assert not (tmp_path / "set").exists()


def test_inject_says_what_could_not_be_damaged_and_makes_no_empty_set(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 2)
    places = [str(tmp_path / "pictures")]
    run_inject(InjectConfig(places, str(tmp_path / "set"), visible=1.0, damaged=3))
    assert "2 pictures" in (said := capsys.readouterr().err)
    assert "left out: 6 x damage that was not visible" in said
    with pytest.raises(UserError, match=r"no pictures to write \(6 x damage that was not visible\)"):
        run_inject(InjectConfig(places, str(tmp_path / "none"), visible=1.0, damaged=3, clean=False))
    assert sorted(os.listdir(tmp_path)) == ["pictures", "set"]


def test_a_set_that_another_process_finished_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    pictures, output = [str(tmp_path / "pictures")], str(tmp_path / "set")
    write_pictures(tmp_path / "pictures", 3)
    check, after = injecting._refuse_loss, {}

    def another_process(*arguments):
        check(*arguments)
        monkeypatch.setattr(injecting, "_refuse_loss", check)
        run_inject(InjectConfig(pictures, output, kinds=["tint"], seed=1))
        after.update(tree(tmp_path))

    # The first look at the output, before the lock.
    monkeypatch.setattr(injecting, "_refuse_loss", another_process)
    with pytest.raises(UserError, match="set: exists already"):
        run_inject(InjectConfig(pictures, output, kinds=["tint"]))
    assert tree(tmp_path) == after
    assert sorted(os.listdir(tmp_path)) == ["pictures", "set"]
    # Of the very same set it says so.
    monkeypatch.setattr(injecting, "_refuse_loss", another_process)
    (tmp_path / "set").rename(tmp_path / "first")
    assert run_inject(InjectConfig(pictures, output, kinds=["tint"], seed=1))["pictures"] == 6
    assert sorted(os.listdir(tmp_path)) == ["first", "pictures", "set"]


@pytest.mark.parametrize("name", ["mine.txt", "run.json"])
def test_a_hidden_folder_of_ones_own_is_not_taken_for_a_set_in_the_making(tmp_path, name):
    write_pictures(tmp_path / "pictures", 2)
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / name).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"\.set\.partial: holds something else than a run of inject"):
        run_inject(InjectConfig([str(tmp_path / "pictures")], str(tmp_path / "set"), kinds=["tint"]))
    assert tree(tmp_path) == before


def test_a_set_with_a_run_json_of_something_else_is_not_replaced(tmp_path):
    write_pictures(tmp_path / "pictures", 2)
    overwriting([tmp_path / "pictures"], tmp_path / "set")
    (tmp_path / "set" / "run.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="set: holds something else than a run of inject"):
        overwriting([tmp_path / "pictures"], tmp_path / "set", seed=1)
    assert tree(tmp_path) == before
