"""MarginalEntropy against exact enumeration: a policy whose responses, and with them H(r), are written down."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibro_lightning.batches import FlatSequences, Rollout
from ibro_lightning.batches.cross_prompts import Probe
from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.callbacks import InformationPlane
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import information_plane
from ibro_lightning.ranks import ALONE
from ibro_lightning.regularizers import (
    IBRO,
    EntropyRegularizer,
    EntropyShapedAdvantage,
    HindsightTemplate,
    InformationBottleneck,
    KLCov,
    MarginalEntropy,
    NoRegularizer,
    SelfDistillation,
)
from ibro_lightning.regularizers.coefficients import Linear, TargetEntropy
from ibro_lightning.regularizers.marginal_entropy import choose
from ibro_lightning.update import PlainLoop, PolicyLoss, Scorer, Updater

PROMPTS = 3
RESPONSES = [(0,), (1, 0), (1, 1)]
"""All that the policy can say: 0 ends a response, and the second token does so, whatever it is."""
GAMMA = 0.7


class Table(nn.Module):
    """A policy over :data:`RESPONSES`: logits of the first token and, after a 1, of the second, for each prompt, which
    is one token."""

    def __init__(self, seed: int = 0, spread: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(spread * torch.randn(PROMPTS, 2, 2, generator=generator, dtype=torch.float64))

    def log_probs(self) -> Tensor:
        """``[q, r]`` log π(r|q)."""
        first, second = self.logits.log_softmax(dim=-1).unbind(dim=1)
        return torch.stack([first[:, 0], first[:, 1] + second[:, 0], first[:, 1] + second[:, 1]], dim=1)

    def entropy(self, prompts: Sequence[int] = range(PROMPTS)) -> Tensor:
        """H(r), exactly, where these prompts are equally likely."""
        log_p = self.log_probs()[list(prompts)].logsumexp(dim=0) - math.log(len(prompts))
        return -(log_p.exp() * log_p).sum()

    def forward(self, sequences: Sequences, *, temperature: float, with_entropy: bool = True) -> Any:
        assert temperature == 1.0
        width = int(sequences.response_lengths.max())
        starts = sequences.starts + sequences.prompt_lengths  # [B] of the responses
        places = (starts[:, None] + torch.arange(width)).clamp(max=sequences.input_ids.shape[1] - 1)
        ids = sequences.input_ids.gather(1, places)  # [B, T]
        prompts = sequences.input_ids.gather(1, sequences.starts[:, None]).squeeze(1)
        of_tokens = self.logits[prompts][:, :width].log_softmax(dim=-1)  # [B, T, V]
        logp = of_tokens.gather(2, ids[:, :, None].clamp(max=1)).squeeze(2)
        return logp, -(of_tokens.exp() * of_tokens).sum(dim=-1)


def parts(policy: nn.Module, regularizer: EntropyRegularizer, **settings: Any) -> tuple[PolicyLoss, Scorer]:
    loss = PolicyLoss(regularizer, sampler_correction=None, **settings)
    return loss, Scorer(PlainLoop({"policy": policy}, []), loss)


def step_of(
    prompts: Sequence[int], said: Sequence[int], old_logp: Tensor | None = None, advantages: Tensor | None = None
) -> Experience:
    """Responses by their numbers. ``old_logp`` ``[q, t, v]``: None, as in a rollout's first step."""
    sequences = FlatSequences.collate([[q] for q in prompts], [RESPONSES[r] for r in said])
    tokens = [(q, t, v) for q, r in zip(prompts, said, strict=True) for t, v in enumerate(RESPONSES[r])]
    old = None if old_logp is None else torch.stack([old_logp[token] for token in tokens])
    zeros = torch.zeros(len(tokens), dtype=torch.float64)
    return Experience(
        sequences=sequences,
        old_logp=old,
        old_entropy=None if old is None else zeros,
        advantages=zeros if advantages is None else advantages.repeat_interleave(sequences.response_lengths),
        mask=torch.ones(len(tokens), dtype=torch.bool),
        groups=torch.tensor(list(prompts)),
        temperature=1.0,
    )


