"""Prompts as a user gives them: none empty, none silently cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from diffdoctor._errors import UserError

logger = logging.getLogger(__name__)


def check_prompts(pipeline, prompts: Sequence[str], *, strict: bool = False) -> list[str]:
    """The prompts as a list, blank ones refused, with a warning that counts those beyond the token limit.

    Args:
        strict: refuse prompts beyond the limit.

    Raises:
        UserError: if there is none, one is blank or not a string, or (strict) one is too long.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise UserError("prompts: at least one was expected, got none")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompts: text was expected, number {place + 1} is {prompt!r}")
    tokenizer, limit = _longest_tokenizer(pipeline)
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


def _longest_tokenizer(pipeline):
    found = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            found.append((min(tokenizer.model_max_length, 512), tokenizer))
    limit, tokenizer = max(found, key=lambda pair: pair[0])
    return tokenizer, limit
