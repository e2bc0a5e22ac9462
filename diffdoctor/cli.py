"""The command line: `diffdoctor COMMAND [options]`.

A command is a dataclass of options and a function that takes it; both are imported only when the command is run, so
that a missing extra stops only the commands that need it.
"""

import contextlib
import importlib
import os
import sys
from dataclasses import dataclass

from diffdoctor._errors import UserError, missing_extra
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
        "diffdoctor.detector.injecting:InjectConfig",
        "diffdoctor.detector.injecting:run_inject",
        ("pictures",),
    ),
    "train-detector": Command(
        "train a detector on labelled shards",
        "diffdoctor.detector.training:TrainDetectorConfig",
        "diffdoctor.detector.training:run_train_detector",
        ("data",),
    ),
    "diagnose": Command(
        "write a confidence map of every picture, and a gallery of the worst",
        "diffdoctor.detector.diagnosing:DiagnoseConfig",
        "diffdoctor.detector.diagnosing:run_diagnose",
        ("pictures",),
    ),
    "evaluate detector": Command(
        "measure a detector on labelled shards",
        "diffdoctor.evaluate.detector_report:EvaluateDetectorConfig",
        "diffdoctor.evaluate.detector_report:run_evaluate_detector",
        ("data",),
    ),
    "env": Command(
        "show versions, what was found and which backend serves what",
        "diffdoctor.environment:EnvConfig",
        "diffdoctor.environment:run_env",
    ),
}


def main(argv=None) -> int:
    """Run the command line; returns the exit code (2 for bad input, 130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        print(f"diffdoctor {__version__}")
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}: expected one of {', '.join(sorted(COMMANDS))}")
    # Nothing that a command needs is downloaded behind the user's back, and stray notices would bury the progress.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _run(name, COMMANDS[name], rest)
    except UserError as error:
        return _fail(str(error), name)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", name)
    except KeyboardInterrupt:
        print(f"diffdoctor {name}: interrupted; the same command goes on from what was finished", file=sys.stderr)
        return INTERRUPTED


def _usage():
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in sorted(COMMANDS.items())]
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


def _fail(message, name=None):
    prefix = f"diffdoctor {name}" if name else "diffdoctor"
    print(f"{prefix}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return USER_ERROR


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
        options = parser.parse_args(argv)
        values = {key: value for key, value in vars(parser.instantiate(options)).items() if key != "config"}
        try:
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

    parser = Parser(prog=f"diffdoctor {name}", description=command.summary, default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file that holds any of these options")
    for positional in command.positional:
        parser.add_argument(positional, type=str, nargs="+")
    parser.add_class_arguments(config_class, skip=set(command.positional))
    return parser


if __name__ == "__main__":
    sys.exit(main())
