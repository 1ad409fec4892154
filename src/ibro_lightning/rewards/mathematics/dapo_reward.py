"""The rule-based verifier of DAPO: the answer after "Answer:", compared as a normalised string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibro_lightning.errors import RewardError
from ibro_lightning.rewards.base import PlainResponses, Verdict, VerifiableReward
from ibro_lightning.rewards.mathematics.answer_text import (
    final_answer,
    is_quantity,
    same_answer,
    spelled,
    without_special_tokens,
)
from ibro_lightning.rewards.mathematics.dapo_rule import normalized, published_answer
from ibro_lightning.rewards.mathematics.gold_text import gold_texts
from ibro_lightning.rewards.mathematics.perturbed import perturbed
from ibro_lightning.types import Completion, Prompt

_TAIL = 300
"""Characters at the end of a response that the lenient rule reads, like the published one."""


def dapo_score(response: str, gold: Any, *, strict: bool = True) -> float:
    r"""1.0 if the response's final answer is ``gold`` by the rule of DAPO-Math-17K, 0.0 if not.

    Args:
        response: special tokens such as ``<|im_end|>`` are dropped, as decoding does.
        gold: an integer in that dataset, but any short LaTeX can be compared. Of a list, any one element (see
            :func:`.gold_text.alternatives`).
        strict: True is the published rule to the letter, ``compute_score`` of verl's ``math_dapo.py`` as DAPO used it:
            the last "Answer:" in the last 300 characters, equal strings after its normalisation. (verl 0.9 also looks
            for a box where there is no "Answer:"; this does not.) Its known false negatives, for gold ``34``:
            ``**Answer:** 34`` (the stars become part of the answer), ``Answer: 34.0``, ``Answer: 0034``,
            ``Answer: +34``, ``Answer: 34.``, ``Answer: 34 apples``, ``\boxed{34}`` or ``$34$`` without the word, a
            full-width colon. Its known false positive: ``Answer: 3 4``, since it drops spaces.

            False accepts all of the former and not the latter. It takes whichever comes last of an "Answer:" line and
            a box, or without either the last formula. Several answers (``34 or 35``), ranges and expressions that
            merely contain the gold (``34x``, ``2 \cdot 34``) stay wrong.
    """
    try:
        golds = gold_texts(gold)
    except ValueError:
        golds = [str(gold)]
    return _judge(str(response), golds, strict).accuracy


class DapoMathReward(VerifiableReward):
    """Right if the final answer equals ``prompt.answer`` by the rule of DAPO (see :func:`dapo_score`).

    Args:
        strict: True is the published rule to the letter; False also accepts what it rejects only for its form.
    """

    pooled = False  # reads 300 characters, with patterns that take at most quadratic time
    tells_bad_answers = True

    def __init__(self, strict: bool = True, correct: float = 1.0, incorrect: float = -1.0) -> None:
        super().__init__(correct, incorrect)
        self.strict = strict

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        return _judge(completion.text, self._golds(prompt), self.strict)

    def plain_responses(self, prompt: Prompt) -> PlainResponses:
        golds = self._golds(prompt)
        for gold in golds:
            if self.strict and normalized(gold) in ("", "[INVALID]"):
                raise RewardError(f"nothing is left of {gold[:80]!r} in the published normalisation")
        # In a number, letters are its name or its unit: x = 5, 5 cm.
        others = [other for gold in golds for other in perturbed(gold, letters=not is_quantity(gold))]
        if len(golds) > 1:
            spell = normalized if self.strict else spelled
            others = [other for other in others if spell(other) not in map(spell, golds)]
        right, wrong = (tuple(f"Answer: {text}" for text in texts) for texts in (golds, others))
        return PlainResponses(right, wrong)

    def _golds(self, prompt: Prompt) -> list[str]:
        try:
            return gold_texts(prompt.answer)
        except ValueError as error:
            remedy = "drop the row, or map the column that holds the right answer"
            reason = f"DapoMathReward finds no answer in prompt {prompt.id!r} ({prompt.answer!r}): {error}"
            raise RewardError(f"{reason} - {remedy}") from error


def _judge(response: str, golds: Sequence[str], strict: bool) -> Verdict:
    """The verdict, with the answer in the form compared; "" if the rule found none."""
    text = without_special_tokens(response)
    if not strict:
        answer = final_answer(text.rstrip()[-_TAIL:])
        right = any(same_answer(answer, gold) for gold in golds)
        return Verdict(float(right), spelled(golds[0] if right else answer))
    found = published_answer(text)
    right_answers = [normalized(gold) for gold in golds]
    if found is None:
        return Verdict(float("[INVALID]" in right_answers), "")  # the rule compares even this placeholder
    answer = normalized(found)
    return Verdict(float(answer in right_answers), answer)