def gradient(policy: Table, loss: PolicyLoss, scorer: Scorer, step: Experience) -> tuple[Tensor, Experience, float]:
    """The gradient of the step's loss, the prepared step, and the loss."""
    prepared = loss.prepare(step, scorer.context())
    micro = prepared.micro_batch()
    value, _ = loss(loss.stats(micro, scorer.context()), micro)
    (found,) = torch.autograd.grad(value, [policy.logits])
    return found, prepared, value.item()


AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "token-mean"},
    {"aggregation": "seq-mean-token-mean"},
    {"aggregation": "seq-mean-token-sum-norm", "aggregation_max_tokens": 5},
]


@pytest.mark.parametrize("settings", AGGREGATIONS, ids=lambda settings: settings["aggregation"])
@pytest.mark.parametrize("direction", ["raise", "lower"])
def test_the_expected_gradient_is_that_of_the_entropy(direction: Any, settings: dict[str, Any]) -> None:
    """Over all 27 ways to answer three prompts, each weighted by its probability: no bias, however the loss aggregates
    tokens, and the estimate has none either. The loss itself is left at 0."""
    policy = Table()
    loss, scorer = parts(policy, MarginalEntropy(GAMMA, direction, prompts=PROMPTS), **settings)
    expected, estimate = torch.zeros_like(policy.logits), 0.0
    table = policy.log_probs().detach()
    for said in itertools.product(range(3), repeat=PROMPTS):
        chance = table[range(PROMPTS), said].sum().exp().item()
        found, prepared, value = gradient(policy, loss, scorer, step_of(range(PROMPTS), said))
        expected += chance * found
        estimate += chance * prepared.metrics["regularizer/marginal_entropy"]
        assert value == 0.0
    (exact,) = torch.autograd.grad(policy.entropy(), [policy.logits])
    sign = -1.0 if direction == "raise" else 1.0  # the loss is minimised
    torch.testing.assert_close(expected, sign * GAMMA * exact, rtol=1e-10, atol=1e-13)
    assert exact.abs().max() > 0.01
    assert estimate == pytest.approx(policy.entropy().item(), rel=1e-10)


def test_responses_of_the_policy_before_are_weighted_by_their_ratio() -> None:
    """A rollout's later steps: drawn from another policy, no ratio of which reaches 2."""
    policy, before = Table(), Table()
    with torch.no_grad():
        before.logits += 0.3 * torch.randn(PROMPTS, 2, 2, generator=torch.Generator().manual_seed(5))
    assert (policy.log_probs() - before.log_probs()).exp().max() < 2
    loss, scorer = parts(policy, MarginalEntropy(GAMMA, prompts=PROMPTS))
    expected, table = torch.zeros_like(policy.logits), before.log_probs().detach()
    old = before.logits.detach().log_softmax(dim=-1)
    for said in itertools.product(range(3), repeat=PROMPTS):
        found, _, _ = gradient(policy, loss, scorer, step_of(range(PROMPTS), said, old))
        expected += table[range(PROMPTS), said].sum().exp() * found
    (exact,) = torch.autograd.grad(policy.entropy(), [policy.logits])
    torch.testing.assert_close(expected, -GAMMA * exact, rtol=1e-10, atol=1e-13)


def test_a_response_that_has_become_much_likelier_counts_twice_at_most() -> None:
    policy, regularizer = Table(), MarginalEntropy(GAMMA, prompts=PROMPTS)
    _, scorer = parts(policy, regularizer)
    said = (1, 2, 0)
    here = policy.logits.detach().log_softmax(dim=-1)
    now, _ = regularizer.pull(step_of(range(PROMPTS), said), scorer.context())
    old = here.clone()
    old[0] -= math.log(3.0)  # two tokens: a ratio of 9
    old[2] += math.log(4.0)
    then, _ = regularizer.pull(step_of(range(PROMPTS), said, old), scorer.context())
    torch.testing.assert_close(then, now * torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64))


