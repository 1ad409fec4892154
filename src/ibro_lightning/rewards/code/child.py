"""What runs in the sandbox for a code reward's tests: :func:`observe` with the response, then :func:`check` without it.

The source of this file is put before the call; it imports nothing of ours and little else.
"""

from __future__ import annotations

import os

_REPORT = 3


def tell(line: str) -> None:
    data = (line + "\n").encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(_REPORT, data) :]


def plain(value: object) -> object:
    """``value`` as nested literals that say their type; TypeError if it is not plain data."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as an enumeration's member: the text alone
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


def rebuilt(told: object) -> object:
    """The value that :func:`plain` told of."""
    if not isinstance(told, tuple):
        return told
    name, content = told
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
    """Run the response, then of each test its statements, and tell the value of each expression that it asks for.

    Tells "setup" once the set-up has run, ``value TEST STEP LITERAL`` for values, and for a test that could not be
    taken apart (one step "whole") ``TOKEN TEST`` when it has run to its end.
    """
    shared: dict[str, object] = {"__name__": "solution"}
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), shared)
    tell("setup")
    exec(compile(response, "response.py", "exec", dont_inherit=True), shared)
    for number, steps in enumerate(tests):
        names = dict(shared)
        try:
            for step, (kind, source) in enumerate(steps):
                if kind != "value":
                    exec(compile(source, "test.py", "exec", dont_inherit=True), names)
                    if kind == "whole":
                        tell(f"{token} {number}")
                    continue
                try:
                    value = eval(compile(source, "test.py", "eval", dont_inherit=True), names)
                    tell(f"value {number} {step} {plain(value)!r}")
                except Exception:
                    continue  # not told: a test that needs it fails, one that does not ("x is None or …") need not
        except BaseException:  # SystemExit, too: it ends the test, not the others
            continue


def check(setup: str, tests: list[tuple[int, str, list[str], dict[str, str]]]) -> None:
    """Tell ``right TEST`` for each test whose statements run and whose conditions hold on the values told."""
    import ast

    shared: dict[str, object] = {"__name__": "solution"}
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), shared)
    for number, statements, conditions, told in tests:
        names = dict(shared)
        try:
            names |= {name: rebuilt(ast.literal_eval(text)) for name, text in told.items()}
            exec(compile(statements, "test.py", "exec", dont_inherit=True), names)
            if all(eval(compile(condition, "test.py", "eval", dont_inherit=True), names) for condition in conditions):
                tell(f"right {number}")
        except Exception:
            continue
