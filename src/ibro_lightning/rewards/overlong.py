"""Reward parts for the form of a response rather than its answer."""

from __future__ import annotations

from collections.abc import Sequence

from ibro_lightning.errors import ConfigError, check_at_least, check_count
from ibro_lightning.rewards.base import Reward
from ibro_lightning.types import Completion, Prompt, RewardResult


class OverlongPenalty(Reward):
    """DAPO's soft overlong punishment as the part "overlong": 0, then linear to ``−factor`` at the length limit.

    The limit is the one that the response was sampled under, also in an evaluation with another length.

    Args:
        buffer_tokens: ``L_buffer``, the last stretch before the limit in which the penalty grows.
        factor: the penalty at the limit.
    """

    pooled = False  # arithmetic, bounded by construction
    tells_bad_answers = True  # trivially: it reads no answers

    def __init__(self, buffer_tokens: int, factor: float = 1.0) -> None:
        check_count("buffer_tokens", buffer_tokens, 1)
        check_at_least("factor", factor, 0)
        self.buffer_tokens, self.factor = buffer_tokens, factor

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        import torch  # here, since the workers of other rewards do not need it

        from ibro_lightning.functional import overlong_penalty

        limits = [completion.max_tokens for completion in completions]
        if completions and self.buffer_tokens > min(limits):
            remedy = f"write at most sampling.max_tokens ({min(limits)})"
            raise ConfigError("buffer_tokens", self.buffer_tokens, remedy)
        penalties = overlong_penalty(
            torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64),
            max_tokens=torch.tensor(limits),
            buffer_tokens=self.buffer_tokens,
            factor=self.factor,
        )
        return [RewardResult(penalty, {"overlong": penalty}) for penalty in penalties.tolist()]
