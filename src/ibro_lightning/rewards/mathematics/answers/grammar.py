r"""Reads an answer: from its tokens to a tree of nodes, by the rules of mathematical notation.

>>> read("7(3)").op, read(r"7\frac13").op, read("(1,2]").op, read("x = 5").op
('mul', 'add', 'interval', 'relation')

Juxtaposition is a product, except for an integer before a bare fraction of integers, which is a mixed number. What is
not in this language (sums, integrals, limits) raises :class:`Unread`; the library math-verify may read it.

Statements and lists of them are read here, what they consist of in `brackets`, `terms`, `measures` and `atoms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from ibro_lightning.rewards.mathematics.answers.brackets import BracketParser
from ibro_lightning.rewards.mathematics.answers.node import Node, Unread, is_term
from ibro_lightning.rewards.mathematics.answers.numerals import numeral
from ibro_lightning.rewards.mathematics.answers.tokens import Token, tokens
from ibro_lightning.rewards.mathematics.answers.vocabulary import LOGIC, RELATIONS, SEPARATORS, SETS, words

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


class _Parser(BracketParser):
    """From whole answers down to sets and terms."""

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
