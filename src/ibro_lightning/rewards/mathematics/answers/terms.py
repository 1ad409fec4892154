"""Reads terms: sums, products and powers, down to numbers, letters and commands."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from ibro_lightning.rewards.mathematics.answers.cursor import Cursor
from ibro_lightning.rewards.mathematics.answers.node import STRUCTURES, Ambiguous, Node, Unread, integer, symbols
from ibro_lightning.rewards.mathematics.answers.numerals import based, number
from ibro_lightning.rewards.mathematics.answers.tokens import Token
from ibro_lightning.rewards.mathematics.answers.units import measured
from ibro_lightning.rewards.mathematics.answers.vocabulary import (
    ACCENTS,
    APPLIED,
    CONSTANTS,
    CURRENCIES,
    FUNCTIONS,
    GREEK,
    INVERTIBLE,
    MARKS,
    OPENING,
    SEPARATORS,
)


class TermParser(Cursor, ABC):
    """Recursive descent; each method reads one level of the grammar."""

    bars = 0
    """How many absolute values are open, in which a bar closes the innermost one."""

    # What stands in brackets may be any statement, and what stands behind a number a unit.

    @abstractmethod
    def group(self) -> Node:
        """What stands in braces."""

    @abstractmethod
    def bracket(self) -> Node:
        """What stands in brackets of any other kind."""

    @abstractmethod
    def set(self) -> Node:
        """A set in braces that are printed."""

    @abstractmethod
    def environment(self, kind: str) -> Node:
        """What ``\\begin{kind}`` begins."""

    @abstractmethod
    def with_unit(self, value: Node) -> Node:
        """``value`` with the words behind it, if these are a unit."""

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

    @abstractmethod
    def amount(self, currency: str) -> Node:
        """The money behind a sign of a currency."""

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

    def atom(self) -> Node:
        token = self.peek()
        if token is None:
            raise Unread("it ends too early")
        if token.kind in ("number", "repeating"):
            self.take()
            return number(token)
        if token.kind == "letter":
            return self.letter()
        if token.text == "{":
            return self.group()
        if token.text in OPENING:
            return self.bracket()
        if token.text == r"\{":
            return self.set()
        if token.text in ("|", r"\|"):
            return self.absolute()
        if token.kind == "command":
            return self.command()
        if token.kind == "text":
            if (after := self.peek(1)) is not None and after.text in ("=", r"\approx"):  # \text{Area} = 12
                self.take()
                return Node("symbol", (token.text,))
            raise Unread(f"the word {token.text!r}")
        raise Unread(f"unexpected {token.text!r}")

    def letter(self) -> Node:
        token = self.take()
        name = token.text
        if name == "e" and not self.at("_"):
            return Node("constant", ("e",))
        if name == "i" and not self.at("_"):
            return Node("constant", ("i",))
        if self.at("_"):
            self.take()
            name += "_" + self.subscript()
        if name[0] in APPLIED and self.at("(", "^"):
            return self.applied(name)
        if name == "C" and self.at("(") and (chosen := self.combination()) is not None:
            return chosen
        if self.at("(", "[") and self.names_equation():
            return self.application(name)
        return Node("symbol", (name,))

    def combination(self) -> Node | None:
        """``C(5, 2)``."""
        if self.names_equation():
            return None
        arguments = self.bracket()
        if arguments.op == "tuple" and len(arguments.args) == 2:
            return Node("call", ("binom", *arguments.args))
        return Node("mul", (Node("symbol", ("C",)), arguments))

    def names_equation(self) -> bool:
        """Whether the bracket here ends before an equals sign at the statement's beginning: P(x) = …, E[X] = …"""
        before = self.tokens[self.here - 2] if self.here >= 2 else None
        if before is not None and before.text not in SEPARATORS:
            return False
        depth = 0
        for place in range(self.here, len(self.tokens)):
            text = self.tokens[place].text
            depth += (text in ("(", "[")) - (text in (")", "]"))
            if depth == 0:
                return place + 1 < len(self.tokens) and self.tokens[place + 1].text in ("=", r"\approx")
        return False

    def application(self, name: str) -> Node:
        arguments = self.bracket()
        parts = arguments.args if arguments.op in ("tuple", "closed") else (arguments,)
        return Node("call", (name, *parts))

    def applied(self, name: str) -> Node:
        """``f(x)``, ``f^{-1}(x)``: a function with a letter's name; a letter is a symbol where no bracket follows."""
        start = self.here
        if self.at("^"):
            self.take()
            exponent = self.exponent()
            inverse = exponent.op == "neg" and exponent.args[0] == integer(1)
            if not (inverse and self.at("(")):
                self.here = start
                return Node("symbol", (name,))
            name += "^-1"
        arguments = self.bracket()
        parts = arguments.args if arguments.op == "tuple" else (arguments,)
        if name[0] != "f" and len(frozenset().union(*map(symbols, parts))) > 1:  # g(m_1 - m_2) is a product
            return Node("mul", (Node("symbol", (name,)), arguments))
        return Node("call", (name, *parts))

    def subscript(self) -> str:
        if not self.at("{"):
            return self.take().text.lstrip("\\")
        depth, parts = 0, list[str]()
        while True:
            token = self.take()
            depth += (token.text == "{") - (token.text == "}")
            if depth == 0:
                return "".join(parts)
            if token.text not in ("{", "}"):
                parts.append(token.text.lstrip("\\"))

    def absolute(self) -> Node:
        bar = self.take().text
        self.bars += 1
        inside = self.sum()
        self.take(bar)
        self.bars -= 1
        return Node("call", ("abs", inside))

    def command(self) -> Node:
        token = self.take()
        name = token.text[1:]
        if token.text in CONSTANTS:
            return Node("constant", (CONSTANTS[token.text],))
        if name == "frac":
            top, bottom = self.argument(), self.argument()
            return Node("div", (top, bottom))
        if name == "binom":
            return Node("call", ("binom", self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name == "cbrt":
            return Node("call", ("root", integer(3), self.argument(whole=True)))
        if name.startswith("begin{"):
            return self.environment(name[6:-1])
        if name in FUNCTIONS:
            return self.function(name)
        if token.text in ACCENTS | MARKS:
            return Node("symbol", (name + " " + self.letters(),))
        if name.startswith("mathbb"):
            suffix = ""
            while self.at("^", "_"):
                self.take()
                suffix += self.subscript()
            return (
                Node("symbol", (name[6:].strip("{}") + suffix,)) if suffix else Node("symbol", ("mathbb " + name[6:],))
            )
        if name == "emptyset":
            return Node("set")
        if name in GREEK:
            if self.at("_"):
                self.take()
                name += "_" + self.subscript()
            return Node("symbol", (name,))
        raise Unread(f"the command {token.text}")

    def letters(self) -> str:
        """What an accent or the sign of an angle belongs to."""
        if self.at("{"):
            return self.subscript()
        parts = []
        while (token := self.peek()) is not None and token.kind == "letter":
            parts.append(self.take().text)
        if not parts:
            raise Unread("an accent without letters")
        return "".join(parts)

    def root(self) -> Node:
        if not self.accept("["):
            return Node("call", ("root", integer(2), self.argument(whole=True)))
        degree = self.sum()
        self.take("]")
        return Node("call", ("root", degree, self.argument(whole=True)))

    def argument(self, whole: bool = False) -> Node:
        r"""One argument of ``\frac``: a group, or one digit or letter; of ``\sqrt`` a whole number."""
        token = self.peek()
        if token is None:
            raise Unread("a command without its argument")
        if token.text == "{":
            return self.group()
        if token.kind == "number" and len(token.text) > 1 and not whole and token.text.isdigit():
            self.tokens[self.here] = Token("number", token.text[1:])
            return integer(int(token.text[0]))
        return self.atom()

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        for _ in range(2):
            if self.at("_") and base is None:
                self.take()
                base = self.group() if self.at("{") else self.argument()
            elif self.at("^") and exponent is None:
                self.take()
                exponent = self.exponent()
        arguments = self.function_arguments(name)
        if name in ("log", "lg", "ln") and base is not None:
            arguments = (arguments[0], base)
            name = "log_b"
        elif base is not None:
            raise Unread(f"a subscript of {name}")
        name = {"lg": "log10"}.get(name, name)
        if not arguments:
            raise Unread(f"{name} of nothing")
        if exponent is not None and exponent == Node("neg", (integer(1),)) and name in INVERTIBLE:
            return Node("call", ("arc" + name, *arguments))
        if name == "cbrt":
            return Node("call", ("root", integer(3), *arguments))
        called = Node("call", (name, *arguments))
        return called if exponent is None else Node("pow", (called, exponent))

    def function_arguments(self, name: str) -> tuple[Node, ...]:
        if self.at("("):
            inside = self.bracket()
            if inside.op == "tuple":
                return inside.args
            return (inside,)
        if self.at("{"):
            inside = self.group()
            return inside.args if inside.op == "set" and name in ("max", "min", "gcd", "lcm") else (inside,)
        if self.at(r"\{"):
            return self.set().args
        if self.at("-"):
            self.take()
            return (Node("neg", (self.power(),)),)
        product = [self.power()]
        while self.begins_factor() and not self.begins_function():
            product.append(self.power())
        return (product[0] if len(product) == 1 else Node("mul", tuple(product)),)

    def begins_function(self) -> bool:
        token = self.peek()
        return (
            token is not None
            and token.kind == "command"
            and (token.text[1:] in FUNCTIONS or token.text.startswith(r"\begin"))
        )


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


def quantity(value: Node, words: list[tuple[str, int]]) -> Node:
    """A number with its unit. Raises :class:`Unread` for words that are none."""
    if (unit := measured(words)) is None:
        raise Unread(f"no unit: {' '.join(word for word, _ in words)}")
    return Node("quantity", ((value, *unit),))
