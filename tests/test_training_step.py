"""``training_step`` from a rollout to new weights, against the same update written out in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import written_out
from helpers.models import TinyQwen2
from helpers.rollouts import make_rollout, padded_further, share_of, with_late
from helpers.updates import assert_same, dapo, fit, ppo, sgd
from helpers.written_out import Loss, per_token, whitened
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.regularizers import EntropyBonus, EntropyRegularizer, InformationBottleneck
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.update import ReferenceKL

torch.set_num_threads(1)
HALF = math.sqrt(0.5)
ADVANTAGES = [-HALF, HALF, HALF, -HALF, HALF, -HALF, 0.0, 0.0]
"""Of a pair with rewards d apart: ±½d over the deviation d/√2."""
PLAIN: dict[str, Any] = {
    "optimizer": sgd,
    "warmup_steps": 0,
    "update_epochs": 2,
    "max_grad_norm": 0.0,
    "sampler_correction": None,
}
"""Two passes of gradient descent at 0.1: in the second, ratios are not 1 any more."""
ALL = [True] * 8

# Micro-batches of one to three responses, and of the whole step.
budgets = pytest.mark.parametrize("micro_batch_tokens", [20, 10_000])


def trained(module: Any, rollout: Rollout) -> dict[str, float]:
    """The iteration's metrics, after training on one rollout."""
    _, recorder = fit(module, [rollout])
    assert not recorder.unchanged(0, 1, "policy.")
    return dict(recorder.metrics[0])


def assert_policy_is(module: Any, expected: Sequence[Tensor]) -> None:
    assert_same([parameter.detach() for parameter in module.policy.model.parameters()], expected)


