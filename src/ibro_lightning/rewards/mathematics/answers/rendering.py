"""Prints an answer as it was read, so that a person sees which reading it was."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Node
from ibro_lightning.rewards.mathematics.answers.units import Dimension

_INFIX = {"add": " + ", "mul": "·", "div": "/", "pow": "^", "union": " ∪ ", "intersection": " ∩ ", "difference": " ∖ "}
_BRACKETS = {"tuple": "()", "closed": "[]", "set": "{}"}
_SIGNS = {"neg": "−{}", "plusminus": "±{}", "minusplus": "∓{}", "percent": "{} %", "degree": "{}°"}
_LONGEST = 600
_NAMES = {"pi": "π", "inf": "∞"}


def printed(node: Node) -> str:
    """One line for an answer, every product and bracket explicit.

    >>> from ibro_lightning.rewards.mathematics.answers.grammar import read
    >>> printed(read(r"2\\frac34")), printed(read("7(3)")), printed(read("x<2 or x>3")), printed(read("5 km/h"))
    ('2 + 3/4', '7·3', 'x < 2 or x > 3', '5 (5/18 m s^-1)')
    """
    op, args = node.op, node.args
    if op == "number":
        value = args[0].value
        long = max(value.numerator.bit_length(), value.denominator.bit_length()) > _LONGEST
        return "a number of many digits" if long else str(value)
    if op in ("symbol", "constant"):
        return _NAMES.get(args[0], str(args[0]))
    if op == "text":
        return f'"{args[0].lower()}"'
    if op in _SIGNS:
        return _SIGNS[op].format(_inner(args[0]))
    if op == "add":
        return " + ".join(map(printed, args)).replace("+ −", "− ")
    if op in _INFIX:
        return _INFIX[op].join(map(_inner, args))
    if op == "call":
        return f"{args[0]}({', '.join(map(printed, args[1:]))})"
    if op in _BRACKETS:
        return f"{_BRACKETS[op][0]}{', '.join(map(printed, args))}{_BRACKETS[op][1]}"
    if op == "interval":
        return f"{args[0]}{printed(args[1])}, {printed(args[2])}{args[3]}"
    if op == "relation":
        return " ".join(part if isinstance(part, str) else printed(part) for part in args)
    if op in ("any", "all"):
        return f" {'or' if op == 'any' else 'and'} ".join(map(printed, args))
    if op in ("matrix", "cases"):
        return f"{op} {'; '.join(', '.join(map(printed, row)) for row in args)}"
    if op == "quantity":
        return " + ".join(f"{_inner(value)} ({_unit(str(size), dimension)})" for value, size, dimension in args)
    if op == "time":
        return f"{args[0]:02}:{args[1]:02}"
    if op == "based":
        return f"{args[0]}{'.' if args[1] else ''}{args[1]} in base {args[2]}"
    return (" : " if op == "ratio" else ", ").join(map(printed, args))


def _inner(node: Node) -> str:
    text = printed(node)
    return f"({text})" if node.op in ("add", "mul", "div", "neg", "plusminus", "minusplus", "relation") else text


def _unit(size: str, dimension: Dimension) -> str:
    names = " ".join(name if power == 1 else f"{name}^{power}" for name, power in dimension)
    return names if size == "1" else f"{size} {names}"
