"""Problems that ask for a function: it is called with the inputs, and its values are compared with the outputs.

A call is a list of arguments, ``[[2, 7], 9]``, with the value that it returns (APPS, TACO, where a value may be wrapped
in a list of one); or text with one argument as JSON on each line, with the value as JSON (LiveCodeBench).

Values are compared by ``==``, except that tuples are lists, keys of objects are texts (as JSON has them), and floats
may differ by rounding (1e-9, relative). Expected values never enter the process that runs the response.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ibro_lightning.rewards.code.unit_tests import VALUE, TestParts

USUAL_IMPORTS = (
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\n"
    "from bisect import *\nfrom itertools import *\nfrom math import *\nfrom copy import deepcopy\n"
    "from builtins import pow\n"  # math's has no third argument
    "import collections, copy, functools, heapq, bisect, itertools, math, re, string, random, operator, sys\n"
)
"""Names that solutions of such problems expect: ``List[int]``, ``Counter``, ``inf``, ``gcd``, ``deepcopy``."""

# Runs without the response. Both values are plain data, taken apart by in_sandbox.plain and rebuilt.
_SAME = """
def _same(value, expected):
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        named = {str(key): item for key, item in value.items()}
        return named.keys() == expected.keys() and all(_same(named[key], expected[key]) for key in expected)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, (int, float)) and isinstance(expected, (int, float))
        return numbers and (value == expected or abs(value - expected) <= 1e-9 * max(abs(value), abs(expected)))
    return value == expected
"""


def function_calls(name: Any, inputs: Any, outputs: Any) -> tuple[TestParts, ...]:
    """One test per input. Raises ValueError unless they are as described above."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"fn_name must be the name of a function, not {name!r}")
    for key, values in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{key} must be a list of at least one, beside fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"it has {len(inputs)} inputs for {len(outputs)} outputs")
    # A method of Solution() if there is one; otherwise the function of this name.
    function = f'(getattr(Solution(), {name!r}) if hasattr(globals().get("Solution"), {name!r}) else {name})'
    return tuple(
        _call(function, number, given, expected)
        for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True), start=1)
    )


def _call(function: str, number: int, given: Any, expected: Any) -> TestParts:
    if isinstance(given, str):
        arguments = [_json(f"input {number}", line) for line in given.split("\n") if line.strip()]
        values = [_json(f"output {number}", expected) if isinstance(expected, str) else expected]
    elif isinstance(given, list | tuple):
        arguments, values = list(given), [expected]
        if isinstance(expected, list | tuple) and len(expected) == 1:
            values.append(expected[0])
    else:
        raise ValueError(f"input {number} must be a list of arguments, or text with one as JSON on each line")
    for what, value in ((f"input {number}", arguments), (f"output {number}", values)):
        _check_plain(what, value)
    same = " or ".join(f"_same({VALUE}0, {value!r})" for value in values)
    call = f"{function}({', '.join(map(repr, arguments))})"
    return TestParts((("value", call),), _SAME, (same,))


def _json(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text, and {text[:60]!r} no JSON") from error


def _check_plain(what: str, value: Any) -> None:
    """Raise ValueError unless JSON can hold ``value``, whose ``repr`` is then a literal."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} holds {value}, which is no JSON")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            _check_plain(what, item)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{what} holds a {type(value).__name__}, which is no JSON")
