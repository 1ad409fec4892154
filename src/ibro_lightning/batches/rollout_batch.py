"""One Lightning batch of reinforcement learning: responses and rewards. Shapes as in :mod:`ibro_lightning.types`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, Self, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from ibro_lightning.batches.sequences import FlatSequences, joined, to_device
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.types import Completion, FinishReason, Group, Logp, Prompt, RewardResult, TokenIds


@dataclass(frozen=True, repr=False)
class Rollout:
    """One Lightning batch: responses sampled from the current policy, with their rewards. With several ranks, this
    rank's share of them, in whole groups.

    Tensors are ``[B]`` unless noted otherwise; ``prompts``, ``completions`` and ``results`` are the same rows as plain
    Python. Completions share the memory of ``sequences`` and ``sampler_logp`` on the CPU. ``groups`` numbers the prompt
    that each response answers, 0..G-1 over all ranks. ``metrics`` describes the generation on all ranks.
    """

    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]
    sequences: FlatSequences
    sampler_logp: Tensor
    """``[N]`` log-probs the engine sampled with, nan where it gave none; response tokens, row after row."""
    rewards: Tensor
    reward_parts: Mapping[str, Tensor]
    results: tuple[RewardResult, ...]
    groups: Tensor
    truncated: Tensor
    """bool: cut at the length limit, no EOS."""
    late: Tensor
    """bool: cut by the engine's deadline; never trained on."""
    name: str
    """"train", or the evaluation set's name."""
    iteration: int
    temperature: float
    dropped: tuple[Group, ...] = ()
    """Groups that were sampled but are not trained on (dynamic sampling), for the record."""
    skip_update: bool = False
    """Dynamic sampling found no group to learn from: the rows are for the record only."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    total_groups: int | None = None
    """G, over all ranks; None: there are no other groups than these."""
    placeholder: bool = False
    """This rank has no share of the rollout: its rows do not count, and only take part in the collectives."""

    @classmethod
    def from_groups(
        cls,
        groups: Sequence[Group],
        numbers: Sequence[int] | None = None,
        *,
        name: str,
        iteration: int,
        temperature: float,
        **generation: Any,
    ) -> Self:
        """Build from whole groups, numbered 0, 1, … or by ``numbers``; ``generation``: further fields, from ``dropped``
        on."""
        numbers = range(len(groups)) if numbers is None else numbers
        rows = [
            (i, g.prompt, c, r)
            for i, g in zip(numbers, groups, strict=True)
            for c, r in zip(g.completions, g.results, strict=True)
        ]
        sampled = [completion for _, _, completion, _ in rows]
        sequences = FlatSequences.collate([p.token_ids for _, p, _, _ in rows], [c.token_ids for c in sampled])
        sampler_logp = joined([_logp_of(prompt, completion) for _, prompt, completion, _ in rows], np.float32)  # [N]
        completions = _views(sampled, sequences.responses, sampler_logp)
        results = [result for _, _, _, result in rows]
        names = dict.fromkeys(name for result in results for name in result.parts)
        return cls(
            prompts=tuple(prompt for _, prompt, _, _ in rows),
            completions=completions,
            sequences=sequences,
            sampler_logp=sampler_logp,
            rewards=torch.tensor([float(result.reward) for result in results]),
            reward_parts={name: torch.tensor([float(r.parts.get(name, 0.0)) for r in results]) for name in names},
            results=tuple(results),
            groups=torch.tensor([group for group, _, _, _ in rows], dtype=torch.long),
            truncated=torch.tensor([completion.truncated for completion in completions], dtype=torch.bool),
            late=torch.tensor([completion.late for completion in completions], dtype=torch.bool),
            name=name,
            iteration=iteration,
            temperature=temperature,
            **generation,
        )

    @classmethod
    def from_tokens(
        cls,
        prompt_token_ids: Sequence[Sequence[int]],
        response_token_ids: Sequence[Sequence[int]],
        rewards: Sequence[float],
        groups: Sequence[int] | None = None,
        logp: Sequence[Sequence[float]] | None = None,
        *,
        accuracy: Sequence[float] | None = None,
        truncated: Sequence[bool] | None = None,
        temperature: float = 1.0,
        iteration: int = 0,
    ) -> Self:
        """Build from responses sampled and judged elsewhere; one entry per response in each argument.

        Args:
            prompt_token_ids, response_token_ids: without padding; a response that has ended ends with EOS.
            rewards: to train on.
            groups: a number for the prompt that a response answers; None: equal prompts are one group.
            logp: of the response's tokens, in nats, as sampled at ``temperature``. None: unknown, and a module needs
                ``sampler_correction=None``.
            accuracy: 1 for right and 0 for wrong, where the reward is something else: for curves, and for GRPO in
                groups that are all right or all wrong. None: not available.
            truncated: cut at the length limit, before EOS.
            iteration: of the run, from 1; 0 takes the Trainer's.

        Raises:
            ConfigError: an argument has another number of entries, or values that it cannot have; or responses of one
                group answer different prompts.
        """
        given = {"rewards": rewards, "groups": groups, "logp": logp, "accuracy": accuracy, "truncated": truncated}
        prompts = _token_rows("prompt_token_ids", prompt_token_ids, shortest=1)
        responses = _token_rows("response_token_ids", response_token_ids, shortest=0)
        for name, column in {"response_token_ids": responses, **given}.items():
            if column is not None and len(column) != len(prompts):
                raise ConfigError(name, column, f"{len(column)} entries for {len(prompts)} prompts: write one for each")
        _check_numbers("rewards", rewards, -math.inf, math.inf)
        _check_numbers("accuracy", () if accuracy is None else accuracy, 0, 1)
        rows_of: dict[Any, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt if groups is None else _group_number(groups[row], row), []).append(row)
        for number, rows in rows_of.items():
            if len({prompts[row] for row in rows}) > 1:
                raise ConfigError("groups", number, "its responses answer different prompts: number each prompt")
        limit = max(map(len, responses), default=0)

        def completion(row: int) -> Completion:
            nats = () if logp is None else list(map(float, logp[row]))
            reason: FinishReason = "length" if truncated is not None and truncated[row] else "stop"
            return Completion(responses[row], nats, reason, "", limit, seed=0)

        def result(row: int) -> RewardResult:
            return RewardResult(float(rewards[row]), {} if accuracy is None else {"accuracy": float(accuracy[row])})

        built = [
            Group(
                Prompt(str(number), "", prompts[rows[0]], None),
                tuple(map(completion, rows)),
                tuple(map(result, rows)),
            )
            for number, rows in enumerate(rows_of.values())
        ]
        return cls.from_groups(built, name="train", iteration=iteration, temperature=temperature)

    def __repr__(self) -> str:
        at = f", iteration {self.iteration}" if self.iteration else ""
        tokens = int(self.sequences.response_lengths.sum())
        reward = f", mean reward {self.rewards.mean():.3g}" if len(self) else ""
        prompts = len(self.groups.unique())
        return f"Rollout({self.name}{at}: {len(self)} responses to {prompts} prompts, {tokens} tokens{reward})"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def accuracy(self) -> Tensor:
        """``[B]`` the reward's "accuracy" part; raises :class:`RolloutError` if there is none."""
        if "accuracy" not in self.reward_parts:
            remedy = "give accuracy to from_tokens or to the samples of collate_rollout, or use a reward with that part"
            raise RolloutError(f"{self!r} does not say which responses are right, as an evaluation must know: {remedy}")
        return self.reward_parts["accuracy"]

    @property
    def outcomes(self) -> Tensor | None:
        """``[B]`` float64: the accuracy, nan where the verifier was stopped; None for rewards without accuracy."""
        if "accuracy" not in self.reward_parts:
            return None
        stopped = torch.tensor([result.timed_out for result in self.results], device=self.rewards.device)
        accuracy = self.accuracy.double()
        return torch.where(stopped, torch.nan, accuracy) if len(stopped) == len(accuracy) else accuracy

    @property
    def outcome_span(self) -> Tensor:
        """``[B]`` float64: the reward of right less that of wrong; 1 where the reward gives none."""
        spans = [1.0 if result.outcome_span is None else float(result.outcome_span) for result in self.results]
        complete = len(spans) == len(self.rewards)
        return torch.tensor(spans if complete else [1.0] * len(self.rewards), device=self.rewards.device).double()

    @property
    def num_groups(self) -> int:
        """G, on all ranks."""
        if self.total_groups is not None:
            return self.total_groups
        return int(self.groups.max()) + 1 if len(self) else 0

    def to(self, device: torch.device | str) -> Self:
        return to_device(self, device)


