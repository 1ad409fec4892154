"""Rewards of reasoning-gym's datasets: logic, algorithms, games, graphs, each with its own scorer."""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType, ModuleType
from typing import Any

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.base import Verdict, VerifiableReward

_INERT = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.UnaryOp, ast.UAdd, ast.USub, ast.BinOp, ast.Add, ast.Sub),
)
_FORMULA = re.compile(r"[A-Za-z0-9\s.+\-*/^,()]*")
_FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"exp", "log", "ln", "sqrt", "Abs"}
# A call of something other than a function of the list, and a dot that is no decimal point.
_CALL = re.compile(r"([A-Za-z0-9)][A-Za-z0-9]*)\s*\(")
_DOT = re.compile(r"[A-Za-z)]\s*\.|\.\s*[A-Za-z(]")
_LONGEST = 20_000


class ReasoningGymReward(VerifiableReward):
    """What a reasoning-gym dataset's own scorer says of the answer in ``<answer>…</answer>``.

    ``prompt.answer`` is what :class:`~ibro_lightning.datamodules.ReasoningGymSource` gives: ``{dataset, config,
    entry}``, the entry with its question, answer and metadata as the dataset made it.

    Scorers give 0.01 to 0.05 for wrong answers and fractions for nearly right ones; only ``threshold`` counts as right.
    Several scorers hand the answer to ``eval`` or to sympy, which evaluates it just so: what could call or import
    anything is scored 0 without being handed on. Two scorers of version 0.1.25 accept wrong answers and are corrected
    here: ``game_of_life_halting`` (any text) and ``puzzle24`` (any four numbers that make 24, whatever was given).

    Args:
        tag: name of the tag; the last pair counts. None takes the whole response as the answer.
        threshold: the score from which an answer is right.
        partial: the accuracy is the scorer's number itself.

    Needs ``pip install 'ibro-lightning[reasoning-gym]'``.
    """

    tells_bad_answers = True

    def __init__(
        self,
        tag: str | None = "answer",
        threshold: float = 1.0,
        partial: bool = False,
        correct: float = 1.0,
        incorrect: float = -1.0,
    ) -> None:
        super().__init__(correct, incorrect)
        if not 0 < threshold <= 1:
            raise ConfigError("reward.init_args.threshold", threshold, "write a number above 0 and up to 1")
        if tag is not None and not re.fullmatch(r"\w+", tag):
            raise ConfigError("reward.init_args.tag", tag, "write the tag's bare name, e.g. answer; or null")
        self.tag, self.threshold, self.partial = tag, threshold, partial
        library()

    def preload(self) -> None:
        library()

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        dataset, entry = self._entry(prompt)
        answer = completion.text.strip() if self.tag is None else last_tagged(completion.text, self.tag)
        if not answer:
            return Verdict(0.0, "")
        try:
            score = score_answer(dataset, answer, entry)
        except Exception as error:  # scorers do raise on odd answers; if on their own, too, the entry is broken
            self._check_entry(prompt, dataset, entry, error)
            score = 0.0
        accuracy = score if self.partial else float(score >= self.threshold)
        return Verdict(accuracy, " ".join(answer.split()))

    def _entry(self, prompt: Prompt) -> tuple[Any, Mapping[str, Any]]:
        answer = prompt.answer
        if not isinstance(answer, Mapping) or not {"dataset", "config", "entry"} <= answer.keys():
            raise RewardError(
                "data.reward: ReasoningGymReward needs an answer with dataset, config and entry, which prompt "
                f"{prompt.id!r} has not: use it with ReasoningGymSource"
            )
        entry = answer["entry"]
        if not isinstance(entry, Mapping) or not {"question", "answer", "metadata"} <= entry.keys():
            raise RewardError(f"data.reward: the entry of prompt {prompt.id!r} lacks question, answer or metadata")
        return make_dataset(answer["dataset"], answer["config"]), entry

    def _check_entry(self, prompt: Prompt, dataset: Any, entry: Mapping[str, Any], error: Exception) -> None:
        if isinstance(entry["answer"], str):
            try:
                score_answer(dataset, entry["answer"].strip(), entry)
            except Exception:
                raise RewardError(
                    f"data.reward: reasoning-gym's scorer raised {type(error).__name__}: {error} for prompt "
                    f"{prompt.id!r}, and for its own answer, too: its entry is broken"
                ) from error


