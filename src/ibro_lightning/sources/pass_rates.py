"""How often each prompt has been answered right so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Outcome = tuple[float, int]
"""Of a group: the share of its judged responses that are right, and how many of them are judged."""


@dataclass(frozen=True, eq=False)
class PassRates:
    """What has been seen of the ``P`` prompts so far; never changed, so that a rollout that fails can begin again."""

    prompts: str
    """Their digest."""
    rates: Tensor
    """``[P]`` float64: the moving pass rate; 0 for a prompt without judged responses."""
    attempts: Tensor
    """``[P]`` int64: judged responses."""

    @classmethod
    def unseen(cls, prompts: str, count: int) -> PassRates:
        return cls(prompts, torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64))

    def told(self, outcomes: Mapping[int, list[Outcome]], memory: float) -> PassRates:
        """With the outcomes of a rollout's groups, by the number of their prompt."""
        rates, attempts = self.rates.clone(), self.attempts.clone()
        for prompt, groups in outcomes.items():
            for rate, judged in groups:
                past = memory if attempts[prompt] else 0.0
                rates[prompt] = past * rates[prompt] + (1 - past) * rate
                attempts[prompt] += judged
        return replace(self, rates=rates, attempts=attempts)
