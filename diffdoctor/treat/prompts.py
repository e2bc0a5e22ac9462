"""Prompts as a user gives them: none empty, none silently cut."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence

from diffdoctor.runs.errors import UserError, expected

logger = logging.getLogger(__name__)


def check_prompts(
    pipeline, prompts: Sequence[str], *, strict: bool = False, max_sequence_length: int | None = None
) -> list[str]:
    """The prompts as a list, blank ones refused, with a warning that counts those beyond the token limit.

    Args:
        pipeline: whose tokenizers count.
        prompts: one, or several.
        strict: refuse prompts beyond the limit.
        max_sequence_length: of T5 prompts, in tokens; None: the pipeline's own.

    Raises:
        UserError: if there is none, one is blank or not a string, or (strict) one is too long.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise UserError(expected("prompts", "at least one", "none"))
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(expected("prompts", "text", f"{prompt!r} as number {number}"))
    tokenizer, limit = _tokens(pipeline, max_sequence_length)
    if tokenizer is None:
        return prompts
    distinct = sorted(set(prompts))
    tokens = tokenizer(distinct, truncation=False).input_ids
    lengths = {prompt: len(ids) for prompt, ids in zip(distinct, tokens, strict=True)}
    long = [prompt for prompt in prompts if lengths[prompt] > limit]
    if long:
        message = f"{len(long)} of {len(prompts)} prompts are longer than {limit} tokens, such as {long[0][:60]!r}"
        if strict:
            raise UserError(f"{message}: shorten them, or leave strict off to have them cut")
        logger.warning("%s: they are cut", message)
    return prompts


def _tokens(pipeline, max_sequence_length: int | None):
    """The tokenizer that reads most of a prompt, and how many tokens of it are used; (None, 0) without one."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    found = [tokenizer for name in names if (tokenizer := getattr(pipeline, name, None)) is not None]
    if not found:
        return None, 0
    # T5 is the last one and says nothing of its own limit: SD3's pipeline takes 256 tokens by default, FLUX's 512
    encode = getattr(pipeline, "encode_prompt", None)
    calls = [type(pipeline).__call__, *([encode] if callable(encode) else [])]
    owns = (inspect.signature(call).parameters.get("max_sequence_length") for call in calls)
    own = next((own for own in owns if own is not None), None)
    limit = found[-1].model_max_length
    if own is not None and not isinstance(found[-1], _clip_tokenizers()):
        limit = min(limit, max_sequence_length or own.default or limit)
    return found[-1], limit


def _clip_tokenizers():
    import transformers

    return transformers.CLIPTokenizer, transformers.CLIPTokenizerFast
