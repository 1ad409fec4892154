"""Takes a unit test apart, so that the program under test never sees the expected values.

``assert f(2) == 4`` becomes the expression ``f(2)``, whose value the process that runs the response reports, and the
condition ``_value_0 == 4``, which is evaluated in another process without the response. Only plain data passes from one
to the other, so a response can pass such a test only by computing the value.
"""

from __future__ import annotations

import ast
import builtins
import copy
from collections.abc import Iterator
from dataclasses import dataclass

VALUE = "_value_"
_BUILTINS = frozenset(dir(builtins))
_COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class OpenTest(ValueError):
    """A test cannot be taken apart, for the reason in the message."""


@dataclass(frozen=True)
class TestParts:
    """``steps`` run with the response, as (kind, source): "run" a statement, "value" report an expression's value,
    "whole" run an entire test. ``statements`` and ``conditions`` run without it; a value is named ``_value_`` with the
    number of its step."""

    __test__ = False  # not a test of pytest's

    steps: tuple[tuple[str, str], ...]
    statements: str = ""
    conditions: tuple[str, ...] = ()


def trusted_names(setup: str, entry_point: str | None) -> frozenset[str]:
    """Names that do not depend on the response: builtins and what the set-up binds, less ``entry_point``."""
    bound = {name for statement in ast.parse(setup).body for name in _bound(statement)}
    return frozenset((_BUILTINS | bound) - {entry_point})


def take_apart(test: str, trusted: frozenset[str]) -> TestParts:
    """Split a test: statements, at least one of them an ``assert``, and asserts only at the top level. Raises
    :class:`OpenTest` if its asserts do not reduce to values that the response computes, and SyntaxError."""
    body = ast.parse(test).body
    imported = {name for statement in body if _is_import(statement) for name in _bound(statement)}
    stored = [name for statement in body if not _is_import(statement) for name in _bound(statement)]
    trusted = (trusted | imported) - set(stored)
    constants = {name: s for s in body if (name := _constant(s)) is not None and stored.count(name) == 1}
    splitter = _Splitter(trusted | constants.keys())
    splitter.split(body, frozenset(constants))
    if shared := constants.keys() & splitter.names_with_response:  # the response sees these, and may change them
        constants = {name: statement for name, statement in constants.items() if name not in shared}
        splitter = _Splitter(trusted | constants.keys())
        splitter.split(body, frozenset(constants))
    if not splitter.conditions:
        raise OpenTest("it has no assert")
    if splitter.idle:
        raise OpenTest(f"{splitter.idle[0]!r} uses nothing that the response defines")
    apart = [statement for statement in body if _is_import(statement) or statement in constants.values()]
    return TestParts(tuple(splitter.steps), _source(apart), tuple(splitter.conditions))


class _Splitter(ast.NodeTransformer):
    """Replaces what the response computes in conditions by names of values, and collects the steps to them."""

    def __init__(self, trusted: frozenset[str]) -> None:
        self.trusted = trusted
        self.steps: list[tuple[str, str]] = []
        self.conditions: list[str] = []
        self.idle: list[str] = []
        self.names_with_response: set[str] = set()
        self._assigned: set[str] = set()

    def split(self, body: list[ast.stmt], constants: frozenset[str]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assert):
                source, before = ast.unparse(statement), len(self.steps)
                self.conditions.append(ast.unparse(self.visit(copy.deepcopy(statement.test))))
                if len(self.steps) == before:
                    self.idle.append(source)
            elif any(isinstance(node, ast.Assert | ast.Raise | ast.Try | ast.With) for node in ast.walk(statement)):
                raise OpenTest("it asserts, raises or catches within another statement")
            elif isinstance(statement, _DEFINES):
                raise OpenTest(f"it defines {statement.name}")
            elif _constant(statement) not in constants:
                self._step("run", statement)
                self._assigned |= set(_bound(statement)) - self.trusted

    def visit(self, node: ast.AST) -> ast.AST:
        if not (foreign := _free_names(node) - self.trusted):
            return node
        if isinstance(node, _COMPREHENSION):
            return self._comprehension(node)
        if isinstance(node, ast.Lambda | ast.NamedExpr | ast.Await):
            raise OpenTest(f"{ast.unparse(node)!r} mixes the test with {', '.join(sorted(foreign))}")
        if isinstance(node, ast.Name) and node.id not in self._assigned:
            raise OpenTest(f"{node.id!r} is used as a value")
        if isinstance(node, ast.Name) or self._rooted(node):
            return self._value(node)
        return self.generic_visit(node)

    def _rooted(self, node: ast.AST) -> bool:
        """``f(…)``, ``F().method(…)[…].x``: chains that begin with a name of the response."""
        while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Name) and node.id not in self.trusted

    def _comprehension(self, node: _COMPREHENSION) -> ast.AST:
        """Report ``[f(x) for x in …]`` as a whole (a generator as a list) if it only collects values of calls."""
        elements = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        bound = {name for loop in node.generators for name in _stored(loop.target)}
        if any(loop.ifs and _free_names(loop) - self.trusted - bound for loop in node.generators) or not all(
            self._rooted(element) or not _free_names(element) - self.trusted - bound for element in elements
        ):
            raise OpenTest(f"{ast.unparse(node)!r} does more than call the response")
        return self._value(ast.ListComp(node.elt, node.generators) if isinstance(node, ast.GeneratorExp) else node)

    def _value(self, node: ast.AST) -> ast.AST:
        self._step("value", node)
        return ast.Name(f"{VALUE}{len(self.steps) - 1}", ast.Load())

    def _step(self, kind: str, node: ast.AST) -> None:
        self.names_with_response |= _free_names(node)
        self.steps.append((kind, ast.unparse(node)))


def _free_names(node: ast.AST) -> set[str]:
    """Names that ``node`` reads and that no comprehension or lambda in it binds."""
    read = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)}
    for inner in ast.walk(node):
        if isinstance(inner, _COMPREHENSION):
            read -= {name for loop in inner.generators for name in _stored(loop.target)}
        elif isinstance(inner, ast.Lambda):
            read -= {argument.arg for argument in ast.walk(inner.args) if isinstance(argument, ast.arg)}
    return read


def _stored(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            if alias.name == "*":
                raise OpenTest(f"{ast.unparse(statement)!r} hides what it imports: name it")
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, _DEFINES):
        yield statement.name
    else:
        yield from _stored(statement)


def _is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _constant(statement: ast.stmt) -> str | None:
    """The name in ``name = literal``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            return None
        return statement.targets[0].id
    return None


def _source(statements: list[ast.stmt]) -> str:
    return "\n".join(ast.unparse(statement) for statement in statements)
