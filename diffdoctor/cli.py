"""The command line: `diffdoctor COMMAND [options]`.

A command is a dataclass of options and a function that takes it; both are imported only when the command is run, so
that a missing extra stops only the commands that need it.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from diffdoctor.runs.errors import UserError, expected, missing_extra
from diffdoctor.version import __version__

USER_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: one line for the list of commands.
        config: "module:Dataclass" of the options.
        run: "module:function" that takes the dataclass; an int that it returns is the exit code.
        positional: the options that are given without a name.
    """

    summary: str
    config: str
    run: str
    positional: tuple[str, ...] = ()


COMMANDS = {
    "demo": Command(
        "diagnose and treat a small real pipeline on handwritten digits, end to end",
        "diffdoctor.demo.config:DemoConfig",
        "diffdoctor.demo.run:run_demo",
    ),
    "treat": Command(
        "tune a LoRA of a diffusers pipeline so that a detector finds fewer artifacts",
        "diffdoctor.treat.command:TreatCommandConfig",
        "diffdoctor.treat.command:run_treat",
    ),
    "inject": Command(
        "damage clean pictures: labelled shards with exact masks",
        "diffdoctor.detector.commands.inject:InjectConfig",
        "diffdoctor.detector.commands.inject:run_inject",
        ("pictures",),
    ),
    "train-detector": Command(
        "train a detector on labelled shards",
        "diffdoctor.detector.commands.train:TrainDetectorConfig",
        "diffdoctor.detector.commands.train:run_train_detector",
        ("data",),
    ),
    "diagnose": Command(
        "write a confidence map of every picture, and a gallery of the worst",
        "diffdoctor.detector.commands.diagnose:DiagnoseConfig",
        "diffdoctor.detector.commands.diagnose:run_diagnose",
        ("pictures",),
    ),
    "evaluate detector": Command(
        "measure a detector on labelled shards",
        "diffdoctor.evaluate.detector.command:EvaluateDetectorConfig",
        "diffdoctor.evaluate.detector.command:run_evaluate_detector",
        ("data",),
    ),
    "evaluate model": Command(
        "draw before and after a treatment, and measure both with an independent judge",
        "diffdoctor.evaluate.model.config:EvaluateModelConfig",
        "diffdoctor.evaluate.model.command:run_evaluate_model",
    ),
    "env": Command(
        "show versions, what was found and which backend serves what",
        "diffdoctor.environment:EnvConfig",
        "diffdoctor.environment:run_env",
    ),
}


def main(argv=None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None: those of this process.

    Returns:
        The exit code: 2 for bad input, 3 for a result that `--strict` does not accept, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        print(f"diffdoctor {__version__}")
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    parts = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if parts and words == 1:
        if argv[1:] in (["-h"], ["--help"]):
            print(_usage(parts))
            return 0
        return _fail(expected(argv[0], f"one of {', '.join(parts)}", " ".join(argv[:2])))
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}: expected one of {', '.join(sorted(COMMANDS))}")
    # Otherwise the tokenizers library warns at every fork, in the middle of the progress bar.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _run(name, COMMANDS[name], rest)
    except UserError as error:
        return _fail(str(error), name, error.exit_code)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return _fail(f"{path}{error.strerror or error}", name)
    except KeyboardInterrupt:
        print(f"diffdoctor {name}: interrupted; the same command resumes after what was finished", file=sys.stderr)
        return INTERRUPTED


def _usage(names=tuple(COMMANDS)):
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name].summary}" for name in sorted(names)]
    return "\n".join(
        [
            "usage: diffdoctor COMMAND [options]",
            "",
            "Diagnose image diffusion models pixel by pixel, then treat them where they are broken.",
            "",
            *lines,
            "",
            "`diffdoctor COMMAND --help` lists a command's options; each can stand in a YAML file given with --config.",
        ]
    )


