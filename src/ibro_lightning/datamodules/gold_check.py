"""Checks before training that every gold is usable by its verifier: a bad one would misjudge every response."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.errors import ConfigError
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.rewards import GoldTrial, Judge, Request, Reward, judge_here
from ibro_lightning.rewards.gold_trial import gives_plain_responses
from ibro_lightning.types import Completion, Prompt

OnBadGold = Literal["refuse", "drop"]
"""How to handle problems whose gold their own verifier cannot use."""
BUDGET_S = 60.0
"""Time limit in seconds with ``refuse``; ``drop`` tries all golds."""
_REPORT_S = 10.0
_CHUNK = 256
_EMPTY = Completion((), (), "stop", "", 1, 0)
_Trial = tuple[GoldTrial, Prompt]
_Key = tuple[int, type, str]
"""``(id of the verifier, type of the gold, repr of the gold)``."""


def usable_golds(
    reward: Reward,
    prompts: Sequence[Prompt],
    judge: Judge = judge_here,
    on_bad_gold: OnBadGold = "refuse",
    ranks: Ranks = ALONE,
    *,
    setting: str,
    budget_s: float = BUDGET_S,
) -> list[Prompt]:
    """The prompts whose verifier accepts their gold in its plainest form and rejects a different value.

    Each distinct gold is tried once, divided among the ranks. Rewards without
    :meth:`~ibro_lightning.rewards.Reward.plain_responses` are skipped.

    Args:
        setting: the source's place in the configuration, for messages.
        on_bad_gold: ``refuse``: a bad gold is an error. ``drop``: such prompts are removed and counted.
        budget_s: with ``refuse``, golds not tried within this time are accepted, with a message.
    """
    trials, keys = _trials(reward, prompts)
    order = list(trials)
    deadline = time.monotonic() + budget_s if on_bad_gold == "refuse" else None
    if not order:
        return list(prompts)
    with ranks.all_or_none():
        own = _run_trials(ranks.share([trials[key] for key in order]), judge, setting, deadline)
    shares = ranks.gather(own)  # each may have run out of time before its end
    tried = {key: shares[place % len(shares)][place // len(shares) :][:1] for place, key in enumerate(order)}
    reasons = {key: reason for key, found in tried.items() for reason in found if reason}
    bad = [prompt for prompt in prompts if any(key in reasons for key in keys[prompt.id])]
    if not bad:
        return list(prompts)
    key = next(key for key in keys[bad[0].id] if key in reasons)
    name = type(trials[key][0].verifier).__name__
    reason = reasons[key] if reasons[key].startswith(name) else f"{name}: {reasons[key]}"
    what = f"{len(bad)} of {len(prompts)} golds are of no use to their verifier; the first is"
    gold = repr(str(bad[0].answer)[:100])
    if on_bad_gold == "refuse" or len(bad) == len(prompts):
        drop = ", or on_bad_gold: drop to leave such rows out" if len(bad) < len(prompts) else ""
        remedy = f"repair the rows, write another answer_column or another reward{drop}"
        raise ConfigError(setting, bad[0].id, f"{what} {gold}: {reason} - {remedy}")
    rank_zero_info(f"data.{setting}: dropped {what} that of {bad[0].id!r}, {gold}: {reason}")
    dropped = {prompt.id for prompt in bad}
    return [prompt for prompt in prompts if prompt.id not in dropped]


def _trials(reward: Reward, prompts: Sequence[Prompt]) -> tuple[dict[_Key, _Trial], dict[str, list[_Key]]]:
    """``(trials by key, {prompt id: keys of its trials})``: one trial per verifier and distinct gold."""
    trials: dict[_Key, _Trial] = {}
    keys: dict[str, list[_Key]] = {prompt.id: [] for prompt in prompts}
    by_leaf: dict[int, GoldTrial] = {}
    for prompt in prompts:
        for leaf in reward.leaves_for(prompt):
            if gives_plain_responses(leaf):
                key = id(leaf), type(prompt.answer), repr(prompt.answer)
                trials.setdefault(key, (by_leaf.setdefault(id(leaf), GoldTrial(leaf)), prompt))
                keys[prompt.id].append(key)
    return trials, keys


def _run_trials(trials: Sequence[_Trial], judge: Judge, setting: str, deadline: float | None) -> list[str | None]:
    """For each trial the reason why the gold is bad, or None; a shorter list if the deadline passes."""
    reasons: list[str | None] = []
    reported = time.monotonic()
    while len(reasons) < len(trials):
        now = time.monotonic()
        so_far = f"data.{setting}: {len(reasons)} of {len(trials)} golds tried on their verifier"
        if deadline is not None and now >= deadline:
            rank_zero_info(f"{so_far} in time")
            break
        if now - reported >= _REPORT_S:
            reported = now
            rank_zero_info(so_far)
        chunk = trials[len(reasons) : len(reasons) + _CHUNK]
        judged = judge([Request(trial, prompt, [_EMPTY]) for trial, prompt in chunk])
        reasons += [None if row[0].reward else row[0].answer or "of no use" for row in judged]
    return reasons