def test_the_pull_by_hand() -> None:
    """Two prompts. One always says 0, and the other 1 0 or 1 1 with half a chance: p is ½, ¼, ¼."""
    policy, regularizer = Table(), MarginalEntropy(GAMMA, prompts=2)
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([[[60.0, 0], [0, 0]], [[0, 60.0], [0, 0]], [[0, 0], [0, 0]]]))
    _, scorer = parts(policy, regularizer)
    pull, entropy = regularizer.pull(step_of([0, 1], [0, 2]), scorer.context())
    weights = [math.log(2), math.log(4)]
    assert pull.tolist() == pytest.approx([(weights[0] - weights[1]) / 2, (weights[1] - weights[0]) / 2])
    assert entropy == pytest.approx(1.5 * math.log(2))


def sampled(policy: Table, per_prompt: int, seed: int) -> Rollout:
    """Responses drawn from the policy, with their log-probs."""
    with torch.no_grad():
        table, of_tokens = policy.log_probs(), policy.logits.log_softmax(dim=-1)
    drawn = torch.multinomial(table.exp(), per_prompt, True, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(q, r) for q in range(PROMPTS) for r in drawn[q]]
    return Rollout.from_tokens(
        [[q] for q, _ in rows],
        [RESPONSES[r] for _, r in rows],
        [0.0] * len(rows),
        logp=[[of_tokens[q, t, v].item() for t, v in enumerate(RESPONSES[r])] for q, r in rows],
        iteration=1,
    )


def test_the_estimate_is_the_information_planes_on_the_same_probe() -> None:
    """One response to each prompt, so both have the same probe; and the estimator itself says the same."""
    policy = Table(seed=3)
    loss, scorer = parts(policy, MarginalEntropy(GAMMA, prompts=PROMPTS))
    rollout = sampled(policy, 1, seed=2)
    prepared = loss.prepare(scorer(rollout), scorer.context())
    found = prepared.metrics["regularizer/marginal_entropy"]
    plane = InformationPlane(prompts=PROMPTS).plane(SimpleNamespace(scorer=scorer), rollout, ALONE)
    assert found == pytest.approx(plane["marginal_entropy"], rel=1e-6)  # sampled log-probs are float32
    probe = Probe([[q] for q in range(PROMPTS)], [tuple(c.token_ids) for c in rollout.completions])
    matrix = probe.cross_logp(scorer.score, 1.0, torch.device("cpu"))
    assert found == pytest.approx(information_plane(matrix).marginal_entropy.item(), rel=1e-12)


@pytest.mark.parametrize(("direction", "sign"), [("raise", 1.0), pytest.param("lower", -1.0, marks=pytest.mark.slow)])
def test_a_few_steps_move_the_entropy_where_they_should(direction: Any, sign: float) -> None:
    """With rewards that are all equal, nothing else moves the policy."""
    policy = Table()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    loss = PolicyLoss(MarginalEntropy(GAMMA, direction, prompts=PROMPTS), sampler_correction=None)
    loop = PlainLoop({"policy": policy}, [optimizer])
    scorer, updater = Scorer(loop, loss), Updater(loop, max_grad_norm=None)
    entropies = [policy.entropy().item()]
    for number in range(60):
        rollout = replace(sampled(policy, 4, seed=number), iteration=number)
        experience = scorer(rollout)
        for step in updater.steps(experience, loss, scorer.context()):
            updater.update(step, loss, scorer.context())
        entropies.append(policy.entropy().item())
    assert sign * (entropies[-1] - entropies[0]) > 0.1
    assert max(entropies) <= math.log(3)


# The probe.


def chosen(step: Experience, prompts: int = 3, seed: int = 0) -> list[int]:
    """The rows that carry the term."""
    _, scorer = parts(Table(), NoRegularizer())
    found = choose(step, prompts, replace(scorer.context(), seed=seed))
    assert found is not None
    rows = found.rows.tolist()
    responses = step.sequences.responses.split(step.lengths.tolist())
    assert [list(found.probe.responses[place]) for place in found.places] == [responses[row].tolist() for row in rows]
    return sorted(rows)


ROWS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
SAID = [0, 0, 0, 1, 2, 1, 2, 2, 0, 2, 1, 0]