@budgets
@pytest.mark.parametrize(
    ("aggregation", "part"),
    [
        ("token-mean", "raw"),
        ("seq-mean-token-mean", "raw"),
        ("seq-mean-token-mean", "centred"),
        ("seq-mean-token-mean", "uniform"),
    ],
)
def test_a_dapo_update_is_the_one_written_out(aggregation: Any, part: Any, micro_batch_tokens: int) -> None:
    """The mean advantage of IB's parts counts tokens as the loss does: under sequence means, not all alike."""
    module = dapo(
        regularizer=InformationBottleneck(0.5, part=part),
        aggregation=aggregation,
        micro_batch_tokens=micro_batch_tokens,
        **PLAIN,
    )
    model, rollout = copy.deepcopy(module.policy.model), make_rollout(iteration=1)
    assert trained(module, rollout)["update/steps"] == 2
    loss = Loss(ALL, aggregation, coef=0.5, part=part)
    advantages = per_token(ADVANTAGES, rollout)
    # The epsilon in the denominator of a group's deviation is 1e-6 of about 1.
    expected = written_out.update_policy(model, rollout, advantages, loss, lr=0.1, passes=2)
    for ours, theirs in zip(module.policy.model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@budgets
def test_reinforce_plus_plus_whitens_over_the_tokens_of_the_loss(micro_batch_tokens: int) -> None:
    """Neither late responses nor those that the overlong filter leaves out have a say in mean and deviation."""
    module = dapo(advantage="reinforce++", overlong_filter=True, micro_batch_tokens=micro_batch_tokens, **PLAIN)
    model, rollout = copy.deepcopy(module.policy.model), with_late({1: 2, 4: 0}, truncated=[3], iteration=1)
    trained(module, rollout)
    counts = [row not in (1, 3, 4) for row in range(8)]
    advantages = whitened(per_token(rollout.rewards.tolist(), rollout), counts)
    assert_policy_is(module, written_out.update_policy(model, rollout, advantages, Loss(counts), lr=0.1, passes=2))


@budgets
def test_a_ppo_update_is_the_one_written_out(micro_batch_tokens: int) -> None:
    """Policy and critic; late and filtered responses take part in neither loss nor whitening."""
    module = ppo(critic_optimizer=sgd, overlong_filter=True, micro_batch_tokens=micro_batch_tokens, **PLAIN)
    policy, critic = copy.deepcopy(module.policy.model), copy.deepcopy(module.critic.model)
    rollout = with_late({1: 2, 4: 0}, truncated=[3], iteration=1)
    with torch.no_grad():
        returns = per_token(rollout.rewards.tolist(), rollout)
        old = written_out.values(critic, rollout)
    counts = [row not in (1, 3, 4) for row in range(8)]
    advantages = whitened([target - value for target, value in zip(returns, old, strict=True)], counts)
    trained(module, rollout)
    assert_policy_is(module, written_out.update_policy(policy, rollout, advantages, Loss(counts), lr=0.1, passes=2))
    expected = written_out.update_critic(critic, rollout, returns, counts, clip=0.5, lr=0.1, passes=2)
    assert_same([parameter.detach() for parameter in module.critic.model.parameters()], expected)


MODULES = {
    "ppo, token mean": lambda **cut: dapo(regularizer=EntropyBonus(0.3), **cut),
    "ppo, constant length": lambda **cut: dapo(
        aggregation="seq-mean-token-sum-norm", aggregation_max_tokens=12, regularizer=EntropyBonus(0.3), **cut
    ),
    "gspo": lambda **cut: dapo(surrogate="gspo", aggregation="seq-mean-token-mean", **cut),
    "cispo": lambda **cut: dapo(surrogate="cispo", aggregation="seq-mean-token-sum", **cut),
    "gmpo": lambda **cut: dapo(surrogate="gmpo", aggregation="seq-mean-token-mean", **cut),
    "dppo": lambda **cut: dapo(surrogate="dppo", **cut),
    "sapo": lambda **cut: dapo(surrogate="sapo", aggregation="seq-mean-token-mean", **cut),
    "PPO with a critic": lambda **cut: ppo(critic_optimizer=sgd, **cut),
}


def outcome(build: Any, rollout: Rollout, **cut: Any) -> tuple[list[Tensor], dict[str, float]]:
    """All weights after two passes in steps of three prompts and of one, and the metrics."""
    module = build(mini_batch_prompts=3, overlong_filter=True, **PLAIN, **cut)
    metrics = trained(module, rollout)
    timeless = {name: value for name, value in metrics.items() if not name.startswith(("time/", "time_share/"))}
    return [parameter.detach() for parameter in module.parameters()], timeless


@pytest.mark.parametrize("name", MODULES)
def test_the_token_budget_changes_neither_weights_nor_metrics(name: str) -> None:
    rollout = with_late({1: 2}, truncated=[4], iteration=1)
    weights, metrics = outcome(MODULES[name], rollout, micro_batch_tokens=10_000)
    cut_weights, cut_metrics = outcome(MODULES[name], rollout, micro_batch_tokens=20)
    assert_same(cut_weights, weights)
    assert cut_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_neither_padding_nor_the_order_of_groups_changes_the_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches padded on the left, with more padding on both sides, of a token that also occurs in the text."""
    rollout = make_rollout(iteration=1)
    weights, metrics = outcome(MODULES[name], rollout)
    pad = FlatSequences.pad

    def otherwise(flat: FlatSequences, rows: Tensor | None = None) -> Sequences:
        right = pad(flat, rows)
        ids = [right.input_ids[row, : right.lengths[row]].tolist() for row in range(len(right))]
        pairs = [(own[:start], own[start:]) for own, start in zip(ids, right.prompt_lengths.tolist(), strict=True)]
        return padded_further(Sequences.collate(*zip(*pairs, strict=True), padding_side="left"), 2, 5)

    with monkeypatch.context() as patched:
        patched.setattr(FlatSequences, "pad", otherwise)
        padded = outcome(MODULES[name], rollout)
    for other_weights, other_metrics in (padded, outcome(MODULES[name], share_of(rollout, [2, 0, 3, 1]))):
        assert_same(other_weights, weights)
        assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


class Remembered(EntropyRegularizer):
    """What a regulariser is given as it prepares a step."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.seeds: list[int] = []

    def prepare(self, step: Any, context: Any) -> Any:
        self.seeds.append(context.seed)
        return step

    def objective(self, stats: Any) -> Tensor:
        return stats.entropy


def test_a_regularizer_gets_a_seed_of_its_own_for_each_step() -> None:
    """In every iteration, pass and step; the same ones when the run is repeated."""
    runs = []
    for _ in range(2):
        regularizer = Remembered()
        fit(
            dapo(regularizer=regularizer, optimizer=sgd, mini_batch_prompts=1, update_epochs=2),
            [make_rollout(iteration=number) for number in (1, 2)],
        )
        runs.append(regularizer.seeds)
    assert len(set(runs[0])) == len(runs[0]) == 2 * 2 * 4
    assert runs[0] == runs[1]


class Told(Coefficient):
    """A constant that remembers what it is told."""

    def __init__(self, measures: Any) -> None:
        super().__init__()
        self.measures = measures
        self.told: list[tuple[float, int]] = []

    @property
    def value(self) -> float:
        return 0.1

    def observe(self, measured: float, samples: int = 1) -> None:
        self.told.append((measured, samples))


def test_coefficients_are_told_of_all_responses_also_of_those_left_out_of_the_loss() -> None:
    """The entropy and the KL of all response tokens, before the update, and how many responses there are."""
    entropy, kl = Told("entropy"), Told("KL")
    module = dapo(
        regularizer=EntropyBonus(entropy),
        kl=ReferenceKL(kl, policy=TinyQwen2(seed=1)),
        overlong_filter=True,
        **PLAIN,
    )
    model, rollout = copy.deepcopy(module.policy.model), with_late({1: 2, 4: 0}, truncated=[3], iteration=1)
    trained(module, rollout)
    with torch.no_grad():
        logp, entropies = (torch.cat(rows) for rows in written_out.scores(model, rollout))
        reference = torch.cat(written_out.scores(TinyQwen2(seed=1).model, rollout)[0])
    ratio = (reference - logp).exp()
    assert entropy.told == [(pytest.approx(entropies.mean().item(), rel=1e-6), 8)]
    assert kl.told == [(pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-6), 8)]


def test_the_curve_of_the_kl_counts_all_responses_also_those_left_out_of_the_loss() -> None:
    kl = ReferenceKL(0.1, policy=TinyQwen2(seed=1))
    module = dapo(kl=kl, overlong_filter=True, **PLAIN)
    model, rollout = copy.deepcopy(module.policy.model), with_late({1: 2, 4: 0}, truncated=[3], iteration=1)
    metrics = trained(module, rollout)
    with torch.no_grad():
        logp, reference = (torch.cat(written_out.scores(one, rollout)[0]) for one in (model, TinyQwen2(seed=1).model))
    ratio = (reference - logp).exp()
    assert metrics["kl/reference"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-6)
