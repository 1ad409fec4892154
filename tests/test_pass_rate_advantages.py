"""Advantages by a quantile or by the pass rate: by hand, against loops in float64, and from a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from helpers.rollouts import rollouts
from helpers.tensors import doubles, f64
from helpers.updates import dapo
from helpers.updates import fit as train
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import (
    asym_grpo_advantages,
    dr_grpo_advantages,
    group_advantages,
    maxrl_advantages,
    quantile_advantages,
)
from ibro_lightning.update.advantages import GROUP_RELATIVE, AsymGRPO, GroupAdvantage, MaxRL, QuantileAdvantage

torch.set_num_threads(1)
NAN = math.nan
quick = settings(max_examples=50, deadline=None)
ONE_GROUP = torch.zeros(4, dtype=torch.long)
FUNCTIONS: list[Callable[..., Tensor]] = [quantile_advantages, maxrl_advantages, asym_grpo_advantages]
each = pytest.mark.parametrize("function", FUNCTIONS)


# By hand.


@pytest.mark.parametrize(
    ("right", "baseline"), [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0)]
)  # K 0.4 of five: the second lowest; p <= 0.6 has baseline 0
def test_the_quantile_is_the_papers_gate_by_the_pass_rate(right: int, baseline: float) -> None:
    rewards = f64(*[1.0] * right, *[0.0] * (5 - right))
    advantages = quantile_advantages(rewards, torch.zeros(5, dtype=torch.long), epsilon=1e-6)
    deviation = np.std(rewards.numpy(), ddof=1)
    torch.testing.assert_close(advantages, (rewards - baseline) / (deviation + 1e-6))
    assert ((advantages == 0) == (rewards == baseline)).all()


def test_the_quantile_of_other_shares() -> None:
    """Of 1, 2, 3, 4, whose deviation is √(5/3)."""
    rewards = f64(3, 1, 4, 2)
    for share, baseline in ((0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        found = quantile_advantages(rewards, ONE_GROUP, quantile=share, epsilon=0.0)
        torch.testing.assert_close(found, (rewards - baseline) / math.sqrt(5 / 3), msg=str(share))
    for size in range(1, 60):  # K·n is a whole number, which rounding must not pass
        ranks = torch.arange(1.0, size + 1, dtype=torch.float64)
        for count in range(1, size + 1):
            found = quantile_advantages(ranks, torch.zeros(size, dtype=torch.long), quantile=count / size)
            assert found.eq(0).nonzero().item() == count - 1


def test_maxrl_divides_by_the_pass_rate() -> None:
    """p = 1/4: 3 and −1; p = 1: 0; p = 0: 0, not 0/0. Groups in any order."""
    rewards, groups = f64(1, 0, 0, 1, 0, 1, 0, 0), torch.tensor([0, 0, 2, 1, 0, 1, 0, 2])
    found = maxrl_advantages(rewards, groups)
    torch.testing.assert_close(found, f64(3, -1, 0, 0, -1, 0, -1, 0), rtol=1e-12, atol=0)


def test_asym_grpo_takes_powers_of_the_odds() -> None:
    """p = 1/4: odds of being wrong 3."""
    rewards = f64(1, 0, 0, 0)
    found = asym_grpo_advantages(rewards, ONE_GROUP)
    torch.testing.assert_close(found, f64(3**0.9, *[-(3**-0.4)] * 3), rtol=1e-12, atol=0)
    half = asym_grpo_advantages(rewards, ONE_GROUP, positive_power=0.5, negative_power=0.5)
    population = (rewards - 0.25) / rewards.std(correction=0)
    torch.testing.assert_close(half, population, rtol=1e-12, atol=0)
    one_and_nought = asym_grpo_advantages(rewards, ONE_GROUP, positive_power=1.0, negative_power=0.0)
    torch.testing.assert_close(one_and_nought, f64(3, -1, -1, -1), rtol=1e-12, atol=0)


@each
def test_other_scales_of_the_reward_are_those_of_right_and_wrong(function: Callable[..., Tensor]) -> None:
    """Rewards of ±1, with their outcomes and their span of 2, are as 0 and 1."""
    outcomes, groups = f64(1, 0, 0, 1, 0), torch.tensor([0, 0, 0, 1, 1])
    expected = function(outcomes, groups)
    found = function(2 * outcomes - 1, groups, outcomes=outcomes, outcome_span=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    per_response = function(2 * outcomes - 1, groups, outcomes=outcomes, outcome_span=torch.full((5,), 2.0))
    torch.testing.assert_close(per_response, found)


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_a_penalty_among_right_responses_stays_in_proportion(function: Callable[..., Tensor]) -> None:
    """Three right of four, one of them with a penalty of 0.2: the differences within are those of the reward."""
    rewards, outcomes = f64(1, 0.8, 1, 0), f64(1, 1, 1, 0)
    found, plain = function(rewards, ONE_GROUP, outcomes=outcomes), function(outcomes, ONE_GROUP)
    assert found[0] == found[2] > found[1] > 0 > found[3]
    scale = plain[0] / 0.25
    assert (found[0] - found[1]).item() == pytest.approx(0.2 * scale.item(), rel=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_an_unknown_outcome_is_left_out_of_the_pass_rate(function: Callable[..., Tensor]) -> None:
    rewards, outcomes = f64(1, 0, 0, 0), f64(1, 0, NAN, NAN)
    known = function(rewards, ONE_GROUP, outcomes=f64(1, 0, 1, 0))  # the same rate of ½
    torch.testing.assert_close(function(rewards, ONE_GROUP, outcomes=outcomes), known)
    assert not function(rewards, ONE_GROUP, outcomes=torch.full((4,), NAN).double()).any()


def test_a_group_of_wrong_answers_teaches_maxrl_and_asym_grpo_nothing_and_the_quantile_little() -> None:
    rewards, outcomes = f64(-1, -1, -1, -1.1), f64(0, 0, 0, 0)
    for function in FUNCTIONS[1:]:
        assert not function(rewards, ONE_GROUP, outcomes=outcomes, outcome_span=2.0).any()
    found = quantile_advantages(rewards, ONE_GROUP, outcomes=outcomes, outcome_span=2.0)
    torch.testing.assert_close(found, f64(0, 0, 0, -0.1), rtol=1e-5, atol=1e-9)


# Properties.


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 0.1, -0.3, 1.0, 1e8 + 0.1])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(
    function: Callable[..., Tensor], reward: float, size: int, dtype: torch.dtype
) -> None:
    advantages = function(torch.full((size,), reward, dtype=dtype), torch.zeros(size, dtype=torch.long))
    assert advantages.dtype == dtype
    assert advantages.tolist() == [0.0] * size


@each
def test_integer_rewards_and_no_rewards(function: Callable[..., Tensor]) -> None:
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    advantages = function(torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert advantages.dtype == torch.float32
    assert advantages[0] > 0 >= advantages[1]


@each
def test_a_reward_that_is_not_a_number_spoils_its_group_alone(function: Callable[..., Tensor]) -> None:
    advantages = function(f64(NAN, 0, 1, 0), torch.tensor([0, 0, 1, 1]))
    assert advantages[2:].isfinite().all()
    assert advantages[0].isnan()


@each
def test_they_pass_gradcheck(function: Callable[..., Tensor]) -> None:
    groups, outcomes = torch.tensor([0, 1, 0, 2, 1, 0]), f64(1, 0, 0, 1, 1, 0)
    assert gradcheck(lambda x: function(x, groups, outcomes=outcomes), doubles(6, grad=True))


def by_loop(name: str, rewards: list[float]) -> list[float]:
    """One group, rewards 0 and 1."""
    n, p = len(rewards), sum(rewards) / len(rewards)
    if p in (0, 1):
        return [0.0] * n
    if name == "quantile_advantages":
        baseline = min(r for r in rewards if sum(other <= r for other in rewards) >= 0.4 * n - 1e-9)
        return [(r - baseline) / (np.std(rewards, ddof=1) + 1e-6) for r in rewards]
    if name == "maxrl_advantages":
        return [(r - p) / p for r in rewards]
    return [((1 - p) / p) ** 0.9 if r else -((p / (1 - p)) ** 0.4) for r in rewards]


@each
@quick
@given(st.data())
def test_they_are_their_loops_and_follow_a_permutation(function: Callable[..., Tensor], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 14))
    rewards = f64(*data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size)))
    groups = torch.tensor(data.draw(st.lists(st.sampled_from([0, 1, 3]), min_size=size, max_size=size)))
    found = function(rewards, groups)
    for group in (0, 1, 3):
        own = groups == group
        if own.any():
            expected = by_loop(function.__name__, rewards[own].tolist())
            assert found[own].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    order = torch.tensor(data.draw(st.permutations(range(size))))
    torch.testing.assert_close(function(rewards[order], groups[order]), found[order], rtol=1e-12, atol=1e-12)
    renamed = torch.tensor([2, 0, 9, 1])[groups]
    torch.testing.assert_close(function(rewards, renamed), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.1, NAN])
def test_a_share_that_is_none_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile must be above 0 and at most 1"):
        quantile_advantages(f64(1, 0, 0, 0), ONE_GROUP, quantile=quantile)


# In a module and a recipe.


class Centred(GroupAdvantage):
    """One of one's own."""

    def __call__(self, rewards: Tensor, groups: Tensor, outcomes: Any, outcome_span: Any) -> Tensor:
        return 3 * dr_grpo_advantages(rewards, groups)


