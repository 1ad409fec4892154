"""Reward parts that look at the response's form rather than at its answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import overlong_penalty
from ibro_lightning.rewards.base import Reward
from ibro_lightning.types import Completion, Prompt, RewardResult


class OverlongPenalty(Reward):
    """DAPO's soft overlong punishment as the part "overlong": 0, then linear to ``−factor`` at the length limit.

    The limit is the one the response was sampled under, so evaluation at another length is judged by its own.

    Args:
        buffer_tokens: ``L_buffer``, the last stretch before the limit in which the penalty grows.
        factor: the penalty at the limit.
    """

    def __init__(self, buffer_tokens: int, factor: float = 1.0) -> None:
        if buffer_tokens < 1:
            raise ConfigError("OverlongPenalty.buffer_tokens", buffer_tokens, "write 1 or more tokens")
        self.buffer_tokens, self.factor = buffer_tokens, factor

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        results = []
        for completion in completions:
            if self.buffer_tokens > completion.max_tokens:
                raise ConfigError(
                    "OverlongPenalty.buffer_tokens",
                    self.buffer_tokens,
                    f"write at most sampling.max_tokens ({completion.max_tokens})",
                )
            penalty = overlong_penalty(
                torch.tensor([len(completion.token_ids)]),
                max_tokens=completion.max_tokens,
                buffer_tokens=self.buffer_tokens,
                factor=self.factor,
            ).item()
            results.append(RewardResult(penalty, {"overlong": penalty}))
        return results
