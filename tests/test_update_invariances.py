"""An update depends on the rollout alone: not on padding, order, or how it was cut to fit into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.flat import flat, span, wide
from helpers.models import TinyQwen2, gpt2, qwen2
from helpers.rollouts import (
    GROUPS,
    PROMPTS,
    RESPONSES,
    REWARDS,
    TEMPERATURE,
    make_rollout,
    padded_further,
    reference_scores,
    sequences,
)
from helpers.updates import assert_same, micro_loss, scored_first, token_stats
from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import group_advantages
from ibro_lightning.models import Policy
from ibro_lightning.modules.dapo import DAPOModule
from ibro_lightning.regularizers import EntropyBonus, EntropyRegularizer, InformationBottleneck, NoRegularizer
from ibro_lightning.update.diagnostics import experience_metrics
from ibro_lightning.update.micro_batches import token_budget_batches
from ibro_lightning.update.steps import mini_batches

torch.set_num_threads(1)


def dapo(dtype: torch.dtype = torch.float64, **kwargs: Any) -> DAPOModule:
    module = DAPOModule(TinyQwen2(dtype), **kwargs)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def module() -> DAPOModule:
    """With an IB coefficient so large that an error in its term could not hide."""
    return dapo(regularizer=InformationBottleneck(coef=0.5))


@pytest.fixture(scope="module")
def experience(module: DAPOModule) -> Experience:
    """Ratios spread around 1, so that all clips take part; one token is left out of the loss."""
    with torch.no_grad():
        logp, entropy = module.policy(sequences(), temperature=TEMPERATURE)
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[0, 0] = -3.0  # ratio e³ > 10
    noise[1, 0] = -3.0
    advantages = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS))
    seqs = sequences().flatten()
    mask = torch.ones(seqs.responses.shape, dtype=torch.bool)
    mask[span(seqs.response_lengths, 3)][2] = False
    old_logp = logp + 0.5 * noise.where(noise > -3, noise * 2)
    scores = (flat(values, seqs.response_lengths) for values in (old_logp, entropy))
    of_tokens = advantages.repeat_interleave(seqs.response_lengths)
    return Experience(seqs, *scores, of_tokens, mask, torch.tensor(GROUPS), TEMPERATURE)


def weighted(step: Experience, num_tokens: Tensor) -> MicroBatch:
    """With the token mean's weights for a step of ``num_tokens``, as :meth:`PolicyLoss.prepare` sets them."""
    return replace(step, weights=step.mask.double() / num_tokens, num_tokens=num_tokens).micro_batch()


def loss_and_gradients(module: DAPOModule, micro_batches: Iterable[Experience], num_tokens: Tensor) -> list[Tensor]:
    """What :meth:`Updater.update` accumulates: the summed loss, then the summed gradient of each parameter."""
    parameters = list(module.policy.parameters())
    total = [torch.zeros((), dtype=torch.float64), *(torch.zeros_like(p) for p in parameters)]
    for micro in micro_batches:
        loss, _ = module.policy_loss(token_stats(module, micro), weighted(micro, num_tokens))
        for place, value in zip(total, [loss.detach(), *torch.autograd.grad(loss, parameters)], strict=True):
            place += value
    return total


@pytest.fixture(scope="module")
def whole_step(module: DAPOModule, experience: Experience) -> list[Tensor]:
    return loss_and_gradients(module, [experience], experience.mask.sum())


# The loss of a step.


def test_the_steps_loss_is_the_formula_written_out(
    module: DAPOModule, experience: Experience, whole_step: list[Tensor]
) -> None:
    """(Σ max(−rA, −clip(r)A, at most 10|A| if A < 0) − α Σ A·H) / N, token by token, from unbatched log-probs."""
    policy_loss, product, tokens, micro = 0.0, 0.0, 0.0, experience.micro_batch()
    kinds = set()
    for row, (logp, entropy) in enumerate(reference_scores(module.policy.model, TEMPERATURE)):
        for t in range(len(logp)):
            if not micro.mask[row, t]:
                continue
            advantage = micro.advantages[row, t].item()
            ratio = math.exp(logp[t] - micro.old_logp[row, t].item())
            loss = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
            if advantage < 0 and loss > -10 * advantage:
                loss = -10 * advantage
                kinds.add("dual")
            kinds.add((advantage > 0) - (advantage < 0) if not 0.8 < ratio < 1.28 else "inside")
            policy_loss, product, tokens = policy_loss + loss, product + advantage * entropy[t], tokens + 1
    assert kinds == {"dual", "inside", 1, 0, -1}  # the example exercises every branch
    assert tokens == sum(map(len, RESPONSES)) - 1
    assert whole_step[0].item() == pytest.approx((policy_loss - 0.5 * product) / tokens, rel=1e-9)


