"""Eight responses in four groups, their scores worked out without padding, and rollouts made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

PROMPTS = [[3, 1, 4], [1, 5], [3, 1, 4], [9, 2, 6, 5], [1, 5], [9, 2, 6, 5], [8], [8]]
RESPONSES = [[7, 2], [1, 8, 2, 8, 1, 4], [5], [9, 0, 4, 5, 2], [3, 5, 0], [0, 2, 8, 7], [4, 7, 1, 3], [5, 2]]
GROUPS = [2, 0, 2, 1, 0, 1, 3, 3]
REWARDS = [1.0, -1.0, 0.0, 1.0, 1.0, -0.5, 0.1, 0.1]
TEMPERATURE = 0.8
LATE = {1: 0, 4: 0, 5: 2}
"""Rows of the rollout that came late, and how many tokens they have: one of a group, then both of another."""


def sequences(padding_side: Any = "right") -> Sequences:
    return Sequences.collate(PROMPTS, RESPONSES, padding_side=padding_side)


def padded_further(seqs: Sequences, left: int, right: int) -> Sequences:
    """More columns on both sides; the padding holds a token that also occurs in the text."""
    wide = torch.full((len(seqs), left + seqs.input_ids.shape[1] + right), 5)
    wide[:, left : wide.shape[1] - right] = torch.where(seqs.attention_mask.bool(), seqs.input_ids, 5)
    return replace(seqs, input_ids=wide, starts=seqs.starts + left)


def reference_scores(model: Any, temperature: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-probs, entropies) of each response, one unpadded sequence at a time, in plain transformers and numpy."""
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double().numpy() / temperature
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        before = logp[len(prompt) - 1 : -1]  # the token at position i is predicted at i − 1
        scores.append((before[range(len(response)), response], -(np.exp(before) * before).sum(-1)))
    return scores


def make_rollout(rewards: Sequence[float] = REWARDS, truncated: Sequence[int] = (), *, iteration: int = 0) -> Rollout:
    """The rows of PROMPTS and RESPONSES sorted into whole groups; ``truncated`` names rows of the sorted order."""
    order = sorted(range(8), key=lambda row: GROUPS[row])
    groups: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    for place, row in enumerate(order):
        groups[GROUPS[row]].append((place, row))
    built = []
    for rows in groups:
        prompt = Prompt(f"p{rows[0][1]}", "", tuple(PROMPTS[rows[0][1]]), answer=None)
        completions = tuple(
            Completion(
                tuple(RESPONSES[row]),
                tuple(-0.1 * (t + 1) for t in range(len(RESPONSES[row]))),
                "length" if place in truncated else "stop",
                "",
                6,
                seed=row,
            )
            for place, row in rows
        )
        results = tuple(RewardResult(rewards[row], {"accuracy": float(rewards[row] > 0)}) for _, row in rows)
        built.append(Group(prompt, completions, results))
    return Rollout.from_groups(built, name="train", iteration=iteration, temperature=TEMPERATURE)


def rollouts(count: int) -> list[Rollout]:
    return [make_rollout(iteration=number + 1) for number in range(count)]


def groups_of(rollout: Rollout, late: Mapping[int, int] | None = None) -> list[Group]:
    """The rollout's groups; of ``late`` rows only so many tokens are left, the deadline cut them off."""
    built: list[Group] = []
    for number in range(rollout.num_groups):
        rows = (rollout.groups == number).nonzero().squeeze(-1).tolist()
        completions = tuple(_cut(rollout.completions[row], (late or {}).get(row)) for row in rows)
        built.append(Group(rollout.prompts[rows[0]], completions, tuple(rollout.results[row] for row in rows)))
    return built


def _cut(completion: Completion, tokens: int | None) -> Completion:
    if tokens is None:
        return completion
    ids, logp = completion.token_ids[:tokens], completion.logp[:tokens]
    return replace(completion, token_ids=ids, logp=logp, finish_reason="deadline")


def with_late(rows: Mapping[int, int] = LATE, *, truncated: Sequence[int] = (), iteration: int = 0) -> Rollout:
    """The rollout of :func:`make_rollout`, of which ``rows`` were cut off after so many tokens."""
    rollout = make_rollout(truncated=truncated, iteration=iteration)
    return Rollout.from_groups(groups_of(rollout, rows), name="train", iteration=iteration, temperature=TEMPERATURE)


def share_of(rollout: Rollout, numbers: Sequence[int]) -> Rollout:
    """What a rank gets that has these groups of the rollout; without any, a row that stands for nothing."""
    total, groups = rollout.num_groups, groups_of(rollout)
    mine = [groups[number] for number in numbers]
    if not mine:
        mine = [replace(groups[0], completions=tuple(_cut(completion, 1) for completion in groups[0].completions))]
    return Rollout.from_groups(
        mine,
        numbers or [total],
        name="train",
        iteration=rollout.iteration,
        temperature=rollout.temperature,
        total_groups=total,
        placeholder=not numbers,
    )


class ShownTokens:
    """A hindsight template for these prompts, which have tokens and no text: it shows the token 9 before them."""

    def sequences(
        self, prompts: Sequence[Prompt], responses: FlatSequences, tokenizer: Any = None, max_length: int | None = None
    ) -> FlatSequences:
        shown = [[9, *prompt.token_ids] for prompt in prompts]
        return replace(
            responses,
            prompts=torch.tensor([token for tokens in shown for token in tokens], dtype=responses.prompts.dtype),
            prompt_lengths=torch.tensor([len(tokens) for tokens in shown]),
        )


def with_shown_tokens(method: Any) -> Any:
    """A method that shows the answer, on rollouts from here."""
    method.hindsight = ShownTokens()
    return method
