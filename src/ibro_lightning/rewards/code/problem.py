"""Reads a code problem's answer: unit tests, calls with their values, or inputs with their outputs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ibro_lightning.errors import RewardError
from ibro_lightning.rewards.code.calls import USUAL_IMPORTS, function_calls
from ibro_lightning.rewards.code.unit_tests import OpenTest, TestParts, take_apart, trusted_names
from ibro_lightning.types import Prompt

_KEYS = {"inputs", "outputs", "fn_name", "metadata"}
_NAMES_FUNCTION = re.compile(r"(?i)func|fn_|method|entry")


@dataclass(frozen=True)
class CodeProblem:
    """Either ``tests`` of functions, preceded by ``setup``, or ``inputs`` with ``outputs`` of programs."""

    setup: str = ""
    tests: tuple[TestParts, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.tests) or len(self.inputs)


def read_problem(prompt: Prompt, run_open_tests: bool) -> CodeProblem:
    """The problem in ``prompt.answer`` (see :class:`CodeReward`); raises :class:`RewardError` if it is unusable."""
    try:
        return _read(_parsed("answer", prompt.answer), run_open_tests)
    except (ValueError, SyntaxError) as error:
        raise broken(prompt, str(error)) from error


def broken(prompt: Prompt, why: str) -> RewardError:
    return RewardError(f"CodeReward cannot judge prompt {prompt.id!r}: {why}")


def _parsed(what: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"its {what} is a text, but no JSON ({error})") from error


def _read(answer: Any, run_open_tests: bool) -> CodeProblem:
    if not isinstance(answer, Mapping):
        raise ValueError(f"its answer is {type(answer).__name__}, but should hold tests, or inputs and outputs")
    if "tests" in answer:
        setup, entry_point = answer.get("setup") or "", answer.get("entry_point")
        if not isinstance(setup, str) or not isinstance(entry_point, str | None):
            raise ValueError("setup and entry_point must be texts")
        tests = _texts(answer, "tests")
        return CodeProblem(setup, tuple(_parts(setup, entry_point, test, run_open_tests) for test in tests))
    name = _function_name(answer)
    allowed = _KEYS | {"setup"} if name else _KEYS
    others = sorted(key for key in answer if key not in allowed and answer[key] is not None)
    if "inputs" in answer and others:
        remedy = "write the function's name as fn_name, and leave out what is no test"
        raise ValueError(f"its answer has {others[0]} beside inputs and outputs: {remedy}")
    if name:
        setup = answer.get("setup", USUAL_IMPORTS) or ""
        if not isinstance(setup, str):
            raise ValueError("setup must be a text")
        ast.parse(setup)
        return CodeProblem(setup, function_calls(name, answer.get("inputs"), answer.get("outputs")))
    if "inputs" not in answer or "outputs" not in answer:
        raise ValueError(f"its answer has {sorted(answer)}, but should have tests, or inputs and outputs")
    inputs, outputs = _texts(answer, "inputs"), _texts(answer, "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"it has {len(inputs)} inputs for {len(outputs)} outputs")
    return CodeProblem(inputs=inputs, outputs=outputs)


def _function_name(answer: Mapping[str, Any]) -> Any:
    """``fn_name``, or LiveCodeBench's ``metadata.func_name``; None without either."""
    metadata: Any = answer.get("metadata")
    metadata = _parsed("metadata", metadata) if not isinstance(metadata, str) or metadata.strip() else {}
    if not isinstance(metadata, Mapping | None):
        raise ValueError(f"its metadata is {type(metadata).__name__}, but should be an object with func_name")
    named = {key: name for key, name in (metadata or {}).items() if name and _NAMES_FUNCTION.search(str(key))}
    if others := sorted(named.keys() - {"func_name", "fn_name"}):
        raise ValueError(f"its metadata has {others[0]}: write the function's name as fn_name")
    names = [*([answer["fn_name"]] if answer.get("fn_name") else []), *named.values()]
    if any(name != names[0] for name in names):
        raise ValueError(f"it names two functions, {names[0]!r} and {names[-1]!r}")
    return names[0] if names else None


def _texts(answer: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = answer[key]
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{key} must be a list of texts")
    if not values:
        raise ValueError(f"{key} is empty")
    return tuple(values)


@lru_cache(maxsize=4096)
def _parts(setup: str, entry_point: str | None, test: str, run_open_tests: bool) -> TestParts:
    try:
        return take_apart(test, trusted_names(setup, entry_point))
    except (OpenTest, SyntaxError) as error:
        is_open = isinstance(error, OpenTest)
        if is_open and run_open_tests:
            return TestParts((("whole", test),))
        remedy = " - write assert f(…) == …, or set open_tests: run" if is_open else ""
        raise ValueError(f"the test {test.strip()[:100]!r} cannot be used: {error}{remedy}") from error
