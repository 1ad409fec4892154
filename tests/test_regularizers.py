"""The entropy regularisers: what they add to the loss, in which direction, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import (
    group_advantages,
    information_bottleneck_objective,
    logprob_and_entropy,
    token_mean,
)
from ibro_lightning.functional.regularization import Part
from ibro_lightning.regularizers import EntropyBonus, EntropyRegularizer, InformationBottleneck, NoRegularizer

torch.set_num_threads(1)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def stats_of(logits: Tensor, advantages: Tensor, mask: Tensor | None = None) -> TokenStats:
    """Statistics of the first token of the vocabulary under ``logits [B, T, V]``; ``advantages`` is ``[B, T]``."""
    logp, entropy = logprob_and_entropy(logits, torch.zeros(logits.shape[:-1], dtype=torch.long))
    assert entropy is not None
    mask = torch.ones(entropy.shape, dtype=torch.bool) if mask is None else mask
    return TokenStats(logp, entropy, logp.detach(), entropy.detach(), advantages, mask)


def objective_of(regularizer: EntropyRegularizer, logits: Tensor, advantages: Tensor) -> Tensor:
    return regularizer.objective(stats_of(logits, advantages)).sum()


def entropy_gradient(logits: Tensor) -> np.ndarray:
    """∂H/∂x_j = −p_j (log p_j + H) of ``[..., V]`` logits, written out in numpy."""
    x = logits.detach().numpy()
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1, keepdims=True)
    return -p * (np.log(p) + h)


def test_defaults_are_the_papers_coefficients() -> None:
    assert NoRegularizer().coef == 0.0
    assert EntropyBonus().coef == 0.001
    assert InformationBottleneck().coef == 0.005
    assert InformationBottleneck().transform == "none"


def test_a_negative_coefficient_is_refused_by_name() -> None:
    for regularizer in (EntropyBonus, InformationBottleneck):
        with pytest.raises(ConfigError, match=r"^coef: -0\.1"):
            regularizer(coef=-0.1)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_an_empty_clip_range_is_refused(clip: float) -> None:
    with pytest.raises(ConfigError, match=r"^clip"):
        InformationBottleneck(transform="clip", clip=clip)


def test_an_unknown_transform_is_refused() -> None:
    """In Python nothing checks the Literal: an ablation with a typo would run as the plain method."""
    with pytest.raises(ConfigError, match=r"^transform"):
        InformationBottleneck(transform="Sign")  # type: ignore[arg-type]


def test_no_regularizer_adds_nothing_and_needs_no_entropy() -> None:
    one = torch.ones(2, 3)
    stats = TokenStats(-one, None, -one, one, one, one.bool())
    assert NoRegularizer().objective(stats).tolist() == [[0.0] * 3] * 2
    assert not NoRegularizer.needs_entropy


def test_every_objective_is_worked_out_by_hand() -> None:
    """Entropies (1, 2, 3, 4) and advantages (2, −0.5, 0, −3)."""
    entropy, advantages = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[2.0, -0.5, 0.0, -3.0]])
    stats = TokenStats(-entropy, entropy, -entropy, entropy, advantages, torch.ones(1, 4, dtype=torch.bool))
    expected = {
        EntropyBonus(): [1.0, 2.0, 3.0, 4.0],
        InformationBottleneck(): [2.0, -1.0, 0.0, -12.0],
        InformationBottleneck(transform="sign"): [1.0, -2.0, 0.0, -4.0],
        InformationBottleneck(transform="clip"): [1.0, -1.0, 0.0, -4.0],
        InformationBottleneck(transform="clip", clip=2.5): [2.0, -1.0, 0.0, -10.0],
        InformationBottleneck(transform="none", clip=0.1): [2.0, -1.0, 0.0, -12.0],
    }
    for regularizer, values in expected.items():
        assert regularizer.objective(stats).tolist() == [values]


@pytest.mark.parametrize("transform", ["none", "sign", "clip"])
def test_ib_gradient_with_respect_to_logits_is_minus_weighted_p_log_p_plus_h(transform: str) -> None:
    """Through the token mean over N = 9: ∂J/∂x_j = −w p_j (log p_j + H) / 9, and 0 on masked tokens."""
    logits = random_logits(2, 3, 5)
    advantages = torch.tensor([[1.7, 1.7, 1.7], [-0.4, -0.4, -0.4]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    regularizer = InformationBottleneck(transform=transform)  # type: ignore[arg-type]
    stats = stats_of(logits, advantages, mask)
    (actual,) = torch.autograd.grad(token_mean(regularizer.objective(stats), mask, 9.0), logits)
    weights = {"none": (1.7, -0.4), "sign": (1.0, -1.0), "clip": (1.0, -0.4)}[transform]
    weight = np.array(weights)[:, None, None] * mask.numpy()[:, :, None]
    np.testing.assert_allclose(actual.numpy(), weight * entropy_gradient(logits) / 9, rtol=1e-12, atol=1e-15)


def test_naive_gradient_is_that_of_the_entropy_whatever_the_advantage() -> None:
    logits, advantages = random_logits(2, 3, 5), random_logits(2, 3, seed=1).detach()
    (actual,) = torch.autograd.grad(objective_of(EntropyBonus(), logits, advantages), logits)
    np.testing.assert_allclose(actual.numpy(), entropy_gradient(logits), rtol=1e-12, atol=1e-15)


def test_ib_objective_passes_gradcheck() -> None:
    advantages = random_logits(2, 3, seed=1).detach()
    for transform in ("none", "sign", "clip"):
        regularizer = InformationBottleneck(transform=transform, clip=0.5)
        assert gradcheck(lambda x, r=regularizer: r.objective(stats_of(x, advantages)), random_logits(2, 3, 4))


@pytest.mark.parametrize("part", get_args(Part))
def test_the_term_for_loops_of_ones_own_is_the_one_that_training_adds(part: Part) -> None:
    stats = stats_of(random_logits(2, 3, 5), random_logits(2, 3, seed=1).detach())
    mean = torch.full_like(stats.advantages, 0.7)
    ours = InformationBottleneck(part=part).objective(replace(stats, extra={"ib_mean_weight": mean}))
    entropy, mask = stats.entropy, stats.mask
    assert entropy is not None
    theirs = information_bottleneck_objective(entropy, stats.advantages, mask, part=part, mean_advantage=0.7)
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0


@pytest.mark.parametrize("transform", ["none", "sign", "clip"])
def test_no_gradient_flows_through_the_advantages(transform: str) -> None:
    """With a critic, a gradient through A would train the critic to please the regulariser."""
    logits, advantages = random_logits(2, 3, 5), random_logits(2, 3, seed=1)
    objective = objective_of(InformationBottleneck(transform=transform), logits, advantages)  # type: ignore[arg-type]
    of_logits, of_advantages = torch.autograd.grad(objective, (logits, advantages), allow_unused=True)
    assert of_advantages is None
    assert of_logits.abs().max() > 0


@pytest.mark.parametrize("transform", ["none", "sign", "clip"])
def test_a_group_of_equal_rewards_contributes_exactly_nothing(transform: str) -> None:
    """Rows 0-2 all earned 0.1 and rows 3-4 differ: only the latter are touched, also by sign(A)."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, -1.0], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1]))
    logits = random_logits(5, 3, 4)
    regularizer = InformationBottleneck(transform=transform)  # type: ignore[arg-type]
    objective = regularizer.objective(stats_of(logits, advantages[:, None].expand(5, 3)))
    (grad,) = torch.autograd.grad(objective.sum(), logits)
    assert (objective[:3] == 0).all()
    assert (grad[:3] == 0).all()
    assert (grad[3:].abs().amax(-1) > 0).all()


