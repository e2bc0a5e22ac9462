"""The command line: `diffdoctor COMMAND [options]`.

A command is a dataclass of options and a function that takes it; both are imported only when the command is run, so
that a missing extra stops only the commands that need it.
"""

from __future__ import annotations

import importlib
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffdoctor.cli.failures import USER_ERROR, fail, report, report_threads, watched_threads
from diffdoctor.cli.help import command_parser
from diffdoctor.cli.options import (
    Options,
    check_value,
    list_kind,
    options_of,
    refuse_nulls,
    with_home,
    with_kinds,
    with_lists,
    with_switches,
)
from diffdoctor.cli.streams import tolerant_streams
from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.runs.record import refuse_url
from diffdoctor.version import __version__


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: one line for the list of commands.
        config: "module:Dataclass" of the options.
        run: "module:function" that takes the dataclass; an int that it returns is the exit code.
        positional: the options that are given without a name.
        required: options with a default that must be given all the same.
        file: what a word before all options is called, the YAML file of `--config`; "": there is none.
        stores: whether the output may lie in an object store.
    """

    summary: str
    config: str
    run: str
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    file: str = ""
    stores: bool = False


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
        required=("pipeline", "detector", "prompts", "output"),
    ),
    "inject": Command(
        "damage clean pictures: labelled shards with exact masks",
        "diffdoctor.detector.commands.inject:InjectConfig",
        "diffdoctor.detector.commands.inject:run_inject",
        ("pictures",),
        stores=True,
    ),
    "sample": Command(
        "draw a set of pictures from prompts and seeds",
        "diffdoctor.treat.sample:SampleConfig",
        "diffdoctor.treat.sample:run_sample",
        required=("pipeline", "prompts", "output"),
        stores=True,
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
        ("detector", "output"),
        stores=True,
    ),
    "repair": Command(
        "redraw what a detector flags in finished pictures, and keep what is then better",
        "diffdoctor.repairs.config:RepairConfig",
        "diffdoctor.repairs.command:run_repair",
        ("pictures",),
    ),
    "serve-detector": Command(
        "let other programs ask a detector over HTTP: maps, regions, rewards",
        "diffdoctor.detector.commands.serve:ServeDetectorConfig",
        "diffdoctor.detector.commands.serve:run_serve_detector",
    ),
    "annotate add": Command(
        "choose pictures for people to label: a round's tasks",
        "diffdoctor.annotate.config:AnnotateAddConfig",
        "diffdoctor.annotate.add:run_annotate_add",
        ("project",),
    ),
    "annotate serve": Command(
        "serve the page on which people label pictures",
        "diffdoctor.annotate.config:AnnotateServeConfig",
        "diffdoctor.annotate.command:run_annotate_serve",
        ("project",),
    ),
    "annotate token": Command(
        "let a person in, or shut one out",
        "diffdoctor.annotate.config:AnnotateTokenConfig",
        "diffdoctor.annotate.command:run_annotate_token",
        ("project", "name"),
    ),
    "annotate status": Command(
        "show how far the labels are, and whether the record is whole",
        "diffdoctor.annotate.config:AnnotateStatusConfig",
        "diffdoctor.annotate.command:run_annotate_status",
        ("project",),
    ),
    "annotate agreement": Command(
        "measure how well raters agree",
        "diffdoctor.annotate.config:AnnotateAgreementConfig",
        "diffdoctor.annotate.command:run_annotate_agreement",
        ("project",),
    ),
    "annotate export": Command(
        "write the labels as shards, or for Label Studio or COCO",
        "diffdoctor.annotate.config:AnnotateExportConfig",
        "diffdoctor.annotate.export:run_annotate_export",
        ("project",),
    ),
    "annotate import": Command(
        "take labels from Label Studio, COCO or a folder of masks",
        "diffdoctor.annotate.config:AnnotateImportConfig",
        "diffdoctor.annotate.imports:run_annotate_import",
        ("project", "source"),
    ),
    "round run": Command(
        "diagnose, have pictures labelled, train, measure and decide, round by round",
        "diffdoctor.rounds.config:RoundConfig",
        "diffdoctor.rounds.command:run_round",
        file="ROUND.yaml",
    ),
    "round status": Command(
        "show how far the rounds are, and what each detector gained",
        "diffdoctor.rounds.config:RoundConfig",
        "diffdoctor.rounds.command:run_round_status",
        file="ROUND.yaml",
    ),
    "set check": Command(
        "check that sets of shards are what their manifests and commits say",
        "diffdoctor.sets.config:SetCheckConfig",
        "diffdoctor.sets.check:run_set_check",
        ("sets",),
    ),
    "set stats": Command(
        "count what sets of shards hold: categories, labels, areas; a page of their quality",
        "diffdoctor.sets.config:SetStatsConfig",
        "diffdoctor.sets.stats:run_set_stats",
        ("sets",),
    ),
    "set dedup": Command(
        "find pictures that sets hold twice or nearly, and test pictures among them",
        "diffdoctor.sets.config:SetDedupConfig",
        "diffdoctor.sets.dedup:run_set_dedup",
        ("sets",),
    ),
    "set join": Command(
        "make one set of several: pictures with the labels of label sets, without duplicates",
        "diffdoctor.sets.config:SetJoinConfig",
        "diffdoctor.sets.join:run_set_join",
        ("sets",),
        stores=True,
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
        required=("judge", "output"),
    ),
    "evaluate compare": Command(
        "let people choose between two pictures of each pair, blind, and measure what they prefer",
        "diffdoctor.evaluate.compare.config:EvaluateCompareConfig",
        "diffdoctor.evaluate.compare.command:run_evaluate_compare",
        ("a", "b"),
    ),
    "env": Command(
        "show versions, what was found and which backend serves what",
        "diffdoctor.environment:EnvConfig",
        "diffdoctor.environment:run_env",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None: those of this process.

    Returns:
        The exit code: 2 for bad input and for whatever else ended the command, 3 for a result that --strict does not
        accept, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with tolerant_streams() as lost:
        code = _main(argv)
    return fail(f"standard output: {lost[0]}") if lost and code == 0 else code


def _main(argv: list[str]) -> int:
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
        return fail(expected(argv[0], f"one of {', '.join(parts)}", " ".join(argv[:2])))
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        return fail(f"unknown command {name!r}: expected one of {', '.join(sorted(COMMANDS))}")
    # Otherwise the tokenizers library warns at every fork, in the middle of the progress bar.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Notices of what is not installed and not needed, which both print when they are imported.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    with watched_threads() as ended:
        try:
            code = _run(name, COMMANDS[name], rest)
        except (Exception, KeyboardInterrupt) as error:
            return report(error, name)
    return report_threads(ended, name) or code


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


def _load(path):
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != "diffdoctor":
            raise missing_extra(error.name, "stages") from error
        raise


def _run(name: str, command: Command, argv: list[str]) -> int:
    config_class = _load(command.config)
    options = options_of(config_class)
    if command.file and argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    refuse_nulls(argv, options)
    argv = with_switches(with_kinds(argv, options), options, has_positional=bool(command.positional))
    values = _parsed(name, command, config_class, options, argv)
    if values is None:
        return 0
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{error} (see `diffdoctor {name} --help`)") from error
    for option in command.required:
        if getattr(config, option) is None:
            raise UserError(expected(f"--{option}", "a value", "none"))
    if not command.stores:
        refuse_url(getattr(config, "output", None))
    run = _load(command.run)
    try:
        result = run(config)
    except SystemExit as error:  # of code that is not ours, which must not pass for success
        raise UserError(f"something called exit({error.code!r}) while the command ran") from error
    return result if isinstance(result, int) else 0


def _parsed(
    name: str, command: Command, config_class: type, options: Options, argv: list[str]
) -> dict[str, Any] | None:
    """The options' values, each of which its type takes; None where the help was printed instead."""
    try:
        import jsonargparse  # noqa: F401
    except ImportError:
        if any(kind is not bool for kind in options.values()):
            raise missing_extra("jsonargparse", "stages") from None
        return _switches_alone(name, command, options, argv)
    parser = command_parser(
        name,
        command.summary,
        config_class,
        options,
        positional=command.positional,
        required=command.required,
        file=command.file,
    )
    try:
        words, kept = with_lists(argv, options)
        parsed = parser.parse_args(words)
        for option, texts in kept.items():
            parsed[option] = type(parsed[option])(texts)
        for option, kind in options.items():
            if option in parsed:
                check_value(option, kind, parsed[option])
                if str in (kind, *typing.get_args(kind)) or list_kind(kind) == "str":
                    parsed[option] = with_home(option, parsed[option])
        return {key: value for key, value in vars(parser.instantiate(parsed)).items() if key != "config"}
    except UserError:
        raise
    except Exception as error:  # the parser's own and those of the types
        raise UserError(f"{first_line(error)} (see `diffdoctor {name} --help`)") from error


def _switches_alone(name: str, command: Command, options: Options, argv: list[str]) -> dict[str, bool] | None:
    """The values of a command that has switches alone, without the parser that an extra brings."""
    if any(word in ("-h", "--help") for word in argv):
        names = "".join(f" [--{option}]" for option in options)
        print(f"usage: diffdoctor {name}{names}\n\n{command.summary}")
        return None
    values = {}
    for word in argv:
        option, _, value = word.partition("=")
        if option.removeprefix("--") not in options or value not in ("true", "false"):
            raise UserError(expected(f"diffdoctor {name}", " or ".join(f"--{each}" for each in options), repr(word)))
        values[option.removeprefix("--")] = value == "true"
    return values
