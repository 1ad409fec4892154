"""The number path: reach a target from a start with given moves, writing out every step.

    prompt    12>41:
    response  *2=24-3=21*2=42-3=39-3=36-3=33-3=30+7=37+7=44-3=41!

Most problems have many right answers of different lengths, a wrong step cannot be undone by luck, and small models
learn it on a CPU in minutes: arithmetic search in which exploration matters. One token per number and per move; ``!``
is EOS.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ibro_lightning.errors import ConfigError

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "!"


class NumberPath:
    """The rules: numbers 0..size−1, and moves such as ``+7``, ``-3``, ``*2`` that must stay within them.

    Args:
        size: how many numbers there are; larger is harder.
        moves: each an operator ``+``, ``-`` or ``*`` and a positive operand.
    """

    def __init__(self, size: int = 50, moves: Sequence[str] = ("+7", "-3", "*2")) -> None:
        if size < 2:
            raise ConfigError("task.size", size, "write 2 or more")
        bad = [
            move for move in moves if move[:1] not in ("+", "-", "*") or not move[1:].isdecimal() or int(move[1:]) < 1
        ]
        if bad or not moves or len(set(moves)) < len(moves):
            raise ConfigError("task.moves", list(moves), "write different moves, like '+7', '-3' or '*2'")
        self.size, self.moves = size, tuple(moves)

    def apply(self, move: str, value: int) -> int | None:
        """The number that ``move`` leads to, or None if it leaves the range or is no move of this task."""
        if move not in self.moves:
            return None
        operand = int(move[1:])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[move[0]]
        return result if 0 <= result < self.size else None

    @cached_property
    def distances(self) -> dict[tuple[int, int], int]:
        """Length of the shortest path for every solvable (start, target) with start ≠ target."""
        found: dict[tuple[int, int], int] = {}
        for start in range(self.size):
            seen, queue = {start: 0}, deque([start])
            while queue:
                value = queue.popleft()
                for move in self.moves:
                    reached = self.apply(move, value)
                    if reached is not None and reached not in seen:
                        seen[reached] = seen[value] + 1
                        queue.append(reached)
            found.update({(start, target): steps for target, steps in seen.items() if steps})
        return found

    def solution(self, start: int, target: int) -> str:
        """A shortest path as a response without EOS: each move is the first that comes one step nearer."""
        text, value = "", start
        while value != target:
            steps = [(move, reached) for move in self.moves if (reached := self.apply(move, value)) is not None]
            move, value = min(steps, key=lambda step: self._distance(step[1], target))
            text += f"{move}={value}"
        return text

    def _distance(self, start: int, target: int) -> float:
        return 0 if start == target else self.distances.get((start, target), math.inf)

    def verify(self, tokens: Sequence[str], start: int, target: int) -> bool:
        """Is this a right answer: steps ``move = number``, each one true, the last number the target, then EOS?

        Takes tokens, not text: joined to a string, neighbouring numbers such as ``3`` ``12`` would read ``312``.
        """
        if len(tokens) < 4 or len(tokens) % 3 != 1 or tokens[-1] != EOS:
            return False
        value = start
        for move, equals, number in zip(tokens[0:-1:3], tokens[1:-1:3], tokens[2:-1:3], strict=True):
            reached = self.apply(move, value)
            if equals != "=" or reached is None or number != str(reached):
                return False
            value = reached
        return value == target

    def random_walk(self, seed: int, max_steps: int) -> tuple[int, int, list[str]]:
        """A demonstration without an expert: walk at random, then call the place where it ended the target.

        Returns:
            ``(start, target, response tokens without EOS)``; the walk is cut where it first meets the target.
        """
        rng = random.Random(seed)
        while True:
            start = value = rng.randrange(self.size)
            visited, tokens = [start], []
            for _ in range(rng.randint(1, max_steps)):
                steps = [(m, r) for m in self.moves if (r := self.apply(m, value)) is not None]
                if not steps:
                    break
                move, value = rng.choice(steps)
                visited.append(value)
                tokens += [move, "=", str(value)]
            first_arrival = visited.index(value)
            if first_arrival > 0:
                return start, value, tokens[: 3 * first_arrival]

    def vocabulary(self) -> Iterator[str]:
        yield from (PAD, UNKNOWN, EOS, ">", ":", "=", *self.moves)
        yield from (str(number) for number in range(self.size))

    def tokenizer(self) -> Any:
        """An ordinary transformers tokenizer (``PreTrainedTokenizerFast``) with one token per number and per move.

        Every token is also registered as an "added token", which is matched before any pre-tokenizer. That keeps the
        saved folder right under ``AutoTokenizer``, which (transformers 5) opens any folder of model type qwen2 as
        Qwen2Tokenizer, whose own pre-tokenizer would split numbers into digits.
        """
        from transformers import PreTrainedTokenizerFast  # slow to import; verifiers in worker processes do not need it

        vocabulary = {token: index for index, token in enumerate(self.vocabulary())}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[+\-*]\d+|\d+|[>:=!]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        special = (PAD, UNKNOWN, EOS)
        backend.add_tokens([AddedToken(token, normalized=False) for token in vocabulary if token not in special])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=PAD,
            unk_token=UNKNOWN,
            eos_token=EOS,
            clean_up_tokenization_spaces=False,
        )

    @staticmethod
    def prompt(start: int, target: int) -> str:
        return f"{start}>{target}:"
