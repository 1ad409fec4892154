"""STEER, CES, SIREN, IB by prompts and positions, and self-distillation: numbers worked out by hand, what they leave
alone, and what is refused. Their formulas on a real model, and their invariances, are in test_entropy_methods.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.models import qwen2
from helpers.rollouts import TEMPERATURE, make_rollout, rollouts
from helpers.updates import begin_step, dapo, micro_loss, ppo, sgd
from helpers.updates import fit as train
from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import RestrictedEntropy
from ibro_lightning.models import Policy
from ibro_lightning.ranks import Ranks
from ibro_lightning.regularizers import (
    SIREN,
    STEER,
    ConditionalEntropyShaping,
    EntropyBonus,
    EntropyRatioClip,
    EntropyRegularizer,
    KLCov,
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
    SelfDistillation,
    StepContext,
)
from ibro_lightning.regularizers.attributed_ib import means
from ibro_lightning.regularizers.coefficients import Linear, TargetEntropy
from ibro_lightning.regularizers.siren import Anchor, most_uncertain
from ibro_lightning.types import Prompt
from ibro_lightning.update.gradient_share import regularizer_share

torch.set_num_threads(1)
F64 = torch.float64


def nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("this method needs no further pass")


ALONE = StepContext(policy=nothing, score=nothing)


def step_of(lengths: Sequence[int], groups: Sequence[int], **values: Sequence[float]) -> Experience:
    """Rows of these lengths; ``values`` are ``[N]``, or ``[B]`` for outcomes and rewards."""
    sequences = FlatSequences.collate([[1]] * len(lengths), [[1] * length for length in lengths])
    zeros = torch.zeros(sum(lengths), dtype=F64)
    given = {name: torch.tensor(numbers, dtype=F64) for name, numbers in values.items()}
    fields = {"advantages": zeros, "old_logp": zeros, "old_entropy": zeros, **given}
    return Experience(sequences, mask=zeros == 0, groups=torch.tensor(groups), temperature=1.0, **fields)


# STEER.


def test_the_token_that_changes_entropy_most_has_the_smallest_weight() -> None:
    """Ω = A(1 − π)(log π + H): 2·½·(1 + log ½) = 0.307, −½·(2 + log ½) = −0.653, 0 (A = 0), 0 (π = 1)."""
    half = math.log(0.5)
    step = step_of([4], [0], advantages=[2, -1, 0, 3], old_logp=[half, half, half, 0], old_entropy=[1, 2, 9, 0.5])
    weight = STEER(w_min=0.5).prepare(step, ALONE).extra["steer_weight"]
    change = [1 + half, 0.5 * (2 + half), 0.0, 0.0]
    assert weight.tolist() == pytest.approx([0.5 ** (c / change[1]) for c in change], rel=1e-12)
    assert weight.min().item() == pytest.approx(0.5)
    loss = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64)
    micro = step.with_extra(steer_weight=weight).micro_batch()
    stats = TokenStats(loss, None, loss, loss, micro.advantages, micro.mask, micro.extra)
    torch.testing.assert_close(STEER().shape_policy_loss(loss, stats), loss * weight)


def test_a_step_that_hardly_changes_entropy_is_left_nearly_alone() -> None:
    """max |Ω| = 0.0001 counts as 0.02: the weight is w_min to the power of 0.005."""
    step = step_of([2], [0], advantages=[0.0002, 0], old_logp=[math.log(0.5)] * 2, old_entropy=[1 - math.log(0.5), 1])
    weight = STEER(w_min=0.8).prepare(step, ALONE).extra["steer_weight"]
    assert weight.tolist() == pytest.approx([0.8**0.005, 1.0], rel=1e-12)


def test_steers_maximum_is_that_of_all_ranks() -> None:
    class Two(Ranks):
        def max(self, value: Tensor) -> Tensor:
            return torch.maximum(value, torch.tensor(1.0, dtype=F64))

    step = step_of([1], [0], advantages=[1], old_logp=[math.log(0.5)], old_entropy=[1 - math.log(0.5)])
    weight = STEER(w_min=0.25).prepare(step, replace(ALONE, ranks=Two())).extra["steer_weight"]
    assert weight.tolist() == pytest.approx([0.5])  # |Ω| = ½ of 1: the root of ¼


# Conditional entropy shaping.


def test_uncertain_tokens_are_penalised_on_right_paths_and_rewarded_on_wrong_ones() -> None:
    """The four most uncertain of ten: one of each response; the one whose verifier was stopped gets nothing."""
    entropy = [5, 0, 0, 4, 0, 6, 0, 0, 7, 0]
    step = step_of([3, 2, 3, 2], [0, 0, 1, 1], old_entropy=entropy, outcomes=[1, 0, 0.5, math.nan])
    sign = ConditionalEntropyShaping(fraction=0.4).prepare(step, ALONE).extra["ces_sign"]
    assert sign.tolist() == [-1, 0, 0, 1, 0, -1, 0, 0, 0, 0]
    strict = ConditionalEntropyShaping(fraction=0.4, right_from=0.6).prepare(step, ALONE).extra["ces_sign"]
    assert strict.tolist() == [-1, 0, 0, 1, 0, 1, 0, 0, 0, 0]


def test_without_accuracies_the_reward_says_what_is_right() -> None:
    step = step_of([1, 1], [0, 0], old_entropy=[1, 1], rewards=[1, -1])
    sign = ConditionalEntropyShaping(fraction=1.0).prepare(step, ALONE).extra["ces_sign"]
    assert sign.tolist() == [-1, 1]


def test_ces_looks_at_correctness_and_not_at_the_advantage() -> None:
    """A group that is all right has advantages of 0, and its uncertain tokens are still made surer."""
    entropy = torch.tensor([[2.0], [3.0]], dtype=F64, requires_grad=True)
    method = ConditionalEntropyShaping(1.0, fraction=1.0)
    micro = method.prepare(step_of([1, 1], [0, 0], old_entropy=[2, 3], outcomes=[1, 1]), ALONE).micro_batch()
    stats = TokenStats(entropy, entropy, entropy, entropy, micro.advantages, micro.mask, micro.extra)
    (gradient,) = torch.autograd.grad(method.objective(stats).sum(), entropy)
    assert gradient.flatten().tolist() == [-1, -1]
    assert method.needs_rows_without_advantage
    assert not ConditionalEntropyShaping(0.0).needs_rows_without_advantage


# SIREN.


def test_the_most_uncertain_tokens_of_each_response_by_hand() -> None:
    """Two of five; at least one of two; the first among equals; none of those that take no part."""
    values = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 1.0, 1.0, 9.0, 8.0, 7.0], dtype=F64)
    step = step_of([5, 2, 3], [0, 0, 0])
    step = replace(step, mask=torch.arange(10) != 7)
    chosen = most_uncertain(values, step, 0.4)
    assert chosen.nonzero().flatten().tolist() == [1, 3, 5, 8]
    nothing_counts = replace(step, mask=torch.zeros(10, dtype=torch.bool))
    assert not most_uncertain(values, nothing_counts, 1.0).any()
    method = SIREN(1.0)
    assert method.prepare(nothing_counts, told(values)).extra["siren_pull"].tolist() == [0] * 10
    assert method.anchor.state["settled"] == 0, "a step without tokens is not the first"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.2, 0.4, 1.0]), st.randoms())
def test_a_responses_choice_does_not_depend_on_the_others(lengths: list[int], fraction: float, random: Any) -> None:
    values = torch.tensor([random.random() for _ in range(sum(lengths))], dtype=F64)
    together = most_uncertain(values, step_of(lengths, [0] * len(lengths)), fraction).split(lengths)
    for own, chosen, length in zip(values.split(lengths), together, lengths, strict=True):
        assert torch.equal(chosen, most_uncertain(own, step_of([length], [0]), fraction))
        assert chosen.sum() == max(1, math.floor(fraction * length))


def told(entropy: Tensor) -> StepContext:
    return replace(ALONE, tell=lambda *_: {"entropy": entropy})


def square_of(method: SIREN, step: Experience, entropy: Tensor) -> Tensor:
    """The loss's term, as :class:`PolicyLoss` adds it up: the sum of weights times −J."""
    micro = step.micro_batch()
    row = entropy.split(step.lengths.tolist())
    padded = nn.utils.rnn.pad_sequence(row, batch_first=True)
    stats = TokenStats(
        padded, None, padded, None, micro.advantages, micro.mask, {**micro.extra, "top_p_entropy": padded}
    )
    return -(method.objective(stats) * micro.weights).sum()


