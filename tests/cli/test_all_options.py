"""Every option of every command: what its type does not take is refused by name, and its help says what it is."""

import typing

import pytest
import yaml

from diffdoctor import cli
from diffdoctor.cli.config_file import read_config
from diffdoctor.cli.help import GROUPS, command_parser
from diffdoctor.cli.options import options_of, refuse_nulls
from diffdoctor.detector import damage_kinds
from diffdoctor.runs.errors import UserError


def config_class(command):
    return cli._load(cli.COMMANDS[command].config)


ALL = [(command, name, kind) for command in cli.COMMANDS for name, kind in options_of(config_class(command)).items()]
NO_NULL = [(command, name, kind) for command, name, kind in ALL if type(None) not in typing.get_args(kind)]


def test_null_for_an_option_that_takes_none_is_refused_by_name(tmp_path):
    path = tmp_path / "options.yaml"
    for command, name, kind in NO_NULL:
        options, value = options_of(config_class(command)), None
        for part in reversed(name.split(".")):
            value = {part: value}
        path.write_text(yaml.safe_dump(value))
        with pytest.raises(UserError, match=rf"options\.yaml: {name}: expected .*, got null$"):
            read_config(str(path), options)
        if kind is not str:
            for words in ([f"--{name}", "null"], [f"--{name}=null"]):
                with pytest.raises(UserError, match=rf"^--{name}: expected .*, got null$"):
                    refuse_nulls(words, options)
    assert len(NO_NULL) > 100


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_null_ends_a_command_with_one_line(tmp_path, capsys, command):
    name = next(name for each, name, _ in NO_NULL if each == command)
    (tmp_path / "options.yaml").write_text(f"{name}:\n")
    assert cli.main([*command.split(), "--config", str(tmp_path / "options.yaml")]) == 2
    errors = capsys.readouterr().err
    assert f"{name}: expected " in errors
    assert errors.count("\n") == 1


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
    named = " ".join(text.split()).partition("draw from: ")[2].partition(", or those")[0].split(", ")
    assert sorted(named) == sorted(damage_kinds())
