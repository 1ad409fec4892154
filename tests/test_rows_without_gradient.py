"""Rows whose loss has no gradient, because they have no advantage, run no backward pass; nothing else changes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.flat import span
from helpers.models import qwen2
from helpers.quick import slow_unless
from helpers.rollouts import make_rollout
from ibro_lightning.batches import TokenStats
from ibro_lightning.batches.experience import Experience
from ibro_lightning.functional import token_mean
from ibro_lightning.models import Policy
from ibro_lightning.regularizers import (
    IBRO,
    SIREN,
    STEER,
    AEnt,
    ClipCov,
    ConditionalEntropyShaping,
    EntroPIC,
    EntropyBonus,
    EntropyRatioClip,
    EntropyRegularizer,
    EntropyShapedAdvantage,
    InformationBottleneck,
    KLCov,
    MarginalEntropy,
    NoRegularizer,
    OppositeInformationBottleneck,
    PassRateInformationBottleneck,
    PolicyLossMethod,
    PositionCentredInformationBottleneck,
    PositiveAdvantageWeight,
    RenyiBonus,
    SelfDistillation,
    TopEntropyTokens,
)
from ibro_lightning.regularizers.coefficients import Constant
from ibro_lightning.update import PlainLoop, PolicyLoss, ReferenceKL, Scorer, Updater
from ibro_lightning.update.surrogates import LOSSES

torch.set_num_threads(1)
WITHOUT = [2, 3, 6, 7]
"""Rows of the rollout that get no advantage: two whole groups."""
REGULARIZERS: list[EntropyRegularizer] = [
    NoRegularizer(),
    InformationBottleneck(0.5),
    InformationBottleneck(0.5, transform="sign"),
    OppositeInformationBottleneck(0.5),
    ClipCov(fraction=0.3, low=-10.0, high=10.0),
    EntropyShapedAdvantage(),
    TopEntropyTokens(0.5),
    STEER(0.3),
    PassRateInformationBottleneck(0.5),
    PositiveAdvantageWeight(0.5),
    EntroPIC(0.5, 1.5),
    EntropyRatioClip(1e-4, 1e-4),
    MarginalEntropy(0.0, base=InformationBottleneck(0.5)),
]
OTHERS: list[EntropyRegularizer] = [
    InformationBottleneck(0.5, part="centred"),
    InformationBottleneck(0.5, part="uniform"),
    InformationBottleneck(0.5, part="reversed"),
    InformationBottleneck(0.5, noise=0.5),
    MarginalEntropy(0.5),
    OppositeInformationBottleneck(0.5, part="centred"),
    EntropyBonus(0.5),
    KLCov(fraction=0.5),
    ConditionalEntropyShaping(0.5),
    SIREN(0.5, anchor=0.1),
    PositionCentredInformationBottleneck(0.5),
]
OFF = (
    *(IBRO(0.0), EntropyBonus(0.0), AEnt(0.0), RenyiBonus(0.0), SelfDistillation(0.0), SIREN(0.0, anchor=0.1)),
    *(InformationBottleneck(0.0, part="uniform"), ConditionalEntropyShaping(0.0)),
    *(PositionCentredInformationBottleneck(0.0), InformationBottleneck(0.0, noise=0.5)),
)


class EveryRow(PolicyLoss):
    """The loss as it is without the shortcut."""

    def rows_with_gradient(self, step: Experience) -> Tensor:
        return torch.ones(len(step), dtype=torch.bool)


def update(loss: PolicyLoss, advantages: Tensor | None = None) -> tuple[Any, ...]:
    """Two updates, in which each row is a micro-batch of its own: their steps and metrics, the weights that they end
    with, and the number of backward passes."""
    policy = Policy(qwen2().double())
    backwards: list[float] = []

    def backward(loss: Tensor) -> None:
        backwards.append(loss.item())
        loss.backward()

    loop = PlainLoop({"policy": policy}, [torch.optim.AdamW(policy.parameters(), lr=0.01)], backward=backward)
    scorer = Scorer(loop, loss)
    updater = Updater(loop, replace(Updater(loop).budget, tokens=1), mini_batch_prompts=None, max_grad_norm=None)
    experience = scorer(make_rollout())
    if advantages is None:
        given = make_rollout().rewards.double() + 0.25  # none of them is 0
        given[WITHOUT] = 0.0
        advantages = experience.per_token(given)
    seen = []
    for _ in range(2):  # the second has moved: ratios are not 1 any more
        for step in updater.steps(replace(experience, advantages=advantages), loss, scorer.context()):
            seen.append(updater.update(step, loss, scorer.context()))
            if experience.old_logp is None:
                experience = replace(experience, old_logp=seen[0][0].old_logp, old_entropy=seen[0][0].old_entropy)
    return seen, {name: value.detach() for name, value in policy.named_parameters()}, len(backwards)


@pytest.mark.parametrize(
    ("regularizer", "kind"),
    slow_unless(
        lambda case: case[1] is LOSSES["ppo"] or case[0] is REGULARIZERS[0],
        itertools.product(REGULARIZERS, LOSSES.values()),
    ),
    ids=lambda one: None if isinstance(one, type) else type(one).__name__,
)
def test_the_update_is_the_same_with_fewer_backward_passes(
    kind: type[PolicyLoss], regularizer: EntropyRegularizer
) -> None:
    every = type("Every", (EveryRow, kind), {})
    seen, weights, backwards = update(kind(regularizer))
    expected, expected_weights, whole = update(every(regularizer))
    assert (backwards, whole) == (2 * 4, 2 * 8)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)
    for (step, metrics), (expected_step, expected_metrics) in zip(seen, expected, strict=True):
        assert metrics == pytest.approx(expected_metrics, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(step.old_logp, expected_step.old_logp)
        torch.testing.assert_close(step.old_entropy, expected_step.old_entropy)


@pytest.mark.parametrize("regularizer", OTHERS, ids=lambda one: f"{type(one).__name__}-{vars(one).get('part')}")
def test_every_row_runs_backward_where_a_term_needs_no_advantage(regularizer: EntropyRegularizer) -> None:
    _, _, backwards = update(PolicyLoss(regularizer))
    assert backwards == 2 * 8


def test_a_kl_penalty_needs_no_advantage() -> None:
    step = _step()
    assert PolicyLoss(kl=ReferenceKL(0.1)).rows_with_gradient(step).all()
    assert PolicyLoss().rows_with_gradient(step).tolist() == [row not in WITHOUT for row in range(8)]


def test_rows_out_of_the_loss_run_no_backward_pass() -> None:
    step = _step()
    mask = step.mask.clone()
    mask[span(step.lengths, 0)] = False
    rows = PolicyLoss(EntropyBonus(0.1)).rows_with_gradient(replace(step, mask=mask))
    assert rows.tolist() == [False, *[True] * 7]


def test_a_step_without_any_advantage_moves_the_weights_as_momentum_does() -> None:
    """Backward passes of zeros give gradients of 0, with which AdamW steps; without gradients it would not."""
    nothing = torch.zeros_like(_step().advantages)
    _, weights, backwards = update(PolicyLoss(), nothing)
    _, expected, _ = update(EveryRow(), nothing)
    assert backwards == 2 * 8
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("regularizer", OFF, ids=lambda one: type(one).__name__)
def test_a_term_that_is_off_needs_nothing(regularizer: EntropyRegularizer) -> None:
    assert not PolicyLoss(regularizer).rows_with_gradient(_step())[WITHOUT].any()
    regularizer.coefficient = Constant(0.1)
    assert PolicyLoss(regularizer).rows_with_gradient(_step()).all()


class OwnSurrogate(PolicyLoss):
    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        return -stats.logp, {}


class OwnWeight(InformationBottleneck):
    def weight(self, advantages: Tensor) -> Tensor:
        return 1.0 + advantages


class OwnShape(PolicyLossMethod):
    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return loss - stats.logp


class OwnTerm(EntropyRegularizer):
    def objective(self, stats: TokenStats) -> Tensor:
        return stats.logp


class ShapesToo(OwnTerm):
    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return loss - stats.logp


class Said(OwnShape):
    zero_without_advantage = True

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return 2 * loss


class Renamed(InformationBottleneck):
    pass


class LessEntropy:
    """A mixin, which knows of no promise."""

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return loss + stats.logp.abs()


class MixedIn(LessEntropy, InformationBottleneck):
    pass


class MixedInBehind(InformationBottleneck, LessEntropy):
    """Its methods are InformationBottleneck's."""