@pytest.mark.parametrize("weights", [[0.2] * 5, [0.3, 0.3, 0.1, 0.1, 0.1]], ids=["token mean", "sequence mean"])
def test_the_term_is_the_square_of_the_distance_and_has_its_gradient(weights: list[float]) -> None:
    """Chosen: tokens 1 and 2 (half of two, half of three). H̃ = Σ w·H / Σ w over them; anchor 0.5."""
    entropy = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.25], dtype=F64, requires_grad=True)
    step = replace(step_of([2, 3], [0, 0]), weights=torch.tensor(weights, dtype=F64))
    method = SIREN(1.0, fraction=0.5, anchor=0.5)
    prepared = method.prepare(step, told(entropy.detach()))
    mean = (weights[1] * 2 + weights[2] * 3) / (weights[1] + weights[2])
    value = square_of(method, prepared, entropy)
    assert value.item() == pytest.approx((mean - 0.5) ** 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, entropy)
    share = [0, weights[1], weights[2], 0, 0]
    expected = [2 * (mean - 0.5) * w / sum(share) for w in share]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_anchor_is_the_first_steps_and_then_stays() -> None:
    method = SIREN(1.0, fraction=1.0)
    step = replace(step_of([2], [0]), weights=torch.full((2,), 0.5, dtype=F64))
    assert method.coefficients["anchor"].value == 0
    first = method.prepare(step, told(torch.tensor([1.0, 3.0], dtype=F64)))
    assert method.coefficients["anchor"].value == 2
    assert first.extra["siren_pull"].tolist() == [0, 0]
    later = method.prepare(step, told(torch.tensor([4.0, 4.0], dtype=F64)))
    assert method.coefficients["anchor"].value == 2
    assert later.extra["siren_pull"].mean().item() == pytest.approx(2.0)
    resumed = SIREN(1.0, fraction=1.0)
    resumed.anchor.load_state_dict(method.anchor.state_dict())
    again = resumed.prepare(step, told(torch.tensor([4.0, 4.0], dtype=F64)))
    assert torch.equal(again.extra["siren_pull"], later.extra["siren_pull"])


