"""Reads what brackets and environments hold: groups, points, intervals, sets, matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from ibro_lightning.rewards.mathematics.answers.node import Node, Unread
from ibro_lightning.rewards.mathematics.answers.numerals import based
from ibro_lightning.rewards.mathematics.answers.terms import TermParser
from ibro_lightning.rewards.mathematics.answers.vocabulary import OPENING, RELATIONS, words

_CONDITIONS = words("if for when where")


class BracketParser(TermParser):
    """From an opening bracket to the one that closes it."""

    @abstractmethod
    def items(self, until: Iterable[str]) -> tuple[list[Node], list[str]]:
        """Statements up to one of the signs ``until``, and what separates them."""

    @abstractmethod
    def statement(self) -> Node:
        """A term, a set, or a relation of these."""

    def group(self) -> Node:
        """Braces of LaTeX; with commas in them they are a set, as ``${1,2}$`` shows one."""
        self.take("{")
        if self.accept("}"):
            raise Unread("empty braces")
        bars, self.bars = self.bars, 0
        items, _ = self.items(until=("}",))
        if self.accept(r"\choose"):
            items = [Node("call", ("binom", items[0], self.sum()))]
        elif self.accept(r"\over"):
            items = [Node("div", (items[0], self.sum()))]
        self.take("}")
        self.bars = bars
        return items[0] if len(items) == 1 else Node("set", tuple(items))

    def bracket(self) -> Node:
        opening = self.take().text
        bars, self.bars = self.bars, 0
        if opening == "(" and self.accept(")"):
            raise Unread("empty brackets")
        items, _ = self.items(until=(")", "]", r"\rangle", r"\rfloor", r"\rceil"))
        closing = self.take().text
        self.bars = bars
        if opening in (r"\lfloor", r"\lceil"):
            if closing != OPENING[opening] or len(items) > 1:
                raise Unread("brackets that do not match")
            return Node("call", ("floor" if opening == r"\lfloor" else "ceil", items[0]))
        if (opening, closing) in (("(", ")"), ("[", "]"), (r"\langle", r"\rangle")):
            if len(items) == 1:
                if opening == r"\langle":
                    raise Unread("one entry in angle brackets")
                return self.based_group(items[0]) if opening == "(" else items[0]
            if opening == "[" and len(items) == 2:
                return Node("closed", tuple(items))
            return Node("tuple", tuple(items))
        if {opening, closing} <= {"(", "]"} or {opening, closing} <= {"[", ")"}:
            if len(items) != 2:
                raise Unread("an interval has two ends")
            return Node("interval", (opening, items[0], items[1], closing))
        raise Unread("brackets that do not match")

    def based_group(self, inside: Node) -> Node:
        """``(101)_2``."""
        if not self.at("_"):
            return inside
        if inside.op != "number":
            raise Unread("a subscript behind a bracket")
        digits = self.tokens[self.here - 2].text
        self.take()
        if (node := based(digits, self.subscript())) is None:
            raise Unread("no numeral of this base")
        return node

    def set(self) -> Node:
        self.take(r"\{")
        if self.accept(r"\}"):
            return Node("set")
        self.bars += 1
        first = self.statement_of_builder()
        self.bars -= 1
        if self.accept("|", ":"):  # {x : x > 2} is the set that the condition describes
            conditions, _ = self.items(until=(r"\}",))
            self.take(r"\}")
            domain = None
            if first.op == "relation" and first.args[1] == "in":
                domain, first = first, first.args[0]
            if first.op != "symbol" or len(conditions) != 1:
                raise Unread("a set by a condition that is not simple")
            if domain is None or domain.args[2] == Node("symbol", ("mathbb R",)):
                return conditions[0]
            if domain.args[2].op == "symbol":
                raise Unread("a set of other numbers than the real ones")
            return Node("all", (domain, conditions[0]))
        items = [first]
        while self.accept(",", ";", "and"):
            items.append(self.statement())
        self.take(r"\}")
        return Node("set", tuple(items))

    def statement_of_builder(self) -> Node:
        left = self.sum()
        if self.accept(r"\in"):
            return Node("relation", (left, "in", self.sum()))
        if (token := self.peek()) is not None and token.text in RELATIONS and token.text != r"\in":
            return Node("relation", (left, RELATIONS[self.take().text], self.sum()))
        return left

    def environment(self, kind: str) -> Node:
        if kind.rstrip("*") not in (
            "pmatrix",
            "bmatrix",
            "vmatrix",
            "Vmatrix",
            "Bmatrix",
            "matrix",
            "smallmatrix",
            "array",
            "cases",
        ):
            raise Unread(f"the environment {kind}")
        if kind == "array" and self.at("{"):
            self.subscript()
        rows: list[list[Node]] = [[]]
        ending = rf"\end{{{kind}}}"
        while not self.at(ending):
            if self.accept("\\\\"):
                rows.append([])
            elif (word := self.peek()) is not None and word.kind == "text":
                self.take()
                if word.text.lower() not in _CONDITIONS:
                    rows[-1].append(Node("text", (word.text.lower(),)))
            elif not self.accept("&"):
                items, _ = self.items(until=("&", "\\\\", ending))
                rows[-1] += items
        self.take(ending)
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise Unread("rows of different lengths")
        table = tuple(tuple(row) for row in rows)
        if kind == "cases":
            if len(table[0]) == 1 and all(row[0].op == "relation" for row in table):
                return Node("list", tuple(row[0] for row in table))
            return Node("cases", table)
        if kind == "vmatrix":
            return Node("call", ("det", Node("matrix", table)))
        return Node("matrix", table)