def test_masked_tokens_have_no_say_in_the_step(
    module: DAPOModule, experience: Experience, whole_step: list[Tensor]
) -> None:
    """Old log-probs, entropies and advantages on the masked token may be any number."""
    garbage = {
        name: getattr(experience, name).where(experience.mask, value)
        for name, value in (("old_logp", -torch.inf), ("advantages", 1e6), ("old_entropy", torch.nan))
    }
    actual = loss_and_gradients(module, [replace(experience, **garbage)], experience.mask.sum())
    assert_same(actual, whole_step)


def test_metrics_of_micro_batches_add_up_to_those_of_the_step(module: DAPOModule, experience: Experience) -> None:
    """Clip shares by hand: tokens beyond each bound over the tokens of the step."""
    num_tokens = experience.mask.sum()
    rows = [torch.tensor([0, 3, 4]), torch.tensor([1, 2]), torch.tensor([5, 6, 7])]
    micro_batches = [weighted(experience.select(some), num_tokens) for some in rows]
    parts = [micro_loss(module, micro)[1] for micro in micro_batches]
    with torch.no_grad():
        logp, _ = module.policy(experience.sequences.pad(), temperature=TEMPERATURE)
        ratio = (flat(logp, experience.lengths) - experience.old_logp).exp()
    sign, mask = experience.advantages.sign(), experience.mask
    expected = {
        "update/clipped_low": (mask & (sign < 0) & (ratio < 0.8)).sum(),
        "update/clipped_high": (mask & (sign > 0) & (ratio > 1.28)).sum(),
        "update/clipped_dual": (mask & (sign < 0) & (ratio > 10)).sum(),
        "update/approx_kl": (ratio - 1 - ratio.log())[mask].sum(),
        "update/regularizer": (experience.advantages * experience.old_entropy)[mask].sum(),
    }
    for name, total in expected.items():
        assert total != 0
        assert sum(part[name] for part in parts) == pytest.approx((total / num_tokens).item(), rel=1e-5)