def test_an_anchor_that_is_given_counts_whatever_a_checkpoint_says() -> None:
    measured = Anchor()
    measured.settle(math.nan)
    assert measured.value == 0
    measured.settle(1.5)
    method = SIREN(1.0, anchor=0.25)
    method.anchor.load_state_dict(measured.state_dict())
    assert method.coefficients["anchor"].value == 0.25


@pytest.mark.parametrize("coef", [Linear(0.0, 1.0, 2), TargetEntropy(target=0.5, start=0.0), 0.0])
def test_the_anchor_is_the_first_steps_even_where_the_coefficient_is_still_zero(coef: Any) -> None:
    """After that step, nothing is computed until the coefficient is above 0."""
    method = SIREN(coef, fraction=1.0)
    step = step_of([2], [0])
    assert method.prepare(step, told(torch.tensor([1.0, 3.0], dtype=F64))) is step
    assert method.anchor.value == 2
    assert method.prepare(step, ALONE) is step
    assert not method.needs_rows_without_advantage
    assert SIREN(0.0, anchor=0.5).prepare(step, ALONE) is step


def test_a_run_whose_coefficient_starts_at_zero_holds_the_entropy_of_its_beginning() -> None:
    """From iteration 2 on, the anchor and the pull are those of a run that measured it in iteration 1, which it did."""
    given = [make_rollout(iteration=number) for number in (1, 2)]
    module = dapo(regularizer=SIREN(Linear(0.0, 5.0, 1)), optimizer=sgd, warmup_steps=0)
    _, recorder = train(module, given)
    anchors = [metrics["regularizer/anchor"] for metrics in recorder.metrics]
    assert 0 < anchors[0] == anchors[1]
    assert "update/regularizer" not in recorder.metrics[0]
    assert recorder.metrics[1]["regularizer/siren_entropy"] != anchors[0]