def test_on_the_first_token_of_a_full_group_ib_cancels_and_the_naive_bonus_does_not() -> None:
    """All responses of a group share the state after the prompt, and normalised advantages sum to 0."""
    advantages = group_advantages(
        torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, -0.7], dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    )
    state = random_logits(1, 1, 8)
    gradients = {}
    for regularizer in (InformationBottleneck(), EntropyBonus()):
        objective = objective_of(regularizer, state.expand(6, 1, 8), advantages[:, None])
        (gradients[type(regularizer)],) = torch.autograd.grad(objective, state)
    assert gradients[InformationBottleneck].abs().max() < 1e-14
    np.testing.assert_allclose(gradients[EntropyBonus].numpy(), 6 * entropy_gradient(state), rtol=1e-12)
    assert gradients[EntropyBonus].abs().max() > 0.1


def test_ib_is_the_naive_bonus_only_where_every_advantage_is_one() -> None:
    logits = random_logits(2, 3, 5)
    ones, mixed = torch.ones(2, 3, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    (naive,) = torch.autograd.grad(objective_of(EntropyBonus(), logits, mixed), logits)
    (same,) = torch.autograd.grad(objective_of(InformationBottleneck(), logits, ones), logits)
    (other,) = torch.autograd.grad(objective_of(InformationBottleneck(), logits, mixed), logits)
    torch.testing.assert_close(same, naive)
    torch.testing.assert_close(other[0], naive[0])
    torch.testing.assert_close(other[1], -naive[1])


@pytest.mark.parametrize(
    ("regularizer", "directions"), [(InformationBottleneck(), [1, -1, 0]), (EntropyBonus(), [1, 1, 1])]
)
def test_minimising_the_loss_moves_entropy_in_the_papers_direction(
    regularizer: EntropyRegularizer, directions: list[int]
) -> None:
    """L = −α·agg(objective). Rows have A = 2, −1.5, 0: IB keeps entropy up, takes it away, leaves it; naive raises."""
    logits = random_logits(3, 4, 6)
    advantages = torch.tensor([2.0, -1.5, 0.0], dtype=torch.float64)[:, None].expand(3, 4)
    before = stats_of(logits, advantages)
    loss = -regularizer.coef * token_mean(regularizer.objective(before), before.mask, 12.0)
    (grad,) = torch.autograd.grad(loss, logits)
    after = stats_of(logits - 10.0 * grad, advantages)
    change = (after.entropy - before.entropy).detach()
    assert (change.sign() == torch.tensor(directions, dtype=torch.float64)[:, None]).all()


def test_a_users_regularizer_is_one_class_with_one_method() -> None:
    """The example in the base class's docstring works as it stands."""

    class HighEntropyBonus(EntropyRegularizer):
        def objective(self, stats: TokenStats) -> Tensor:
            return stats.entropy * (stats.old_entropy > 0.5)

    entropy = torch.tensor([[0.2, 0.7]])
    stats = TokenStats(-entropy, entropy, -entropy, entropy, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    regularizer = HighEntropyBonus(coef=0.3)
    assert regularizer.coef == 0.3
    assert regularizer.needs_entropy
    torch.testing.assert_close(regularizer.objective(stats), torch.tensor([[0.0, 0.7]]))
