"""Are problems evaluated on that were trained on? Compared as normalised text, and named."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ibro_lightning.types import Prompt

_BETWEEN_WORDS = re.compile(r"(?:[^\w+\-*/=<>^]|_)+")
_CONTAINED_FROM = 40
"""Normalised characters that a question must have to be looked for inside training prompts: "What is 1 + 1" is part of
many, and means nothing there."""


@dataclass(frozen=True)
class Overlap:
    """An evaluation question that is trained on, with the first training prompt that has it."""

    eval_id: str
    train_id: str
    question: str

    def __str__(self) -> str:
        question = " ".join(self.question.split())
        beginning = question if len(question) <= 60 else f"{question[:59]}…"
        return f"{self.eval_id} = {self.train_id} {beginning!r}"


def normalized(text: str) -> str:
    r"""``text`` as questions are compared: what differs between two copies of a problem is mostly white space, case,
    punctuation and the delimiters of LaTeX. Letters, digits and ``+ - * / = < > ^`` remain.

    >>> normalized(r"Find $\left( x^2 - 1 \right)$, if \(x = 3\).")
    'find left x^2 - 1 right if x = 3'
    >>> normalized("12>41:") == normalized("1>241:")
    False
    """
    return _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


class TrainingTexts:
    """Training prompts, indexed so that many questions can be looked up in tens of thousands of them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._ids = [prompt.id for prompt in prompts]
        self._questions: dict[str, int] = {}
        texts = []
        for index, prompt in enumerate(prompts):
            question, text = normalized(_question(prompt)), normalized(prompt.text)
            self._questions.setdefault(question, index)
            # Mostly the question is in the prompt. A source may name another one, and then both are searched.
            texts.append(f" {text} " if f" {question} " in f" {text} " else f" {question} \n {text} ")
        self._starts = [0]
        for text in texts:
            self._starts.append(self._starts[-1] + len(text) + 1)
        self._joined = "\n".join(texts)  # no normalised text has a line break: nothing is found across prompts

    def find(self, prompt: Prompt) -> Overlap | None:
        """Where the question of an evaluation prompt is trained on; None if nowhere."""
        question = normalized(_question(prompt))
        index = self._questions.get(question)
        if index is None and len(question) >= _CONTAINED_FROM:
            position = self._joined.find(f" {question} ")
            index = bisect_right(self._starts, position) - 1 if position >= 0 else None
        return None if index is None else Overlap(prompt.id, self._ids[index], _question(prompt))


def overlaps(eval_prompts: Sequence[Prompt], train_prompts: Sequence[Prompt]) -> list[Overlap]:
    """The evaluation prompts whose question is trained on.

    It is if its normalised question equals that of a training prompt; or if it has at least 40 normalised characters
    and stands, from one word border to another, in a training question or prompt. So a problem is found under another
    template, and inside a longer one; a problem in other words is not.
    """
    texts = TrainingTexts(train_prompts)
    return [overlap for prompt in eval_prompts if (overlap := texts.find(prompt))]


def _question(prompt: Prompt) -> str:
    return prompt.question or prompt.text