def _fail(message, name=None, code=USER_ERROR):
    prefix = f"diffdoctor {name}" if name else "diffdoctor"
    print(f"{prefix}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _load(path):
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != "diffdoctor":
            raise missing_extra(error.name, "stages") from error
        raise


def _run(name, command, argv):
    config_class = _load(command.config)
    parser = _parser(name, command, config_class)
    with contextlib.suppress(BrokenPipeError):
        argv = _with_switches(argv, config_class, has_positional=bool(command.positional))
        options = parser.parse_args(_with_lists(argv, config_class))
        try:
            values = {key: value for key, value in vars(parser.instantiate(options)).items() if key != "config"}
            config = config_class(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{error} (see `diffdoctor {name} --help`)") from None
        result = _load(command.run)(config)
        return result if isinstance(result, int) else 0
    return 0


def _parser(name, command, config_class):
    try:
        from jsonargparse import ActionConfigFile, ArgumentParser
    except ImportError:
        raise missing_extra("jsonargparse", "stages") from None

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            raise UserError(f"{message} (see `diffdoctor {name} --help`)")

        def parse_path(self, path, **kwargs):
            return self.parse_string(_config_text(path, _list_options(config_class)), **kwargs)

    parser = Parser(prog=f"diffdoctor {name}", description=command.summary, default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file that holds any of these options")
    described = _described(config_class)
    for positional in command.positional:
        parser.add_argument(positional, type=str, nargs="+", help=described.get(positional))
    parser.add_class_arguments(config_class, skip=set(command.positional))
    return parser


def _described(config_class) -> dict[str, str]:
    """What the dataclass's docstring says of each option."""
    import docstring_parser

    parsed = docstring_parser.parse(config_class.__doc__ or "")
    return {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}


def _config_text(path, lists) -> str:
    """A YAML file's text, with a list wherever a list option has a single word in the file."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text)
    except UnicodeDecodeError as error:
        raise UserError(expected(f"--config {path}", "a YAML file in UTF-8", str(error))) from None
    except yaml.YAMLError:
        # The parser says what is wrong.
        return text
    # The text changes where it has to and nowhere else: reading and writing it would turn 1e-4 into a word.
    return yaml.serialize(root) if _make_lists(root, lists) else text


def _make_lists(node, lists, prefix="") -> bool:
    """Turn single words of list options into lists, in place; returns whether there were any."""
    import yaml

    changed = False
    for index, (key, value) in enumerate(node.value if isinstance(node, yaml.MappingNode) else ()):
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            changed |= _make_lists(value, lists, f"{name}.")
        elif isinstance(value, yaml.ScalarNode) and lists.get(name) == "str" and not value.tag.endswith(":null"):
            word = yaml.ScalarNode("tag:yaml.org,2002:str", value.value, style='"')
            node.value[index] = key, yaml.SequenceNode("tag:yaml.org,2002:seq", [word], flow_style=True)
            changed = True
    return changed


def _with_switches(argv, config_class, has_positional):
    """The words with `--strict` and `--strict True` as the parser wants them, `--strict=true`."""
    switches = {f"--{name}" for name, kind in _options(config_class) if kind is bool}
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


def _with_lists(argv, config_class):
    """The words with `--real a b` as the parser wants it, `--real ["a", "b"]`, for list and tuple options."""
    kinds = _list_options(config_class)
    result, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        kind = kinds.get(name.removeprefix("--")) if name.startswith("--") else None
        if kind is None:
            result.append(word)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and not (values and _is_list(values[0])):
            values.append(rest.pop(0))
        if values and not _is_list(values[0]) and values != ["null"]:
            # Numbers stay numbers, and names of files are not read as anything else.
            values = [json.dumps(values) if kind == "str" else f"[{', '.join(values)}]"]
        result += [name, *values]
    return result


def _is_list(text) -> bool:
    """Whether a word is a whole list, rather than a name that begins with a bracket."""
    import yaml

    if not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return isinstance(yaml.safe_load(text), list)
    except yaml.YAMLError:
        return False


def _options(config_class, prefix=""):
    """Name and type of every option, those of nested dataclasses included."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _options(kind, f"{name}.")
        yield name, kind


def _list_options(config_class) -> dict[str, str]:
    """The options that hold several values, by name, with the kind of a value: "str" or "other"."""
    found = {}
    for name, declared in _options(config_class):
        for kind in (declared, *typing.get_args(declared)):
            if typing.get_origin(kind) in (list, tuple):
                found[name] = "str" if typing.get_args(kind)[0] is str else "other"
    return found


if __name__ == "__main__":
    sys.exit(main())
