"""Advantages relative to a group of responses: what DAPO's ``advantage`` names, or is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor

from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.functional import (
    asym_grpo_advantages,
    dr_grpo_advantages,
    group_advantages,
    maxrl_advantages,
    quantile_advantages,
    rloo_advantages,
)
from ibro_lightning.functional.pass_rate_advantages import LARGEST_POWER
from ibro_lightning.regularizers.method import Method


class GroupAdvantage(ABC):
    """One advantage per response, from the rewards of all responses to its prompt. For one of your own, write a class
    with this method."""

    @abstractmethod
    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        """The advantages ``[B]``.

        Args:
            rewards: ``[B]``.
            groups: ``[B]`` int64: which prompt a response answers.
            outcomes: ``[B]``, the accuracy in [0, 1], nan where it is unknown; None: the rewards are the outcomes.
            outcome_span: the reward of right less that of wrong: one number, or ``[B]``.
        """


class GRPO(GroupAdvantage):
    """Reward less the group's mean, over its standard deviation (arXiv 2402.03300)."""

    method = Method(
        formula="(R − mean)/(std + ε) over the group",
        source="arXiv 2402.03300",
        certainty="paper",
        recipe="advantage: grpo",
    )

    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        return group_advantages(rewards, groups, outcomes=outcomes, outcome_span=outcome_span)


class DrGRPO(GroupAdvantage):
    """Reward less the group's mean (arXiv 2503.20783)."""

    method = Method(
        formula="R − mean",
        source="arXiv 2503.20783",
        certainty="paper",
        recipe="advantage: dr_grpo",
    )

    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        return dr_grpo_advantages(rewards, groups)


class RLOO(GroupAdvantage):
    """Reward less the mean of the others (arXiv 2402.14740)."""

    method = Method(
        formula="R − the mean of the others",
        source="arXiv 2402.14740",
        certainty="paper",
        recipe="advantage: rloo",
    )

    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        return rloo_advantages(rewards, groups)


class QuantileAdvantage(GroupAdvantage):
    """Reward less the group's K-quantile, over its standard deviation (QAE, arXiv 2509.22611).

    Args:
        quantile: K, above 0 and up to 1; 0.4 in the paper, 0.6 against a collapse of entropy.
    """

    method = Method(
        formula="(R − Q_K)/(std + ε), Q_K the group's 0.4-quantile",
        source="arXiv 2509.22611",
        certainty="code read",
        recipe="advantage: quantile",
    )

    def __init__(self, quantile: float = 0.4) -> None:
        if not (is_number(quantile) and 0 < quantile <= 1):
            raise ConfigError("quantile", quantile, "write a share of the group, above 0 and up to 1, such as 0.4")
        self.quantile = quantile

    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        return quantile_advantages(
            rewards, groups, quantile=self.quantile, outcomes=outcomes, outcome_span=outcome_span
        )


class MaxRL(GroupAdvantage):
    """Reward less the group's mean, over its pass rate (arXiv 2602.02710)."""

    method = Method(
        formula="(R − mean)/mean, 0 where the mean is 0",
        source="arXiv 2602.02710; its authors' code",
        certainty="code read",
        recipe="advantage: maxrl",
    )

    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        with _named("maxrl"):
            return maxrl_advantages(rewards, groups, outcomes=outcomes, outcome_span=outcome_span)


class AsymGRPO(GroupAdvantage):
    """Powers of the odds of the pass rate, one for right and one for wrong responses (arXiv 2604.04894); a note by
    others was seen, not the paper.

    Args:
        positive_power: β⁺ of right responses, 0.9 by that note.
        negative_power: β⁻ of wrong ones, 0.4 by that note; both ½ are GRPO.
    """

    method = Method(
        formula="((1 − p)/p)^β⁺ on right responses, −(p/(1 − p))^β⁻ on wrong ones, p the pass rate; β⁺ 0.9, β⁻ 0.4",
        source="arXiv 2604.04894; the note leaves a factor open: 1 here",
        certainty="note",
        recipe="advantage: asym_grpo",
    )

    def __init__(self, positive_power: float = 0.9, negative_power: float = 0.4) -> None:
        for name, power in (("positive_power", positive_power), ("negative_power", negative_power)):
            if not (is_number(power) and 0 <= power <= LARGEST_POWER):
                raise ConfigError(name, power, f"write a number from 0 to {LARGEST_POWER:g}, such as 0.5")
        self.positive_power, self.negative_power = positive_power, negative_power

    def __call__(
        self, rewards: Tensor, groups: Tensor, outcomes: Tensor | None, outcome_span: Tensor | float
    ) -> Tensor:
        with _named("asym_grpo"):
            return asym_grpo_advantages(
                rewards,
                groups,
                positive_power=self.positive_power,
                negative_power=self.negative_power,
                outcomes=outcomes,
                outcome_span=outcome_span,
            )


@contextmanager
def _named(advantage: str) -> Iterator[None]:
    """Turn the refusal of rewards that have no pass rate into an error that names the setting."""
    try:
        yield
    except ValueError as error:
        remedy = "let the reward report a part accuracy from 0 to 1, or write another advantage, such as grpo"
        raise ConfigError("advantage", advantage, f"{error}: {remedy}") from error


GROUP_RELATIVE: dict[str, type[GroupAdvantage]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "rloo": RLOO,
    "quantile": QuantileAdvantage,
    "maxrl": MaxRL,
    "asym_grpo": AsymGRPO,
}
"""The advantages by their names in a recipe, with the papers' numbers."""
AdvantageEstimator = Literal["grpo", "dr_grpo", "rloo", "quantile", "maxrl", "asym_grpo", "reinforce++"]


def group_advantage(advantage: GroupAdvantage | AdvantageEstimator) -> GroupAdvantage | None:
    """What a recipe's ``advantage`` names, or is; None for ``reinforce++``, which compares with the whole rollout."""
    if isinstance(advantage, GroupAdvantage):
        return advantage
    if advantage not in get_args(AdvantageEstimator):
        names = ", ".join(get_args(AdvantageEstimator))
        raise ConfigError("advantage", advantage, f"write one of {names}, or an instance of GroupAdvantage")
    return None if advantage == "reinforce++" else GROUP_RELATIVE[advantage]()
