import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from diffdoctor import cli, openmp
from diffdoctor.demo.config import DemoConfig
from diffdoctor.demo.stages import Stages


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


@dataclasses.dataclass
class Nested:
    """Options of a part.

    Args:
        betas: two numbers.
        balance: a switch.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    balance: bool = False


@dataclasses.dataclass
class ListOptions:
    """Options of a command.

    Args:
        places: what is read.
        kinds: names.
        area: a range.
        part: a part.
        seed: a number.
        strict: a switch.
    """

    places: list[str]
    kinds: list[str] | None = None
    area: tuple[float, float] = (0.0, 1.0)
    part: Nested = dataclasses.field(default_factory=Nested)
    seed: int = 0
    strict: bool = False


@pytest.fixture
def list_options(monkeypatch):
    """Runs a command of list options up to its options, which are collected here."""
    seen = []
    command = cli.Command("summary", "collect:options", "collect:run", ("places",))
    monkeypatch.setitem(cli.COMMANDS, "lists", command)
    monkeypatch.setattr(cli, "_load", lambda path: seen.append if path == "collect:run" else ListOptions)
    return seen


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("a b --seed 1", ListOptions(["a", "b"], seed=1)),
        ("a --kinds tint", ListOptions(["a"], ["tint"])),
        ("a --kinds tint swirl --area 0.1 0.5", ListOptions(["a"], ["tint", "swirl"], (0.1, 0.5))),
        ("--kinds=tint a b", ListOptions(["a", "b"], ["tint"])),
        ("--kinds [tint,swirl] a", ListOptions(["a"], ["tint", "swirl"])),
        ("a --kinds 007 null", ListOptions(["a"], ["007", "null"])),
        ("a --kinds null", ListOptions(["a"])),
        ("a --part.betas 0.5 0.6", ListOptions(["a"], part=Nested((0.5, 0.6)))),
        ("a --area [0.1,0.5]", ListOptions(["a"], area=(0.1, 0.5))),
        ("a --kinds '[2024] set'", ListOptions(["a"], ["[2024] set"])),
        ("a --kinds='[2024] set'", ListOptions(["a"], ["[2024] set"])),
        ("a --kinds '[2024] set' '[x] [y]'", ListOptions(["a"], ["[2024] set", "[x] [y]"])),
        ("a --kinds '🎨 x' \x7f", ListOptions(["a"], ["🎨 x", "\x7f"])),
        ("a --kinds K\udce4 b", ListOptions(["a"], ["K\udce4", "b"])),
        ("a --kinds K\udce4 --kinds b", ListOptions(["a"], ["b"])),
        ("'[2024] set' --strict", ListOptions(["[2024] set"], strict=True)),
        ("--strict a", ListOptions(["a"], strict=True)),
        ("a --strict False", ListOptions(["a"])),
        ("--strict TRUE a", ListOptions(["a"], strict=True)),
        ("--part.balance a", ListOptions(["a"], part=Nested(balance=True))),
        ("a --part.balance True --strict=false", ListOptions(["a"], part=Nested(balance=True))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lists_and_switches_are_given_as_a_shell_gives_them(list_options, argv, expected):
    assert cli.main(["lists", *shlex.split(argv)]) == 0
    assert list_options == [expected]


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [("clean", ["clean"]), ("[a, b]", ["a", "b"]), ("2024", ["2024"]), ("été # there", ["été"])],
    ids=["word", "list", "number", "accents"],
)
def test_a_file_may_give_one_place_as_a_word(list_options, tmp_path, text, expected):
    more = "seed: 3\nkinds: tint\narea: [1e-4, 1]\npart:\n  betas: [1e-3, .5]\n"
    (tmp_path / "options.yaml").write_text(f"places: {text}\n{more}", encoding="utf-8")
    assert cli.main(["lists", "--config", str(tmp_path / "options.yaml")]) == 0
    assert list_options == [ListOptions(expected, ["tint"], (1e-4, 1.0), Nested((1e-3, 0.5)), seed=3)]
    # The command line wins.
    assert cli.main(["lists", "--config", str(tmp_path / "options.yaml"), "b", "c", "--seed", "4"]) == 0
    assert list_options[1] == dataclasses.replace(list_options[0], places=["b", "c"], seed=4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n", "options.yaml: expected a YAML file in UTF-8"),
        ("places: clean\n".encode("utf-16"), "options.yaml: expected a YAML file in UTF-8"),
        (b"places: [clean, 7]\n", "Got value: 7"),
        (b"places: null\n", "places: expected a list of text, got null"),
        (b"places: clean\nseed:\n", "seed: expected a whole number, got null"),
        (b"places: clean\npart: ~\n", "part: expected options by name, got null"),
        (b"places: clean\npart:\n  betas: null\n", "part.betas: expected a list of 2, got null"),
        (b"places: clean\npart.balance: null\n", "part.balance: expected true or false, got null"),
        (b"places: clean\nseed: [\n", "options.yaml: expected a YAML file, got while parsing"),
        (b"- clean\n", "options.yaml: expected options by name, got a sequence"),
        (b"", "options.yaml: expected options by name, got nothing"),
        (b"# places: clean\n\n# seed: 3\n", "options.yaml: expected options by name, got nothing"),
        (b"? [a]\n: b\n", "expected options by name, got a sequence as a name"),
        (b"config: options.yaml\n", "expected options, got another --config"),
        (b"places: [" + b"[" * 3000 + b"]" * 3000 + b"]\n", "expected at most 20 levels, got more"),
        (b"places: " + b"[" * 30 + b"]" * 30 + b"\n", "expected at most 20 levels, got more"),
        (b"a: &a\n  b: *a\n", "expected values, got an alias of what it is a part of"),
        (b"a: &a [*a]\n", "expected values, got an alias of what it is a part of"),
        (
            b"a0: &a0 {k: v}\n"
            + b"".join(b"a%d: &a%d {p: *a%d, q: *a%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 20)),
            "expected at most 10,000 values, got more",
        ),
        (b"places: " + b"x" * 300_000, "expected a YAML file of at most 262,144 bytes, got a larger one"),
        (b"places: clean\nseed: " + b"9" * 5000 + b"\n", "seed: expected a whole number, got 5000 digits"),
        (
            b"places: clean\nseed: 99999999999999999999\n",
            "seed: expected a whole number of at most 64 bits, got one of 67",
        ),
        (b'places: "a\\0b"\n', "places: expected text without NUL characters, got 'a\\x00b'"),
        (b"places: [clean, ~nobody-there/x]\n", "places: expected a path, got '~nobody-there/x', the home of no user"),
        (b"places: clean\nkinds: ~nobody-there\n", "kinds: expected a path, got '~nobody-there', the home of no user"),
        (b"places: clean\narea: [.nan, 1]\n", "area: expected a number, got nan"),
    ],
    ids=[
        "picture",
        "utf-16",
        "number-in-a-list",
        "null",
        "null-number",
        "null-part",
        "null-in-part",
        "dotted-null",
        "no-yaml",
        "list",
        "empty",
        "comments",
        "list-as-name",
        "itself",
        "very-deep",
        "deep",
        "recursive-mapping",
        "recursive-list",
        "aliases",
        "large",
        "digits",
        "large-number",
        "nul",
        "home-in-a-list",
        "home",
        "nan",
    ],
)
def test_a_file_that_cannot_be_taken_is_one_line(list_options, tmp_path, capsys, content, words):
    (tmp_path / "options.yaml").write_bytes(content)
    assert cli.main(["lists", "--config", str(tmp_path / "options.yaml")]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert list_options == []


def test_a_home_folder_is_found_in_a_file_too(list_options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "options.yaml").write_text("places: [~/a, ./~b, c~d, '~e f']\n")
    assert cli.main(["lists", "--config", str(tmp_path / "options.yaml")]) == 0
    assert list_options == [ListOptions(["/home/somebody/a", "./~b", "c~d", "~e f"])]


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


def test_env_runs_as_a_program_whose_threads_do_not_spin():
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-m", "diffdoctor", "env", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["serves"]["cpu"]["weighted_loss"]
    assert found["packages"]["torch"] != "not installed"
    assert found["variables"]["GOMP_SPINCOUNT"] == "10000"


class TestSpinning:
    @pytest.mark.parametrize(
        "environment", [{"GOMP_SPINCOUNT": "infinity"}, {"OMP_WAIT_POLICY": "active"}], ids=["count", "policy"]
    )
    def test_what_the_user_chose_stays(self, environment):
        before = dict(environment)
        openmp.limit_spinning(environment)
        assert environment == before

    @pytest.mark.parametrize(
        ("original", "argv"),
        [
            ("python /usr/bin/diffdoctor env", "/usr/bin/diffdoctor env"),
            ("python C:/Scripts/diffdoctor.exe", "C:/Scripts/diffdoctor.exe"),
            ("python -m diffdoctor env --json", "-m env --json"),
            ("python -Bmdiffdoctor env", "-m env"),
            ("python -u -m diffdoctor.demo.table folder", "-m folder"),
        ],
    )
    def test_our_programs_are_known(self, original, argv):
        assert openmp.is_own_program(argv.split(), original.split())

    @pytest.mark.parametrize(
        ("original", "argv"),
        [
            ("python train.py diffdoctor", "train.py diffdoctor"),
            ("python -m trainer diffdoctor", "-m diffdoctor"),
            ("python -c code -m diffdoctor", "-c -m diffdoctor"),
            ("python", ""),
            ("", "-m a b"),
        ],
    )
    def test_a_user_s_program_is_left_alone(self, original, argv):
        assert not openmp.is_own_program(argv.split(), original.split())


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


class TestStages:
    def test_a_finished_stage_is_not_made_again(self, tmp_path):
        calls = []

        def make(folder):
            calls.append(folder)
            (folder / "result").write_text("done")

        for _ in range(2):
            folder = Stages(tmp_path, {"seed": 0}).run("one", make)
            assert (folder / "result").read_text() == "done"
        assert len(calls) == 1

    def test_a_half_written_stage_is_made_again(self, tmp_path):
        def fails(folder):
            (folder / "result").write_text("half")
            raise KeyboardInterrupt

        stages = Stages(tmp_path, {"seed": 0})
        with pytest.raises(KeyboardInterrupt):
            stages.run("one", fails)
        # What kill -9 leaves: a temporary folder, and a stage without its record.
        (tmp_path / "stages" / ".one.diffdoctor-tmp-abcd1234").mkdir()
        (tmp_path / "stages" / "one").mkdir()
        (tmp_path / "stages" / "one" / "result").write_text("half")
        stages = Stages(tmp_path, {"seed": 0})
        folder = stages.run("one", lambda folder: (folder / "result").write_text("whole"))
        assert (folder / "result").read_text() == "whole"
        assert sorted(os.listdir(tmp_path / "stages")) == ["one"]

    def test_other_settings_are_refused_unless_overwritten(self, tmp_path):
        Stages(tmp_path, {"seed": 0}).run("one", lambda folder: None)
        with pytest.raises(ValueError, match=r"another seed \(expected 0, got 1\); choose another folder"):
            Stages(tmp_path, {"seed": 1})
        assert Stages(tmp_path, {"seed": 0}).done("one")
        assert not Stages(tmp_path, {"seed": 1}, overwrite=True).done("one")
