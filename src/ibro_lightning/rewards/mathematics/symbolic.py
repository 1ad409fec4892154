"""The symbolic verifier: answers compared as mathematics, by the math-verify library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError, check_count
from ibro_lightning.rewards.base import PlainResponses, Verdict, VerifiableReward
from ibro_lightning.rewards.mathematics.answer_text import answer_line, bare, is_quantity, without_special_tokens
from ibro_lightning.rewards.mathematics.expressions import equal, parse, spelled
from ibro_lightning.rewards.mathematics.gold_text import gold_texts
from ibro_lightning.rewards.mathematics.perturbed import perturbed
from ibro_lightning.types import Completion, Prompt

_KINDS = ("latex", "expr", "string")
_MAX_NESTING = 50
_BRACKET = re.compile(r"[(\[{}\])]")
_BOXED = re.compile(r"\\(?:boxed|fbox)")
_DELIMITED = re.compile(r"(?<!\\)(?:\$|\\\(|\\\[)|\\boxed|\\fbox")
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTION = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|exp|sqrt|mod|gcd|lcm|max|min|and|det|inf"
_WORD = re.compile(rf"\b(?!(?:{_FUNCTION})\b)(?:[A-Za-z]{{3,}}|is|of|to|by|be|as|on|it|if|an|no|at)\b")
_STYLE = re.compile(r"\\(?:text|mathrm|mbox|operatorname)")
_APPROXIMATELY = re.compile(r".+?(?=\\approx|≈)", re.DOTALL)
# What the library misreads: 1 234 as a sum, 1e5 as 5e, 0x1F as 0, a date as a difference.
_MISREAD = re.compile(
    r"(?P<spaced>[0-9](?:\s|~|\\ )+[0-9][0-9/]*)"
    r"|(?P<exponent>(?<![\w}.])[0-9.]+[eE][-+]?[0-9]+(?!\w))"
    r"|(?P<prefixed>\b0[xXbBoO][0-9a-fA-F]+\b)"
    r"|(?P<grouped>\b[0-9]{1,3}(?:_[0-9]{3})+\b)"
    r"|(?P<date>\b(?:[0-9]{4}([-/.])[0-9]{1,2}\6[0-9]{1,2}|[0-9]{1,2}([-/.])[0-9]{1,2}\7[0-9]{4})\b)"
    r"|(?P<time>[0-9](?:\s*\\(?:text|mathrm|mbox)\s*\{\s*[aApP]\.?\s?[mM]|\s?[aApP]\.\s?[mM]\.|\s+[aApP][mM]\b))"
)
_REMEDIES = {
    "spaced": r"1234, 1\frac{1}{2} or 1, 2",
    "exponent": r"100000 or 10^{5}",
    "prefixed": "the number in decimals",
    "grouped": "1234",
    **dict.fromkeys(("date", "time"), "another reward, such as DapoMathReward"),
}
_SENTENCE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def math_verify_score(response: str, gold: Any, **options: Any) -> float:
    """1.0 if the answer in ``response`` is mathematically the same as ``gold``; 0.0 if it is not, or if one of them
    cannot be read. (:class:`MathVerifyReward` raises for an unreadable gold.)

    There is no time limit: a hanging call must be stopped from outside, as the reward pool does. (The library's own
    limits are alarm signals, which fail in threads and do not interrupt C code; they are switched off.)

    Args:
        gold: as LaTeX with or without delimiters. Of a list, any one element (see :func:`.gold_text.alternatives`).
        options: the arguments of :class:`MathVerifyReward`.
    """
    reward = MathVerifyReward(**options)
    try:
        return reward.judged(str(response), gold_texts(gold)).accuracy
    except ValueError:
        return 0.0


class MathVerifyReward(VerifiableReward):
    r"""Right if the response's answer is mathematically the same as ``prompt.answer``, by the math-verify library.

    The answer is the value of the last "Answer:" line if it is alone there and no box follows it. Otherwise it is what
    the library takes: the last ``\boxed{}`` (adjacent ones form a set), then "the final answer is ...", then the text
    after the word "answer", then the last formula, then the last number.

    More lenient than it may look: of ``Answer: $34$ or maybe $35$`` the first formula counts, and words after a number
    are ignored, a unit as well as the "million" of ``34 million``.

    Args:
        match_types: what to look for: "latex", "expr" (plain numbers and arithmetic), "string" (a letter A to D).
        strict: names of variables matter, and a tuple is no set.
        precision: decimals to which floats are rounded for the comparison.
        numeric_precision: significant digits in the evaluation of expressions, where it is needed.
        allow_set_relation_comp: an inequality may equal the interval it describes, whichever of the two is the gold;
            otherwise only if the gold is the inequality.
        last_chars: characters at the response's end that are read, from the beginning of a line where there is one. A
            response that continues for longer after its answer is wrong.
    """

    tells_bad_answers = True

    def __init__(
        self,
        match_types: Sequence[str] = ("latex", "expr"),
        strict: bool = True,
        precision: int = 6,
        numeric_precision: int = 15,
        allow_set_relation_comp: bool = False,
        last_chars: int = 5000,
        correct: float = 1.0,
        incorrect: float = -1.0,
    ) -> None:
        super().__init__(correct, incorrect)
        if isinstance(match_types, str) or not match_types or any(kind not in _KINDS for kind in match_types):
            raise ConfigError("match_types", match_types, f"write a list of some of {', '.join(_KINDS)}")
        check_count("precision", precision, 0)
        check_count("numeric_precision", numeric_precision, 1)
        check_count("last_chars", last_chars, 1)
        self.match_types, self.last_chars = tuple(match_types), last_chars
        self.options = {"strict": strict, "float_rounding": precision, "numeric_precision": numeric_precision}
        self.options["allow_set_relation_comp"] = allow_set_relation_comp

    def preload(self) -> None:
        one, half = (parse(f"\\boxed{{{text}}}", ("latex", "expr"))[0] for text in ("1", "\\frac{1}{2}"))
        equal(one, half, self.options)

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        try:
            return self.judged(completion.text, self._golds(prompt))
        except ValueError as error:
            raise RewardError(f"MathVerifyReward: prompt {prompt.id!r}: {error}") from error

    def judged(self, response: str, golds: Sequence[str]) -> Verdict:
        """The verdict on a text. Raises ValueError for a gold that cannot be read."""
        right = [_gold(gold, self.match_types) for gold in golds]
        found = parse(_answer_text(response, self.match_types, self.last_chars), self.match_types)
        if any(equal(item, answer, self.options) for parsed, _ in right for item in parsed for answer in found):
            return Verdict(1.0, right[0][1])
        return Verdict(0.0, spelled(found))

    def _golds(self, prompt: Prompt) -> list[str]:
        try:
            return gold_texts(prompt.answer)
        except ValueError as error:
            shown = str(prompt.answer)[:200]
            raise ValueError(f"the gold answer {shown!r} cannot be read as mathematics: {error}") from error

    def plain_responses(self, prompt: Prompt) -> PlainResponses:
        golds = self._golds(prompt)
        for gold in golds:
            if misread := _MISREAD.search(gold):
                raise ValueError(f"the library misreads {misread[0]!r}: write {_REMEDIES[str(misread.lastgroup)]}")
        others = self._others(golds[0]) if len(golds) == 1 else []
        right, wrong = (tuple(self._plain(text) for text in texts) for texts in (golds, others))
        return PlainResponses(right, wrong)

    def _others(self, gold: str) -> list[str]:
        """The gold perturbed where it matters: not after an "≈", not in the base of a number. Letters only where a
        number is not enough (each costs the parsing of an expression), and not those of units."""
        counts = _APPROXIMATELY.match(gold)
        value, rest = (gold[: counts.end()], gold[counts.end() :]) if counts else (gold, "")
        letters = "=" in value and not is_quantity(value) and not _STYLE.search(value)
        others = perturbed(value, subscripts=False, letters=letters, decimals=self.options["float_rounding"])
        return [other + rest for other in others]

    def _plain(self, answer: str) -> str:
        if "latex" not in self.match_types:
            return f"The answer is {answer}"
        return answer if _DELIMITED.search(answer) else f"\\boxed{{{answer}}}"


def _answer_text(response: str, match_types: tuple[str, ...], last_chars: int) -> str:
    """The text for the library: the end of the response, or the "Answer:" line in dollars if it is a formula."""
    text = without_special_tokens(response[-last_chars:])
    if len(response) > last_chars and 0 <= (line_end := text.find("\n")) < len(text) - 1:
        text = text[line_end + 1 :]  # a cut within a formula would swap formulas and text in all that follows
    if _depth(text) > _MAX_NESTING:
        return ""
    line = answer_line(text) if "latex" in match_types else None
    value = "" if line is None or _BOXED.search(line) else bare(line)
    return f"${' '.join(value.split())}$" if value and _is_formula(value) else text


def _is_formula(value: str) -> bool:
    """Whether a value without delimiters is mathematics, or a single word, rather than a sentence."""
    plain = _COMMAND.sub(" ", value)
    return not _DELIMITED.search(value) and (not _WORD.search(plain) or plain.strip(" {}").isalpha())


def _depth(text: str) -> int:
    """The deepest nesting of brackets, in which the library's parser takes quadratic time."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=4096)
def _gold(gold: str, match_types: tuple[str, ...]) -> tuple[tuple[Any, ...], str]:
    """The gold as the library's expressions and as one string; cached, since all responses to a prompt share it."""
    text = gold
    if "latex" in match_types and not _DELIMITED.search(gold) and not _SENTENCE.search(_COMMAND.sub(" ", gold)):
        text = f"${' '.join(gold.split())}$"
    if not (found := parse(text, match_types)):
        raise ValueError(f"the gold answer {gold[:200]!r} cannot be read as mathematics: correct it, or drop the row")
    return found, spelled(found)