class Partial(InformationBottleneck):
    def _scaled(self, loss: Tensor, stats: TokenStats, factor: float) -> Tensor:
        return loss + factor * stats.logp

    shape_policy_loss = partialmethod(_scaled, factor=2.0)


class PartialAlone(InformationBottleneck):
    shape_policy_loss = partialmethod(LessEntropy.shape_policy_loss)


class Named:
    """A mixin without a say in the update."""

    def measure(self, stats: TokenStats) -> dict[str, Tensor]:
        return {"one": torch.ones_like(stats.logp)}


class MixedHarmless(Named, InformationBottleneck):
    pass


class LossMixin:
    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        return stats.logp, {}


class MixedLoss(LossMixin, PolicyLoss):
    pass


def test_a_class_with_methods_of_its_own_does_not_inherit_the_promise() -> None:
    step = _step()
    assert OwnSurrogate().rows_with_gradient(step).all()
    for regularizer in (OwnWeight(), OwnShape()):
        assert PolicyLoss(regularizer).rows_with_gradient(step).all()
    for regularizer in (OwnTerm(0.1), ShapesToo(0.0)):
        assert PolicyLoss(regularizer).rows_with_gradient(step).all()
    assert MixedLoss().rows_with_gradient(step).all()
    for mixed in (MixedIn(0.1), MixedIn(0.0), Partial(0.1), PartialAlone(0.1)):
        assert PolicyLoss(mixed).rows_with_gradient(step).all()
    for regularizer in (Said(), Renamed(), OwnTerm(0.0), MixedInBehind(0.1), MixedHarmless(0.1)):
        assert not PolicyLoss(regularizer).rows_with_gradient(step)[WITHOUT].any()


