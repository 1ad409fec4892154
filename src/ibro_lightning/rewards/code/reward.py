"""Programs judged by unit tests, in a locked-down process (see :mod:`.sandbox`)."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.base import Verdict, VerifiableReward
from ibro_lightning.rewards.code.sandbox import DEFAULT_LIMITS, SandboxLimits, SandboxResult, run_python
from ibro_lightning.rewards.code.unit_tests import VALUE, OpenTest, TestParts, take_apart, trusted_names

_FENCE = "```"
_PYTHON = ("python", "py", "python3")
_SLACK_S = 5.0
_CHECK_S = 1.0


@dataclass(frozen=True)
class CodeTests:
    """A problem's unit tests. Either ``tests``, or ``inputs`` with ``outputs``."""

    tests: tuple[str, ...] = ()
    setup: str = ""
    entry_point: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.tests) or len(self.inputs)


class CodeReward(VerifiableReward):
    """Runs the response's Python program against the problem's unit tests: right if it passes all of them.

    The program is the last closed ````` ```python ````` block of the response, or the last unlabelled block if there
    is none. ``prompt.answer`` holds, as a mapping or as JSON text, one of

    - ``{"tests": ["assert f(1) == 2", …], "setup": "import math", "entry_point": "f"}`` for functions. ``setup`` (may
      be left out) runs before the response and is visible to it: imports and helpers, no reference solution.
      ``entry_point`` is needed only if the tested function is named like a builtin;
    - ``{"inputs": ["1 2\\n", …], "outputs": ["3\\n", …]}`` for programs that read stdin and print. Outputs are compared
      without trailing whitespace on each line and without empty lines at the end; the program must exit with code 0.

    What is guaranteed: expected outputs, and whatever an assert compares with, never enter the process in which the
    response runs, and are compared in one that has not run it. Only plain data passes between the two (None, numbers,
    strings, lists, tuples, sets, dictionaries, deques). So exit codes, faked output, overridden ``__eq__`` and
    builtins, and tampering with the interpreter gain nothing: a response must come up with the values. It can still
    hard-code those that its prompt shows. Asserts that cannot be taken apart (loops around asserts, functions passed
    to checkers, caught exceptions: see :mod:`.unit_tests`) have no such guarantee and are refused unless
    ``open_tests`` is "run".

    Args:
        fenced: read a fenced block; False takes the whole response as the program.
        partial: the accuracy is the share of tests passed, instead of 1 for all of them and 0 otherwise.
        limits: of one response's tests together for wall time, of each process for the rest.
        open_tests: "run" judges tests that cannot be taken apart by their end in the response's own process, which a
            response that sets out to can fake.
    """

    tells_bad_answers = True

    def __init__(
        self,
        fenced: bool = True,
        partial: bool = False,
        limits: SandboxLimits = DEFAULT_LIMITS,
        open_tests: Literal["refuse", "run"] = "refuse",
        correct: float = 1.0,
        incorrect: float = -1.0,
    ) -> None:
        super().__init__(correct, incorrect)
        if open_tests not in ("refuse", "run"):
            raise ConfigError("reward.init_args.open_tests", open_tests, "write refuse or run")
        self.fenced, self.partial, self.limits, self.open_tests = fenced, partial, limits, open_tests
        self.deadline_s = limits.wall_s + _CHECK_S + _SLACK_S  # the sandbox keeps its own limit; this is the pool's

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        problem = _read_tests(prompt)
        for test in problem.tests:
            self._parts(prompt, problem, test)  # a test that cannot be used is an error whatever the response says
        program = last_program(completion.text) if self.fenced else completion.text
        if not program.strip():
            return Verdict(0.0, "")
        passed = self._run_functions(prompt, problem, program) if problem.tests else self._run_inputs(problem, program)
        digest = hashlib.sha256(program.strip().encode("utf-8", "replace")).hexdigest()[:16]
        return Verdict(passed / problem.count if self.partial else float(passed == problem.count), digest)

    def _run_inputs(self, problem: CodeTests, program: str) -> int:
        ends = time.monotonic() + self.limits.wall_s
        passed = 0
        for given, expected in zip(problem.inputs, problem.outputs, strict=True):
            left = ends - time.monotonic()
            if left < 0.1:
                break
            result = run_python(program, stdin=given, limits=replace(self.limits, wall_s=left))
            right = result.status == "ok" and _lines(result.stdout) == _lines(expected)
            passed += right
            if not right and not self.partial:
                break
        return passed

    def _run_functions(self, prompt: Prompt, problem: CodeTests, program: str) -> int:
        parts = [self._parts(prompt, problem, test) for test in problem.tests]
        token = secrets.token_hex(16)
        steps = [list(part.steps) for part in parts]
        observed = run_python(
            f"{_child_source()}\nobserve({problem.setup!r}, {program!r}, {steps!r}, {token!r})", limits=self.limits
        )
        told = observed.report.split("\n")
        if told[0] != "setup" and observed.status == "error":
            raise _broken(prompt, f"its setup fails: {_last_line(observed)}")
        whole = {line for line in told if line.startswith(token)}
        passed = sum(part.steps[-1][0] == "whole" and f"{token} {i}" in whole for i, part in enumerate(parts))
        checks = _checks(parts, told)
        if not checks or (not self.partial and passed + len(checks) < len(parts)):
            return passed
        left = max(_CHECK_S, self.limits.wall_s - observed.seconds)
        judged = run_python(
            f"{_child_source()}\ncheck({problem.setup!r}, {checks!r})", limits=replace(self.limits, wall_s=left)
        )
        return passed + sum(line.startswith("right ") for line in judged.report.split("\n"))

    def _parts(self, prompt: Prompt, problem: CodeTests, test: str) -> TestParts:
        parts = _take_apart(problem.setup, problem.entry_point, test)
        if isinstance(parts, TestParts):
            return parts
        if self.open_tests == "run" and isinstance(parts, OpenTest):
            return TestParts((("whole", test),))
        raise _broken(
            prompt,
            f"the test {test.strip()[:100]!r} cannot be used: {parts}"
            + (" - write assert f(…) == …, or set open_tests: run" if isinstance(parts, OpenTest) else ""),
        )


