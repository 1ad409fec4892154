"""Our loss and advantages against the formulas that verl 0.9 and TRL 1.16 document, token by token in plain Python, and
exactly how far they differ where they do. `benchmarks/parity.py` runs the peers' own code; docs/peers.md has both."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from helpers.tensors import doubles, prefix_mask
from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.batches.sequences import FlatSequences
from ibro_lightning.functional import (
    aggregate,
    group_advantages,
    masked_whiten,
)
from ibro_lightning.regularizers import (
    EntropyBonus,
    EntropyRegularizer,
    InformationBottleneck,
    NoRegularizer,
    StepContext,
)
from ibro_lightning.update import PolicyLoss

LENGTHS = [6, 1, 4, 3]
ROWS, COLUMNS = len(LENGTHS), 6
TOKENS = sum(LENGTHS)
ADVANTAGES = [1.5, -0.5, -2.0, 0.7]
LOW, HIGH, DUAL = 0.2, 0.28, 10.0
REWARDS, GROUPS = [1.0, -1.0, -1.0, 1.0, 0.5, -1.5], [0, 0, 0, 1, 1, 1]


def documented_dapo(logp: float, old_logp: float, advantage: float) -> tuple[float, float]:
    """A token's loss, max(−rA, −clip(r)A) and at most −cA where A < 0, and its derivative by the log-prob."""
    ratio = math.exp(logp - old_logp)
    clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
    loss = max(-ratio * advantage, -clipped * advantage)
    moves = loss == -ratio * advantage and (advantage > 0 or ratio < DUAL)
    if advantage < 0:
        loss = min(loss, -DUAL * advantage)
    return loss, -ratio * advantage if moves else 0.0


@pytest.mark.parametrize(
    ("regularizer", "weight"),
    [
        (NoRegularizer(), lambda advantage: 0.0),
        (EntropyBonus(0.001), lambda advantage: 0.001),  # verl's entropy_coeff, TRL's entropy_coef
        (InformationBottleneck(0.005), lambda advantage: 0.005 * advantage),
    ],
    ids=["none", "naive", "IB"],
)
def test_the_loss_and_its_gradient_by_definition(regularizer: EntropyRegularizer, weight) -> None:
    """Divided by the tokens of the step: verl's token-mean, TRL's loss_type dapo."""
    old, moved, entropy = doubles(TOKENS, seed=1), doubles(TOKENS, seed=2), doubles(TOKENS, seed=3).abs()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    sequences = FlatSequences.collate([[1]] * ROWS, [[1] * length for length in LENGTHS])
    everywhere = torch.ones(TOKENS, dtype=torch.bool)
    groups = torch.zeros(ROWS, dtype=torch.long)
    step = Experience(sequences, -old.abs(), entropy, advantages, everywhere, groups, 1.0)
    loss = PolicyLoss(regularizer, clip_ratio_low=LOW, clip_ratio_high=HIGH, dual_clip=DUAL)
    micro = loss.prepare(step, StepContext(policy=None, score=None)).micro_batch()
    old_logp = micro.old_logp
    logp = step.with_extra(logp=1.5 * moved - old.abs()).micro_batch().extra["logp"].requires_grad_()
    entropy = micro.old_entropy.clone().requires_grad_()
    stats = TokenStats(logp, entropy, old_logp, micro.old_entropy, micro.advantages, micro.mask, micro.extra)
    value, _ = loss(stats, micro)
    by_logp, by_entropy = torch.autograd.grad(value + 0.0 * entropy.sum(), (logp, entropy))

    expected, kinds = 0.0, set()
    for row, length in enumerate(LENGTHS):
        for column in range(COLUMNS):
            if column >= length:
                assert by_logp[row, column] == by_entropy[row, column] == 0
                continue
            token, gradient = documented_dapo(logp[row, column].item(), old_logp[row, column].item(), ADVANTAGES[row])
            kinds.add(gradient == 0)
            bonus = weight(ADVANTAGES[row])
            expected += (token - bonus * entropy[row, column].item()) / TOKENS
            assert by_logp[row, column].item() == pytest.approx(gradient / TOKENS, abs=1e-14)
            assert by_entropy[row, column].item() == pytest.approx(-bonus / TOKENS, abs=1e-14)
    assert kinds == {True, False}, "the batch has clipped and other tokens"
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_verl_divides_as_we_do_and_trl_by_a_larger_epsilon() -> None:
    found = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS))
    for group in (0, 1):
        rewards = [reward for reward, owner in zip(REWARDS, GROUPS, strict=True) if owner == group]
        mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
        ours = [found[index].item() for index, owner in enumerate(GROUPS) if owner == group]
        assert ours == pytest.approx([(reward - mean) / (deviation + 1e-6) for reward in rewards], rel=1e-12)
        trl = [(reward - mean) / (deviation + 1e-4) for reward in rewards]
        assert trl == pytest.approx([one * (deviation + 1e-6) / (deviation + 1e-4) for one in ours], rel=1e-12)


def test_a_group_of_one_has_no_advantage() -> None:
    """In verl it has its reward: 0 counts as the mean of a single response, and 1 as its deviation."""
    assert group_advantages(torch.tensor([0.5, -1.5]), torch.tensor([0, 1])).tolist() == [0, 0]


def test_verl_whitens_with_bessels_correction() -> None:
    values, mask = doubles(ROWS, COLUMNS), prefix_mask(LENGTHS, COLUMNS)
    kept = values[mask].tolist()
    mean, deviation = statistics.mean(kept), statistics.stdev(kept)
    verl = [(value - mean) / deviation for value in kept]
    ours = masked_whiten(values, mask)[mask].tolist()
    assert ours == pytest.approx([value * math.sqrt(TOKENS / (TOKENS - 1)) for value in verl], rel=1e-7)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_rows_without_tokens_count_in_trls_means_alone(mode) -> None:
    """Overlong filtering makes them. TRL divides by all rows, verl and we by those with tokens."""
    mask = prefix_mask([*LENGTHS, 0], COLUMNS)
    values = doubles(ROWS + 1, COLUMNS)
    ours = aggregate(values, mask, mode, num_tokens=mask.sum(), num_sequences=mask.any(1).sum(), max_tokens=COLUMNS)
    rows = [values[row, :length].sum().item() for row, length in enumerate(LENGTHS)]
    if mode == "seq-mean-token-mean":
        rows = [total / length for total, length in zip(rows, LENGTHS, strict=True)]
    else:
        rows = [total / COLUMNS for total in rows]
    trl = sum(rows) / (ROWS + 1)
    assert ours.item() == pytest.approx(trl * (ROWS + 1) / ROWS, rel=1e-12)
