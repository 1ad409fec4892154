"""Runs a program against a problem's tests in the sandbox, and compares its values in a process of their own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ibro_lightning.rewards.code.limits import CHECK_S, SandboxLimits
from ibro_lightning.rewards.code.problem import CodeProblem, broken
from ibro_lightning.rewards.code.sandbox import run_python
from ibro_lightning.rewards.code.unit_tests import VALUE, TestParts
from ibro_lightning.types import Prompt


def tests_passed(prompt: Prompt, problem: CodeProblem, program: str, limits: SandboxLimits, *, stop_early: bool) -> int:
    """The number of the problem's tests that the program passes; raises :class:`RewardError` if the set-up fails.

    Args:
        limits: for wall time, of all tests together.
        stop_early: only whether all are passed matters.
    """
    if not problem.inputs:
        return _by_value(prompt, problem, program, limits, stop_early)
    ends = time.monotonic() + limits.wall_s
    passed = 0
    for given, expected in zip(problem.inputs, problem.outputs, strict=True):
        if (left := ends - time.monotonic()) < 0.1:
            break
        result = run_python(program, stdin=given, limits=replace(limits, wall_s=left))
        right = result.status == "ok" and _lines(result.stdout) == _lines(expected)
        passed += right
        if not right and stop_early:
            break
    return passed


def _by_value(prompt: Prompt, problem: CodeProblem, program: str, limits: SandboxLimits, stop_early: bool) -> int:
    token, tests = secrets.token_hex(16), problem.tests
    steps = [list(test.steps) for test in tests]
    call = f"observe({problem.setup!r}, {program!r}, {steps!r}, {token!r})"
    observed = run_python(f"{_in_sandbox()}\n{call}", limits=limits)
    report = observed.report.split("\n")
    if report[0] != "setup" and observed.status == "error":
        last_line = observed.stderr.strip().rpartition("\n")[2]
        raise broken(prompt, f"its setup fails: {last_line[:300]}")
    passed = sum(test.steps[-1][0] == "whole" and f"{token} {number}" in report for number, test in enumerate(tests))
    checks = _checks(tests, report)
    if not checks or (stop_early and passed + len(checks) < len(tests)):
        return passed
    left = max(CHECK_S, limits.wall_s - observed.seconds)
    judged = run_python(f"{_in_sandbox()}\ncheck({problem.setup!r}, {checks!r})", limits=replace(limits, wall_s=left))
    return passed + sum(line.startswith("right ") for line in judged.report.split("\n"))


def _checks(parts: Sequence[TestParts], report: Sequence[str]) -> list[tuple[int, str, list[str], dict[str, str]]]:
    """Arguments of ``in_sandbox.check``: the tests that were taken apart and have a value in the report."""
    lines = [line.split(" ", 3) for line in report]  # "value", test, step, literal
    values = {(words[1], words[2]): words[3] for words in lines if words[0] == "value" and len(words) == 4}
    checks = []
    for number, part in enumerate(parts):
        asked = [step for step, (kind, _) in enumerate(part.steps) if kind == "value"]
        given = {f"{VALUE}{step}": values[key] for step in asked if (key := (str(number), str(step))) in values}
        if given:
            checks.append((number, part.statements, list(part.conditions), given))
    return checks


@cache
def _in_sandbox() -> str:
    return Path(__file__).with_name("in_sandbox.py").read_text(encoding="utf-8")


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n").split("\n")