REQUIRED = ("prompt_token_ids", "response_token_ids", "rewards")
COLUMNS = ("response_token_ids", "rewards", "logp", "accuracy", "truncated")
"""The keys of a sample with one entry per response."""
OPTIONAL = tuple(name for name in COLUMNS if name not in REQUIRED)
COLUMNS_RULE = f"write {', '.join(REQUIRED)} in every sample, and {', '.join(OPTIONAL)} in all samples or in none"


def collate_rollout(samples: Sequence[Mapping[str, Any]]) -> Rollout:
    """``collate_fn`` of a DataLoader; each of its samples is one prompt with all its responses.

    Args:
        samples: ``prompt_token_ids``; ``response_token_ids`` and ``rewards``, one per response; and, in all samples or
            in none, ``logp``, ``accuracy`` and ``truncated``, as in :meth:`Rollout.from_tokens`; nothing else.

    Raises:
        ConfigError: a sample lacks one of them, has another key, or another number of entries than responses.
    """
    if not samples or not all(isinstance(sample, Mapping) for sample in samples):
        kinds = [type(sample).__name__ for sample in samples]
        raise ConfigError("samples", kinds, f"write at least one mapping: {COLUMNS_RULE}")
    first = samples[0].keys()
    columns: dict[str, Any] = {name: [] for name in COLUMNS if name in first}
    prompts, groups = [], []
    for number, sample in enumerate(samples):
        place, count = f"samples[{number}]", len(sample.get("response_token_ids", ()))
        for name in ("prompt_token_ids", *COLUMNS):
            if (name in sample) != (name in first or name in REQUIRED):
                raise ConfigError(place, list(sample), f"{name}: {COLUMNS_RULE}")
        if unknown := [name for name in sample if name not in ("prompt_token_ids", *COLUMNS)]:
            raise ConfigError(f"{place}.{unknown[0]}", sample[unknown[0]], f"nothing reads it: {COLUMNS_RULE}")
        for name, column in columns.items():
            if len(sample[name]) != count:
                remedy = f"{len(sample[name])} entries for {count} responses: write one for each"
                raise ConfigError(f"{place}.{name}", sample[name], remedy)
            column += sample[name]
        prompts += [sample["prompt_token_ids"]] * count
        groups += [number] * count
    return Rollout.from_tokens(prompts, groups=groups, **columns)


