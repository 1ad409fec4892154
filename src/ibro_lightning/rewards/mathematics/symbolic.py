"""The symbolic verifier: answers compared as mathematics, by the math-verify library."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from types import ModuleType
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.base import Verdict, VerifiableReward
from ibro_lightning.rewards.mathematics.answer_text import answer_line, bare, without_special_tokens
from ibro_lightning.rewards.mathematics.expression_size import is_heavy

_KINDS = ("latex", "expr", "string")
_LAST_CHARS = 5000

_MOST_NESTED = 50

_BRACKET = re.compile(r"[(\[{}\])]")
_BOXED = re.compile(r"\\(?:boxed|fbox)")
_DELIMITED = re.compile(r"(?<!\\)(?:\$|\\\(|\\\[)|\\boxed|\\fbox")
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTION = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt mod gcd lcm max min and det inf"
_WORD = re.compile(
    rf"\b(?!(?:{'|'.join(_FUNCTION.split())})\b)(?:[A-Za-z]{{3,}}|is|of|to|by|be|as|on|it|if|an|no|at)\b"
)
_SENTENCE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")


@dataclass(frozen=True)
class _Options:
    """What two answers are compared by; hashable, so that parsed golds can be kept."""

    match_types: tuple[str, ...] = ("latex", "expr")
    strict: bool = True
    precision: int = 6
    numeric_precision: int = 15
    allow_set_relation_comp: bool = False


def math_verify_score(response: str, gold: str, **options: Any) -> float:
    """1.0 if the answer in ``response`` is mathematically the same as ``gold``; 0.0 if it is not, or if nothing can be
    read in one of them. (:class:`MathVerifyReward` takes an unreadable gold for the broken data that it is.)

    Without a time limit: what hangs must be stopped from outside, as ``data.reward_pool`` does. (The library's own
    limits are alarm signals, which fail in threads and do not interrupt C code; they are switched off.)

    Args:
        response: the response's text.
        gold: the right answer, as LaTeX with or without delimiters.
        options: the arguments of :class:`MathVerifyReward` other than its rewards; ``float_rounding`` is another name
            of ``precision``.

    Raises:
        ConfigError: an option that does not exist, or cannot be.
    """
    last_chars = options.pop("last_chars", _LAST_CHARS)
    checked = _checked(options, last_chars)
    try:
        return _judge(str(response), str(gold), checked, last_chars).accuracy
    except ValueError:
        return 0.0


class MathVerifyReward(VerifiableReward):
    r"""Right if the response's answer is mathematically the same as ``prompt.answer``, by the math-verify library.

    The answer is the value of the last "Answer:" line if it stands there alone and no box follows it. Otherwise it is
    what the library takes: the last ``\boxed{}`` (several, if they stand together: a set), then "the final answer is
    ...", then what follows the word "answer", then the last formula, then the last number.

    More lenient than it may look: of ``Answer: $34$ or maybe $35$`` the first formula counts, and words behind a number
    are passed over, a unit as well as the "million" of ``34 million``.

    Args:
        match_types: what to look for: "latex", "expr" (plain numbers and arithmetic), "string" (a letter A to D).
        strict: names of variables matter, and a tuple is no set.
        precision: decimals to which floats are rounded before they are compared.
        numeric_precision: significant digits with which expressions are evaluated where they must be.
        allow_set_relation_comp: an inequality may equal the interval it describes, whichever of the two is the gold;
            otherwise only if the gold is the inequality.
        last_chars: how much of the response's end is read, cut at the beginning of a line where there is one. A
            response that goes on for longer after its answer is wrong.

    Raises:
        ConfigError: a match type that does not exist, or a number that cannot be.
        RewardError: an answer of a prompt that cannot be read.
    """

    tells_bad_answers = True

    def __init__(
        self,
        match_types: Sequence[str] = ("latex", "expr"),
        strict: bool = True,
        precision: int = 6,
        numeric_precision: int = 15,
        allow_set_relation_comp: bool = False,
        last_chars: int = _LAST_CHARS,
        correct: float = 1.0,
        incorrect: float = -1.0,
    ) -> None:
        super().__init__(correct, incorrect)
        self.last_chars = last_chars
        self.options = _checked(
            {
                "match_types": match_types,
                "strict": strict,
                "precision": precision,
                "numeric_precision": numeric_precision,
                "allow_set_relation_comp": allow_set_relation_comp,
            },
            last_chars,
        )

    def preload(self) -> None:
        _equal(_gold("1", ("latex", "expr"))[0][0], _parse("\\boxed{\\frac{1}{2}}", ("latex", "expr"))[0], self.options)

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        gold = "" if prompt.answer is None else str(prompt.answer)
        try:
            return _judge(completion.text, gold, self.options, self.last_chars)
        except ValueError as error:
            raise RewardError(f"data.reward: MathVerifyReward: prompt {prompt.id!r}: {error}") from error


def _checked(options: dict[str, Any], last_chars: int) -> _Options:
    options = {"precision" if name == "float_rounding" else name: value for name, value in options.items()}
    allowed = [field.name for field in fields(_Options)]
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"MathVerifyReward.{name}", options[name], f"write one of {', '.join(allowed)}, last_chars"
            )
    kinds = options.get("match_types", _Options.match_types)
    if isinstance(kinds, str) or not kinds or any(kind not in _KINDS for kind in kinds):
        raise ConfigError("MathVerifyReward.match_types", kinds, f"write a list of some of {', '.join(_KINDS)}")
    checked = _Options(**{**options, "match_types": tuple(kinds)})
    for name, value, least in (
        ("precision", checked.precision, 0),
        ("numeric_precision", checked.numeric_precision, 1),
        ("last_chars", last_chars, 1),
    ):
        if value < least:
            raise ConfigError(f"MathVerifyReward.{name}", value, f"write {least} or more")
    return checked


def _judge(response: str, gold: str, options: _Options, last_chars: int) -> Verdict:
    right, right_spelled = _gold(gold, options.match_types)
    found = _parse(_answer_text(response, options.match_types, last_chars), options.match_types)
    if any(_equal(one, other, options) for one in right for other in found):
        return Verdict(1.0, right_spelled)
    return Verdict(0.0, _spelled(found))


def _answer_text(response: str, match_types: tuple[str, ...], last_chars: int) -> str:
    """What the library is to read: the end of the response, or the "Answer:" line in dollars if it is a formula."""
    text = without_special_tokens(response[-last_chars:])
    if len(response) > last_chars and 0 <= (line_end := text.find("\n")) < len(text) - 1:
        text = text[line_end + 1 :]  # a cut in the middle of a formula would turn all that follows inside out
    if _depth(text) > _MOST_NESTED:
        return ""
    line = answer_line(text) if "latex" in match_types else None
    value = "" if line is None or _BOXED.search(line) else bare(line)
    return f"${' '.join(value.split())}$" if value and _is_formula(value) else text


def _is_formula(value: str) -> bool:
    """Whether a value without delimiters is mathematics, or a single word, rather than a sentence."""
    plain = _COMMAND.sub(" ", value)
    return not _DELIMITED.search(value) and (not _WORD.search(plain) or plain.strip(" {}").isalpha())


def _depth(text: str) -> int:
    """How deep the brackets nest at most; the library's parser takes quadratic time in this."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=4096)