def test_measuring_the_share_of_the_gradient_does_not_settle_the_anchor() -> None:
    """A callback measures it on other rows, before the first step: the run must not depend on that."""
    module = dapo(regularizer=SIREN(1.0), optimizer=sgd)
    experience = module.prepare(make_rollout(iteration=1))
    loop = SimpleNamespace(
        networks={"policy": module.policy}, ranks=module.ranks, backward=Tensor.backward, optimizers=[], schedules=[]
    )
    updater = SimpleNamespace(loop=loop, budget=module.updater.budget)
    assert regularizer_share(updater, experience, module.policy_loss, module.context()) == 0  # type: ignore[arg-type]
    assert module.regularizer.anchor.state["settled"] == 0
    begin_step(module, experience)
    assert module.regularizer.anchor.state["settled"] == 1


def test_what_the_scorer_tells_is_what_the_policy_says() -> None:
    module = dapo(micro_batch_tokens=12)
    sequences = make_rollout().sequences
    functionals = {"a": RestrictedEntropy(top_p=0.8), "b": RestrictedEntropy(top_fraction=0.5)}
    context = module.context()
    found = context.tell(sequences, TEMPERATURE, functionals)
    _, _, known = module.policy(sequences.pad(), temperature=TEMPERATURE, functionals=functionals)
    mask = sequences.pad().response_mask
    for name in functionals:
        torch.testing.assert_close(found[name], known[name][mask], rtol=1e-9, atol=1e-12)
        assert not found[name].requires_grad
    with pytest.raises(NotImplementedError, match="comes from no Scorer"):
        ALONE.tell(sequences, 1.0, functionals)


@pytest.mark.parametrize("module", [dapo, ppo])
def test_siren_holds_entropy_where_it_began(module: Any) -> None:
    """Three iterations on the same responses, against a bonus that blows entropy up."""

    def distance(regularizer: EntropyRegularizer) -> float:
        _, recorder = train(module(regularizer=regularizer, optimizer=sgd, warmup_steps=0), rollouts(3))
        entropies = [metrics["policy/entropy"] for metrics in recorder.metrics]
        return abs(entropies[-1] - entropies[0])

    assert distance(SIREN(5.0, fraction=1.0, top_p=1.0)) < 0.5 * distance(EntropyBonus(5.0))


# IB by pass rate, and within a prompt and a position.


@pytest.mark.parametrize(
    ("prompts", "scale"), [("hard", [0.75, 0.0, 1.0]), ("easy", [0.25, 1.0, 0.0]), ("mixed", [0.75, 0.0, 0.0])]
)
def test_pass_rates_by_hand(prompts: Any, scale: list[float]) -> None:
    """Pass rates ¼ (of a half and a wrong one), 1 (one was not verified to the end), and 0 (none was)."""
    step = step_of(
        [2, 1, 1, 1, 1], [4, 4, 0, 0, 2], advantages=[1, 1, -1, 2, -2, 3], outcomes=[0.5, 0, 1, math.nan, math.nan]
    )
    weight = PassRateInformationBottleneck(prompts=prompts).prepare(step, ALONE).extra["ib_weight"]
    expected = [scale[0], scale[0], -scale[0], 2 * scale[1], -2 * scale[1], 3 * scale[2]]
    assert weight.tolist() == pytest.approx(expected)


def test_position_centred_advantages_by_hand() -> None:
    """Group 0: lengths 3, 2 and 1 with advantages 1, −2 and 4. Means at its positions: 1, −½, 1. Group 1 is alone."""
    step = step_of([3, 1, 2, 1], [0, 1, 0, 0], advantages=[1, 1, 1, 7, -2, -2, 4])
    weight = PositionCentredInformationBottleneck().prepare(step, ALONE).extra["ib_weight"]
    assert weight.tolist() == pytest.approx([0, 1.5, 0, 0, -3, -1.5, 3])
    masked = replace(step, mask=torch.arange(7) != 6)  # the first position's mean is now −½
    weight = PositionCentredInformationBottleneck().prepare(masked, ALONE).extra["ib_weight"]
    assert weight.tolist() == pytest.approx([1.5, 1.5, 0, 0, -1.5, -1.5, 0])
    counted = replace(step, weights=torch.tensor([0.1, 0.1, 0.1, 1, 0.3, 0.3, 0.6], dtype=F64))
    weight = PositionCentredInformationBottleneck().prepare(counted, ALONE).extra["ib_weight"]
    assert weight[0].item() == pytest.approx(1 - (0.1 - 0.6 + 2.4) / 1.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=8), st.randoms())
