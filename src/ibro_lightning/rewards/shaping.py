"""Reward parts that look at the response's form rather than at its answer."""

from __future__ import annotations

from collections.abc import Sequence

from ibro_lightning.errors import ConfigError
from ibro_lightning.responses import Completion, Prompt, RewardResult
from ibro_lightning.rewards.base import Reward


class OverlongPenalty(Reward):
    """DAPO's soft overlong punishment as the part "overlong": 0, then linear to ``−factor`` at the length limit.

    The limit is the one the response was sampled under, so evaluation at another length is judged by its own.

    Args:
        buffer_tokens: ``L_buffer``, the last stretch before the limit in which the penalty grows.
        factor: the penalty at the limit.
    """

    pooled = False  # arithmetic, bounded by construction
    tells_bad_answers = True  # of any kind: it reads none

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
            excess = len(completion.token_ids) - (completion.max_tokens - self.buffer_tokens)
            penalty = -self.factor * min(1.0, max(0.0, excess / self.buffer_tokens))  # as functional.overlong_penalty
            results.append(RewardResult(penalty, {"overlong": penalty}))
        return results