def test_the_modules_clip_settings_reach_its_loss() -> None:
    """Ratios 3, 0.1, 5 and 1.5 at A = 1, −1, −1, 1, in bounds [0.5, 2] with c = 4."""
    logp = torch.tensor([[3.0, 0.1, 5.0, 1.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    stats = TokenStats(logp, None, torch.zeros(1, 4), torch.zeros(1, 4), advantages, torch.ones(1, 4).bool())
    loss, metrics = dapo(clip_ratio_low=0.5, clip_ratio_high=1.0, dual_clip=4.0).policy_loss.surrogate(stats)
    torch.testing.assert_close(loss, torch.tensor([[-2.0, 0.5, 4.0, -1.5]]))
    assert {name: flags.tolist() for name, flags in metrics.items()} == {
        "update/clipped_low": [[False, True, False, False]],
        "update/clipped_high": [[True, False, False, False]],
        "update/clipped_dual": [[False, False, True, False]],
    }
    unbounded, _ = dapo(clip_ratio_low=0.5, clip_ratio_high=1.0, dual_clip=None).policy_loss.surrogate(stats)
    torch.testing.assert_close(unbounded, torch.tensor([[-2.0, 0.5, 5.0, -1.5]]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("clip_ratio_low", 0.0), ("clip_ratio_low", 1.0), ("clip_ratio_high", 0.0), ("dual_clip", 1.0)],
)
def test_clip_settings_that_make_no_sense_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: {value}"):
        DAPOModule(TinyQwen2(), **{setting: value})


def test_selected_rows_keep_everything_that_belongs_to_them(experience: Experience) -> None:
    """In the order asked for (rows 2 and 0: one token and two); padded to the longest of them in a micro-batch."""
    some = experience.select(torch.tensor([2, 0]))
    assert some.groups.tolist() == [2, 2]
    assert experience.select(torch.tensor([1, 6])).groups.tolist() == [0, 3]
    assert len(some) == 2
    for name in ("old_logp", "old_entropy", "advantages", "mask"):
        values, lengths = getattr(experience, name), experience.lengths
        assert torch.equal(getattr(some, name), torch.cat([values[span(lengths, 2)], values[span(lengths, 0)]]))
        expected = wide(values, lengths)[[2, 0], :2]
        for micro in (some.micro_batch(), experience.micro_batch(torch.tensor([2, 0]))):
            assert torch.equal(getattr(micro, name), expected)
            assert micro.sequences.input_ids.tolist() == [[3, 1, 4, 5, 0], [3, 1, 4, 7, 2]]
            assert micro.sequences.response_mask.tolist() == [[True, False], [True, True]]
            assert micro.groups.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("regularizer", "wanted"), [(NoRegularizer(), False), (InformationBottleneck(0.0), False), (EntropyBonus(), True)]
)
def test_entropy_is_computed_only_for_a_regularizer_that_counts(
    experience: Experience, regularizer: EntropyRegularizer, wanted: bool
) -> None:
    module = dapo(regularizer=regularizer)
    stats = token_stats(module, experience)
    assert (stats.entropy is not None) == wanted
    step = weighted(experience, experience.mask.sum())
    assert ("update/regularizer" in module.policy_loss(stats, step)[1]) == wanted


def test_without_dynamic_sampling_a_group_of_equal_rewards_leaves_the_gradient_alone(
    module: DAPOModule, experience: Experience, whole_step: list[Tensor]
) -> None:
    """Rows 6 and 7 both earned 0.1: only the denominator knows of them."""
    rest = experience.select(torch.arange(6))
    assert_same(loss_and_gradients(module, [rest], experience.mask.sum()), whole_step)


# The policy's scores.


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [qwen2, gpt2])
def test_scores_are_those_of_each_sequence_on_its_own(build: Any, side: str, temperature: float) -> None:
    """Response-aligned, at the sampling temperature, and exactly 0 on padding."""
    policy = Policy(build().double())
    reference = reference_scores(policy.model, temperature)
    seqs = sequences(side)
    for some in (seqs, padded_further(seqs, 2, 1)):
        logp, entropy = (scores.detach().numpy() for scores in policy(some, temperature=temperature))
        assert logp.shape == entropy.shape == (8, 6)
        for row, (expected_logp, expected_entropy) in enumerate(reference):
            length = len(expected_logp)
            np.testing.assert_allclose(logp[row, :length], expected_logp, rtol=1e-9)
            np.testing.assert_allclose(entropy[row, :length], expected_entropy, rtol=1e-9)
            assert (logp[row, length:] == 0).all()
            assert (entropy[row, length:] == 0).all()


class Bigrams(nn.Module):
    """A model without positions or ``logits_to_keep`` whose next token depends on the current one alone."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def test_each_token_is_scored_by_the_position_before_it() -> None:
    """Off by one in either direction would read another entry of the table."""
    policy = Policy(Bigrams([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.7, 0.2, 0.1]]), fused_head=False)
    prompts, responses = [[0, 1], [2]], [[2, 2, 0], [1]]
    for side in ("left", "right"):
        seqs = Sequences.collate(prompts, responses, padding_side=side)  # type: ignore[arg-type]
        logp, entropy = policy(seqs, temperature=1.0)
        expected = torch.tensor([[0.6, 0.1, 0.7], [0.2, 1, 1]], dtype=torch.float64).log()
        torch.testing.assert_close(logp.detach(), expected)
        h = {row: -sum(p * math.log(p) for p in row) for row in [(0.1, 0.3, 0.6), (0.7, 0.2, 0.1)]}
        first, second = h.values()
        expected = torch.tensor([[first, second, second], [second, 0, 0]], dtype=torch.float64)
        torch.testing.assert_close(entropy.detach(), expected)


def test_responses_of_very_different_prompts_can_share_a_batch() -> None:
    """A response may end before another one's prompt does; the columns of the two do not overlap."""
    policy = Policy(qwen2().double())
    prompts, responses = [[4], [1, 2, 3, 4, 5, 6, 7]], [[3, 2], [8, 9, 1]]
    together, _ = policy(Sequences.collate(prompts, responses), temperature=1.0)
    for row in range(2):
        alone, _ = policy(Sequences.collate(prompts[row : row + 1], responses[row : row + 1]), temperature=1.0)
        torch.testing.assert_close(together[row : row + 1, : alone.shape[1]], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "dropout"),
    [
        (gpt2, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        (gpt2, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.5}),
        (qwen2, {"attention_dropout": 0.5}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_is_off_although_the_model_trains(build: Any, dropout: dict[str, float], attention: str) -> None:
    """With dropout, the ratio to the policy that sampled would be noise."""
    model = build(**dropout, attn_implementation=attention)
    ids = torch.tensor([PROMPTS[3] + RESPONSES[3]])
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)  # the model does drop before it becomes a policy
    policy = Policy(model)
    assert model.training
    logp, _ = policy(sequences(), temperature=1.0)
    again, _ = policy(sequences(), temperature=1.0)
    assert torch.equal(logp, again)
    model.eval()
    evaluated, _ = policy(sequences(), temperature=1.0)
    torch.testing.assert_close(logp, evaluated, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient() -> None:
    results = []
    for checkpointing in (False, True):
        policy = Policy(qwen2().double(), gradient_checkpointing=checkpointing)
        policy(sequences(), temperature=TEMPERATURE)  # the first time, it also tries its head
        calls: list[int] = []
        # A hook before the forward: torch stops recomputing as soon as it has what it needs.
        policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logp, entropy = policy(sequences(), temperature=TEMPERATURE)
        gradients = torch.autograd.grad((logp * logp + entropy).sum(), list(policy.parameters()))
        assert len(calls) == (2 if checkpointing else 1)
        results.append([logp.detach(), *gradients])
    assert_same(results[1], results[0])


# Cutting a rollout.


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 100))
def test_micro_batches_cover_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    cut = [rows.tolist() for rows in token_budget_batches(lengths, budget)]
    assert sorted(row for rows in cut for row in rows) == list(range(len(lengths)))
    for rows in cut:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget


def test_micro_batches_are_filled_and_sorted_by_length() -> None:
    """Lengths 9, 1, 3, 1, 2, 20 under 10 tokens: 1·3 and 2·3 fit; 3·4 = 12 does not; 9·2 does not; 20 stands alone."""
    cut = [rows.tolist() for rows in token_budget_batches([9, 1, 3, 1, 2, 20], 10)]
    assert cut == [[1, 3, 4], [2], [0], [5]]


def cost(rows: Sequence[int], lengths: Sequence[int], padded: bool) -> int:
    """What a micro-batch holds in memory."""
    return len(rows) * max(lengths[row] for row in rows) if padded else sum(lengths[row] for row in rows)


def contiguous_cuts(order: Sequence[int]) -> Iterable[list[Sequence[int]]]:
    """Every way to cut ``order`` into runs."""
    for borders in itertools.product([False, True], repeat=len(order) - 1):
        places = [0, *(i + 1 for i, border in enumerate(borders) if border), len(order)]
        yield [order[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("padded", [True, False])
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), budget=st.integers(1, 40))
def test_micro_batches_are_as_few_and_then_as_equal_as_can_be(padded: bool, lengths: list[int], budget: int) -> None:
    """Among all cuts of the rows in order of length that keep to the budget (a single row may exceed it)."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    allowed = [
        cut
        for cut in contiguous_cuts(order)
        if all(len(rows) == 1 or cost(rows, lengths, padded) <= budget for rows in cut)
    ]
    fewest = min(len(cut) for cut in allowed)
    best = min(max(cost(rows, lengths, padded) for rows in cut) for cut in allowed if len(cut) == fewest)
    cut = [rows.tolist() for rows in token_budget_batches(lengths, budget, padded=padded)]
    assert [row for rows in cut for row in rows] == order
    assert len(cut) == fewest
    assert max(cost(rows, lengths, padded) for rows in cut) == best


def test_the_budget_is_lowered_until_micro_batches_are_equal() -> None:
    """Greedily, 12 tokens would hold three rows of 4 and leave one alone."""
    cut = [rows.tolist() for rows in token_budget_batches([4, 4, 4, 4], 12)]
    assert cut == [[0, 1], [2, 3]]
    assert [rows.tolist() for rows in token_budget_batches([], 12)] == []


def test_a_row_longer_than_the_budget_does_not_unbalance_the_others() -> None:
    assert [rows.tolist() for rows in token_budget_batches([4, 30, 4, 4, 4], 12)] == [[0, 2], [3, 4], [1]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mini_batches_keep_groups_whole_and_cover_all(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=7), label="group sizes")
    rows = data.draw(st.permutations([group for group, size in enumerate(sizes) for _ in range(size)]))
    prompts = data.draw(st.none() | st.integers(1, 8), label="prompts per step")
    seed = data.draw(st.integers(0, 2**62), label="seed")
    groups = torch.tensor(rows)
    steps = list(mini_batches(groups, prompts, seed))
    assert sorted(torch.cat(steps).tolist()) == list(range(len(rows)))
    seen = [set(groups[step].tolist()) for step in steps]
    assert sum(len(some) for some in seen) == len(sizes)  # no group in two steps
    per_step = prompts or len(sizes)
    assert [len(some) for some in seen[:-1]] == [per_step] * (len(steps) - 1)
    assert 1 <= len(seen[-1]) <= per_step


def test_mini_batches_are_shuffled_by_their_seed_alone() -> None:
    groups = torch.arange(12).repeat_interleave(2)

    def order(seed: int) -> list[list[int]]:
        torch.rand(seed + 1)  # the global generator moves on, the order does not
        return [rows.tolist() for rows in mini_batches(groups, 3, seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)


# From a rollout to an experience.


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 10_000])
def test_score_equals_the_policys_forward(micro_batch_tokens: int) -> None:
    """However it is cut; and nothing of it carries a gradient."""
    module = dapo(torch.float32, micro_batch_tokens=micro_batch_tokens)
    logp, entropy = module.scorer.score(sequences("left").flatten(), TEMPERATURE)
    lengths = sequences().response_lengths
    padded = module.policy(sequences("left"), temperature=TEMPERATURE)
    expected_logp, expected_entropy = (flat(values, lengths) for values in padded)
    assert not logp.requires_grad
    assert not entropy.requires_grad
    torch.testing.assert_close(logp, expected_logp.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=1e-4, atol=1e-5)


def test_score_keeps_the_precision_of_a_float64_policy() -> None:
    """Scoring promises float64 for float64 logits, which is what one debugs numerics with."""
    module = dapo(torch.float64)
    logp, _ = module.scorer.score(sequences().flatten(), TEMPERATURE)
    expected, _ = module.policy(sequences(), temperature=TEMPERATURE)
    torch.testing.assert_close(logp, flat(expected, sequences().response_lengths).detach(), rtol=1e-9, atol=1e-12)


def test_prepare_gives_every_token_its_responses_advantage() -> None:
    """Sorted groups: (−1, 1), (1, −0.5), (1, 0), (0.1, 0.1). A pair's advantages are ±½d / (d/√2 + ε)."""
    module = scored_first(dapo(torch.float32))
    rollout = make_rollout()
    with torch.no_grad():
        experience = module.prepare(rollout)
    half = math.sqrt(0.5)
    lengths = rollout.sequences.response_lengths
    expected = torch.tensor([-half, half, half, -half, half, -half, 0.0, 0.0]).repeat_interleave(lengths)
    torch.testing.assert_close(experience.advantages, expected, rtol=1e-5, atol=0)
    assert experience.mask.all()
    assert experience.temperature == TEMPERATURE
    padded = module.policy(rollout.sequences.pad(), temperature=TEMPERATURE)
    logp, entropy = (flat(values, lengths) for values in padded)
    torch.testing.assert_close(experience.old_logp, logp.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experience.old_entropy, entropy.detach(), rtol=1e-4, atol=1e-5)


def test_integer_rewards_train_like_float_ones() -> None:
    """``RewardResult(1 if right else 0, ...)`` is what many people write first."""
    module = dapo(torch.float32)
    whole = [1, 0, 0, 1, 1, 0, 0, 0]
    advantages = [module.prepare(make_rollout(rewards)).advantages for rewards in (whole, [float(r) for r in whole])]
    assert advantages[1].abs().max() > 0.5
    torch.testing.assert_close(advantages[0], advantages[1], check_dtype=False)


@pytest.mark.parametrize("overlong_filter", [True, False])
def test_overlong_filter_masks_truncated_responses_but_still_compares_with_them(overlong_filter: bool) -> None:
    rollout = make_rollout(truncated=[1, 4])
    experience = dapo(torch.float32, overlong_filter=overlong_filter).prepare(rollout)
    lengths = rollout.sequences.response_lengths
    expected = torch.ones(int(lengths.sum()), dtype=torch.bool)
    if overlong_filter:
        expected[span(lengths, 1)] = expected[span(lengths, 4)] = False
    assert torch.equal(experience.mask, expected)
    half, firsts = math.sqrt(0.5), lengths.cumsum(0) - lengths
    torch.testing.assert_close(experience.advantages[firsts[:2]], torch.tensor([-half, half]), rtol=1e-5, atol=0)


def test_a_filtered_response_leaves_no_trace_in_the_gradient(module: DAPOModule, experience: Experience) -> None:
    mask = experience.mask.clone()
    mask[span(experience.lengths, 1)] = mask[span(experience.lengths, 4)] = False
    filtered, rest = replace(experience, mask=mask), experience.select(torch.tensor([0, 2, 3, 5, 6, 7]))
    expected = loss_and_gradients(module, [rest], rest.mask.sum())
    assert_same(loss_and_gradients(module, [filtered], mask.sum()), expected)


def test_experience_metrics_agree_with_numpy(experience: Experience) -> None:
    """Means over the loss's tokens, except for the policy's own statistics, which are over all response tokens."""
    rollout = make_rollout()  # only its sampler's log-probs are read
    mask = experience.mask.clone()
    mask[span(experience.lengths, 4)] = False
    # The sampler's log-probs in the order of these rows, which are not sorted into groups.
    order = sorted(range(8), key=lambda row: GROUPS[row])
    by_row = dict(zip(order, rollout.sampler_logp.split(rollout.sequences.response_lengths.tolist()), strict=True))
    rollout = replace(rollout, sampler_logp=torch.cat([by_row[row] for row in range(8)]))
    metrics = experience_metrics(replace(experience, mask=mask), rollout)
    valid = mask.numpy()
    a, h = experience.advantages.numpy()[valid], experience.old_entropy.numpy()[valid]
    log_ratio = experience.old_logp.numpy() - rollout.sampler_logp.numpy()
    mismatch, ratio = np.abs(log_ratio), np.exp(log_ratio)
    expected = {
        "ib/mean_product": (a * h).mean(),
        "ib/cov_advantage_entropy": np.cov(a, h, bias=True)[0, 1],
        "ib/mean_advantage_times_mean_entropy": a.mean() * h.mean(),
        "advantage/mean": a.mean(),
        "advantage/std": a.std(),
        "advantage/max": a.max(),
        "advantage/min": a.min(),
        "policy/entropy": experience.old_entropy.numpy().mean(),
        "policy/entropy_first_token": wide(experience.old_entropy, experience.lengths).numpy()[:, 0].mean(),
        "policy/logp": experience.old_logp.numpy().mean(),
        "sampler/logp_difference_mean": mismatch.mean(),
        "sampler/logp_difference_max": mismatch.max(),
        "sampler/ratio_mean": ratio.mean(),
        "sampler/ratio_max": ratio.max(),
        "sampler/effective_sample_size": ratio.sum() ** 2 / (ratio.size * (ratio**2).sum()),
        "sampler/kl_k1": -log_ratio.mean(),
        "sampler/kl_k3": (ratio - 1 - log_ratio).mean(),
    }
    assert min(abs(value) for value in expected.values()) > 1e-3  # nothing is right for being 0
    # These are 0: all log-probs are finite, and without a correction nothing is dropped.
    expected |= {"sampler/non_finite": 0.0, "sampler/masked_share": 0.0}
    assert metrics == pytest.approx(expected, rel=1e-9)


def test_experience_metrics_of_a_rollout_without_valid_tokens_are_zero_not_nan(experience: Experience) -> None:
    """Overlong filtering may leave nothing."""
    metrics = experience_metrics(replace(experience, mask=torch.zeros_like(experience.mask)), make_rollout())
    assert {name: value for name, value in metrics.items() if name.startswith(("ib/", "advantage/"))} == {
        "ib/mean_product": 0.0,
        "ib/cov_advantage_entropy": 0.0,
        "ib/mean_advantage_times_mean_entropy": 0.0,
        "advantage/mean": 0.0,
        "advantage/std": 0.0,
        "advantage/max": 0.0,
        "advantage/min": 0.0,
    }


def test_selected_rows_keep_their_outcomes_and_spans() -> None:
    experience = dapo().prepare(make_rollout())
    experience = replace(experience, outcome_span=torch.arange(8.0))
    chosen = experience.select(torch.tensor([5, 0]))
    assert chosen.outcomes.tolist() == experience.outcomes[[5, 0]].tolist()
    assert chosen.outcome_span.tolist() == [5.0, 0.0]


def test_ranks_with_a_share_of_the_groups_take_the_same_steps() -> None:
    """Also a rank that has no group of a step: it takes part with nothing."""
    whole = [rows.tolist() for rows in mini_batches(torch.arange(4), 2, seed=5, total=4)]
    for mine in ([0], [1, 2, 3], [0, 3], [2]):
        groups = torch.tensor(mine)
        steps = [groups[rows].tolist() for rows in mini_batches(groups, 2, seed=5, total=4)]
        assert steps == [[group for group in mine if group in step] for step in whole]
