"""From problems to prompts: chat template, tokenizer, length limit, and the order in which they are drawn."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.datamodules.sources import PromptSource
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.rendering import last_message, render
from ibro_lightning.seeding import derive_seed, permutation
from ibro_lightning.types import ModelSpec, Problem, Prompt, SamplingParams


@dataclass(frozen=True)
class PromptLimits:
    """What happens to prompts that are too long.

    Args:
        max_tokens: longest prompt; None means no limit.
        overlong: drop such prompts (and say how many), or stop with an error.
    """

    max_tokens: int | None = None
    overlong: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_at_least("data.prompt_limits.max_tokens", self.max_tokens, 1)


def encode_prompts(source: PromptSource, tokenizer: Any, limits: PromptLimits, *, setting: str) -> list[Prompt]:
    """All of a source's problems as prompts.

    Raises:
        ConfigError: no problems, none short enough, one too long with ``overlong: error``, or no chat template.
    """
    prompts = [_encode(problem, tokenizer, setting) for problem in source.problems()]
    name = type(source).__name__
    if not prompts:
        raise ConfigError(setting, name, "it has no problems: check its file, split and difficulty settings")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ConfigError(
            setting, name, "several of its problems have the same id: ids must be unique, seeds derive from them"
        )
    if limits.max_tokens is None:
        return prompts
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limits.max_tokens]
    dropped = len(prompts) - len(kept)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if dropped and (limits.overlong == "error" or not kept):
        raise ConfigError(
            "data.prompt_limits.max_tokens",
            limits.max_tokens,
            f"{dropped} of {len(prompts)} prompts of {name} are longer (up to {longest} tokens): "
            f"write {longest}" + ("" if limits.overlong == "drop" else ", or overlong: drop to leave them out"),
        )
    if dropped:
        rank_zero_info(
            f"{setting}: {dropped} of {len(prompts)} prompts dropped, "
            f"longer than {limits.max_tokens} tokens (up to {longest})"
        )
    return kept


def _encode(problem: Problem, tokenizer: Any, setting: str) -> Prompt:
    if not isinstance(problem, Problem):
        raise ConfigError(setting, type(problem).__name__, "a source yields ibro_lightning.types.Problem, nothing else")
    if not isinstance(problem.prompt, str) and not tokenizer.chat_template:
        raise ConfigError(
            setting, "chat: true", "the policy's tokenizer has no chat template: write chat: false for raw prompts"
        )
    text, token_ids = render(problem.prompt, tokenizer)
    if not token_ids:
        raise ConfigError(
            setting, problem.id, "this problem's prompt has no tokens: a response needs something to follow"
        )
    question = problem.question or last_message(problem.prompt)
    return Prompt(problem.id, text, token_ids, problem.answer, problem.meta, problem.prompt, question, problem.part)


def check_vocabulary(prompts: list[Prompt], spec: ModelSpec, *, setting: str) -> None:
    """Raise :class:`ConfigError` if the tokenizer gives tokens that the model has not: it is another model's."""
    vocabulary = int(spec.config.get_text_config().vocab_size)
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= vocabulary:
            raise ConfigError(
                "model.policy",
                f"token id {largest}",
                f"{setting} has a prompt with this token ({prompt.id}), but the model has {vocabulary}: the tokenizer "
                "in its folder is another model's",
            )


def check_lengths(prompts: list[Prompt], sampling: SamplingParams, limit: int | None, *, setting: str) -> None:
    """Raise :class:`ConfigError` if a prompt and its response may be longer than the engine can take."""
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if limit is not None and longest + sampling.max_tokens > limit:
        raise ConfigError(
            f"{setting}.max_tokens",
            sampling.max_tokens,
            f"with the longest prompt ({longest} tokens) this exceeds the {limit} positions of engine and model: "
            f"write at most {limit - longest}, or lower data.prompt_limits.max_tokens",
        )


class PromptCursor:
    """Draws prompts in an order that is a function of the seed and of one number, the position.

    Each pass over the prompts is a new permutation. Restoring ``position`` restores everything.

    Args:
        prompts: what is drawn from.
        seed: of the order.
        weights: the shares of a mixture's parts. Which part a draw is from is then a function of seed and position
            alone; within a part, each pass over its prompts is a permutation of its own.

    Raises:
        ConfigError: a part has no prompts, or a prompt's part has no weight.
    """

    def __init__(self, prompts: list[Prompt], seed: int, weights: Mapping[str, float] | None = None) -> None:
        self.prompts, self.seed = prompts, seed
        self.position = 0
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._parts = {"": range(len(prompts))} if weights is None else _parts_of(prompts, weights)
        self._names = sorted(self._parts)
        self._bounds = list(accumulate(weights[name] for name in self._names)) if weights is not None else [1.0]
        # How many of the draws before position ``_replayed`` were from each part.
        self._drawn, self._replayed = [0] * len(self._names), 0

    def draw(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ``count`` draws as ``(position, prompt)``; the position identifies a draw within the run."""
        draws = [(p, self._at(p)) for p in range(self.position, self.position + count)]
        self.position += count
        return draws

    def _at(self, position: int) -> Prompt:
        if len(self._names) == 1:
            return self._within(self._names[0], position)
        if position < self._replayed:
            self._drawn, self._replayed = [0] * len(self._names), 0
        for earlier in range(self._replayed, position):
            self._drawn[self._part_of_draw(earlier)] += 1
        self._replayed = position
        part = self._part_of_draw(position)
        return self._within(self._names[part], self._drawn[part])

    def _part_of_draw(self, position: int) -> int:
        """Which part (by its place among the sorted names) a draw is from."""
        uniform = derive_seed(self.seed, "prompt part", position) / 2**63
        return min(bisect_right(self._bounds, uniform * self._bounds[-1]), len(self._bounds) - 1)

    def _within(self, part: str, position: int) -> Prompt:
        """The prompt of a part at this position in the sequence of its own draws."""
        indices = self._parts[part]
        epoch, offset = divmod(position, len(indices))
        if part not in self._orders or self._orders[part][0] != epoch:
            counters = ("prompt order", part, epoch) if part else ("prompt order", epoch)
            self._orders[part] = epoch, permutation(len(indices), derive_seed(self.seed, *counters))
        return self.prompts[indices[self._orders[part][1][offset]]]


def _parts_of(prompts: list[Prompt], weights: Mapping[str, float]) -> dict[str, Sequence[int]]:
    """The indices of each part's prompts."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.source.weights[{name!r}]", weight, "write a finite number above 0")
    parts: dict[str, list[int]] = {name: [] for name in weights}
    for index, prompt in enumerate(prompts):
        if prompt.part not in parts:
            raise ConfigError("data.source", prompt.part, f"the prompt {prompt.id!r} is of a part without a weight")
        parts[prompt.part].append(index)
    for name, indices in parts.items():
        if not indices:
            raise ConfigError(
                f"data.source.parts.{name}",
                "no prompts",
                "it has no problems, or data.prompt_limits.max_tokens dropped them all: raise the limit, or take the "
                "part out",
            )
    return dict(parts)
