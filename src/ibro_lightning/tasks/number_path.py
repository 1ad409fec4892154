"""The number-path task: reach a target from a start with given moves, writing out every step.

    prompt    12>41:
    response  *2=24-3=21*2=42-3=39-3=36-3=33-3=30+7=37+7=44-3=41!

An arithmetic search task that small models learn on a CPU in minutes, and in which exploration matters: most problems
have many correct answers, and guessing cannot repair a wrong step. One token per number and move; ``!`` is EOS.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.seeding import derive_seed
from ibro_lightning.sources.base import DemonstrationSource, PromptSource
from ibro_lightning.tasks.split import Split, check_split, in_split
from ibro_lightning.types import Completion, Problem, Prompt

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "!"


class NumberPath:
    """The rules: numbers 0..size−1, and moves such as ``+7``, ``-3``, ``*2`` that must stay in this range.

    Args:
        size: how many numbers there are; larger is harder.
        moves: each an operator ``+``, ``-`` or ``*`` followed by a positive operand.
    """

    def __init__(self, size: int = 50, moves: Sequence[str] = ("+7", "-3", "*2")) -> None:
        check_count("size", size, 2)
        valid = all(move[:1] in ("+", "-", "*") and move[1:].isdecimal() and int(move[1:]) > 0 for move in moves)
        if not valid or not moves or len(set(moves)) < len(moves):
            raise ConfigError("moves", list(moves), "write different moves, like '+7', '-3' or '*2'")
        self.size, self.moves = size, tuple(moves)

    def apply(self, move: str, value: int) -> int | None:
        """The number that ``move`` leads to; None if it leaves the range or is not a move of this task."""
        if move not in self.moves:
            return None
        operand = int(move[1:])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[move[0]]
        return result if 0 <= result < self.size else None

    @cached_property
    def distances(self) -> dict[tuple[int, int], int]:
        """Shortest path length of every solvable (start, target) with start ≠ target."""
        distances: dict[tuple[int, int], int] = {}
        for start in range(self.size):
            seen, queue = {start: 0}, deque([start])
            while queue:
                value = queue.popleft()
                for move in self.moves:
                    reached = self.apply(move, value)
                    if reached is not None and reached not in seen:
                        seen[reached] = seen[value] + 1
                        queue.append(reached)
            distances.update({(start, target): steps for target, steps in seen.items() if steps})
        return distances

    def solution(self, start: int, target: int) -> str:
        """A shortest path as a response without EOS; ties are broken by the order of the moves."""
        text, value = "", start
        while value != target:
            steps = [(move, reached) for move in self.moves if (reached := self.apply(move, value)) is not None]
            move, value = min(steps, key=lambda step: self._distance(step[1], target))
            text += f"{move}={value}"
        return text

    def _distance(self, start: int, target: int) -> float:
        return 0 if start == target else self.distances.get((start, target), math.inf)

    def verify(self, tokens: Sequence[str], start: int, target: int) -> bool:
        """Whether ``tokens`` are a correct answer: true steps ``move = number`` that end at the target, then EOS.

        Takes tokens, since in text adjacent numbers such as ``3`` ``12`` would read ``312``.
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
        """``(start, target, response tokens without EOS)`` of a random walk, relabelled so that its last number is the
        target, and cut at its first arrival there."""
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
        """A transformers tokenizer (``PreTrainedTokenizerFast``) with one token per number and move.

        Every token is also an "added token", matched before pre-tokenization: for model type qwen2, ``AutoTokenizer``
        (transformers 5) loads any saved folder as Qwen2Tokenizer, whose pre-tokenizer would split numbers into digits.
        """
        from transformers import PreTrainedTokenizerFast  # lazy: slow, and not needed in reward workers

        vocabulary = {token: index for index, token in enumerate(self.vocabulary())}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[+\-*]\d+|\d+|[>:=!]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        special = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": EOS}
        plain = [token for token in vocabulary if token not in special.values()]
        backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)

    @staticmethod
    def prompt(start: int, target: int) -> str:
        return f"{start}>{target}:"