EXPECTED: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "grpo": ("grpo", group_advantages),
    "quantile": ("quantile", quantile_advantages),
    "quantile 0.6": (QuantileAdvantage(0.6), partial(quantile_advantages, quantile=0.6)),
    "maxrl": ("maxrl", maxrl_advantages),
    "asym_grpo": ("asym_grpo", asym_grpo_advantages),
    "asym_grpo, other powers": (
        AsymGRPO(0.7, 0.2),
        partial(asym_grpo_advantages, positive_power=0.7, negative_power=0.2),
    ),
    "one's own": (Centred(), lambda rewards, groups, **_: 3 * dr_grpo_advantages(rewards, groups)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_module_gives_them_the_rollouts_rewards_outcomes_and_span(name: str) -> None:
    advantage, function = EXPECTED[name]
    module = dapo(advantage=advantage)
    assert module.min_group_size == 2
    (rollout,) = rollouts(1)
    experience = module.prepare(rollout)
    span = 1.0 if rollout.outcome_span is None else rollout.outcome_span
    expected = function(rollout.rewards, rollout.groups, outcomes=rollout.outcomes, outcome_span=span)
    torch.testing.assert_close(experience.advantages, experience.per_token(expected).to(experience.advantages))
    _, recorder = train(dapo(advantage=advantage), rollouts(2))
    assert all(metrics["update/skipped_steps"] == 0 for metrics in recorder.metrics)


def test_only_reinforce_plus_plus_needs_no_groups() -> None:
    assert {name for name in (*GROUP_RELATIVE, "reinforce++") if dapo(advantage=name).min_group_size == 1} == {
        "reinforce++"
    }


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        *((lambda q=q: QuantileAdvantage(q), "quantile") for q in (0.0, -0.1, 1.1, NAN, "0.4", None, True)),
        *((lambda b=b: AsymGRPO(positive_power=b), "positive_power") for b in (-0.1, NAN, math.inf, "1", 500.0)),
        *((lambda b=b: AsymGRPO(negative_power=b), "negative_power") for b in (-0.1, NAN, math.inf, None)),
        *((lambda a=a: dapo(advantage=a), "advantage") for a in ("nope", None, 3, MaxRL)),
    ],
)
def test_bad_settings_are_refused_by_name(make: Callable[[], object], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.setting == setting


@pytest.mark.parametrize("power", [-1.0, 500.0, NAN, math.inf])
@pytest.mark.parametrize("name", ["positive_power", "negative_power"])
def test_powers_that_have_no_meaning_are_refused_in_a_loop_of_ones_own(name: str, power: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be from 0 to 10, got"):
        asym_grpo_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long), **{name: power})


