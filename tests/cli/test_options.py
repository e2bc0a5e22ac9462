"""Lists, switches and parts as options, on the command line and in files, and files that cannot be taken."""

import dataclasses
import shlex

import pytest

from diffdoctor import cli


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
