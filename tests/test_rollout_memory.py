"""A rollout takes little memory: tokens and log-probs are kept once, in 4 bytes each, and nothing is padded but
micro-batches. What is computed of flat tokens is what the functions of padded ones compute."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rollout_memory
from helpers.flat import flat, span, wide
from helpers.rollouts import make_rollout, sequences
from helpers.updates import begin_step, dapo, ppo, scored_first
from ibro_lightning.batches import Experience, FlatSequences, Rollout, Sequences, ragged
from ibro_lightning.datamodules import in_flight
from ibro_lightning.functional import aggregation_weights, gae, mismatch_weights, reward_to_go
from ibro_lightning.ranks import Ranks
from ibro_lightning.regularizers import StepContext
from ibro_lightning.types import Completion, Generation, Group, Logp, Prompt, RewardResult, TokenIds
from ibro_lightning.update import PolicyLoss, SamplerCorrection
from ibro_lightning.update.correction import mismatch_metrics

torch.set_num_threads(1)


# Memory.


@pytest.mark.parametrize("kind", ["dapo", "ppo"])
def test_a_rollout_of_the_papers_lengths_takes_at_most_forty_bytes_per_token(kind: str) -> None:
    """From the engine to the first micro-batch, whose own size depends on the token budget alone."""
    found = rollout_memory.measured(128, kind, resident=False)
    held, tokens = found["held"], found["tokens"]
    assert list(held) == list(rollout_memory.STAGES)
    assert max(held.values()) <= rollout_memory.LIMIT
    assert held["generations"] < held["completions"] < 8.5, "completions share the arrays of the generations"
    assert held["rollout"] < held["completions"] + 0.5, "and the rollout's tensors are these arrays"
    step = held["experience"] * 2 / rollout_memory.STEPS
    of_micro_batch = 80 * 20480 / tokens
    assert held["first micro-batch"] < held["experience"] + step + of_micro_batch


def test_the_benchmark_counts_memory_once_and_python_objects_in_full() -> None:
    tensor, array = torch.zeros(1000), np.zeros(1000, np.float32)
    of_tensor = rollout_memory.bytes_of(tensor)
    assert of_tensor == 4000
    assert rollout_memory.bytes_of([tensor, tensor[5:], tensor.numpy()]) - rollout_memory.bytes_of([]) < 4100
    assert rollout_memory.bytes_of(array, array[3:]) == 4000
    numbers = tuple(float(n) for n in range(1000))
    assert rollout_memory.bytes_of(numbers) == 40 + 1000 * (8 + 24)
    assert 4000 < rollout_memory.bytes_of(Logp(numbers)) < 4500


def test_a_step_on_the_whole_rollout_is_no_copy() -> None:
    module = scored_first(dapo())
    experience = module.prepare(make_rollout())
    (step,) = module.updater.steps(experience, module.policy_loss, module.context())
    for name in ("old_logp", "old_entropy", "advantages", "mask", "sampler_logp"):
        assert getattr(step, name) is getattr(experience, name), name


# Token ids and log-probs.


def test_numbers_read_like_a_tuple_of_pythons_own() -> None:
    ids, logp = TokenIds([3, 70_000, 3]), Logp([-0.5, None, -math.inf])
    assert ids == (3, 70_000, 3)
    assert ids != (3, 70_000)
    assert (ids == [3, 70_000, 3]) is False, "nor is a tuple equal to a list"
    assert hash(ids) == hash((3, 70_000, 3))
    assert {(3, 70_000, 3): "found"}[ids] == "found"  # type: ignore[index]
    assert [type(token) for token in ids] == [int] * 3
    assert (ids[1], ids[-1], ids.index(70_000), ids.count(3), 3 in ids) == (70_000, 3, 1, 2, True)
    assert (*ids, 5) == (3, 70_000, 3, 5)
    assert bool(ids)
    assert not TokenIds()
    assert repr(ids) == "(3, 70000, 3)"
    assert repr(TokenIds(range(1000))) == "(0, 1, 2, 3, 4, 5, 6, 7, … 1000 numbers)"
    assert logp[0] == -0.5
    assert math.isnan(logp[1])
    assert logp[2] == -math.inf
    assert logp == Logp([-0.5, math.nan, -math.inf])
    assert type(logp[0]) is float


def test_numbers_share_what_nobody_can_write_and_copy_the_rest() -> None:
    mine = np.array([1, 2, 3, 4], np.int32)
    ids = TokenIds(mine)
    mine[0] = 9
    assert ids == (1, 2, 3, 4)
    array = np.asarray(ids)
    assert not array.flags.writeable
    for view in (ids[1:], TokenIds(ids), TokenIds.shared(array)):
        assert np.shares_memory(np.asarray(view), array)
    assert TokenIds.shared(np.empty(0, np.int32)) == ()
    assert TokenIds(torch.tensor([7, 8])) == (7, 8)
    for wrong in (np.array([1, 2]), np.array([1.0], np.float32), np.zeros((2, 2), np.int32)):
        with pytest.raises(TypeError, match="an array of type i with one dimension"):
            TokenIds.shared(wrong)
    for wrong in ([1.5], ["1"], [None]):
        with pytest.raises(TypeError):
            TokenIds(wrong)
    assert np.array(ids).flags.writeable
    again = pickle.loads(pickle.dumps(ids[1:]))
    assert again == (2, 3, 4)
    assert type(again) is TokenIds
    assert len(pickle.dumps(TokenIds(range(100_000))[:10])) < 500, "a slice travels alone"


def test_a_completion_has_the_arrays_of_its_generation_and_a_rollout_those_of_its_completions() -> None:
    """Any sequence may be given to either."""
    given_ids, given_logp = [[3, 4], [5]], [np.array([-0.5, -0.25]), None]
    pairs = zip(given_ids, given_logp, strict=True)
    samples = [Generation(ids, logp, "stop") for ids, logp in pairs]  # type: ignore[arg-type]
    assert [sample.token_ids for sample in samples] == [(3, 4), (5,)]
    assert [sample.logp for sample in samples] == [(-0.5, -0.25), ()]
    completions = tuple(Completion(one.token_ids, one.logp, "stop", "", 8, 0) for one in samples)
    for sample, completion in zip(samples, completions, strict=True):
        assert np.shares_memory(np.asarray(sample.token_ids), np.asarray(completion.token_ids))
    assert samples[0] == Generation((3, 4), (-0.5, -0.25), "stop")
    assert samples[0] != samples[1]
    group = Group(Prompt("p", "", (1, 2), None), completions, (RewardResult(0.0, {}),) * 2)
    rollout = Rollout.from_groups([group], name="train", iteration=1, temperature=1.0)
    assert rollout.completions == completions
    assert rollout.sequences.responses.tolist() == [3, 4, 5]
    for completion in rollout.completions:
        assert np.shares_memory(np.asarray(completion.token_ids), rollout.sequences.responses.numpy())
    assert np.shares_memory(np.asarray(rollout.completions[0].logp), rollout.sampler_logp.numpy())
    assert rollout.completions[1].logp == (), "unknown log-probs stay unknown in the log"
    assert rollout.sampler_logp[2].isnan()


def test_a_checkpoint_of_an_earlier_version_holds_the_same_responses() -> None:
    """It has them as int64 and float64."""
    rollout = make_rollout()
    prompt = replace(rollout.prompts[0], id="p")
    groups = [Group(prompt, rollout.completions[:2], rollout.results[:2])]
    packed = in_flight._packed(groups)
    assert (packed["token_ids"].dtype, packed["logp"].dtype) == (torch.int32, torch.float32)
    earlier = {**packed, "token_ids": packed["token_ids"].long(), "logp": packed["logp"].double()}
    for state in (packed, earlier):
        assert in_flight._unpacked(state, {"p": prompt}) == groups


# Rows, padded and not.

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=9)


def values_of(lengths: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(lengths=LENGTHS, data=st.data())
@settings(deadline=None)
def test_rows_that_are_selected_and_padded_are_those_of_the_padded_batch(lengths: list[int], data: Any) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    values, of, chosen = values_of(lengths), torch.tensor(lengths), torch.tensor(rows)
    own = values[ragged.tokens_of(of, chosen)]
    assert own.tolist() == [x for row in rows for x in values[span(of, row)].tolist()]
    places = ragged.Places.of(of, chosen)
    width = max(lengths[row] for row in rows)
    assert torch.equal(places.pad(values), wide(values, of)[chosen, :width])
    assert torch.equal(places.exists, torch.arange(width) < of[chosen][:, None])
    written = torch.isin(torch.arange(len(lengths)).repeat_interleave(of), chosen)
    by_place, by_row = torch.full_like(values, torch.nan), torch.full_like(values, torch.nan)
    places.put(places.pad(values), by_place)
    ragged.put_tokens(own, by_row, of, chosen)
    for into in (by_place, by_row):
        assert torch.equal(into[written], values[written])
        assert into[~written].isnan().all()


@given(lengths=LENGTHS, at_once=st.integers(1, 30))
@settings(deadline=None)
def test_all_rows_are_gone_through_once_and_few_at_a_time(lengths: list[int], at_once: int) -> None:
    parts = list(ragged.similar_rows(torch.tensor(lengths), at_once))
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(len(lengths)))
    for rows, places in parts:
        assert len(rows) == 1 or places.index.numel() <= at_once


@given(lengths=LENGTHS)
@settings(deadline=None)
def test_sums_of_rows_and_values_of_rows(lengths: list[int]) -> None:
    values, of = values_of(lengths), torch.tensor(lengths)
    padded = wide(values, of)
    torch.testing.assert_close(ragged.row_sums(values, of), padded.sum(dim=1))
    assert torch.equal(ragged.row_sums(values > 0, of), (padded > 0).sum(dim=1))
    each = torch.arange(len(lengths)).double()
    assert torch.equal(ragged.per_token(each, of), each.repeat_interleave(of))


@given(
    lengths=LENGTHS,
    at_once=st.integers(1, 30),
    gamma=st.sampled_from([1.0, 0.9]),
    critic_lam=st.sampled_from([None, 1.0, 0.3]),
)
@settings(deadline=None)
def test_advantages_and_returns_of_flat_tokens_are_those_of_padded_ones(
    lengths: list[int], at_once: int, gamma: float, critic_lam: float | None
) -> None:
    """To the last bit, however many rows are padded together."""
    of, rewards, values = torch.tensor(lengths), values_of(lengths, 1), values_of(lengths, 2)
    lam, last = torch.rand(len(lengths)).double(), torch.rand(len(lengths)).double()
    mask = torch.arange(max(lengths)) < of[:, None]
    estimate = partial(gae, gamma=gamma, critic_lam=critic_lam)
    expected = estimate(wide(rewards, of), wide(values, of), mask, lam=lam, last_values=last)
    to_go = reward_to_go(wide(rewards, of), mask, gamma=gamma)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ragged, "similar_rows", partial(ragged.similar_rows, at_once=at_once))

        def some(rows: Tensor, mask: Tensor, rewards: Tensor, values: Tensor) -> Any:
            return estimate(rewards, values, mask, lam=lam[rows], last_values=last[rows])

        found = ragged.row_wise(some, of, rewards, values)
        (found_to_go,) = ragged.row_wise(lambda _, mask, own: reward_to_go(own, mask, gamma=gamma), of, rewards)
    for one, other in zip((*found, found_to_go), (*expected, to_go), strict=True):
        assert torch.equal(one, flat(other, of))


def step_of(lengths: Sequence[int], seed: int) -> Experience:
    of, values = torch.tensor(lengths), partial(values_of, lengths)
    seqs = FlatSequences.collate([[1, 2]] * len(lengths), [[3] * length for length in lengths])
    groups, mask = torch.zeros(len(lengths), dtype=torch.long), values(seed) > -0.5
    logp = -values(seed + 1).abs()
    experience = Experience(seqs, logp, logp.abs(), values(seed + 2), mask, groups, 1.0)
    assert torch.equal(experience.lengths, of)
    return replace(experience, sampler_logp=logp + 0.5 * values(seed + 3))


def nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is scored here")


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_weights_of_a_step_are_those_of_the_padded_step(aggregation: Any, lengths: list[int], seed: int) -> None:
    loss = PolicyLoss(aggregation=aggregation, aggregation_max_tokens=7)
    step = step_of(lengths, seed)
    prepared = loss.prepare(step, StepContext(nothing, nothing))
    mask = wide(step.mask, step.lengths)
    counts = {"num_tokens": mask.sum().clamp(min=1), "num_sequences": mask.any(dim=1).sum().clamp(min=1)}
    expected = aggregation_weights(mask, aggregation, **counts, max_tokens=7, dtype=torch.float64)
    assert torch.equal(prepared.weights, flat(expected, step.lengths))
    assert prepared.num_tokens == counts["num_tokens"]
    micro = prepared.micro_batch()
    assert torch.equal(micro.weights, expected)
    assert torch.equal(micro.mask, mask)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_share_that_a_correction_drops_is_that_of_padded_tokens(level: Any, lengths: list[int], seed: int) -> None:
    step, correction = step_of(lengths, seed), SamplerCorrection(level=level, mode="mask", cap=1.2)
    found = mismatch_metrics(correction, step.old_logp, step.sampler_logp, step.mask, step.lengths)
    padded = (wide(values, step.lengths) for values in (step.old_logp, step.sampler_logp, step.mask))
    dropped = mismatch_weights(*padded, level=level, mode="mask", cap=1.2).masked
    share = dropped.sum() / step.mask.sum().clamp(min=1)
    assert found["sampler/masked_share"].item() == pytest.approx(share.item(), rel=1e-6)


def test_sequences_are_padded_and_flattened_to_themselves() -> None:
    padded = sequences()
    for side in ("right", "left"):
        again = sequences(side).flatten().pad()
        for name in ("input_ids", "starts", "prompt_lengths", "response_lengths"):
            assert torch.equal(getattr(again, name), getattr(padded, name)), name
    both = padded.flatten()
    assert both.same_prompts() == padded.same_prompts() == [0, 1, 0, 3, 1, 3, 6, 6]
    chosen = torch.tensor([6, 1])
    expected = padded.select(chosen)
    for some in (both.pad(chosen), both.select(chosen).pad()):
        assert torch.equal(some.input_ids, expected.input_ids)
    empty = FlatSequences.collate([[3, 1], [4]], [[], []])
    assert empty.pad().input_ids.tolist() == [[3, 1], [4, 0]]
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        FlatSequences.collate([[1], [2]], [[3]])
    assert isinstance(empty.pad(), Sequences)


@pytest.mark.parametrize("build", [dapo, ppo])
def test_parts_of_a_step_have_what_belongs_to_their_rows(build: Any) -> None:
    """Flat or padded, of every tensor that an algorithm has."""
    module = scored_first(build())
    step = begin_step(module, module.prepare(make_rollout()))
    rows = torch.tensor([5, 0, 3])
    part, micro = step.select(rows), step.micro_batch(rows)
    tensors = {name: getattr(step, name) for name in ("old_logp", "old_entropy", "advantages", "mask", "weights")}
    tensors |= {"sampler_logp": step.sampler_logp, **step.extra}
    assert ("returns" in tensors) == (build is ppo)
    for name, values in tensors.items():
        expected = wide(values, step.lengths)[rows][:, : int(part.lengths.max())]
        for some in (part, micro):
            own = some.extra[name] if name in some.extra else getattr(some, name)
            assert torch.equal(own if some is micro else wide(own, part.lengths), expected), name
    assert micro.groups.tolist() == part.groups.tolist() == step.groups[rows].tolist()


class Both(Ranks):
    """Two ranks with the same tokens."""

    def sum(self, value: Tensor) -> Tensor:
        return value * 2


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_means_over_ranks_of_masks_and_of_weights(lengths: list[int], seed: int) -> None:
    step = step_of(lengths, seed)
    values, mask = step.advantages.masked_fill(~step.mask, torch.nan), step.mask
    expected = step.advantages[mask].mean().item() if mask.any() else 0.0
    for ranks in (Ranks(), Both()):
        for weights in (mask, mask.double(), 0.5 * mask.double()):
            assert ranks.mean(values, weights).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