def _gold(gold: str, match_types: tuple[str, ...]) -> tuple[tuple[Any, ...], str]:
    """The gold as the library's expressions and as one string; kept, since all responses to a prompt share it."""
    text = gold
    if "latex" in match_types and not _DELIMITED.search(gold) and not _SENTENCE.search(_COMMAND.sub(" ", gold)):
        text = f"${' '.join(gold.split())}$"
    if not (found := _parse(text, match_types)):
        raise ValueError(f"the gold answer {gold[:200]!r} cannot be read as mathematics: correct it, or drop the row")
    return found, _spelled(found)


@lru_cache(maxsize=16)
def _targets(match_types: tuple[str, ...]) -> tuple[Any, ...]:
    library = _library()
    made = {
        "latex": lambda: library.LatexExtractionConfig(boxed_match_priority=0),  # a box comes before everything else
        "expr": library.ExprExtractionConfig,
        "string": library.StringExtractionConfig,
    }
    return tuple(made[kind]() for kind in match_types)


def _parse(text: str, match_types: tuple[str, ...]) -> tuple[Any, ...]:
    """The answer as an expression, if it can be one, followed by its normalised text; () if there is none."""
    try:
        return tuple(_library().parse(text, list(_targets(match_types)), parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # hostile text makes the library, its parser and sympy raise almost anything
        return ()


def _equal(gold: Any, answer: Any, options: _Options) -> bool:
    if isinstance(gold, str) or isinstance(answer, str):
        return isinstance(gold, str) and isinstance(answer, str) and gold.strip() == answer.strip() != ""
    try:
        if is_heavy(gold) or is_heavy(answer):
            return bool(gold == answer)
        return bool(
            _library().verify(
                gold,
                answer,
                float_rounding=options.precision,
                numeric_precision=options.numeric_precision,
                strict=options.strict,
                allow_set_relation_comp=options.allow_set_relation_comp,
                timeout_seconds=None,
                raise_on_error=True,
            )
        )
    except MemoryError:
        raise
    except Exception:  # as above
        return False


def _spelled(found: tuple[Any, ...]) -> str:
    """One string for an answer: a number in lowest terms, anything else as sympy prints it."""
    if not found:
        return ""
    first, text = found[0], str(found[-1]) if isinstance(found[-1], str) else ""
    try:
        if isinstance(first, str) or is_heavy(first):
            return text[:200]
        if type(first).__name__ == "Equality" and first.lhs.is_Symbol:
            first = first.rhs  # as the library takes x = 5 for 5
        return _rational(first) or str(first)[:200]
    except MemoryError:
        raise
    except Exception:  # as above
        return text[:200]


def _rational(expression: Any) -> str:
    """``6/8``, ``0.75`` and ``\\frac{3}{4}`` → ``3/4``; "" for what is no rational number."""
    from sympy import Add, Float, Mul, Number, Pow, Rational, UnevaluatedExpr, preorder_traversal

    if not all(isinstance(part, Number | Add | Mul | Pow | UnevaluatedExpr) for part in preorder_traversal(expression)):
        return ""
    value = expression.doit()
    if isinstance(value, Float):
        value = Rational(str(value))
    return str(value) if value.is_Rational else ""


@lru_cache(maxsize=1)
def _library() -> ModuleType:
    """math-verify, imported on first use: it takes half a second, which rewards of another kind need not wait for.

    It warns once, from its first call without a time limit; that call is made here, and the warning dropped.
    """
    import math_verify

    with _silent("math_verify.parser", "math_verify.grader"):
        math_verify.verify(math_verify.parse("$1$", parsing_timeout=None), [], timeout_seconds=None)
    return math_verify


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]

    def drop(record: logging.LogRecord) -> bool:
        return False

    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)
