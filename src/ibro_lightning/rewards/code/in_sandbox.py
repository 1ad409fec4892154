"""Runs a code reward's tests in the sandbox: :func:`observe` with the response, then :func:`check` without it.

The source of this file is put before the call; it imports nothing of this package and little else.
"""

from __future__ import annotations

import os

_REPORT = 3


def report(line: str) -> None:
    data = (line + "\n").encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(_REPORT, data) :]


def plain(value: object) -> object:
    """``value`` as nested literals that name their types; TypeError if it is not plain data."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # the text alone of a subclass, such as an enumeration's member
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if float("-inf") < value < float("inf") else ("float", str(float(value)))
    if isinstance(value, complex):
        return ("complex", str(complex(value)))
    if isinstance(value, dict):
        return ("dict", [(plain(key), plain(item)) for key, item in value.items()])
    for container in (list, tuple, set, frozenset):
        if isinstance(value, container):
            return (container.__name__, [plain(item) for item in value])
    name = type(value).__name__
    if name == "deque":
        return (name, [plain(item) for item in value])  # type: ignore[attr-defined]
    if name in ("Fraction", "Decimal"):
        return (name, str(value))
    raise TypeError(name)


def rebuilt(literal: object) -> object:
    """The value from which :func:`plain` made this literal."""
    if not isinstance(literal, tuple):
        return literal
    name, content = literal
    if name == "dict":
        return {rebuilt(key): rebuilt(item) for key, item in content}
    if name in ("Fraction", "Decimal", "deque"):
        import collections
        import decimal
        import fractions

        kinds = {"Fraction": fractions.Fraction, "Decimal": decimal.Decimal, "deque": collections.deque}
        return kinds[name]([rebuilt(item) for item in content] if name == "deque" else content)
    if name in ("float", "complex"):
        return {"float": float, "complex": complex}[name](content)
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[name](rebuilt(item) for item in content)


def observe(setup: str, response: str, tests: list[list[tuple[str, str]]], token: str) -> None:
    """Run the response, then the statements of each test, and report the values of its expressions.

    Reports "setup" after the set-up, ``value TEST STEP LITERAL`` for values, and ``TOKEN TEST`` at the end of a test
    that could not be taken apart (one step "whole").
    """
    shared: dict[str, object] = {"__name__": "solution"}
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), shared)
    report("setup")
    exec(compile(response, "response.py", "exec", dont_inherit=True), shared)
    for number, steps in enumerate(tests):
        names = dict(shared)
        try:
            for step, (kind, source) in enumerate(steps):
                if kind != "value":
                    exec(compile(source, "test.py", "exec", dont_inherit=True), names)
                    if kind == "whole":
                        report(f"{token} {number}")
                    continue
                try:
                    value = eval(compile(source, "test.py", "eval", dont_inherit=True), names)
                    report(f"value {number} {step} {plain(value)!r}")
                except Exception:
                    continue  # no value: only tests that need it fail ("x is None or …" may not)
        except BaseException:  # SystemExit, too: it ends this test, not the others
            continue


def check(setup: str, tests: list[tuple[int, str, list[str], dict[str, str]]]) -> None:
    """Report ``right TEST`` for each test whose statements run and whose conditions hold on its values."""
    import ast

    shared: dict[str, object] = {"__name__": "solution"}
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), shared)
    for number, statements, conditions, values in tests:
        names = dict(shared)
        try:
            names |= {name: rebuilt(ast.literal_eval(text)) for name, text in values.items()}
            exec(compile(statements, "test.py", "exec", dont_inherit=True), names)
            if all(eval(compile(condition, "test.py", "eval", dont_inherit=True), names) for condition in conditions):
                report(f"right {number}")
        except Exception:
            continue
