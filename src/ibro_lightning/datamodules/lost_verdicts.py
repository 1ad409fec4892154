"""Detects rollouts whose verdicts were lost because the reward pool stopped them.

Otherwise a reward that crashes or times out on every response looks like a policy that is always wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.errors import RewardError
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.rewards import PoolOptions, Reward, RewardPool, judge_all
from ibro_lightning.rewards.pool import Verdicts, joined
from ibro_lightning.types import Completion, Group, Prompt, SamplingParams

SETTING = "data.reward_pool.max_lost_rollouts"


class LostVerdicts:
    """Counts consecutive lost rollouts, identically on all ranks.

    Args:
        options: the pool's; None if there is no pool, so that no verdict can be lost.
        in_a_row: the count to resume from.
    """

    def __init__(self, options: PoolOptions | None, in_a_row: int = 0) -> None:
        self.options, self.in_a_row = options, in_a_row

    def note(self, groups: Sequence[Group], verdicts: Sequence[Verdicts], moment: str, ranks: Ranks = ALONE) -> float:
        """The share of responses, over all ranks, whose verdict was lost; warns if it is large. Raises RewardError on
        all ranks after ``max_lost_rollouts`` consecutive lost rollouts.

        Args:
            groups, verdicts: this rank's groups, and its pool's counts for them.
            moment: the point in the run, such as "iteration 3".
        """
        if self.options is None:
            return 0.0
        results = [result for group in groups for result in group.results]
        own = len(results), sum(result.timed_out for result in results), list(verdicts)
        counts = ranks.broadcast(ranks.gather(own))  # broadcast: tensor-parallel ranks judge independently
        asked, lost = sum(count[0] for count in counts), sum(count[1] for count in counts)
        share = lost / asked if asked else 0.0
        bad = [entry for entry in joined(count[2] for count in counts) if entry.share >= self.options.lost_share]
        self.in_a_row = self.in_a_row + 1 if asked and share >= self.options.lost_share else 0
        if not bad and not self.in_a_row:
            return share
        message = "; ".join(map(str, bad)) or f"{lost} of {asked} responses have no verdict: judging them was stopped"
        limit = self.options.max_lost_rollouts
        if limit is not None and self.in_a_row >= limit:
            raise RewardError(f"{SETTING}: {limit} - {moment} is lost, {self._nth()}: {message}")
        if self.in_a_row:
            consequence = "never stops" if limit is None else f"the run stops after {limit}"
            message = f"{message} - lost {self._nth()}; {consequence} ({SETTING})"
        rank_zero_warn(f"{moment}: {message}")
        return share

    def _nth(self) -> str:
        return "1 so far" if self.in_a_row == 1 else f"{self.in_a_row} in a row"


def check_verdicts(
    pool: RewardPool | None, reward: Reward, prompts: Sequence[Prompt], sampling: SamplingParams, tokenizer: Any
) -> None:
    """Judge a plain response to one prompt per part; raises RewardError if it is lost twice (``max_lost_rollouts``)."""
    if pool is None:
        return
    pending = [
        (prompt, [_plain_response(prompt, sampling, tokenizer)])
        for prompt in {prompt.part: prompt for prompt in reversed(prompts)}.values()
    ]
    for _ in range(2):
        pool.take_verdicts()  # discard earlier counts
        judged = judge_all(reward, pending, pool)
        pending = [pair for pair, row in zip(pending, judged, strict=True) if row[0].timed_out]
        if not pending:
            return
    lost = "; ".join(str(verdicts) for verdicts in pool.take_verdicts() if verdicts.lost)
    message = f"a first verdict was tried twice before training (prompt {pending[0][0].id!r}): {lost}"
    if pool.options.max_lost_rollouts is None:
        rank_zero_warn(f"{message} ({SETTING}: null does not stop)")
    else:
        raise RewardError(f"data.reward_pool: {message}")


def _plain_response(prompt: Prompt, sampling: SamplingParams, tokenizer: Any) -> Completion:
    """A response consisting of the gold if that is text or a number, and of "1" otherwise; read with the prefill."""
    gold = prompt.answer
    text = str(gold) if isinstance(gold, str | int | float) and not isinstance(gold, bool) else "1"
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    tokens = tokens if end is None else (*tokens, end)
    limit = max(sampling.max_tokens, len(tokens))
    return Completion(tokens, (0.0,) * len(tokens), "stop", prompt.prefill + text, limit, seed=0)
