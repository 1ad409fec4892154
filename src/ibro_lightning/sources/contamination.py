"""Contamination check: finds problems shared by training and evaluation by their normalised text."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ibro_lightning.types import Prompt

_BETWEEN_WORDS = re.compile(r"(?:[^\w+\-*/=<>^]|_)+")
_CONTAINED_FROM = 40
"""Minimum characters of a question to search in training prompts: many contain "What is 1 + 1" by chance."""


@dataclass(frozen=True)
class Overlap:
    """An evaluation question and the first training prompt that contains it."""

    eval_id: str
    train_id: str
    question: str

    def __str__(self) -> str:
        question = " ".join(self.question.split())
        beginning = question if len(question) <= 60 else f"{question[:59]}…"
        return f"{self.eval_id} = {self.train_id} {beginning!r}"


def normalized(text: str) -> str:
    r"""``text`` after NFKC and case folding, reduced to letters, digits and ``+ - * / = < > ^``.

    Copies of a problem mostly differ in white space, case, punctuation and LaTeX delimiters.

    >>> normalized(r"Find $\left( x^2 - 1 \right)$, if \(x = 3\).")
    'find left x^2 - 1 right if x = 3'
    >>> normalized("12>41:") == normalized("1>241:")
    False
    """
    return _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


class TrainingTexts:
    """An index of training prompts for looking up many questions."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._ids = [prompt.id for prompt in prompts]
        self._questions: dict[str, int] = {}
        texts = []
        for index, prompt in enumerate(prompts):
            question, text = normalized(_question(prompt)), normalized(prompt.text)
            self._questions.setdefault(question, index)
            # The prompt usually contains the question; if a source names a different one, both are searched.
            texts.append(f" {text} " if f" {question} " in f" {text} " else f" {question} \n {text} ")
        self._starts = [0]
        for text in texts:
            self._starts.append(self._starts[-1] + len(text) + 1)
        self._joined = "\n".join(texts)  # normalised text has no line breaks, so no match spans two prompts

    def find(self, prompt: Prompt) -> Overlap | None:
        """The first overlap of an evaluation prompt's question with the training prompts, or None."""
        question = normalized(_question(prompt))
        index = self._questions.get(question)
        if index is None and len(question) >= _CONTAINED_FROM:
            position = self._joined.find(f" {question} ")
            index = bisect_right(self._starts, position) - 1 if position >= 0 else None
        return None if index is None else Overlap(prompt.id, self._ids[index], _question(prompt))


def overlaps(eval_prompts: Sequence[Prompt], train_prompts: Sequence[Prompt]) -> list[Overlap]:
    """The evaluation prompts whose question occurs in the training prompts.

    Two questions match if they are equal after normalisation, or if the evaluation question has at least 40 normalised
    characters and occurs as whole words in a training question or prompt. This finds a problem in another template or
    inside a longer one, but not a paraphrase.
    """
    texts = TrainingTexts(train_prompts)
    return [overlap for prompt in eval_prompts if (overlap := texts.find(prompt))]


def _question(prompt: Prompt) -> str:
    return prompt.question or prompt.text
