"""A place among tokens, and the steps from there."""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.node import Unread
from ibro_lightning.rewards.mathematics.answers.tokens import Token


class Cursor:
    def __init__(self, found: list[Token]) -> None:
        self.tokens = found
        self.here = 0

    def at(self, *texts: str) -> bool:
        return (
            self.here < len(self.tokens)
            and self.tokens[self.here].text in texts
            and self.tokens[self.here].kind != "text"
        )

    def peek(self, ahead: int = 0) -> Token | None:
        place = self.here + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def take(self, *texts: str) -> Token:
        if self.here >= len(self.tokens):
            raise Unread("it ends too early")
        token = self.tokens[self.here]
        if texts and token.text not in texts:
            raise Unread(f"unexpected {token.text!r}")
        self.here += 1
        return token

    def accept(self, *texts: str) -> bool:
        if self.at(*texts):
            self.here += 1
            return True
        return False

    def previous(self) -> Token:
        """The token before this place, which is not the first."""
        return self.tokens[self.here - 1]