def test_no_prompt_and_no_position_is_under_uniform_pressure(rows: list[tuple[int, int]], random: Any) -> None:
    lengths, groups = [length for length, _ in rows], [group for _, group in rows]
    step = step_of(lengths, groups, advantages=[random.uniform(-3, 3) for _ in range(sum(lengths))])
    weight = PositionCentredInformationBottleneck().prepare(step, ALONE).extra["ib_weight"]
    cells: dict[tuple[int, int], float] = {}
    place = 0
    for length, group in rows:
        for position in range(length):
            cells[group, position] = cells.get((group, position), 0.0) + weight[place].item()
            place += 1
    assert max(map(abs, cells.values())) < 1e-12
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(random.randrange(99)))
    shuffled = PositionCentredInformationBottleneck().prepare(step.select(order), ALONE).extra["ib_weight"]
    torch.testing.assert_close(shuffled, torch.cat([weight.split(lengths)[row] for row in order.tolist()]))


@pytest.mark.parametrize("method", [PassRateInformationBottleneck, PositionCentredInformationBottleneck])
def test_weights_are_not_computed_while_the_coefficient_is_zero(method: Any) -> None:
    step = step_of([2], [0])
    assert method(0.0).prepare(step, ALONE) is step
    assert not method(0.0).needs_rows_without_advantage
    assert method(0.1).needs_rows_without_advantage == (method is PositionCentredInformationBottleneck)


def test_means_of_cells() -> None:
    values, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 3.0, 0.0])
    assert means(values, weights, torch.tensor([7, 2, 7, 5])).tolist() == [2.5, 2.0, 2.5, 0.0]
    assert means(values[:0], weights[:0], torch.tensor([], dtype=torch.long)).tolist() == []


# Self-distillation.


class Letters:
    """A tokenizer of one token per letter, a to w."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def to_distill(policy: Policy) -> tuple[StepContext, Any]:
    """A context and a micro-batch of two responses to prompts whose answers are e and fg."""
    prompts = tuple(
        Prompt(t, t, tuple(Letters()(t, False)["input_ids"]), a, content=t) for t, a in (("abc", "e"), ("d", "fg"))
    )
    sequences = Sequences.collate([p.token_ids for p in prompts], [[4, 5, 6], [7]])
    micro = SimpleNamespace(sequences=sequences, prompts=prompts, temperature=0.7)
    return StepContext(policy, nothing, Letters(), micro=micro), micro  # type: ignore[arg-type]


def distributions(policy: Policy, texts: Sequence[str]) -> Tensor:
    """``log p [N, V]`` of the responses after these prompts, one sequence at a time."""
    rows = []
    for text, response in zip(texts, ([4, 5, 6], [7]), strict=True):
        prompt = Letters()(text, False)["input_ids"]
        logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0] / 0.7
        rows.append(logits.log_softmax(dim=-1)[len(prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_teacher_is_the_policy_with_the_answer_shown_and_has_no_gradient(direction: Any, fused_head: bool) -> None:
    policy = Policy(qwen2().double(), fused_head=fused_head)
    method = SelfDistillation(direction=direction, template="{answer}{prompt}")
    context, micro = to_distill(policy)
    asked = method.functionals(context)
    _, _, told = policy(micro.sequences, temperature=0.7, functionals=asked)
    kl = told["kl_to_hindsight"][micro.sequences.response_mask]
    student, teacher = distributions(policy, ["abc", "d"]), distributions(policy, ["eabc", "fgd"]).detach()
    of, to = (student, teacher) if direction == "reverse" else (teacher, student)
    expected = (of.exp() * (of - to)).sum(dim=-1)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-12)
    assert (kl > 1e-3).all()
    parameters = list(policy.parameters())
    ours, theirs = (torch.autograd.grad(x.sum(), parameters) for x in (kl, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_under_autocast_both_distributions_are_rounded_alike() -> None:
    """A policy is no further from itself than that: with the head's weight in float32 it would be, by about 1e-5."""
    policy = Policy(qwen2())
    _, micro = to_distill(policy)
    with torch.autocast("cpu", torch.bfloat16):
        same = policy.kl_to(micro.sequences, temperature=0.7, reverse=True)
        _, _, told = policy(micro.sequences, temperature=0.7, functionals={"kl": same})
    assert told["kl"].abs().max() < 1e-6


