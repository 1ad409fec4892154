"""The symbolic verifier: answers read and compared as a mathematician does; math-verify reads what is rarely one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError, check_count, check_one_of
from ibro_lightning.rewards.base import PlainResponses, Verdict, VerifiableReward
from ibro_lightning.rewards.mathematics import expressions
from ibro_lightning.rewards.mathematics.answer_text import is_quantity
from ibro_lightning.rewards.mathematics.answers.equality import compare
from ibro_lightning.rewards.mathematics.answers.names import of_equations
from ibro_lightning.rewards.mathematics.answers.node import is_term, symbols
from ibro_lightning.rewards.mathematics.answers.rules import UNITS, Judgement, Rules
from ibro_lightning.rewards.mathematics.gold_text import gold_texts
from ibro_lightning.rewards.mathematics.perturbed import perturbed, with_another_meaning
from ibro_lightning.rewards.mathematics.readings import (
    Reading,
    library_expression,
    library_gold,
    read_answer,
    read_gold,
    with_unit,
)
from ibro_lightning.rewards.mathematics.response_text import DELIMITED, searched_text
from ibro_lightning.types import Completion, Prompt

_MEASURED = ("quantity", "percent")
_KINDS = ("latex", "expr", "string")
EQUALITIES = ("rules", "library")
_INDEXED = re.compile(r"[A-Za-z}]\s*_")
_APPROXIMATELY = re.compile(r".+?(?=\\approx|≈)", re.DOTALL)
# A date reads as a difference.
_DATE = re.compile(r"\b(?:[0-9]{4}([-/.])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/.])[0-9]{1,2}\2[0-9]{4})\b")
_LIBRARYS = re.compile(r"\\(?:int|sum|prod|lim|iint|oint)(?![A-Za-z])")
_DOTS = re.compile(r"\\[lc]?dots|\.\.\.|…")
_LETTERS = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


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
    r"""Right if the response's answer is mathematically the same as ``prompt.answer``: the rules are in
    ``docs/verifiers.md``.

    The answer is the value of the last "Answer:" line if it is alone there and no box follows it. Otherwise it is what
    the patterns of the math-verify library find: the last ``\boxed{}`` (adjacent ones form a list), then "the final
    answer is ...", then the text after the word "answer", then the last formula, then the last number. What our reader
    does not know, such as an integral, the library reads; it counts as the same only if its letters agree, too.

    Args:
        match_types: what to look for: "latex", "expr" (plain numbers and arithmetic), "string" (a letter A to D).
        strict: names of variables matter, and a tuple is no set.
        precision: a decimal with at least so many digits after the point stands for every number that rounds to it, one
            with fewer for itself alone.
        numeric_precision: significant digits in the library's evaluation of expressions that it alone reads.
        allow_set_relation_comp: an inequality equals the interval it describes, whichever of the two is the gold;
            otherwise only if the gold is the inequality.
        units: "agree": a unit may be left out, and must agree where both have one; "required": it may not be left out;
            "ignored": units are not compared.
        order: the entries of a list without brackets must come in the gold's order.
        simplified: the answer must have no more operations than the gold: ``2/4`` passes for ``1/2``, ``5 \cdot 6`` not
            for ``30``.
        equality: "rules": those of ``docs/verifiers.md``; "library": math-verify's own, as other frameworks use it.
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
        allow_set_relation_comp: bool = True,
        units: str = "agree",
        order: bool = False,
        simplified: bool = False,
        equality: str = "rules",
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
        check_one_of("units", units, UNITS)
        check_one_of("equality", equality, EQUALITIES)
        flags = {"strict": strict, "allow_set_relation_comp": allow_set_relation_comp, "order": order}
        for name, value in {**flags, "simplified": simplified}.items():
            if not isinstance(value, bool):
                raise ConfigError(name, value, "write true or false")
        self.match_types, self.last_chars, self.equality = tuple(match_types), last_chars, equality
        self.options = {"strict": strict, "float_rounding": precision, "numeric_precision": numeric_precision}
        self.options["allow_set_relation_comp"] = allow_set_relation_comp
        self.rules = Rules(precision, units, order, simplified, strict, allow_set_relation_comp)

    def preload(self) -> None:
        self.judged("\\boxed{1}", ["\\frac{1}{2}"])
        integral = expressions.parse("$\\int_0^1 x dx$", ("latex",))
        expressions.equal(integral[0], integral[0], self.options)

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        try:
            return self.judged(completion.text, self._golds(prompt))
        except ValueError as error:
            raise RewardError(f"MathVerifyReward: prompt {prompt.id!r}: {error}") from error

    def judged(self, response: str, golds: Sequence[str]) -> Verdict:
        """The verdict on a text. Raises ValueError for a gold that cannot be read."""
        text = searched_text(response, self.match_types, self.last_chars)
        if self.equality == "library":
            return self._judged_by_the_library(text, golds)
        right = [read_gold(gold, self.match_types) for gold in golds]
        if (found := read_answer(text, self.match_types, right)) is None:
            return Verdict(0.0, "", "no answer")
        judgements = [self._judgement(gold, found) for gold in right]
        if same := next((judgement for judgement in judgements if judgement.same), None):
            return Verdict(1.0, right[0].spelled(), same.why)
        return Verdict(0.0, found.spelled(), judgements[0].why)

    def readings(self, response: str, gold: str) -> tuple[Reading, Reading | None]:
        """How a gold and a response's answer are read; None for a response without one."""
        text = searched_text(response, self.match_types, self.last_chars)
        right = read_gold(gold, self.match_types)
        return right, read_answer(text, self.match_types, [right])

    def _judgement(self, gold: Reading, answer: Reading) -> Judgement:
        if gold.node is not None and answer.node is not None:
            answered = answer.node
            if gold.node.op == "quantity" and answered.op != "quantity":
                answered = with_unit(answer.text) or answered
            return compare(gold.node, answered, self.rules)
        if _squeezed(gold.text) == _squeezed(answer.text) != "":
            return Judgement(True, "text")
        return self._by_the_library(gold, answer)

    def _by_the_library(self, gold: Reading, answer: Reading) -> Judgement:
        """For what our reader does not know; the library drops letters and their case, so that they must agree."""
        both = [library_expression(reading) for reading in (gold, answer)]
        if both[0] is None or both[1] is None:
            return Judgement(False, "not read")
        if any(_signs(gold.text)[place] != _signs(answer.text)[place] for place in range(2)):
            return Judgement(False, "not read")
        same = expressions.equal(both[0], both[1], self.options)
        return Judgement(same, "library" if same else "another value")

    def _judged_by_the_library(self, text: str, golds: Sequence[str]) -> Verdict:
        right = [library_gold(gold, self.match_types) for gold in golds]
        found = expressions.parse(text, self.match_types)
        pairs = ((item, answer) for parsed, _ in right for item in parsed for answer in found)
        if any(expressions.equal(item, answer, self.options) for item, answer in pairs):
            return Verdict(1.0, right[0][1], "library")
        return Verdict(0.0, expressions.spelled(found), "another value" if found else "no answer")

    def _golds(self, prompt: Prompt) -> list[str]:
        try:
            return gold_texts(prompt.answer)
        except ValueError as error:
            shown = str(prompt.answer)[:200]
            raise ValueError(f"the gold answer {shown!r} cannot be read as mathematics: {error}") from error

    def plain_responses(self, prompt: Prompt) -> PlainResponses:
        golds = self._golds(prompt)
        for gold in golds:
            if date := _DATE.search(gold):
                remedy = "write another reward, such as DapoMathReward"
                raise ValueError(f"the date {date[0]!r} reads as a number: {remedy}")
        others = self._others(golds[0]) if len(golds) == 1 else []
        right, wrong = (tuple(self._plain(text) for text in texts) for texts in (golds, others))
        return PlainResponses(right, wrong)

    def _others(self, gold: str) -> list[str]:
        """The gold perturbed where it matters: not after an "≈", nor in the index of a symbol. Letters are those of
        names and units, which some settings leave out."""
        counts = _APPROXIMATELY.match(gold)
        value, rest = (gold[: counts.end()], gold[counts.end() :]) if counts else (gold, "")
        letters = self.rules.names and (self.rules.units != "ignored" or not is_quantity(value))
        others = [*perturbed(value, subscripts=not _INDEXED.search(value), letters=letters)]
        node = read_gold(gold, self.match_types).node
        if node is not None and self.equality == "rules":
            formula = self.rules.names and is_term(of_equations(node)) and bool(symbols(node))
            others += with_another_meaning(
                value, units=self.rules.units != "ignored" and node.op in _MEASURED, names=formula
            )
        return [other + rest for other in others]

    def _plain(self, answer: str) -> str:
        if "latex" not in self.match_types:
            return f"The answer is {answer}"
        return answer if DELIMITED.search(answer) else f"\\boxed{{{answer}}}"


def _signs(text: str) -> tuple[list[str], list[str]]:
    """Letters, commands and numbers of a formula that only the library reads: it drops units and cases, so that two of
    them are the same only if they consist of the same."""
    letters = [letter for letter in _LETTERS.findall(text) if len(letter) == 1]
    both_cases = any(letter.swapcase() in letters for letter in letters)  # the library takes them for one
    if not _LIBRARYS.search(text) or _DOTS.search(text) or both_cases:
        return [text], []
    return sorted(_LETTERS.findall(text)), sorted(re.findall(r"[0-9]+", text))


def _squeezed(text: str) -> str:
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "\x00", text)
    text = re.sub(r"\\(?:left|right|text|mathrm|mbox)(?![A-Za-z])|\\[,;:! ]|[\s$]", "", text)
    return re.sub(r"\{(.)\}", r"\1", text)