class NumberPathSource(PromptSource):
    """All number-path problems of a given difficulty.

    ``meta`` contains the shortest path's length (``distance``) and one such path (``solution``), for hindsight prompts.

    Args:
        task: the rules.
        split: "train" for training, "heldout" for evaluation.
        min_distance, max_distance: difficulty, in moves of the shortest path.
        heldout_fraction: share of held-out problems, by a hash of the problem.
    """

    def __init__(
        self,
        task: NumberPath | None = None,
        split: Split = "train",
        min_distance: int = 2,
        max_distance: int = 8,
        heldout_fraction: float = 0.15,
    ) -> None:
        check_instance("task", task, NumberPath, optional=True)
        check_split(split, heldout_fraction)
        check_count("min_distance", min_distance)
        check_count("max_distance", max_distance, min_distance, ", min_distance")
        self.task = task or NumberPath()
        self.split, self.heldout_fraction = split, heldout_fraction
        self.min_distance, self.max_distance = min_distance, max_distance

    def problems(self) -> Iterator[Problem]:
        for (start, target), distance in sorted(self.task.distances.items()):
            prompt = self.task.prompt(start, target)
            suits = self.min_distance <= distance <= self.max_distance
            if suits and in_split(prompt, self.split, self.heldout_fraction):
                answer = {"start": start, "target": target, "size": self.task.size, "moves": list(self.task.moves)}
                meta = {"distance": distance, "solution": self.task.solution(start, target)}
                yield Problem(id=prompt, prompt=prompt, answer=answer, meta=meta)


class NumberPathDemonstrations(DemonstrationSource):
    """Random walks, relabelled with the number where they end; mostly far from shortest paths.

    Args:
        task: the rules.
        max_steps: maximum length of a walk.
        heldout_fraction: as in :class:`NumberPathSource`; walks that solve a held-out problem are excluded.
    """

    def __init__(self, task: NumberPath | None = None, max_steps: int = 12, heldout_fraction: float = 0.15) -> None:
        check_instance("task", task, NumberPath, optional=True)
        check_split("train", heldout_fraction)
        check_count("max_steps", max_steps, 1)
        self.task = task or NumberPath()
        if not self.task.distances:
            raise ConfigError("task", list(self.task.moves), "no move leads anywhere within the numbers: add one")
        self.max_steps, self.heldout_fraction = max_steps, heldout_fraction

    def demonstration(self, seed: int) -> tuple[str, str]:
        attempt = 0
        while True:
            start, target, tokens = self.task.random_walk(derive_seed(seed, "walk", attempt), self.max_steps)
            prompt = self.task.prompt(start, target)
            if in_split(prompt, "train", self.heldout_fraction):
                return prompt, "".join(tokens)
            attempt += 1

    def may_show(self, prompt: str) -> bool:
        return in_split(prompt, "train", self.heldout_fraction)


class NumberPathReward(VerifiableReward):
    """Correct if every step is true, the last number is the target and EOS follows. Reads tokens, not text.

    ``prompt.answer`` is ``{start, target, size, moves}``, as from :class:`NumberPathSource`.
    """

    pooled = False  # time is linear in the number of tokens
    _tokenizer: Any = None

    def setup(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tasks: dict[tuple[int, tuple[str, ...]], NumberPath] = {}

    def verify(self, prompt: Prompt, completion: Completion) -> bool:
        if self._tokenizer is None:
            raise RuntimeError("NumberPathReward.setup(tokenizer) must be called first")
        answer = prompt.answer
        tokens = self._tokenizer.convert_ids_to_tokens(list(completion.token_ids))
        return self._task(answer["size"], tuple(answer["moves"])).verify(tokens, answer["start"], answer["target"])

    def _task(self, size: int, moves: tuple[str, ...]) -> NumberPath:
        """The rules, after checking that the policy's tokenizer has all tokens of the task."""
        if (size, moves) not in self._tasks:
            task = NumberPath(size, moves)
            vocabulary = self._tokenizer.get_vocab()
            if missing := [token for token in task.vocabulary() if token not in vocabulary]:
                remedy = "use a policy trained on this task, as by sft_quickstart.yaml (50 numbers), or another task"
                reason = f"the policy's tokenizer has no token {missing[0]!r}"
                raise ConfigError("reward", "NumberPathReward", f"{reason}: {remedy}")
            self._tasks[size, moves] = task
        return self._tasks[size, moves]