def test_a_policy_that_cannot_be_a_teacher_is_refused() -> None:
    method = SelfDistillation(template="{answer}{prompt}")
    context, _ = to_distill(Policy(qwen2()))
    with pytest.raises(ConfigError, match=r"^policy: .*SelfDistillation asks it for kl_to"):
        method.functionals(replace(context, policy=nothing))


# All of them.


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        *((lambda w=w: STEER(w_min=w), "w_min") for w in (0.0, 1.1, math.nan, "0.8", None, True)),
        *((lambda f=f: ConditionalEntropyShaping(fraction=f), "fraction") for f in (0.0, 1.1, "0.2", None)),
        *((lambda r=r: ConditionalEntropyShaping(right_from=r), "right_from") for r in (math.nan, "1", None)),
        (lambda: ConditionalEntropyShaping(coef=-1.0), "coef"),
        *((lambda f=f: SIREN(fraction=f), "fraction") for f in (0.0, 1.1, math.nan)),
        *((lambda r=r: ConditionalEntropyShaping(right_from=r), "right_from") for r in (7, 0.0, -1.0, math.nan)),
        *((lambda p=p: SIREN(top_p=p), "top_p") for p in (0.0, 1.1, None, "0.8")),
        *((lambda a=a: SIREN(anchor=a), "anchor") for a in (-0.1, math.inf, "0.5")),
        (lambda: SIREN(coef=-1.0), "coef"),
        *((lambda p=p: PassRateInformationBottleneck(prompts=p), "prompts") for p in ("Hard", None, 1)),
        (lambda: PassRateInformationBottleneck(coef=-1.0), "coef"),
        (lambda: PositionCentredInformationBottleneck(coef=math.nan), "coef"),
        *((lambda d=d: SelfDistillation(direction=d), "direction") for d in ("both", None)),
        (lambda: SelfDistillation(template="{prompt}"), "template"),
        (lambda: SelfDistillation(coef=-1.0), "coef"),
    ],
)
def test_bad_settings_are_refused_by_name(build: Callable[[], object], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build()
    assert refused.value.setting == setting


def test_defaults_are_those_of_the_papers_or_said_to_be_ours() -> None:
    steer, ces, siren = STEER(), ConditionalEntropyShaping(), SIREN()
    assert steer.w_min.value == 0.8
    assert (ces.coef, ces.fraction, ces.right_from) == (0.001, 0.2, 0.5)
    assert (siren.coef, siren.restricted.top_p, siren.fraction) == (0.005, 0.8, 0.2)
    assert (PassRateInformationBottleneck().coef, PassRateInformationBottleneck().prompts) == (0.005, "hard")
    assert PositionCentredInformationBottleneck().coef == 0.005
    assert (SelfDistillation().coef, SelfDistillation().reverse) == (0.01, True)


@pytest.mark.parametrize("method", [EntropyRatioClip, KLCov])
@pytest.mark.parametrize("module", [dapo, ppo])
def test_a_method_that_needs_several_steps_says_once_that_there_is_one(module: Any, method: Any) -> None:
    single = f"{method.__name__} has no effect in an update of one optimizer step"
    with pytest.warns(UserWarning, match=single) as warned:
        train(module(regularizer=method()), rollouts(2))
    assert sum(single in str(one.message) for one in warned) == 1
    for several in ({"mini_batch_prompts": 2}, {"update_epochs": 2}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(module(regularizer=method(), **several), rollouts(1))
        assert not any(single in str(one.message) for one in caught)


LEAVE_ROWS_OUT = {"STEER", "PassRateInformationBottleneck"}


@pytest.mark.parametrize(
    "method",
    [
        STEER(0.3),
        ConditionalEntropyShaping(0.5),
        SIREN(0.5, anchor=0.1),
        PassRateInformationBottleneck(0.5),
        PositionCentredInformationBottleneck(0.5),
    ],
)
def test_rows_without_a_gradient_are_those_whose_loss_is_zero(method: Any) -> None:
    """A group of equal rewards needs no backward pass where a term is 0 without an advantage."""
    module = dapo(regularizer=method)
    step = begin_step(module, module.prepare(make_rollout(iteration=1)))
    learns = module.policy_loss.rows_with_gradient(step)
    assert bool(learns.all()) == (type(method).__name__ not in LEAVE_ROWS_OUT)
    for row in (~learns).nonzero().flatten():
        assert micro_loss(module, step.select(row[None]))[0].item() == 0
