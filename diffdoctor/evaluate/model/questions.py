"""Yes-or-no questions about a picture to a model of pictures and text: whether it shows what its prompt asks for."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from diffdoctor.data.text import read_text, split_lines
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.pretrained import load_from_transformers

_MAX_BYTES = 64 << 20
MOST_QUESTIONS = 32
ASKED = "{question} Answer with yes or no."
# Where a prompt is cut into what is asked for.
_CUTS = re.compile(r"[,;:.!?\n]|\b(?:and|with)\b", re.IGNORECASE)
_WORDS = {answer: [answer, answer.title(), f" {answer}", f" {answer.title()}"] for answer in ("yes", "no")}


def questions_from(prompt: str) -> list[str]:
    """Questions made of a prompt's own words.

    The prompt is cut at punctuation and at the words "and" and "with"; for each part that has a letter, whether the
    picture shows it is asked, once.

    Example:
        >>> questions_from("a red cube and two spheres")
        ['Does the picture show a red cube?', 'Does the picture show two spheres?']
    """
    parts = [" ".join(part.split()) for part in _CUTS.split(prompt)]
    parts = [part for part in dict.fromkeys(parts) if any(character.isalpha() for character in part)]
    return [f"Does the picture show {part}?" for part in parts[:MOST_QUESTIONS]]


def read_questions(path: str | Path, prompts: Iterable[str]) -> dict[str, list[str]]:
    """The questions of a file.

    Args:
        path: of JSON lines with `prompt` and `questions`, texts to which yes is the right answer.
        prompts: each of which must have some.

    Returns:
        The questions of each of the prompts.

    Raises:
        UserError: it cannot be read, or a prompt has none or more than 32.
    """
    name, found = f"--questions {path}", {}
    for number, line in enumerate(split_lines(read_text(path, limit=_MAX_BYTES, name=name)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, questions = row["prompt"], row["questions"]
            texts = [prompt, *questions] if isinstance(questions, list) else [None]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            what = f"`prompt` and a list `questions` in line {number}"
            raise UserError(expected(name, what, repr(line[:80]))) from None
        if not 0 < len(questions) <= MOST_QUESTIONS:
            what = f"1 to {MOST_QUESTIONS} questions in line {number}"
            raise UserError(expected(name, what, len(questions)))
        found[prompt] = questions
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
    if missing:
        got = f"{len(missing)} without, the first of them {missing[0][:60]!r}"
        raise UserError(expected(name, "questions for every prompt", got))
    return {prompt: found[prompt] for prompt in dict.fromkeys(prompts)}


class Questioner:
    """Asks a model whether a picture shows what its prompt asks for, and takes the probability of "yes".

    Source: A. Kamath et al., GenEval 2 (Soft-TIFA), arXiv 2512.16853: probabilities in place of answers, of a picture
    their geometric mean.

    Args:
        source: folder or hub id of a model of transformers that takes pictures and text and gives text.
        questions: of each prompt; `questions_from` for one that is not there.

    Raises:
        UserError: there is no such model, or its tokenizer has no word for yes or no.
    """

    option = "--vqa"

    def __init__(self, source: str, questions: dict[str, list[str]]):
        self.source, self.questions = source, questions
        names = "AutoModelForImageTextToText", "AutoProcessor"
        self.model, self.processor = load_from_transformers(self.option, source, *names)
        # models without it give the logits of all positions, of which the last alone is looked at
        known = inspect.signature(self.model.forward).parameters
        self.last_alone = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.tokenizer = getattr(self.processor, "tokenizer", None)
        image = getattr(self.processor, "image_token", None)
        if self.tokenizer is None or not (image or getattr(self.processor, "chat_template", None)):
            what = "a model whose processor has a tokenizer, and a chat template or a token for pictures"
            raise UserError(expected(f"{self.option} {source}", what, type(self.processor).__name__))
        self.tokenizer.padding_side = "left"  # so that the answer follows the last position of every row
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokens = {answer: self._tokens_of(words) for answer, words in _WORDS.items()}
        if not all(self.tokens.values()) or {*self.tokens["yes"]} & {*self.tokens["no"]}:
            raise UserError(expected(f"{self.option} {source}", "a tokenizer that tells yes from no", "another"))

    def _tokens_of(self, words: Sequence[str]) -> list[int]:
        """The tokens that begin an answer, however it is written."""
        encoded = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return sorted({tokens[0] for tokens in encoded if len(tokens) == 1} - {self.tokenizer.unk_token_id})

    def to(self, device: torch.device) -> Questioner:
        """Move the model."""
        self.model.to(device)
        return self

    def asked(self, prompt: str) -> list[str]:
        """The questions of a prompt."""
        return self.questions.get(prompt) or questions_from(prompt)

    @torch.no_grad()
    def scores(self, pictures: torch.Tensor, prompts: Sequence[str], width: int | None = None) -> torch.Tensor:
        """The probability of yes for each question of each picture.

        It is that of the tokens for yes, over that of those for yes and for no, where the model would begin its answer.

        Args:
            pictures: uint8 (B, 3, H, W).
            prompts: B.
            width: columns of the result; None: as many as the longest list of questions has.

        Returns:
            (B, width) float32 on the CPU, NaN behind a picture's last question.
        """
        lists = [self.asked(prompt) for prompt in prompts]
        width = max(map(len, lists), default=0) if width is None else width
        result = torch.full((len(lists), width), math.nan)
        arrays = list(pictures.cpu().permute(0, 2, 3, 1).numpy())
        for row, (picture, questions) in enumerate(zip(arrays, lists, strict=True)):
            if questions:
                texts = [self._text(question) for question in questions]
                images = [picture] * len(texts)
                inputs = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
                logits = self.model(**inputs.to(self.model.device), **self.last_alone).logits[:, -1].float()
                both = torch.stack([logits[:, self.tokens[answer]].logsumexp(1) for answer in ("yes", "no")])
                result[row, : len(questions)] = both.softmax(0)[0].cpu()
        return result

    def _text(self, question: str) -> str:
        asked = ASKED.format(question=question)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            turn = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return f"{self.processor.image_token}\n{asked}"


def picture_scores(probabilities: torch.Tensor) -> torch.Tensor:
    """The geometric mean (B,) of each picture's probabilities (B, Q), without those that are NaN; 1 without any."""
    known = ~probabilities.isnan()
    logs = probabilities.clamp_min(1e-6).log().where(known, 0.0)
    return (logs.sum(1) / known.sum(1).clamp_min(1)).exp()