def last_tagged(text: str, tag: str) -> str:
    """What is between the last ``<tag>`` that is closed and its ``</tag>``, stripped; "" if there is none."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(0, text.rfind(closing)))
    return text[start + len(opening) :].partition(closing)[0].strip() if start >= 0 else ""


def library() -> ModuleType:
    """reasoning-gym, imported when it is first needed: it takes a second.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("reasoning-gym", "not installed", "pip install 'ibro-lightning[reasoning-gym]'") from error
    return reasoning_gym


def make_dataset(name: str, config: Mapping[str, Any]) -> Any:
    """A reasoning-gym dataset. ``config`` holds its settings, ``seed`` and ``size`` included.

    Raises:
        ConfigError: there is no such dataset, or its settings are wrong (in the dataset's own words).
    """
    return _make_dataset(name, json.dumps(config, sort_keys=True, default=list))


@lru_cache(maxsize=64)
def _make_dataset(name: str, config: str) -> Any:
    library()
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"write one of {', '.join(sorted(DATASETS))}"
        raise ConfigError("source.dataset", name, f"reasoning-gym has no such dataset: {remedy}")
    settings = json.loads(config)
    try:
        if name == "composite":
            settings["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets") or []]
        return create_dataset(name, **settings)
    except Exception as error:
        reason = " ".join(str(error).split()) or "refused by a check without a message"
        raise ConfigError(
            "source.config", config, f"{name} does not take this: {type(error).__name__}: {reason[:300]}"
        ) from error


def score_answer(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The dataset's score in [0, 1], without the answer being able to run anything. Raises what the scorer raises."""
    metadata = entry["metadata"]
    name = metadata.get("source_dataset", "")
    while hasattr(dataset, "datasets"):  # a composite
        dataset = dataset.datasets[name]
    if len(answer) > _LONGEST or not all(harmless(answer) for harmless in _guards(type(dataset).score_answer)):
        return 0.0
    if name == "game_of_life_halting":
        return float(answer.casefold() == str(entry["answer"]).casefold())
    with contextlib.redirect_stdout(io.StringIO()):  # some print what they do not like
        score = float(dataset.score_answer(answer, entry))
    if name == "puzzle24" and sorted(map(int, re.findall(r"\d+", answer))) != sorted(metadata["numbers"]):
        score = min(score, 0.01)
    return min(1.0, max(0.0, score))


@lru_cache(maxsize=256)
def _guards(scorer: Any) -> tuple[Callable[[str], bool], ...]:
    """What an answer must be to be handed to this scorer, by the functions that it names."""
    names = _names(scorer.__code__)
    guards: list[Callable[[str], bool]] = []
    if names & {"eval", "exec"}:
        guards.append(is_inert)
    parser = scorer.__globals__.get("parse_expr")  # propositional_logic has a harmless one of its own
    if names & {"parse_expr", "sympify"} and (parser is None or parser.__module__.startswith("sympy")):
        guards.append(is_formula)
    return tuple(guards)


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def is_inert(text: str) -> bool:
    """True if ``eval(text)`` can do nothing but build lists of constants, or fail."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return True  # as it would for eval
    except (MemoryError, RecursionError):
        return False  # eval might get further
    return all(isinstance(node, _INERT) for node in ast.walk(tree))


def is_formula(text: str) -> bool:
    """True if it is made of numbers, variables, operators and well-known functions alone. sympy's ``parse_expr`` hands
    on to ``eval`` what it does not know, Python's builtins included; it also leaves integrals unevaluated, so that
    ``Integral`` of the question would be an answer to it."""
    if not _FORMULA.fullmatch(text) or _DOT.search(text) or "\n" in text.strip():
        return False
    return all(name in _FUNCTIONS for name in _CALL.findall(text))
