"""The questions of the check after a sync, and the answers of engine and trainer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines.base import PolicyProvider, RolloutEngine
from ibro_lightning.errors import RolloutError
from ibro_lightning.ranks import Ranks
from ibro_lightning.seeding import counter_uniforms, derive_seed
from ibro_lightning.types import Generation, SamplingParams

SHARES = (4, 9)
"""Divisors of ``prompt_tokens`` for the lengths of the new prompts."""
ENDED_TOKENS = 4
"""Maximum length of the answers of which some end early; faults show immediately."""


class Answer(NamedTuple):
    """A response of the engine, with both log-probs, ``[new tokens]`` each."""

    generation: Generation
    engine_logp: Tensor
    trainer_logp: Tensor

    @property
    def difference(self) -> float:
        """Maximum |Δlogp| in nats; infinite if one is NaN."""
        return float((self.engine_logp - self.trainer_logp).abs().nan_to_num(torch.inf, torch.inf).max())


class Question(NamedTuple):
    """A prompt, and a seed for each of its samples."""

    prompt: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Answers:
    """All answers of a check.

    Args:
        same: to the fixed prompt.
        new: to new prompts of other lengths, all samples of one after those of the other.
        ended: to the new prompts again, where some rows end early and the others continue.
    """

    same: Answer
    new: list[Answer]
    ended: list[Answer]

    @property
    def all(self) -> list[Answer]:
        return [self.same, *self.new, *self.ended]


def largest_difference(answers: Sequence[Answer]) -> float:
    return max(answer.difference for answer in answers)


@dataclass(frozen=True)
class Questions:
    """Has the engine answer questions and the trainer score the answers; collective, one engine per rank."""

    engine: RolloutEngine
    provider: PolicyProvider
    seed: int
    ranks: Ranks
    prompt_tokens: int
    new_tokens: int

    def ask_all(self, *moment: int | str) -> Answers:
        """Ask all questions of a check; the new prompts are a function of ``moment``."""
        same, new = self.same(), self.new(*moment)
        generated = self._generate([same, *new], self.new_tokens)
        length = min(self.new_tokens, ENDED_TOKENS)
        stop = _stop_token([row.token_ids[:length] for group in generated[1:] for row in group])
        again = self._generate(new, length, stop)
        questions = [same, *new, *new]
        answers, rows = self._score(questions, [*generated, *again]), sum(len(question.seeds) for question in new)
        return Answers(answers[0], answers[1 : 1 + rows], answers[1 + rows :])

    def ask(self, questions: list[Question]) -> list[Answer]:
        """All samples of all questions, in order."""
        return self._score(questions, self._generate(questions, self.new_tokens))

    def same(self) -> Question:
        return Question(self.prompt(self.prompt_tokens, "same"), [derive_seed(self.seed, "weight check")])

    def new(self, *moment: int | str) -> list[Question]:
        """Two prompts of different lengths, two samples of each."""
        return [
            Question(
                self.prompt(max(1, self.prompt_tokens // share), "new", number, *moment),
                [derive_seed(self.seed, "weight check", number, sample, *moment) for sample in range(2)],
            )
            for number, share in enumerate(SHARES)
        ]

    def prompt(self, length: int, *counters: str | int) -> list[int]:
        """Random tokens, so that the check does not depend on the task."""
        seed = torch.tensor([derive_seed(self.seed, "weight check prompt", *counters)])
        draws = counter_uniforms(seed.expand(length), torch.arange(length))
        vocabulary = int(self.provider.model_spec().config.get_text_config().vocab_size)
        return (draws * vocabulary).long().clamp(max=vocabulary - 1).tolist()

    def _generate(self, questions: list[Question], length: int, stop: tuple[int, ...] = ()) -> list[list[Generation]]:
        sampling = SamplingParams(temperature=1.0, max_tokens=length, stop_token_ids=stop)
        prompts, seeds = [question.prompt for question in questions], [question.seeds for question in questions]
        with self.ranks.all_or_none():
            generated = self.engine.generate(prompts, sampling, seeds)
            if not all(row.token_ids for group in generated for row in group):
                raise RolloutError("the engine's deadline ended its check: raise data.engine.deadline_s")
        return generated

    def _score(self, questions: Sequence[Question], generated: Sequence[Sequence[Generation]]) -> list[Answer]:
        """Score the generated responses with the trainer; prefixes of longer ones are not scored separately."""
        pairs = zip(questions, generated, strict=True)
        rows = [(tuple(question.prompt), row) for question, group in pairs for row in group]
        places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        scored: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for prompt, row in sorted(rows, key=lambda pair: -len(pair[1].token_ids)):
            tokens = tuple(row.token_ids)
            if (prompt, tokens) not in places:
                places |= {(prompt, tokens[:length]): len(scored) for length in range(1, len(tokens) + 1)}
                scored.append((prompt, tokens))
        logp: dict[int, Tensor] = {}
        # Long and short prompts apart, to save most of the padding. By the questions, which are as long on every rank:
        # all must score equally often, also if their answers have different lengths.
        longest = max(len(question.prompt) for question in questions)
        for short in (False, True):
            batch = [place for place, (prompt, _) in enumerate(scored) if (2 * len(prompt) <= longest) == short]
            if batch:
                sequences = Sequences.collate(*zip(*(scored[place] for place in batch), strict=True))
                logp |= dict(zip(batch, self.provider.response_logp(sequences, 1.0).float().cpu(), strict=True))
        return [
            Answer(row, torch.tensor(list(row.logp)), logp[places[prompt, tuple(row.token_ids)]][: len(row.logp)])
            for prompt, row in rows
        ]


def _stop_token(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The stop token with which one row ends early and another continues for as long as possible."""
    best: tuple[int, tuple[int, ...]] = (0, ())
    for position in range(2):
        for row in rows:
            token = row[min(position, len(row) - 1)]
            ends = [(*other, token).index(token) for other in rows]
            if max(ends) - min(ends) > best[0]:
                best = (max(ends) - min(ends), (token,))
    return best[1]


def windows_of(config: Any) -> dict[str, int]:
    """The attention windows and chunk sizes in a config, in tokens, by key."""
    return {
        name: value
        for name, value in vars(config.get_text_config()).items()
        if re.search(r"window|chunk", name) and type(value) is int and value > 0 and "layers" not in name
    }
