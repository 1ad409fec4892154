"""Reads numbers with a unit, and amounts of money."""

from __future__ import annotations

from abc import abstractmethod

from ibro_lightning.rewards.mathematics.answers import units
from ibro_lightning.rewards.mathematics.answers.atoms import AtomParser
from ibro_lightning.rewards.mathematics.answers.node import Node, Unread, integer, is_term
from ibro_lightning.rewards.mathematics.answers.number_words import multiplier
from ibro_lightning.rewards.mathematics.answers.vocabulary import CURRENCIES


class MeasureParser(AtomParser):
    """From a number to the words that belong to it."""

    @abstractmethod
    def product(self) -> Node:
        """Factors, with or without a sign between them, and a unit."""

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


def quantity(value: Node, words: list[tuple[str, int]]) -> Node:
    """A number with its unit. Raises :class:`Unread` for words that are none."""
    if (unit := units.measured(words)) is None:
        raise Unread(f"no unit: {' '.join(word for word, _ in words)}")
    return Node("quantity", ((value, *unit),))
