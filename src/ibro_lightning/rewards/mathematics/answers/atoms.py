"""Reads atoms: numbers, letters and commands with their arguments, functions, absolute values."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ibro_lightning.rewards.mathematics.answers.cursor import Cursor
from ibro_lightning.rewards.mathematics.answers.node import Node, Unread, integer, symbols
from ibro_lightning.rewards.mathematics.answers.numerals import number
from ibro_lightning.rewards.mathematics.answers.tokens import Token
from ibro_lightning.rewards.mathematics.answers.vocabulary import (
    ACCENTS,
    APPLIED,
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    INVERTIBLE,
    MARKS,
    OPENING,
    SEPARATORS,
)


class AtomParser(Cursor, ABC):
    """Recursive descent; each method reads one level of the grammar.

    One grammar in several files: its levels call one another in both directions, so each file is a class on top of the
    one below it, from here to :mod:`.grammar`, and names here what it calls of those above.
    """

    bars = 0
    """How many absolute values are open, in which a bar closes the innermost one."""

    # An atom may hold whole terms, and in brackets any statement.

    @abstractmethod
    def sum(self) -> Node:
        """Products with signs between them."""

    @abstractmethod
    def power(self) -> Node:
        """An atom with its exponents, and with the signs behind it."""

    @abstractmethod
    def exponent(self) -> Node:
        """What stands behind a ``^``."""

    @abstractmethod
    def begins_factor(self) -> bool:
        """Whether a further factor stands here."""

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
