"""A command's parser with a help that reads well: required options look required, many options stand in groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffdoctor.cli.config_file import read_config
from diffdoctor.cli.options import Options, list_kind
from diffdoctor.runs.errors import UserError

_ROUND = {
    "what is read and written": ("pool", "detector", "output", "test", "data"),
    "what is asked": (
        *("budget", "strategy", "gold", "audit_share", "gold_share", "new_share", "double_share", "blind_share"),
        *("per_prompt", "generator_share", "per_look", "look_distance"),
    ),
    "who answers": ("annotator", "merge", "truth", "raters"),
    "what is learnt": ("precision", "most_pseudo", "human_share", "pseudo_share", "architecture"),
    "when to stop": ("rounds", "patience", "bootstrap"),
    "the detector, memory and speed": ("mirrored", "tile", "batch_size", "device", "seed"),
}
# The groups of a command that has many options, by title; what is named in none stays where it is.
GROUPS = {
    "treat": {
        "what is read and written": (
            *("pipeline", "detector", "prompts", "offline", "output", "lora", "webui", "monitor", "scheduler", "dtype"),
        ),
        "sampling, and the steps that carry a gradient": (
            *("method", "sampling_steps", "grad_steps", "guidance_scale", "negative_prompt", "cfg_grad", "height"),
            *("width", "max_sequence_length", "merge_rollout"),
        ),
        "the method nft": ("old_decay", "nft_clean", "nft_artifact", "nft_repeats", "anchor_weight"),
        "the method grpo": (
            *("group_size", "grpo_window", "grpo_eta", "grpo_updates", "grpo_clip", "grpo_level", "kl_weight"),
            "reward_weight",
        ),
        "optimisation": (
            *("steps", "batch_size", "learning_rate", "warmup_steps", "final_learning_rate", "weight_decay"),
            *("adam_epsilon", "max_grad_norm", "ema_decay", "max_skipped", "seed"),
        ),
        "the LoRA": ("rank", "alpha", "lora_targets"),
        "the artifact term": (
            *("artifact_grad", "clean_grad", "modulate", "artifact_threshold", "artifact_method", "replay_area"),
            *("replay_confidence", "map_source"),
        ),
        "the offline term": ("offline_weight", "offline_batch_size", "offline_confidence", "offline_dilation"),
        "measuring, and when to stop": (
            *("evaluate_every", "evaluate_pictures", "patience", "good_enough", "min_sharpness", "min_diversity"),
        ),
        "memory and speed": (
            *("micro_batch_size", "gradient_checkpointing", "vae_slicing", "vae_tiling", "text_encoders"),
            *("precision", "attention_backend", "device"),
        ),
        "records": ("checkpoint_every", "log_with", "sample_every", "sample_pictures", "strict"),
    },
    "repair": {
        "what is read and written": ("pipeline", "detector", "output", "lora", "scheduler", "dtype", "gallery"),
        "what is redrawn": ("threshold", "grow", "feather", "context", "regions", "min_area", "max_area"),
        "how it is redrawn": (
            *("method", "prompt", "negative_prompt", "strength", "last_strength", "tries", "sampling_steps"),
            *("guidance_scale", "max_sequence_length", "height", "width", "seed"),
        ),
        "the detector, memory and speed": ("tile", "overlap", "batch_size", "device", "strict"),
    },
    "round run": _ROUND,
    "round status": _ROUND,
    "evaluate model": {
        "the treatment that is evaluated": ("treatment", "pipeline", "lora", "treated", "guide", "guide_options"),
        "the detectors": ("detector", "judge"),
        "what is generated": (
            *("prompts", "pictures", "seed", "sampling_steps", "guidance_scale", "negative_prompt", "height", "width"),
            *("max_sequence_length", "scheduler", "dtype", "batch_size", "picture_type"),
        ),
        "measures beside the detectors' rates": (
            *("real", "damaged", "features", "clip", "preference", "preference_processor", "classifier"),
        ),
    },
}


def command_parser(
    name: str,
    summary: str,
    config_class: type,
    options: Options,
    *,
    positional: Sequence[str] = (),
    required: Sequence[str] = (),
    file: str = "",
):
    """The parser of a command.

    Args:
        name: the command's.
        summary: one line about it.
        config_class: the dataclass of its options, whose docstring describes them.
        options: name and type of each.
        positional: the options that are given without a name.
        required: options with a default that must be given all the same.
        file: see `cli.Command`.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            raise UserError(f"{message} (see `diffdoctor {name} --help`)")

        def parse_path(self, path, **kwargs):
            return self.parse_string(read_config(str(path), options), **kwargs)

        def format_help(self):
            # Only here: otherwise the parser asks for them, in words of its own.
            for action in self._actions:
                action.required |= action.dest in required
            return super().format_help()

    parser = Parser(prog=" ".join(["diffdoctor", name, file]).rstrip(), description=summary, default_env=False)
    also = f"; {file} is the same" if file else ""
    parser.add_argument("--config", action=ActionConfigFile, help=f"a YAML file that holds any of these options{also}")
    described = _described(config_class)
    for each in positional:
        several = list_kind(options[each]) is not None
        # One that may be left out has an empty list as its default.
        count = ("+" if _must_be_given(config_class, each) else "*") if several else None
        parser.add_argument(each, type=str, nargs=count, help=described.get(each))
    parser.add_class_arguments(config_class, skip=set(positional))
    for action in parser._actions:
        if f"{action.dest}.kind" in options:
            action.metavar, action.help = "KIND", f"short for --{action.dest}.kind"
    _group(parser, GROUPS.get(name, {}))
    return parser


def _must_be_given(config_class: type, option: str) -> bool:
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == option)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _described(config_class: type) -> dict[str, str]:
    """What the dataclass's docstring says of each option."""
    import docstring_parser

    found: dict[str, str] = {}
    for each in reversed(config_class.__mro__):  # the options of a class that it extends, too
        parsed = docstring_parser.parse(each.__doc__ or "")
        found |= {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
    return found


def _group(parser: Any, groups: Mapping[str, Sequence[str]]) -> None:
    """Show options under titles; the parser takes them as before."""
    titles = {option: title for title, options in groups.items() for option in options}
    made = {title: parser.add_argument_group(title) for title in groups}
    for group in [group for group in parser._action_groups if group not in made.values()]:
        for action in [action for action in group._group_actions if action.dest in titles]:
            group._group_actions.remove(action)
            made[titles[action.dest]]._group_actions.append(action)
    # The rest last: under the titles of the class and of argparse.
    parser._action_groups.sort(key=lambda group: group not in made.values() and group.title not in _FIRST)


_FIRST = ("positional arguments", "options")
