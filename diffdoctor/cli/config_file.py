"""The YAML file of `--config`: read within bounds, and checked by the types of the options before any is parsed."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffdoctor.cli.options import Options, check_value, described, list_kind
from diffdoctor.runs.errors import UserError, expected

MAX_BYTES = 1 << 18
MAX_VALUES = 10_000
MAX_DEPTH = 20


def read_config(path: str, options: Options) -> str:
    """A YAML file's text, with a list wherever a list option has a single word in the file.

    Args:
        path: the file.
        options: name and type of each option.

    Raises:
        UserError: it cannot be read, is no YAML, is out of bounds, or gives null where an option takes none.
    """
    import yaml

    name = f"--config {path}"
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(expected(name, f"a YAML file of at most {MAX_BYTES:,} bytes", "a larger one"))
    try:
        text = data.decode("utf-8-sig")
        _check_size(text, name)
        root = yaml.compose(text)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(expected(name, "a YAML file in UTF-8", str(error))) from None
    except (yaml.YAMLError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(expected(name, "a YAML file", what)) from None
    if root is None:
        raise UserError(expected(name, "options by name", "nothing"))
    if not isinstance(root, yaml.MappingNode):
        raise UserError(expected(name, "options by name", f"a {root.id}"))
    _count(root, name, (), {})
    changed = _check(root, options, name, "")
    # The text changes where it has to and nowhere else: reading and writing it would turn 1e-4 into a word.
    return yaml.serialize(root) if changed else text


def _check_size(text: str, name: str) -> None:
    """Refuse what is too deep or too long, before it is composed, which recurses."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(expected(name, f"at most {MAX_DEPTH} levels", "more"))
        if count > 2 * MAX_VALUES:
            raise UserError(expected(name, f"at most {MAX_VALUES:,} values", "more"))


def _count(node: Any, name: str, above: tuple[int, ...], counted: dict[int, int]) -> int:
    """How many values a node holds once its aliases are written out."""
    import yaml

    if id(node) in above:
        raise UserError(expected(name, "values", "an alias of what it is a part of"))
    if len(above) > MAX_DEPTH:  # by aliases
        raise UserError(expected(name, f"at most {MAX_DEPTH} levels", "more"))
    if id(node) not in counted:
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        else:
            inside = node.value if isinstance(node, yaml.SequenceNode) else []
        counted[id(node)] = 1 + sum(_count(part, name, (*above, id(node)), counted) for part in inside)
    if counted[id(node)] > MAX_VALUES:
        raise UserError(expected(name, f"at most {MAX_VALUES:,} values", "more"))
    return counted[id(node)]


def _check(node: Any, options: Options, name: str, prefix: str) -> bool:
    """Refuse null by the options' types, and turn single words of list options into lists; whether there were any."""
    import yaml

    changed = False
    for index, (key, value) in enumerate(node.value):
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(expected(name, "options by name", f"a {key.id} as a name"))
        option = f"{prefix}{key.value}"
        if option == "config":
            raise UserError(expected(name, "options", "another --config"))
        kind = options.get(option)
        if isinstance(value, yaml.MappingNode):
            if dataclasses.is_dataclass(kind):
                changed |= _check(value, options, name, f"{option}.")
            continue
        if option not in options or not isinstance(value, yaml.ScalarNode):
            continue
        if value.tag == "tag:yaml.org,2002:null":
            check_value(f"{name}: {option}", kind, None)
        elif dataclasses.is_dataclass(kind) and f"{option}.kind" in options:
            word = yaml.ScalarNode("tag:yaml.org,2002:str", "kind")
            node.value[index] = key, yaml.MappingNode("tag:yaml.org,2002:map", [(word, value)], flow_style=True)
            changed = True
        elif list_kind(kind) == "str":
            word = yaml.ScalarNode("tag:yaml.org,2002:str", value.value, style='"')
            node.value[index] = key, yaml.SequenceNode("tag:yaml.org,2002:seq", [word], flow_style=True)
            changed = True
        elif value.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(value.value) > 400:
            raise UserError(expected(f"{name}: {option}", described(kind), f"{len(value.value)} digits"))
    return changed
