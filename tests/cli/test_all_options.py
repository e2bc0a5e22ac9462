"""Every option of every command: what its type does not take is refused by name, and its help says what it is."""

import dataclasses
import typing

import pytest
import yaml

from diffdoctor import cli
from diffdoctor.cli.help import GROUPS, command_parser
from diffdoctor.cli.options import options_of
from diffdoctor.detector import damage_kinds


def config_class(command):
    return cli._load(cli.COMMANDS[command].config)


ALL = [(command, name, kind) for command in cli.COMMANDS for name, kind in options_of(config_class(command)).items()]
NO_NULL = [(command, name, kind) for command, name, kind in ALL if type(None) not in typing.get_args(kind)]


def test_null_for_an_option_that_takes_none_is_one_line_that_names_it(tmp_path, monkeypatch, capsys):
    # In one test: there are hundreds, and none of them gets as far as its command.
    path = tmp_path / "options.yaml"
    for command, name, kind in NO_NULL:
        value = None
        for part in reversed(name.split(".")):
            value = {part: value}
        path.write_text(yaml.safe_dump(value))
        ways = [["--config", str(path)]]
        if kind is not str and not dataclasses.is_dataclass(kind) and name not in cli.COMMANDS[command].positional:
            ways += [[f"--{name}", "null"], [f"--{name}=null"]]
        for words in ways:
            assert cli.main([*command.split(), *words]) == 2, (command, words)
            errors = capsys.readouterr().err
            assert f"{name}: expected " in errors, errors
            assert errors.endswith("got null\n"), errors
            assert errors.count("\n") == 1, errors
    assert len(NO_NULL) > 100


@pytest.fixture(scope="module")
def parsers():
    made = {}
    for name, command in cli.COMMANDS.items():
        of = config_class(name)
        made[name] = command_parser(
            name, command.summary, of, options_of(of), positional=command.positional, required=command.required
        )
    return made


def test_every_option_is_described(parsers):
    for name, parser in parsers.items():
        silent = [action.dest for action in parser._actions if not action.help or action.help.isspace()]
        assert silent == [], name


def test_options_without_which_a_command_does_not_start_look_required(parsers):
    for name, command in cli.COMMANDS.items():
        text = " ".join(parsers[name].format_help().split())
        for option in command.required:
            assert f"--{option} {option.upper()}" in text, (name, option)
            assert f"[--{option} " not in text, (name, option)


@pytest.mark.parametrize("command", [name for name, command in cli.COMMANDS.items() if command.required])
def test_an_option_that_is_required_is_asked_for(command, capsys):
    assert cli.main(command.split()) == 2
    errors = capsys.readouterr().err
    assert f"--{cli.COMMANDS[command].required[0]}: expected a value, got none" in errors
    assert errors.count("\n") == 1


def test_many_options_stand_in_groups(parsers):
    for name, parser in parsers.items():
        known = {n for n, _ in options_of(config_class(name)).items()}
        titled = {option for options in GROUPS.get(name, {}).values() for option in options}
        assert titled <= known, (name, titled - known)
        longest = max(len(group._group_actions) for group in parser._action_groups)
        assert longest <= 30, (name, longest)


def test_the_help_names_every_kind_of_damage(parsers):
    (text,) = [action.help for action in parsers["inject"]._actions if action.dest == "kinds"]
    named = text.partition("draw from: ")[2].partition(", or those")[0].split(", ")
    assert sorted(named) == sorted(damage_kinds())