class FalsePromise(OwnSurrogate):
    zero_without_advantage = True


def test_a_false_promise_would_change_the_weights() -> None:
    """So the rule above matters: the surrogate moves the policy where the advantage is 0, too."""
    (_, weights, backwards), (_, expected, _) = update(FalsePromise()), update(OwnSurrogate())
    assert backwards == 2 * 4
    assert any((weights[name] - value).abs().max() > 1e-4 for name, value in expected.items())


@pytest.mark.parametrize("kind", LOSSES.values())
@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda one: type(one).__name__)
def test_the_promise_holds_exactly(kind: type[PolicyLoss], regularizer: EntropyRegularizer) -> None:
    """Without an advantage the loss is 0, and so is its gradient for every log-prob and every entropy."""
    torch.manual_seed(0)
    logp, entropy = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask, chosen = torch.ones(3, 5, dtype=torch.bool), torch.rand(3, 5) < 0.5
    old, zero = torch.randn(3, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    extra = {"clip_cov": chosen, "top_entropy": chosen, "steer_weight": old.exp(), "ib_weight": 0.7 * zero}
    stats = TokenStats(logp, entropy, old, entropy.detach(), zero, mask, extra)
    micro = replace(
        _step().micro_batch(), mask=mask, weights=torch.rand(3, 5, dtype=torch.float64), advantages=zero, extra=extra
    )
    value, _ = kind(regularizer)(stats, micro)
    gradients = torch.autograd.grad(value + 0.0 * (logp + entropy).sum(), (logp, entropy))
    assert value == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def _step() -> Experience:
    policy = Policy(qwen2().double())
    experience = Scorer(PlainLoop({"policy": policy}, []), PolicyLoss())(make_rollout())
    given = torch.ones(8, dtype=torch.float64)
    given[WITHOUT] = 0.0
    advantages = experience.per_token(given)
    assert token_mean(advantages, experience.mask, 1.0) > 0
    return replace(experience, advantages=advantages)