@pytest.mark.parametrize("function", [maxrl_advantages, asym_grpo_advantages])
def test_rewards_whose_mean_is_no_pass_rate_are_refused_without_outcomes(function: Callable[..., Tensor]) -> None:
    """Three of four are right. The mean of 1 and −1 would be 0.5; with outcomes, p is 0.75."""
    groups = torch.zeros(4, dtype=torch.long)
    for rewards in (torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([2.0, 2.0, 0.0, 2.0])):
        with pytest.raises(ValueError, match=r"without outcomes, rewards must be from 0 \(wrong\) to 1 \(right\)"):
            function(rewards, groups)
        outcomes = torch.tensor([1.0, 1.0, 0.0, 1.0])
        given = function(rewards, groups, outcomes=outcomes, outcome_span=2.0)
        torch.testing.assert_close(given, function(outcomes, groups))
    with pytest.raises(ValueError, match="outcomes must be from 0"):
        function(torch.tensor([1.0, 0.0]), groups[:2], outcomes=torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("name", ["maxrl", "asym_grpo"])
def test_a_module_names_the_setting_where_rewards_have_no_pass_rate(name: Any) -> None:
    (rollout,) = rollouts(1)
    module = dapo(advantage=name)
    experience = replace(module.prepare(rollout), outcomes=None)
    with pytest.raises(ConfigError, match=f"^advantage: '{name}' - without outcomes, .* report a part accuracy"):
        module.advantages(experience)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.advantage", "maxrl"], "maxrl"),
        (["--model.advantage", "QuantileAdvantage", "--model.advantage.quantile", "0.6"], "quantile: 0.6"),
        (["--model.advantage={class_path: AsymGRPO, init_args: {negative_power: 0.2}}"], "negative_power: 0.2"),
    ],
)
def test_a_recipe_names_one_or_gives_its_numbers(workspace: Path, arguments: list[str], expected: str) -> None:
    off = ["--trainer.limit_val_batches", "0", "--trainer.max_epochs", "1"]
    main(["fit", "--config", "tiny.yaml", *off, *arguments])
    assert expected in (workspace / "run" / "config.yaml").read_text()