def last_program(text: str) -> str:
    """The last closed fenced block that is labelled as Python; without one, the last unlabelled one; or ""."""
    last: dict[bool, str] = {}
    label: str | None = None
    block: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        if not bare.startswith(_FENCE):
            block.append(line)
        elif label is None:
            label, block = bare[len(_FENCE) :].strip().lower(), []
        else:
            if label in ("", *_PYTHON):
                last[label != ""] = "\n".join(block)
            label = None
    return last.get(True, last.get(False, ""))


def _read_tests(prompt: Prompt) -> CodeTests:
    answer: Any = prompt.answer
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise _broken(prompt, f"its answer is a text, but no JSON ({error})") from error
    if not isinstance(answer, Mapping):
        raise _broken(prompt, f"its answer is {type(answer).__name__}, but should hold tests, or inputs and outputs")
    if "tests" in answer:
        setup, entry_point = answer.get("setup") or "", answer.get("entry_point")
        if not isinstance(setup, str) or not isinstance(entry_point, str | None):
            raise _broken(prompt, "setup and entry_point must be texts")
        return CodeTests(_texts(prompt, answer, "tests"), setup, entry_point)
    if "inputs" not in answer or "outputs" not in answer:
        raise _broken(prompt, f"its answer has {sorted(answer)}, but should have tests, or inputs and outputs")
    inputs, outputs = _texts(prompt, answer, "inputs"), _texts(prompt, answer, "outputs")
    if len(inputs) != len(outputs):
        raise _broken(prompt, f"it has {len(inputs)} inputs for {len(outputs)} outputs")
    return CodeTests(inputs=inputs, outputs=outputs)


def _texts(prompt: Prompt, answer: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = answer[key]
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise _broken(prompt, f"{key} must be a list of texts")
    if not values:
        raise _broken(prompt, f"{key} is empty")
    return tuple(values)


def _broken(prompt: Prompt, why: str) -> RewardError:
    return RewardError(f"data.reward: CodeReward cannot judge prompt {prompt.id!r}: {why}")


def _checks(parts: Sequence[TestParts], told: Sequence[str]) -> list[tuple[int, str, list[str], dict[str, str]]]:
    """Arguments of ``child.check``: the tests that can be taken apart and of which something was told."""
    values: dict[tuple[str, str], str] = {}
    for line in told:
        kind, _, rest = line.partition(" ")
        test, _, rest = rest.partition(" ")
        step, _, literal = rest.partition(" ")
        if kind == "value":
            values[test, step] = literal
    checks = []
    for number, part in enumerate(parts):
        asked = [step for step, (kind, _) in enumerate(part.steps) if kind == "value"]
        known = {
            f"{VALUE}{step}": values[str(number), str(step)] for step in asked if (str(number), str(step)) in values
        }
        if known:
            checks.append((number, part.statements, list(part.conditions), known))
    return checks


@lru_cache(maxsize=4096)
def _take_apart(setup: str, entry_point: str | None, test: str) -> TestParts | OpenTest | SyntaxError:
    try:
        return take_apart(test, trusted_names(setup, entry_point))
    except (OpenTest, SyntaxError) as error:
        return error


@cache
def _child_source() -> str:
    return Path(__file__).with_name("child.py").read_text(encoding="utf-8")


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n").split("\n")


def _last_line(result: SandboxResult) -> str:
    return result.stderr.strip().rpartition("\n")[2][:300]
