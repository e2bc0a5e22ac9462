"""The command line: commands, options, help, and bad input as one line."""

import sys

import pytest
import yaml

from diffdoctor import cli
from diffdoctor.demo.config import DemoConfig


@pytest.fixture
def demo_options(monkeypatch):
    """Runs `diffdoctor demo` up to its options, which are collected here."""
    seen = []
    command = cli.Command("summary", "diffdoctor.demo.config:DemoConfig", "collect:run")
    load = cli._load
    monkeypatch.setitem(cli.COMMANDS, "demo", command)
    monkeypatch.setattr(cli, "_load", lambda path: seen.append if path == "collect:run" else load(path))
    return seen


def test_options_come_from_the_command_line(demo_options):
    assert cli.main(["demo", "--output", "somewhere", "--seed", "7"]) == 0
    assert demo_options == [DemoConfig(output="somewhere", seed=7)]


def test_options_come_from_a_file_and_the_command_line_wins(demo_options, tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump({"seed": 3, "pictures": 50}))
    assert cli.main(["demo", "--config", str(path), "--pictures", "60"]) == 0
    assert demo_options == [DemoConfig(seed=3, pictures=60)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "--sede", "1"], "sede"),
        (["demo", "--seed", "many"], "seed"),
        (["demo", "--config", "no-such-file.yaml"], "no-such-file.yaml"),
        (["demo", "--pictures", "3"], "pictures: expected at least 20, two of each digit, got 3"),
        (["treat", "--method", "nope"], "method: expected one of draft_k"),
        (["treatment"], "unknown command 'treatment'"),
        (["evaluate"], "evaluate: expected one of evaluate detector, evaluate model"),
        (["evaluate", "modle"], "evaluate: expected one of evaluate detector, evaluate model"),
        (["evaluate", "model"], "--judge: expected a value, got none"),
    ],
    ids=[
        "unknown-option", "wrong-type", "no-such-config", "demo-value", "treat-value", "unknown-command",
        "half-a-command", "unknown-second-word", "nothing-given",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(argv, words, capsys):
    assert cli.main(argv) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert errors.startswith("diffdoctor")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["diagnose", "a", "--strict", "yes"], "--strict: expected true or false, got 'yes'"),
        (["evaluate", "model", "--guide", "ture"], "--guide: expected true or false, got 'ture'"),
        (["evaluate", "model", "--guide", "--sede"], "sede"),
    ],
    ids=["yes", "typing-error", "unknown-option"],
)
def test_a_switch_says_what_it_takes(argv, words, capsys):
    assert cli.main(argv) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1


def test_every_positional_option_is_described(capsys):
    for name in ("inject", "evaluate detector"):
        with pytest.raises(SystemExit):
            cli.main([*name.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "clean pictures: files, folders, patterns, shards." in text
    assert "folders of labelled shards, as `diffdoctor inject` makes them." in text


def test_the_evaluations_are_listed(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "evaluate detector" in text
    assert "evaluate model" in text
    assert "train-detector" not in text


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in DemoConfig.__dataclass_fields__.items():
        assert f"--{name}" in text
        assert f"default: {'null' if field.default is None else str(field.default).lower()}" in text.lower()


def test_usage_lists_the_commands(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


@pytest.fixture
def no_extra(monkeypatch):
    """A bare `pip install .`: modules that cannot be imported stand in for those that are not installed."""
    for name in (
        *("accelerate", "diffusers", "docstring_parser", "jinja2", "jsonargparse", "matplotlib", "peft", "PIL"),
        *("pyarrow", "pycocotools", "safetensors", "scipy", "sklearn", "tensorboard", "torchmetrics", "tqdm"),
        *("transformers", "yaml"),
    ):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("argv", [["env"], ["env", "--json"], ["env", "--json", "false"]], ids=" ".join)
def test_env_needs_no_extra(no_extra, capsys, argv):
    assert cli.main(argv) == 0
    out, errors = capsys.readouterr()
    assert "jsonargparse" not in errors
    assert "weighted_loss" in out
    assert out.startswith("{") == (argv[1:] == ["--json"])


def test_env_without_an_extra_describes_and_refuses(no_extra, capsys):
    assert cli.main(["env", "--help"]) == 0
    assert "usage: diffdoctor env [--json]" in capsys.readouterr().out
    assert cli.main(["env", "--jsno"]) == 2
    assert capsys.readouterr().err == "diffdoctor env: error: diffdoctor env: expected --json, got '--jsno'\n"


def test_a_missing_extra_says_what_to_install(no_extra, capsys):
    assert cli.main(["demo"]) == 2
    errors = capsys.readouterr().err
    assert "jsonargparse is not installed: run `pip install '.[stages]'`" in errors
    assert errors.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 2
    errors = capsys.readouterr().err
    assert "cannot be written" in errors
    assert errors.count("\n") == 1
