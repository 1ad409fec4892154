"""The rule-based verifier of DAPO: the answer after "Answer:", compared as a normalised string."""

from __future__ import annotations

from ibro_lightning.errors import RewardError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.base import Verdict, VerifiableReward
from ibro_lightning.rewards.mathematics.answer_text import final_answer, same_answer, spelled, without_special_tokens
from ibro_lightning.rewards.mathematics.dapo_rule import normalized, published_answer

_TAIL = 300
"""Characters at the end of a response in which the lenient rule looks for the answer, as the published one does."""


def dapo_score(response: str, gold: str, *, strict: bool = True) -> float:
    r"""1.0 if the response's final answer is ``gold`` by the rule of DAPO-Math-17K, 0.0 if not.

    Args:
        response: the response's text. Special tokens such as ``<|im_end|>``, which decoding drops, are dropped here.
        gold: the right answer; integers in that dataset, but any short LaTeX can be compared.
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
    return _judge(str(response), str(gold), strict).accuracy


class DapoMathReward(VerifiableReward):
    """Right if the final answer equals ``prompt.answer`` by the rule of DAPO (see :func:`dapo_score`).

    Args:
        strict: True is the published rule to the letter; False also accepts what it rejects for its form only.

    Raises:
        RewardError: a prompt without an answer.
    """

    pooled = False  # looks at 300 characters, with patterns whose time is at most quadratic in them
    tells_bad_answers = True

    def __init__(self, strict: bool = True, correct: float = 1.0, incorrect: float = -1.0) -> None:
        super().__init__(correct, incorrect)
        self.strict = strict

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        gold = "" if prompt.answer is None else str(prompt.answer)
        if not gold.strip():
            raise RewardError(
                f"data.reward: DapoMathReward finds no answer in prompt {prompt.id!r} ({prompt.answer!r}) - "
                "drop the row, or map the column that holds the right answer"
            )
        return _judge(completion.text, gold, self.strict)


def _judge(response: str, gold: str, strict: bool) -> Verdict:
    """The verdict, with the answer as it was compared: "" if the rule found none."""
    text = without_special_tokens(response)
    if not strict:
        answer = final_answer(text.rstrip()[-_TAIL:])
        right = same_answer(answer, gold)
        return Verdict(float(right), spelled(gold if right else answer))
    found = published_answer(text)
    if found is None:
        return Verdict(float(normalized(gold) == "[INVALID]"), "")  # the rule compares this placeholder, too
    answer = normalized(found)
    return Verdict(float(answer == normalized(gold)), answer)
