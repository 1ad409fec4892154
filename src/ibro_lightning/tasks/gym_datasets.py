"""reasoning-gym's datasets and scorers, made reproducible and safe against answers that run code."""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import json
import keyword
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType, ModuleType
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.tasks.gym_strictness import deserves_full_marks

UNSEEDED = frozenset({"isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note"})
"""Datasets (of version 0.1.25) that iterate over sets or use the global random generator, so that their problems differ
between processes despite the seed. They are generated in a subprocess in which both are fixed."""
_GENERATE = (
    f"import pickle, random, sys; from {__name__} import make_dataset; "
    "name, config, size = pickle.load(sys.stdin.buffer); dataset = make_dataset(name, config); random.seed(0); "
    "entries = [dataset[index] for index in range(size)]; pickle.dump(entries, sys.stdout.buffer)"
)
_INERT = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.UnaryOp, ast.UAdd, ast.USub, ast.BinOp, ast.Add, ast.Sub),
)
_FORMULA = re.compile(r"[A-Za-z0-9\s.+\-*/^,()]*")
_FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"exp", "log", "ln", "sqrt", "Abs"}
# Candidates for calls of functions not listed above, and dots that are not decimal points.
_CALL = re.compile(r"([A-Za-z0-9)][A-Za-z0-9]*)\s*\(")
_DOT = re.compile(r"[A-Za-z)]\s*\.|\.\s*[A-Za-z(]")
_KEYWORDS = frozenset(keyword.kwlist)
_MAX_CHARACTERS = 20_000


def library() -> ModuleType:
    """The reasoning-gym package, imported lazily because that takes a second."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("reasoning-gym", "not installed", "pip install 'ibro-lightning[reasoning-gym]'") from error
    return reasoning_gym


def make_dataset(name: str, config: Mapping[str, Any]) -> Any:
    """A reasoning-gym dataset; ``config`` includes ``seed`` and ``size``. Raises ConfigError with its message."""
    return _make_dataset(name, json.dumps(config, sort_keys=True, default=list))


@lru_cache(maxsize=64)
def _make_dataset(name: str, config: str) -> Any:
    library()
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"write one of {', '.join(sorted(DATASETS))}"
        raise ConfigError("dataset", name, f"reasoning-gym has no such dataset: {remedy}")
    settings = json.loads(config)
    try:
        if name == "composite":
            settings["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets") or []]
        return create_dataset(name, **settings)
    except Exception as error:
        reason = " ".join(str(error).split()) or "refused by a check without a message"
        raise ConfigError("config", config, f"{name} refuses it: {type(error).__name__}: {reason[:300]}") from error


def generate_entries(name: str, config: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The first ``count`` entries of a dataset, identical in every process."""
    if {name, *(spec["name"] for spec in config.get("datasets", []))} & UNSEEDED:
        process = subprocess.run(
            [sys.executable, "-c", _GENERATE],
            input=pickle.dumps((name, config, count)),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=True,
        )
        return list(pickle.loads(process.stdout))
    dataset = make_dataset(name, config)
    return [dataset[index] for index in range(count)]


def score_answer(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The dataset's score in [0, 1]; an answer that could run code scores 0. Raises what the scorer raises."""
    metadata = entry["metadata"]
    name = metadata.get("source_dataset", "")
    while hasattr(dataset, "datasets"):  # a composite
        dataset = dataset.datasets[name]
    if len(answer) > _MAX_CHARACTERS or not all(harmless(answer) for harmless in _guards(type(dataset).score_answer)):
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # some scorers print
        score = float(dataset.score_answer(answer, entry))
    if name == "puzzle24" and sorted(map(int, re.findall(r"\d+", answer))) != sorted(metadata["numbers"]):
        score = min(score, 0.01)
    if score >= 1 and not deserves_full_marks(name, answer, entry):
        score = 0.01
    return min(1.0, max(0.0, score))


@lru_cache(maxsize=256)
def _guards(scorer: Any) -> tuple[Callable[[str], bool], ...]:
    """The checks that an answer must pass before this scorer sees it, chosen by the functions the scorer calls."""
    names = _names(scorer.__code__)
    guards: list[Callable[[str], bool]] = []
    if names & {"eval", "exec"}:
        guards.append(is_inert)
    parser = scorer.__globals__.get("parse_expr")  # propositional_logic defines a harmless one
    if names & {"parse_expr", "sympify"} and (parser is None or parser.__module__.startswith("sympy")):
        guards.append(is_formula)
    return tuple(guards)


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def is_inert(text: str) -> bool:
    """Whether ``eval(text)`` can only build containers of constants, or fail."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return True  # eval fails, too
    except (MemoryError, RecursionError):
        return False  # eval might succeed
    return all(isinstance(node, _INERT) for node in ast.walk(tree))


def is_formula(text: str) -> bool:
    """Whether ``text`` consists of numbers, variables, operators and common functions only.

    sympy's ``parse_expr`` passes everything else to ``eval``, including Python's builtins. It also leaves integrals
    unevaluated, so that the question's own ``Integral`` would count as an answer.
    """
    if (
        set(re.findall(r"[a-z]+", text)) & _KEYWORDS
        or not _FORMULA.fullmatch(text)
        or _DOT.search(text)
        or "\n" in text.strip()
    ):
        return False
    return all(name in _FUNCTIONS for name in _CALL.findall(text))
