r"""Reads an answer: from its tokens to a tree of nodes, by the rules of mathematical notation.

>>> read("7(3)").op, read(r"7\frac13").op, read("(1,2]").op, read("x = 5").op
('mul', 'add', 'interval', 'relation')

Juxtaposition is a product, except for an integer before a bare fraction of integers, which is a mixed number. What is
not in this language (sums, integrals, limits) raises :class:`Unread`; the library math-verify may read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from ibro_lightning.rewards.mathematics.answers import units
from ibro_lightning.rewards.mathematics.answers.node import Node, Unread, integer, is_term
from ibro_lightning.rewards.mathematics.answers.number_words import multiplier
from ibro_lightning.rewards.mathematics.answers.numerals import based, numeral
from ibro_lightning.rewards.mathematics.answers.terms import TermParser, quantity
from ibro_lightning.rewards.mathematics.answers.tokens import Token, tokens
from ibro_lightning.rewards.mathematics.answers.vocabulary import (
    CURRENCIES,
    LOGIC,
    OPENING,
    RELATIONS,
    SEPARATORS,
    SETS,
    words,
)

_TIME = re.compile(
    r"\s*(?:\\(?:text|mathrm)\s*\{\s*)?([0-9]{1,2})(?:\s*:\s*([0-9]{2}))?"
    r"(?:\s|~|\\[,;: ])*(?:\\(?:text|mathrm|textrm|mbox)\s*\{\s*)?"
    r"([aApP])\.?\s?[mM]\b\.?\s*\}?\s*$"
)
_CHOICE = re.compile(
    r"^\s*\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?[A-E]\)?[.:]?\s*\}(?:\\[ ,;:]|~|\\q?quad|\s|:)+(?=\S)"
)
"""``\\textbf{(B)}\\ 12``: the letter of a choice before its value."""
_NAME = re.compile(r"\s*(?:[A-Z](?=[a-z]*[aeiouy])[a-z]{2,}|(?=.*[\u00c0-\u024f])[A-Za-z\u00c0-\u024f]{3,})\s*\.?\s*")
"""Monday and café; but Mgh is a product."""
_CONDITIONS = words("if for when where")
_IN_TEXT = words("text letter and or . , - ' \" ! ( ) { }")


def read(text: str) -> Node:
    """The answer in a text without delimiters. Raises :class:`Unread`."""
    try:
        return _read(text)
    except Unread:
        raise
    except (ValueError, IndexError, OverflowError, RecursionError) as error:
        raise Unread(str(error)) from error


def _read(text: str) -> Node:
    text = re.sub(r"\\[()]|(?<!\\)\\\s*$|\\displaystyle(?![A-Za-z])|(?<=[A-Za-z0-9}])\.\s*$", " ", text)
    text = dollars[1] if (dollars := re.fullmatch(r"\s*\$([^$]+)\$\s*", text)) else text
    text = _CHOICE.sub("", text)
    if (time := _TIME.match(text)) and 1 <= int(time[1]) <= 12:
        hour, minute = int(time[1]) % 12, int(time[2] or 0)
        return Node("time", (hour + 12 * (time[3] in "pP"), minute))
    if _NAME.fullmatch(text):
        return Node("text", (text.strip(" .\t\n"),))
    if re.fullmatch(r"\s*[A-Z]{3,4}\s*", text):  # a triangle, or a theorem such as SAS
        return Node("symbol", (text.strip(),))
    if based_numeral := numeral(text):
        return based_numeral
    found = tokens(text)
    while found and found[-1].text in (".", ",", ";", "\\\\", "!") and (found[-1].text != "!" or len(found) == 1):
        found.pop()
    if found and found[0].text == r"\approx":
        del found[0]
    if not found:
        raise Unread("empty")
    if spoken := _words(found):
        return Node("text", (spoken,))
    parser = _Parser(found)
    node = parser.answer()
    if parser.here < len(found):
        raise Unread(f"unexpected {found[parser.here].text!r}")
    return node


def _words(found: list[Token]) -> str:
    """Words alone, as ``\\text{Monday}`` and "no solution"; "" for anything else."""
    kinds = {token.kind for token in found}
    if "text" not in kinds or not kinds <= _IN_TEXT:
        return ""
    return " ".join(token.text for token in found if token.text not in "{}")


class _Parser(TermParser):
    """From whole answers down to what stands in brackets."""

    logic = False
    """Whether a logical sign was read, which only conditions may have between them."""

    def answer(self) -> Node:
        items, separators = self.items(until=())
        if self.accept(r"\pmod"):
            return _listed(_congruences(items, self.power()), separators)
        if ";" in separators:  # "p=5, q=2; p=7, q=2": a list of lists
            groups: list[list[Node]] = [[items[0]]]
            for separator, item in zip(separators, items[1:], strict=True):
                if separator == ";":
                    groups.append([item])
                else:
                    groups[-1].append(item)
            if any(len(group) > 1 for group in groups):
                return Node("list", tuple(_listed(group, [",", ","]) for group in groups))
        if set(separators) in ({"and"}, {"or"}) and all(_is_inequality(item) for item in items):
            return Node("any" if separators[0] == "or" else "all", tuple(items))
        relations = set(separators) == {"or"} and all(item.op == "relation" for item in items)
        if relations and len({repr(item.args[0]) for item in items}) > 1:  # x = 0 or y = 0
            return Node("any", tuple(items))
        if self.logic:
            raise Unread("a formula of logic")
        return _listed(items, separators)

    def items(self, until: Iterable[str]) -> tuple[list[Node], list[str]]:
        closing = tuple(until)
        found, separators = [self.statement()], list[str]()
        while (
            not self.at(*closing)
            and (token := self.peek()) is not None
            and token.kind != "text"
            and token.text in SEPARATORS
        ):
            separator = self.separator()
            while (token := self.peek()) is not None and token.kind != "text" and token.text in SEPARATORS:
                separator = self.separator()  # ", and"
            if self.peek() is None or self.at(*closing):
                break
            separators.append(separator)
            found.append(self.statement())
        return found, separators

    def separator(self) -> str:
        text = self.take().text
        self.logic = self.logic or text in LOGIC
        return LOGIC.get(text, text)

    def statement(self) -> Node:
        token = self.peek()
        bound = (
            token is not None and token.kind != "text" and token.text in RELATIONS and token.text not in ("=", r"\in")
        )
        parts: list[Node | str] = [Node("symbol", ("?",)) if bound else self.ratio()]  # > 3, without a symbol
        while (token := self.peek()) is not None and token.text in RELATIONS and token.kind != "text":
            parts += [RELATIONS[self.take().text], self.ratio()]
        if self.at(r"\approx") and len(parts) == 1 and isinstance(parts[0], Node) and parts[0].op in ("symbol", "call"):
            self.take()  # a name has no other value
            return Node("relation", (parts[0], "=", self.ratio()))
        if self.at(r"\approx"):  # what is approximately so is no part of the answer
            while self.peek() is not None and not (self.at(*SEPARATORS) or self.at(")", "]", "}")):
                self.take()
        if len(parts) == 1:
            assert isinstance(parts[0], Node)
            return parts[0]
        return Node("relation", tuple(parts))

    def ratio(self) -> Node:
        terms = [self.set_expression()]
        while self.accept(":"):
            terms.append(self.set_expression())
        return terms[0] if len(terms) == 1 else Node("ratio", tuple(terms))

    def set_expression(self) -> Node:
        left = self.sum()
        while (token := self.peek()) is not None and (token.text in SETS or self.at_union()):
            left = Node(SETS.get(self.take().text, "union"), (left, self.sum()))
        if left.op == "add" and len(left.args) == 2 and left.args[1].op == "neg" and left.args[1].args[0].op == "set":
            return Node("difference", (left.args[0], left.args[1].args[0]))
        return left

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

    def amount(self, currency: str) -> Node:
        """``\\$5``, ``\\$5 million``, ``\\$5 per hour``."""
        value = self.power()
        word = self.peek()
        if word is not None and word.kind == "text" and (many := multiplier(word.text)):
            self.take()
            value = Node("mul", (value, integer(many)))
        unit = [(currency, 1)]
        word = self.peek()
        if word is not None and (word.text in ("per", "an", "a", "/") or word.text.startswith("per ")):
            for name in self.take().text.split():
                if name not in ("per", "a", "an", "/"):
                    unit.append((name, -1))
            if (word := self.peek()) is not None and word.kind == "text":
                unit.append((self.take().text, -1))
        return quantity(value, unit)

    def with_unit(self, value: Node) -> Node:
        """``value`` with the words behind it, if it is a number and they are a unit."""
        token = self.peek()
        if token is not None and token.kind in CURRENCIES and is_term(value):  # 5 €
            self.take()
            return quantity(value, [(CURRENCIES[token.text], 1)])
        if token is None or token.kind != "text":
            return value
        if not is_term(value):
            raise Unread(f"the word {token.text!r}")
        if many := multiplier(token.text):
            self.take()
            return self.with_unit(Node("mul", (value, integer(many))))
        unit, power = list[tuple[str, int]](), 1
        while (token := self.peek()) is not None and len(unit) < 8:
            if token.kind == "text" and token.text.lower() != "per":
                for word in self.take().text.replace("/", " / ").replace(".", " ").split():
                    if word in ("/", "per"):
                        power = -1
                        continue
                    if word.lower() not in ("and",):
                        unit.append((word, power))
            elif token.text in ("/", "per") and unit:
                self.take()
                power = -1
                if (below := self.peek()) and below.kind == "letter" and units.is_unit_symbol(below.text):  # km/h
                    unit.append((self.take().text, power))
            elif token.text == "^" and unit:
                self.take()
                exponent = self.exponent()
                if exponent.op == "neg":
                    exponent, sign = exponent.args[0], -1
                else:
                    sign = 1
                if exponent.op != "number" or exponent.args[0].value.denominator != 1:
                    raise Unread("the power of a unit")
                unit[-1] = (unit[-1][0], unit[-1][1] * sign * int(exponent.args[0].value))
            elif (
                token.text in (r"\cdot", r"\times")
                and unit
                and (after := self.peek(1)) is not None
                and after.kind == "text"
            ):
                self.take()
            else:
                break
        measured = quantity(value, unit)
        token = self.peek()
        if token is not None and token.kind == "number":  # 2 hours 30 minutes
            further = self.product()
            if further.op == "quantity":
                return Node("quantity", measured.args + further.args)
            raise Unread("a number behind a unit")
        return measured


def _is_inequality(node: Node) -> bool:
    return node.op == "relation" and "=" not in node.args[1::2]


def _congruences(items: list[Node], modulus: Node) -> list[Node]:
    """``n ≡ 0, 1 (mod 4)``: every residue with the name and the modulus."""
    name, found = None, list[Node]()
    for item in items:
        if item.op == "relation" and item.args[1::2] == ("==",):
            name, residue = item.args[0], item.args[2]
        elif name is not None and is_term(item):
            residue = item
        else:
            raise Unread("a modulus of no congruence")
        found.append(Node("relation", (name, "==", Node("call", ("mod", residue, modulus)))))
    return found


def _listed(items: list[Node], separators: list[str]) -> Node:
    if len(items) == 1:
        return items[0]
    if set(separators) == {"and"} and all(item.op == "quantity" for item in items):
        # "2 hours and 30 minutes", each smaller than the one before it
        parts = [part for item in items for part in item.args]
        sizes = [size for _, size, _ in parts]
        if len({dimension for _, _, dimension in parts}) == 1 and all(a > b for a, b in pairwise(sizes)):
            return Node("quantity", tuple(parts))
    return Node("list", tuple(items))
