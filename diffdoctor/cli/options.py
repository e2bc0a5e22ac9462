"""A command's options by the types of its dataclass: how they are written in a shell, and what each may hold."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from diffdoctor.data.text import is_unicode, readable
from diffdoctor.runs.errors import UserError, expected

# name -> type, those of nested dataclasses included, as `training.steps`
Options = dict[str, Any]

_LARGEST = 2**63 - 1
_HOME = re.compile(r"~[\w.-]*(/|$)")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def options_of(config_class: type, prefix: str = "") -> Options:
    """Name and type of every option of a dataclass."""
    hints, found = typing.get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= options_of(kind, f"{name}.")
        found[name] = kind
    return found


def list_kind(kind: Any) -> str | None:
    """What an option of several values holds, "str" or "other"; None: it holds one value."""
    for each in (kind, *typing.get_args(kind)):
        if typing.get_origin(each) in (list, tuple):
            return "str" if typing.get_args(each)[0] is str else "other"
    return None


def described(kind: Any) -> str:
    """A type in words, such as "a list of text or null"."""
    if kind in _NAMES:
        return _NAMES[kind]
    if dataclasses.is_dataclass(kind):
        return "options by name"
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, inside))
    if origin in (list, tuple):
        return f"a list of {described(inside[0])}" if origin is list or ... in inside else f"a list of {len(inside)}"
    return "values by name" if origin is dict else "a value"


def check_value(name: str, kind: Any, value: Any) -> None:
    """Refuse what an option's type does not take, and values that no option takes.

    Args:
        name: for the message.
        kind: the option's type.
        value: parsed.

    Raises:
        UserError: null for a type without None, a whole number beyond 64 bits, NaN, or a NUL character.
    """
    if value is None:
        if kind is not Any and type(None) not in (kind, *typing.get_args(kind)):
            raise UserError(expected(name, described(kind), "null"))
    elif isinstance(value, str) and "\0" in value:
        raise UserError(expected(name, "text without NUL characters", repr(value)[:80]))
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise UserError(expected(name, "a whole number of at most 64 bits", f"one of {value.bit_length()} bits"))
    elif isinstance(value, float) and math.isnan(value):
        raise UserError(expected(name, "a number", "nan"))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_value(name, Any, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_value(f"{name}.{key}", Any, item)


def with_home(name: str, value: Any) -> Any:
    """Text, or a list of it, with the home folder for a leading ~, which a shell would replace and a YAML file keeps.

    Raises:
        UserError: it is the home of a user who is not there.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(with_home(name, item) for item in value)
    if not isinstance(value, str) or not _HOME.match(value):
        return value
    path = os.path.expanduser(value)
    if path == value:
        raise UserError(expected(name, "a path", f"{value!r}, the home of no user; ./{value} if it is a file's name"))
    return path


def refuse_nulls(argv: Sequence[str], options: Options) -> None:
    """Refuse the word null for options whose type takes none; for one that holds text it is text.

    Raises:
        UserError: names the option.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        kind = options.get(name.removeprefix("--")) if name.startswith("--") else None
        if (value if equals else following) == "null" and kind is not None and kind is not str:
            check_value(name, kind, None)


def with_switches(argv: Sequence[str], options: Options, *, has_positional: bool) -> list[str]:
    """The words with `--strict` and `--strict True` as the parser wants them, `--strict=true`."""
    switches = {f"--{name}" for name, kind in options.items() if kind is bool}
    result, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word not in switches:
            result.append(word)
            continue
        value = rest[0].lower() if rest else ""
        if value in ("true", "false"):
            result.append(f"{word}={value}")
            rest.pop(0)
        elif value in ("yes", "no", "on", "off", "1", "0") or (value and not has_positional and value[0] != "-"):
            raise UserError(expected(word, "true or false", repr(rest[0])))
        else:
            result.append(f"{word}=true")
    return result


def with_kinds(argv: Sequence[str], options: Options) -> list[str]:
    """The words with `--engine ray --address HOST` as the parser wants them: `--engine.kind ray --engine.address HOST`.

    So for every option that has a `kind`, and for the engine's address.
    """
    kinds = [name.removesuffix(".kind") for name in options if name.endswith(".kind")]
    long = {f"--{name}": f"--{name}.kind" for name in kinds}
    long |= dict.fromkeys(["--address"] if "engine.address" in options else (), "--engine.address")
    result = list(argv)
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in long and not (value if equals else "".join(argv[index + 1 : index + 2])).startswith(("{", "--")):
            result[index] = f"{long[name]}{equals}{value}"
    return result


def with_lists(argv: Sequence[str], options: Options) -> tuple[list[str], dict[str, list[str]]]:
    """The words with `--real a b` as the parser wants it, `--real ["a", "b"]`, for list and tuple options.

    Returns:
        The words, and by option the texts that take the place of what the parser makes of its own: those with names of
        files that are no Unicode, which no YAML can hold.
    """
    result, rest, kept = [], list(argv), {}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        kind = list_kind(options.get(name.removeprefix("--"))) if name.startswith("--") else None
        if kind is None:
            result.append(word)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and not (values and _is_list(values[0])):
            values.append(rest.pop(0))
        if values and not _is_list(values[0]) and values != ["null"]:
            # Numbers stay numbers, and names of files are not read as anything else.
            if kind == "str" and not is_unicode("".join(values)):
                kept[name.removeprefix("--")] = values
            else:
                kept.pop(name.removeprefix("--"), None)
            values = [f"[{', '.join(map(_quoted, values) if kind == 'str' else values)}]"]
        result += [name, *values]
    return result, kept


def _quoted(text: str) -> str:
    """Text as YAML in ASCII. JSON's escapes will not do: they halve characters beyond U+FFFF, such as emoji."""
    return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08X}" for c in readable(text)) + '"'


def _is_list(text: str) -> bool:
    """Whether a word is a whole list, rather than a name that begins with a bracket."""
    import yaml

    if not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return isinstance(yaml.safe_load(text), list)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
