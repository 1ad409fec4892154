"""Reads terms: sums, products and powers."""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.answers.measures import MeasureParser, quantity
from ibro_lightning.rewards.mathematics.answers.node import STRUCTURES, Ambiguous, Node, Unread
from ibro_lightning.rewards.mathematics.answers.numerals import based, number
from ibro_lightning.rewards.mathematics.answers.tokens import Token
from ibro_lightning.rewards.mathematics.answers.vocabulary import (
    ACCENTS,
    CONSTANTS,
    CURRENCIES,
    FUNCTIONS,
    GREEK,
    MARKS,
)


class TermParser(MeasureParser):
    """From sums down to powers."""

    def sum(self) -> Node:
        terms: list[Node] = []
        sign = self.sign()
        terms.append(signed(sign, self.product()))
        while sign := self.sign():
            terms.append(signed(sign, self.product()))
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def sign(self) -> str:
        sign = ""
        while self.at("+", "-", r"\pm", r"\mp"):
            text = self.take().text
            if text in (r"\pm", r"\mp"):
                if sign:
                    raise Unread("two signs")
                sign = text
            elif text == "-" and sign == "-":
                sign = "+"
            elif text == "-" or not sign:
                sign = text
        return sign

    def product(self) -> Node:
        left = self.factors()
        while True:
            if self.at("*", r"\cdot", r"\times"):
                cross = self.take().text == r"\times"
                right = signed(self.sign(), self.factors())
                if cross and left.op == right.op == "symbol" and left.args[0].startswith("vec "):
                    raise Unread("a product of vectors")
                left = Node("mul", (left, right))
            elif self.accept(r"\bmod", r"\mod"):
                left = Node("call", ("mod", left, self.factors()))
            elif self.accept("/", r"\div"):
                left = self.divided(left)
            else:
                return self.with_unit(left)

    def divided(self, left: Node) -> Node:
        """By what stands behind the slash: all factors, but of two numbers, as in ``4/3\\pi``, the number alone."""
        divisor = self.peek()
        if left.op == "number" and _is_integer(divisor):
            quotient = Node("div", (left, self.power()))
            rest = []
            while self.begins_factor():
                rest.append(self.power())
            return Node("mul", (quotient, *rest)) if rest else quotient
        return Node("div", (left, signed(self.sign(), self.factors())))

    def factors(self) -> Node:
        """Factors that stand beside each other."""
        currency = self.peek()
        if currency is not None and currency.kind in CURRENCIES:
            self.take()
            return self.amount(CURRENCIES[currency.text])
        first = self.peek()
        result = self.power()
        if _is_integer(first) and self.previous() is first:
            result = self.mixed(result)
        product = [result]
        while self.begins_factor():
            product.append(self.power())
        return product[0] if len(product) == 1 else Node("mul", tuple(product))

    def mixed(self, whole: Node) -> Node:
        r"""``1\frac{1}{2}`` and ``1 1/2``."""
        if self.at(r"\frac"):
            if not self.at_bare_fraction():
                return whole
            self.take()
            fraction = Node("div", (self.argument(), self.argument()))
            return self.with_sign_behind(Node("add", (whole, fraction)))
        top_token, slash, bottom_token = self.peek(), self.peek(1), self.peek(2)
        if _is_integer(top_token) and top_token is not None and top_token.spaced:
            if slash is not None and slash.text == "/" and _is_integer(bottom_token):
                self.here += 3
                assert bottom_token is not None
                fraction = Node("div", (number(top_token), number(bottom_token)))
                return self.with_sign_behind(Node("add", (whole, fraction)))
            raise Ambiguous("two numbers beside each other")
        return whole

    def at_bare_fraction(self) -> bool:
        r"""At a ``\frac`` of two whole numbers, without an exponent behind."""
        text = "".join(token.text for token in self.tokens[self.here : self.here + 9])
        return (
            re.match(r"\\frac(?:\{[0-9]+\}(?:\{[0-9]+\}|[0-9])|[0-9](?:\{[0-9]+\}|[0-9]))(?![\^!])", text) is not None
        )

    def with_sign_behind(self, value: Node) -> Node:
        if self.accept("%"):
            return Node("percent", (value,))
        return Node("degree", (value,)) if self.accept(r"\degree") else value

    def begins_factor(self) -> bool:
        token = self.peek()
        if token is None or token.kind in ("text", "and", "or"):
            return False
        if token.kind in ("number", "repeating"):
            if (before := self.previous()) is not None and before.kind in ("number", "repeating"):
                raise Ambiguous("two numbers beside each other")
            return True
        if self.at_union():
            return False
        if token.kind == "letter" or token.text in ("(", "{"):
            return True
        if token.text == "|":
            return self.bars == 0
        if token.kind != "command":
            return False
        name = token.text[1:]
        return (
            name in FUNCTIONS
            or name in GREEK
            or token.text in CONSTANTS
            or token.text in ACCENTS | MARKS
            or token.text in (r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil", r"\langle")
            or name.startswith("begin{")
        )

    def at_union(self) -> bool:
        """At a U between two sets that is the letter, not the sign."""
        before, after = self.tokens[self.here - 1] if self.here else None, self.peek(1)
        if not self.at("U") or before is None or after is None:
            return False
        return before.text in (")", "]", r"\}") and after.text in ("(", "[", r"\{")

    def power(self) -> Node:
        base = self.atom()
        while True:
            if self.accept("!"):
                base = Node("call", ("factorial2", base)) if self.accept("!") else Node("call", ("factorial", base))
            elif self.at("^"):
                self.take()
                exponent = self.exponent()
                base = Node("pow", (base, exponent))
            elif self.accept("%"):
                base = Node("percent", (base,))
            elif self.accept(r"\degree"):
                token = self.peek()
                if token is not None and token.text in ("C", "F") and base.op not in STRUCTURES:
                    self.take()
                    return quantity(base, [("degree" + token.text, 1)])
                base = Node("degree", (base,))
            elif self.at("_") and base.op == "number":
                self.take()
                digits = self.tokens[self.here - 2].text
                if (node := based(digits, self.subscript())) is None:
                    raise Unread("no numeral of this base")
                return node
            else:
                return base

    def exponent(self) -> Node:
        if self.at("{"):
            return self.group()
        sign = "-" if self.accept("-") else ""
        base = self.atom()
        if self.accept("^"):  # 2^3^2 is 2^(3^2)
            base = Node("pow", (base, self.exponent()))
        return signed(sign, base)


def _is_integer(token: Token | None) -> bool:
    return token is not None and token.kind == "number" and token.text.isdigit()


def signed(sign: str, term: Node) -> Node:
    if sign == "-":
        if term.op == "quantity" and len(term.args) == 1:
            value, size, dimension = term.args[0]
            return Node("quantity", ((Node("neg", (value,)), size, dimension),))
        if term.op in ("degree", "percent"):
            return Node(term.op, (Node("neg", term.args),))
        return Node("neg", (term,))
    if sign == r"\pm":
        return Node("plusminus", (term,))
    return Node("minusplus", (term,)) if sign == r"\mp" else term