def test_each_step_has_one_response_to_each_of_some_prompts() -> None:
    step = step_of(ROWS, SAID)
    seen = [chosen(step, 2, seed) for seed in range(40)]
    assert all(len({ROWS[row] for row in rows}) == len(rows) == 2 for rows in seen)
    assert {tuple(sorted(ROWS[row] for row in rows)) for rows in seen} == {(0, 1), (0, 2), (1, 2)}
    assert chosen(step, 2, 7) == chosen(step, 2, 7)


def test_a_response_is_chosen_as_often_as_it_was_given() -> None:
    """Three of four responses to the first prompt are the same: each row has a quarter of the chances."""
    count, step = Counter[int](), step_of(ROWS, SAID)
    for seed in range(400):
        count.update(chosen(step, 3, seed))
    assert count.total() == 3 * 400
    assert all(60 < count[row] < 140 for row in range(len(ROWS))), count  # 100 ± 8.7


def test_neither_the_order_of_the_rows_nor_a_prompt_that_comes_twice_matters() -> None:
    step = step_of(ROWS, SAID)
    order = torch.tensor([11, 3, 7, 0, 5, 9, 1, 2, 10, 6, 8, 4])
    for seed in range(5):
        rows = chosen(step, 2, seed)
        said = {(ROWS[row], SAID[row]) for row in rows}
        assert {(ROWS[order[row]], SAID[order[row]]) for row in chosen(step.select(order), 2, seed)} == said
    twice = replace(step, groups=torch.arange(12) // 2)  # two groups of each prompt
    assert all(len({ROWS[row] for row in chosen(twice, 6, seed)}) == 3 for seed in range(5))


def test_a_response_of_which_a_token_is_left_out_is_not_in_the_probe() -> None:
    step = step_of([0, 1, 2], [1, 2, 0])
    mask = step.mask.clone()
    mask[1] = False  # the second token of the first response
    step = replace(step, mask=mask)
    assert chosen(step) == [1, 2]
    regularizer = MarginalEntropy(GAMMA, prompts=3)
    _, scorer = parts(Table(), regularizer)
    _, entropy = regularizer.pull(step, scorer.context())
    log_p = Table().log_probs()[[1, 2]].logsumexp(dim=0) - math.log(2)
    assert entropy == pytest.approx(-(log_p[2] + log_p[0]).item() / 2)  # of the other two prompts


def test_one_prompt_is_no_probe() -> None:
    loss, scorer = parts(Table(), MarginalEntropy(GAMMA))
    prepared = loss.prepare(step_of([1, 1], [0, 2]), scorer.context())
    assert not prepared.extra["marginal_pull"].any()
    assert "regularizer/marginal_entropy" not in prepared.metrics


def test_without_gamma_nothing_is_scored() -> None:
    """The base alone, to the bit; a schedule that begins with 0, too."""

    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError

    advantages = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    policy, step = Table(), step_of(range(3), (1, 2, 0), advantages=advantages)
    base = InformationBottleneck(0.5)
    expected, _, value = gradient(policy, *parts(policy, base), step)
    for gamma in (0.0, Linear(start=0.0, end=1.0, iterations=10)):
        loss, scorer = parts(policy, MarginalEntropy(gamma, base=base))
        context = replace(scorer.context(), score=nothing)
        prepared = loss.prepare(step, context)
        micro = prepared.micro_batch()
        found, _ = loss(loss.stats(micro, context), micro)
        assert found.item() == value
        assert torch.equal(torch.autograd.grad(found, [policy.logits])[0], expected)
        assert not loss.regularizer.needs_rows_without_advantage


# With another method.

BASES: dict[str, Any] = {
    "none": NoRegularizer,
    "ib": lambda: InformationBottleneck(0.5),
    "ib centred": lambda: InformationBottleneck(0.5, part="centred"),
    "ib with noise": lambda: InformationBottleneck(0.5, noise=0.7),
    "shaped": EntropyShapedAdvantage,
    "kl-cov": lambda: KLCov(fraction=0.5),
}


@pytest.mark.parametrize("name", BASES)
def test_beside_another_method_the_gradients_add_up(name: str) -> None:
    advantages = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    policy, old = Table(), Table(seed=1).logits.detach().log_softmax(dim=-1)
    step = step_of(range(3), (1, 2, 0), old, advantages)
    step = replace(step, old_entropy=torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    with_both, of_base, of_marginal, of_none = (
        gradient(policy, *parts(policy, regularizer), step)
        for regularizer in (
            MarginalEntropy(GAMMA, base=BASES[name]()),
            BASES[name](),
            MarginalEntropy(GAMMA),
            NoRegularizer(),
        )
    )
    torch.testing.assert_close(with_both[0] - of_base[0], of_marginal[0] - of_none[0], rtol=1e-9, atol=1e-12)
    assert with_both[2] == of_base[2]
    assert (of_marginal[0] - of_none[0]).abs().max() > 1e-3
    assert with_both[1].extra.keys() == of_base[1].extra.keys() | {"marginal_pull"}
    assert with_both[1].metrics.items() >= of_base[1].metrics.items()


def test_it_asks_for_what_its_base_asks_for_and_for_all_rows() -> None:
    for base in (InformationBottleneck(0.5), EntropyShapedAdvantage(), IBRO(0.1), KLCov(), SelfDistillation()):
        both = MarginalEntropy(GAMMA, base=base)
        for name in ("needs_entropy", "shaping_needs_entropy", "shaping_needs_extra", "prepare_needs_scores"):
            assert getattr(both, name) == getattr(base, name), name
        assert both.reads_old_entropy == base.reads_old_entropy
        assert both.min_group_size == base.min_group_size
        assert both.coef == base.coef
        assert both.needs_rows_without_advantage
        assert not both.zero_without_advantage
    assert MarginalEntropy(GAMMA, base=KLCov()).acts_in_first_step
    assert not MarginalEntropy(0.0, base=KLCov()).acts_in_first_step


def test_all_numbers_that_move_are_saved() -> None:
    base = IBRO(TargetEntropy(target=0.2), beta=Linear(start=2.0, end=3.0, iterations=5))
    loss = PolicyLoss(MarginalEntropy(Linear(start=0.0, end=1.0, iterations=5), base=base))
    assert set(loss.coefficients) == {"regularizer", "regularizer/beta", "regularizer/gamma"}
    assert loss.coefficients["regularizer"] is base.coefficient
    assert loss.needs_scores  # α follows a measurement


def test_the_prompts_that_a_base_shows_are_found() -> None:
    """By the dry run, by the check of golds, and by the information plane."""
    base = IBRO(0.1)
    both = MarginalEntropy(GAMMA, base=base)
    assert both.combined == (both, base)
    shown = [
        value for method in both.combined for value in vars(method).values() if isinstance(value, HindsightTemplate)
    ]
    assert shown == [base.hindsight]
    assert NoRegularizer().combined[0].coef == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gamma": ({"gamma": -0.1}, "gamma: -0.1 - write 0 or more"),
    "infinite": ({"gamma": math.inf}, "gamma: inf - write 0 or more"),
    "direction": ({"direction": "up"}, "direction: 'up' - write raise or lower"),
    "prompts": ({"prompts": 1}, "prompts: 1 - write 2 or more"),
    "class": ({"base": InformationBottleneck}, "write an instance of EntropyRegularizer, or None"),
    "twice": ({"base": MarginalEntropy()}, "base: 'MarginalEntropy' - it is added once: write another method, or null"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case: str) -> None:
    settings, line = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        MarginalEntropy(**settings)
    assert line in str(refused.value)


def test_a_response_that_does_not_fit_after_another_prompt_is_refused() -> None:
    regularizer = MarginalEntropy(GAMMA)
    _, scorer = parts(Table(), regularizer)
    step = step_of(range(3), (1, 2, 0))
    regularizer.pull(step, replace(scorer.context(), max_length=3))
    with pytest.raises(ConfigError, match="takes up to 3 tokens, and the model has positions for 2: lower data"):
        regularizer.pull(step, replace(scorer.context(), max_length=2))