def _token_rows(name: str, rows: Sequence[Sequence[int]], *, shortest: int) -> list[tuple[int, ...]]:
    """The rows as plain integers; raises :class:`ConfigError` for rows that are too short or no token ids."""
    remedy = f"write whole numbers from 0, at least {shortest} for every response"
    plain: list[tuple[int, ...]] = []
    for number, row in enumerate(rows):
        try:
            plain.append(tuple(map(index, row)))
        except TypeError as error:
            raise ConfigError(f"{name}[{number}]", row, remedy) from error
        if len(row) < shortest or min(row, default=0) < 0:
            raise ConfigError(f"{name}[{number}]", row, remedy)
    return plain


def _group_number(value: Any, row: int) -> int:
    try:
        return index(value)
    except TypeError as error:
        raise ConfigError(f"groups[{row}]", value, "write a whole number for each prompt") from error


def _check_numbers(name: str, values: Sequence[float], low: float, high: float) -> None:
    for number, value in enumerate(values):
        if not (isinstance(value, SupportsFloat) and math.isfinite(value) and low <= value <= high):
            bounds = "" if math.isinf(low) else f" from {low:g} to {high:g}"
            raise ConfigError(f"{name}[{number}]", value, f"write a finite number{bounds}")


def _logp_of(prompt: Prompt, completion: Completion) -> Any:
    """One number per token, nan where missing."""
    logp, count = completion.logp, len(completion.token_ids)
    if len(logp) not in (0, count):
        counts = f"a response to prompt {prompt.id!r} has {count} tokens and {len(logp)} log-probs"
        raise RolloutError(f"{counts}: give each token one (nan if it is unknown), or none at all")
    return logp if len(logp) else np.full(count, np.nan, np.float32)


def _views(completions: Sequence[Completion], responses: Tensor, logp: Tensor) -> tuple[Completion, ...]:
    """The same completions on the tensors' memory ``[N]``, so that theirs can be freed."""
    ids, nats, views, end = TokenIds.shared(responses.numpy()), Logp.shared(logp.numpy()), list[Completion](), 0
    for completion in completions:
        start, end = end, end + len(completion.token_ids)
        own = nats[start:end] if len(completion.logp) else completion.logp
        views.append(replace(completion, token_ids=ids[start:end], logp=own))
    return tuple(views)
