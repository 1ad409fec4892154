"""The family of entropy methods: each against numbers worked out by hand and against its formula, one sequence at a
time in plain transformers; and, like every update, indifferent to padding, order and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from helpers.flat import flat, span
from helpers.updates import begin_step, micro_loss, token_stats
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import group_advantages
from ibro_lightning.models import PolicyOptions, PolicySource
from ibro_lightning.modules import DAPOModule
from ibro_lightning.ranks import Ranks
from ibro_lightning.regularizers import (
    IBRO,
    SIREN,
    STEER,
    AEnt,
    ClipCov,
    ConditionalEntropyShaping,
    CorrectPathEntropySuppression,
    EntroPIC,
    EntropyBonus,
    EntropyRatioClip,
    EntropyRegularizer,
    EntropyShapedAdvantage,
    HindsightTemplate,
    InformationBottleneck,
    KLCov,
    MarginalEntropy,
    NoRegularizer,
    OppositeInformationBottleneck,
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
    PositiveAdvantageWeight,
    RenyiBonus,
    SelfDistillation,
    StepContext,
    TopEntropyTokens,
)
from ibro_lightning.regularizers.coefficients import AdaptiveKL, Constant, EntropyBand, EntropySteps
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import Prompt

torch.set_num_threads(1)
TOKENIZER = NumberPath(size=12).tokenizer()
VOCAB = len(TOKENIZER)
TEMPERATURE = 0.8
TEMPLATE = "{prompt}{answer}>{prompt}"  # in words that the number path's tokenizer knows
# Two responses to each of four prompts; 33 tokens, one of which takes no part in the loss.
TEXTS = ["3>5:", "1:", "3>5:", "+7>2=11:", "1:", "+7>2=11:", "8>8:", "8>8:"]
ANSWERS = [5, 10, 5, 2, 10, 2, 8, 8]
GROUPS = [2, 0, 2, 1, 0, 1, 3, 3]
REWARDS = [1.0, -1.0, 0.0, 1.0, 1.0, -0.5, 0.1, 0.1]
OUTCOMES = [1.0, 0.25, 0.0, 1.0, 1.0, 0.75, math.nan, 0.0]  # pass rates: 0.5, 0.625 and 0.875 of groups 2, 0 and 1
RESPONSES = [[7, 2, 9], [1, 8, 2, 8, 1, 4], [5], [9, 0, 4, 5, 2], [3, 5, 0], [0, 2, 8, 7], [4, 7, 1, 3, 20, 19]]
RESPONSES += [[5, 2, 18, 2, 6]]
N = 32


# A step by hand: no model, entropies and log-probs as one likes.


def alone(**others: Any) -> StepContext:
    """A context without a model, on one rank."""

    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("this method needs no scoring")

    settings = {"policy": nothing, "score": nothing, "tokenizer": None, "seed": 0}
    return StepContext(**{**settings, **others})


def step_of(
    advantages: Sequence[Sequence[float]],
    old_logp: Sequence[Sequence[float]] | None = None,
    old_entropy: Sequence[Sequence[float]] | None = None,
    mask: Sequence[Sequence[int]] | None = None,
) -> Experience:
    a = torch.tensor(advantages, dtype=torch.float64)
    rows, width = a.shape
    other = [a.new_zeros(a.shape) if x is None else torch.tensor(x, dtype=a.dtype) for x in (old_logp, old_entropy)]
    valid = torch.ones(a.shape, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    seqs = FlatSequences.collate([[1]] * rows, [[1] * width] * rows)
    values = (x.flatten() for x in (*other, a, valid))  # [N] each
    return Experience(seqs, *values, torch.zeros(rows, dtype=torch.long), 1.0)


def stats_of(
    step: Experience, entropy: Tensor | None = None, logp: Tensor | None = None, **extra: Tensor
) -> TokenStats:
    """Of the step in one micro-batch, ``[B, T]`` each."""
    micro = step.micro_batch()
    return TokenStats(
        micro.old_logp if logp is None else logp,
        micro.old_entropy if entropy is None else entropy,
        micro.old_logp,
        micro.old_entropy,
        micro.advantages,
        micro.mask,
        {**micro.extra, **extra},
    )


def tensor(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# The same step on a real model.


class TinyQwen2(PolicySource):
    """Random weights, large enough that distributions are far from uniform. Throughout in float64: transformers' own
    RMSNorm computes in float32 whatever it is given, and its rounding would hide errors of 1e-8."""

    def __init__(self) -> None:
        config = Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=64,
            initializer_range=0.4,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = Qwen2ForCausalLM(config).double()
        for parent in [*self.model.modules()]:
            for name, child in [*parent.named_children()]:
                if type(child).__name__ == "Qwen2RMSNorm":
                    setattr(parent, name, nn.RMSNorm(16, eps=child.variance_epsilon, dtype=torch.float64))

    def tokenizer(self) -> Any:
        return TOKENIZER

    def config(self) -> Any:
        return self.model.config

    def build(self, options: PolicyOptions) -> Any:
        return self.model


SOURCE = TinyQwen2()


def dapo(regularizer: EntropyRegularizer, **settings: Any) -> DAPOModule:
    module = DAPOModule(SOURCE, regularizer=regularizer, **settings)
    module.configure_model()
    return module


def tokens_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def one_by_one(prompts: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """``(logp, entropy) [N]`` with gradients: each unpadded sequence on its own, over the full softmax."""
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for log_p, response in zip(distributions(prompts), RESPONSES, strict=True):
        columns[0].append(log_p[range(len(response)), response])
        columns[1].append(-(log_p.exp() * log_p).sum(dim=-1))
    return torch.cat(columns[0]), torch.cat(columns[1])


def distributions(prompts: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """``log p [n, V]`` of each response's tokens."""
    for prompt, response in zip(prompts, RESPONSES, strict=True):
        logits = SOURCE.model(torch.tensor([[*prompt, *response]])).logits[0] / TEMPERATURE
        log_p = logits - logits.exp().sum(dim=-1, keepdim=True).log()
        yield log_p[len(prompt) - 1 : -1]  # the token at position i is predicted at i − 1


def likeliest(log_p: Tensor, count: int) -> Tensor:
    """The entropy of the ``count`` likeliest tokens alone."""
    kept = log_p.sort(dim=-1, descending=True).values[:, :count]
    log_q = kept - kept.exp().sum(dim=-1, keepdim=True).log()
    return -(log_q.exp() * log_q).sum(dim=-1)


@pytest.fixture(scope="module")
def experience() -> Experience:
    """Off policy: old log-probs and entropies are spread around those of the policy, so that all clips take part."""
    prompts = tuple(Prompt(t, t, tuple(tokens_of(t)), a, content=t) for t, a in zip(TEXTS, ANSWERS, strict=True))
    seqs = FlatSequences.collate([prompt.token_ids for prompt in prompts], RESPONSES)
    with torch.no_grad():
        logp, entropy = one_by_one(prompt.token_ids for prompt in prompts)
    wide = torch.randn(2, 8, max(map(len, RESPONSES)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = [flat(values, seqs.response_lengths) for values in wide]
    advantages = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS))
    mask = torch.ones(logp.shape, dtype=torch.bool)
    mask[span(seqs.response_lengths, 3)][2] = False
    assert mask.sum() == N
    return Experience(
        sequences=seqs,
        old_logp=logp + 0.4 * noise[0],
        old_entropy=entropy * (0.3 * noise[1]).exp(),
        advantages=advantages.repeat_interleave(seqs.response_lengths),
        mask=mask,
        groups=torch.tensor(GROUPS),
        temperature=TEMPERATURE,
        prompts=prompts,
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
        outcomes=torch.tensor(OUTCOMES, dtype=torch.float64),
    )


def loss_and_gradients(module: DAPOModule, micro_batches: Iterable[Experience | MicroBatch]) -> list[Tensor]:
    """What :meth:`Updater.update` accumulates: the summed loss, then the summed gradient of each parameter."""
    parameters = list(SOURCE.model.parameters())
    total = [torch.zeros((), dtype=torch.float64), *(torch.zeros_like(p) for p in parameters)]
    for micro in micro_batches:
        loss, _ = micro_loss(module, micro)
        for place, value in zip(total, [loss.detach(), *torch.autograd.grad(loss, parameters)], strict=True):
            place += value
    return total


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To 1e-12 of the largest entry: float64 leaves about 1e-15."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * other.abs().max().item())


# Every method, with settings under which it takes part in this small step. IBRO's ratio is cut on some tokens only.

METHODS: dict[str, Callable[[], EntropyRegularizer]] = {
    "none": NoRegularizer,
    "naive": lambda: EntropyBonus(0.3),
    "ib": lambda: InformationBottleneck(0.5),
    "ib sign": lambda: InformationBottleneck(0.5, transform="sign"),
    "ib centred": lambda: InformationBottleneck(0.5, part="centred"),
    "ib uniform": lambda: InformationBottleneck(0.5, part="uniform"),
    "ib centred sign": lambda: InformationBottleneck(0.5, part="centred", transform="sign"),
    "ib uniform clip": lambda: InformationBottleneck(0.5, part="uniform", transform="clip", clip=0.6),
    "ib noise": lambda: InformationBottleneck(0.5, noise=0.8),
    "ib noise centred clip": lambda: InformationBottleneck(0.5, "centred", "clip", 0.6, 0.8),
    "opposite": lambda: OppositeInformationBottleneck(0.5),
    "opposite centred": lambda: OppositeInformationBottleneck(0.5, part="centred"),
    "ibro weighted": lambda: IBRO(0.8, beta=2.5, template=TEMPLATE),
    "ibro two-term": lambda: IBRO(0.8, beta=2.5, form="two-term", template=TEMPLATE),
    "clip-cov": lambda: ClipCov(fraction=0.15, low=0.05, high=2.0),
    "kl-cov": lambda: KLCov(fraction=0.2, kl_coef=0.7),
    "80/20": TopEntropyTokens,
    "shaped": EntropyShapedAdvantage,
    "aent": lambda: AEnt(0.5, dropped=0.4),
    "renyi": lambda: RenyiBonus(0.5),
    "steer": lambda: STEER(w_min=0.3),
    "ces": lambda: ConditionalEntropyShaping(0.5),
    "siren": lambda: SIREN(0.5, fraction=0.4, anchor=0.2),
    "hard prompts": lambda: PassRateInformationBottleneck(0.5),
    "easy prompts": lambda: PassRateInformationBottleneck(0.5, prompts="easy"),
    "mixed prompts": lambda: PassRateInformationBottleneck(0.5, prompts="mixed"),
    "by position": lambda: PositionCentredInformationBottleneck(0.5),
    "distilled": lambda: SelfDistillation(0.5, template=TEMPLATE),
    "distilled forward": lambda: SelfDistillation(0.5, direction="forward", template=TEMPLATE),
    "positive weight": lambda: PositiveAdvantageWeight(0.3),
    "entropic": lambda: EntroPIC(0.6, 1.7),
    "entropy ratio": lambda: EntropyRatioClip(low=0.2, high=0.1),
    "marginal": lambda: MarginalEntropy(0.05),
    "marginal lower": lambda: MarginalEntropy(0.05, "lower", base=EntropyBonus(0.3)),
    "marginal of three": lambda: MarginalEntropy(0.05, prompts=3, base=InformationBottleneck(0.5, part="centred")),
}
MEASURED = {
    **{name: "ib_mean_weight" for name in METHODS if name.startswith(("ib ", "opposite"))},
    "ib": "ib_mean_weight",
    "ibro weighted": "hindsight_entropy",
    "clip-cov": "clip_cov",
    "kl-cov": "kl_cov",
    "80/20": "top_entropy",
    "shaped": "advantage_addition",
    "steer": "steer_weight",
    "ces": "ces_sign",
    "siren": "siren_pull siren_entropy",
    **{name: "ib_weight" for name in METHODS if name.endswith("prompts")},
    "by position": "ib_weight",
    **{name: "ib_noise ib_mean_weight" for name in METHODS if name.startswith("ib noise")},
    "marginal": "marginal_pull",
    "marginal lower": "marginal_pull",
    "marginal of three": "ib_mean_weight marginal_pull",
}
ACTIVE = [name for name in METHODS if name != "none"]


def nucleus(log_p: Tensor, p: float = 0.8) -> Tensor:
    """The entropy of the likeliest tokens that together reach ``p``, of one distribution ``[V]``."""
    kept = log_p.sort(descending=True).values
    count = next(n for n in range(1, VOCAB + 1) if kept[:n].exp().sum() >= p)
    return likeliest(log_p[None], count)[0]


def mean_at_its_position(a: Tensor, step: Experience) -> Tensor:
    """``[N]`` the mean advantage of the group's valid tokens at each token's position."""
    token = [(row, t) for row, length in enumerate(step.lengths.tolist()) for t in range(length)]
    means = []
    for row, t in token:
        there = [a[i] for i, (r, s) in enumerate(token) if s == t and GROUPS[r] == GROUPS[row] and step.mask[i]]
        means.append(sum(there) / max(1, len(there)))
    return torch.tensor(means, dtype=torch.float64)


def marginal_term(rows: Sequence[int], step: Experience) -> Tensor:
    """The term whose gradient is that of H(r), from one response to each of some prompts."""
    texts = [TEXTS[row] for row in rows]
    assert len(set(texts)) == len(texts) >= 3
    scores = [one_by_one([tokens_of(text)] * 8)[0].split(step.lengths.tolist()) for text in texts]  # [j][row]
    logp = torch.stack([torch.stack([of_prompt[row].sum() for of_prompt in scores]) for row in rows])  # [M, M]
    surprise = -logp.detach().exp().mean(dim=1).log()
    old = torch.stack([step.old_logp.split(step.lengths.tolist())[row].sum() for row in rows])
    term = 0.0
    for i, own in enumerate(logp.diagonal()):
        others = sum(surprise[j] for j in range(len(rows)) if j != i) / (len(rows) - 1)
        term += (own.detach() - old[i]).exp().clamp(max=2) * (surprise[i] - others) * own / len(rows)
    return term


def clipped_loss(step: Experience, logp: Tensor, advantages: Tensor) -> Tensor:
    """max(−rA, −clip(r, 0.8, 1.28)A), and at most −10A if A < 0."""
    ratio = (logp - step.old_logp).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.28) * advantages)
    return torch.where(advantages < 0, torch.minimum(loss, -10 * advantages), loss)


def formula(name: str, step: Experience) -> Tensor:
    """The step's loss as the papers write it, from unbatched scores. ``step`` tells only which tokens were drawn."""
    mask, a = step.mask, torch.zeros(8, dtype=torch.float64)
    for group in range(4):
        rows = [row for row in range(8) if GROUPS[row] == group]
        rewards = np.array([REWARDS[row] for row in rows])
        a[rows] = torch.tensor((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6))
    a = a.repeat_interleave(step.lengths)
    logp, entropy = one_by_one(tokens_of(text) for text in TEXTS)

    def mean(values: Tensor) -> Tensor:
        return values[mask].sum() / N

    covariance = ((a - mean(a)) * (step.old_logp - mean(step.old_logp))).masked_fill(~mask, -torch.inf)
    plain = clipped_loss(step, logp, a)
    if name == "clip-cov":
        return mean(plain * ~step.extra["clip_cov"])
    if name == "kl-cov":  # 0.2 · 32 = 6.4
        held = covariance >= covariance.sort(descending=True).values[5]
        return mean(plain + held * (0.7 * (logp - step.old_logp).abs()))
    if name == "80/20":  # 0.2 · 32 = 6.4
        uncertain = step.old_entropy.masked_fill(~mask, -1.0)
        return mean(plain * (uncertain >= uncertain.sort(descending=True).values[5]))
    if name == "positive weight":
        return mean(torch.where(a > 0, 0.3 * plain, plain))
    if name == "entropic":
        return mean(torch.where(a > 0, 0.6 * plain, 1.7 * plain))
    if name == "entropy ratio":
        inside = (entropy > 0.8 * step.old_entropy) & (entropy < 1.1 * step.old_entropy)
        assert 3 < (inside & mask).sum() < N - 3
        return mean(torch.where(inside, plain, plain.detach()))
    if name == "shaped":
        return mean(clipped_loss(step, logp, a + torch.minimum(0.4 * step.old_entropy, a.abs() / 2)))
    if name.startswith("ibro"):
        shown = [f"{text}{answer}>{text}" for text, answer in zip(TEXTS, ANSWERS, strict=True)]
        with_answer = one_by_one(tokens_of(text) for text in shown)[1]
        if name == "ibro two-term":
            return mean(plain) + 0.8 * mean(2.5 * with_answer - entropy)
        lam = 2.5 * (with_answer / entropy).detach().clamp(max=1.0) - 1.0
        return mean(plain) + 0.8 * mean(lam * entropy)
    if name == "steer":
        p = step.old_logp.exp()
        change = (a * (1 - p) * (p.log() + step.old_entropy)).abs()
        return mean(plain * (math.log(0.3) * change / max(change[mask].max().item(), 0.02)).exp())
    if name == "ces":  # 0.2 · 32 = 6.4
        uncertain = step.old_entropy.masked_fill(~mask, -1.0)
        uncertain = uncertain >= uncertain.sort(descending=True).values[5]
        sign = torch.tensor([-1, 1, 1, -1, -1, -1, 0, 1]).repeat_interleave(step.lengths)  # right: from 0.5 on
        return mean(plain) - 0.5 * mean(uncertain * sign * entropy)
    if name == "siren":
        chosen = []
        for row, log_p in enumerate(distributions(tokens_of(text) for text in TEXTS)):
            values = torch.stack([nucleus(log_p[t]) for t in range(len(log_p)) if row != 3 or t != 2])
            chosen += sorted(values, reverse=True)[: max(1, math.floor(0.4 * len(values)))]
        return mean(plain) + 0.5 * (sum(chosen) / len(chosen) - 0.2) ** 2
    if name.endswith("prompts"):
        p = torch.tensor([{2: 0.5, 0: 0.625, 1: 0.875, 3: 0.0}[group] for group in GROUPS])
        scale = {"hard": 1 - p, "easy": p, "mixed": 4 * p * (1 - p)}[name.split()[0]]
        return mean(plain) - 0.5 * mean(scale.repeat_interleave(step.lengths) * a * entropy)
    if name == "by position":
        return mean(plain) - 0.5 * mean((a - mean_at_its_position(a, step)) * entropy)
    if name.startswith("marginal"):
        pulled = [row for row, pull in enumerate(step.row_sums(step.extra["marginal_pull"]).tolist()) if pull]
        term, sign = marginal_term(pulled, step), -1 if name == "marginal lower" else 1
        objective = {"marginal": 0.0 * entropy, "marginal lower": 0.6 * entropy}.get(name, (a - mean(a)) * entropy)
        return mean(plain) - 0.5 * mean(objective) - sign * 0.05 * (term - term.detach())
    if name.startswith("distilled"):
        shown = [f"{text}{answer}>{text}" for text, answer in zip(TEXTS, ANSWERS, strict=True)]
        teacher = torch.cat(list(distributions(tokens_of(text) for text in shown))).detach()
        policy = torch.cat(list(distributions(tokens_of(text) for text in TEXTS)))
        of, to = (policy, teacher) if name == "distilled" else (teacher, policy)
        return mean(plain) + 0.5 * mean((of.exp() * (of - to)).sum(dim=-1))
    if name in ("aent", "renyi"):
        all_of_them = torch.cat(list(distributions(tokens_of(text) for text in TEXTS)))
        kept = round(0.6 * VOCAB)
        objective = likeliest(all_of_them, kept) if name == "aent" else -all_of_them.exp().pow(2).sum(dim=-1).log()
        return mean(plain) - 0.5 * mean(objective)
    noisy = a + step.extra.get("ib_noise", 0.0)
    objective = {
        "none": lambda: 0.0 * entropy,
        "naive": lambda: entropy,
        "ib": lambda: a * entropy,
        "ib sign": lambda: a.sign() * entropy,
        "ib centred": lambda: (a - mean(a)) * entropy,
        "ib uniform": lambda: mean(a) * entropy,
        "ib centred sign": lambda: (a.sign() - mean(a.sign())) * entropy,
        "ib noise": lambda: noisy * entropy,
        "ib noise centred clip": lambda: (noisy.clamp(-0.6, 0.6) - mean(noisy.clamp(-0.6, 0.6))) * entropy,
        "ib uniform clip": lambda: mean(a.clamp(-0.6, 0.6)) * entropy,
        "opposite": lambda: -a * entropy,
        "opposite centred": lambda: (mean(a) - a) * entropy,
    }[name]()
    return mean(plain) - (0.3 if name == "naive" else 0.5) * mean(objective)


@pytest.mark.parametrize("name", METHODS)
def test_the_steps_loss_and_gradient_are_the_formula_written_out(name: str, experience: Experience) -> None:
    module = dapo(METHODS[name]())
    step = begin_step(module, experience, seed=11)
    expected = formula(name, step)
    gradients = torch.autograd.grad(expected, list(SOURCE.model.parameters()))
    assert_same(loss_and_gradients(module, [step]), [expected.detach(), *gradients])


def test_the_example_tells_all_methods_apart(experience: Experience) -> None:
    """No two methods have the same loss here, so none of the tests on it can pass for the wrong one."""
    losses = {}
    for name in METHODS:
        module = dapo(METHODS[name]())
        loss, *gradients = loss_and_gradients(module, [begin_step(module, experience, seed=11)])
        losses[name] = loss.item() + sum(gradient.abs().sum().item() for gradient in gradients)
    values = sorted(losses.values())
    assert min(b - a for a, b in pairwise(values)) > 1e-4, losses


# Invariances, for every method.

CUTS = {
    "one by one": [[row] for row in range(8)],
    "short and long": [[0, 2, 4], [1, 3, 5, 6, 7]],
    "groups torn apart": [[7, 0], [3, 1], [5, 2, 4], [6]],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", METHODS)
def test_any_cut_into_micro_batches_gives_the_same_step(name: str, cut: str, experience: Experience) -> None:
    module = dapo(METHODS[name]())
    step = begin_step(module, experience, seed=11)
    parts = [step.select(torch.tensor(rows)) for rows in CUTS[cut]]
    assert_same(loss_and_gradients(module, parts), loss_and_gradients(module, [step]))


@pytest.mark.parametrize("name", METHODS)
def test_the_token_budget_does_not_matter_to_what_is_prepared(name: str, experience: Experience) -> None:
    small, large = dapo(METHODS[name](), micro_batch_tokens=1), dapo(METHODS[name](), micro_batch_tokens=10_000)
    one, other = begin_step(small, experience, seed=11), begin_step(large, experience, seed=11)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6)
    for key, values in one.extra.items():
        torch.testing.assert_close(values, other.extra[key], rtol=1e-12, atol=1e-14)


def padded(step: Experience, side: Any, left: int, right: int) -> MicroBatch:
    """The step in a micro-batch with other padding around its rows, whose token occurs in the text too."""
    prompts = [prompt.token_ids for prompt in step.prompts]
    seqs = Sequences.collate(prompts, RESPONSES, padding_side=side)
    wide = torch.full((len(seqs), left + seqs.input_ids.shape[1] + right), 5)
    wide[:, left : wide.shape[1] - right] = torch.where(seqs.attention_mask.bool(), seqs.input_ids, 5)
    return replace(step.micro_batch(), sequences=replace(seqs, input_ids=wide, starts=seqs.starts + left))


@pytest.mark.parametrize(("side", "left", "right"), [("left", 0, 0), ("left", 2, 3), ("right", 3, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_padding_does_not_change_the_step(name: str, side: str, left: int, right: int, experience: Experience) -> None:
    module = dapo(METHODS[name]())
    step = begin_step(module, experience, seed=11)
    assert_same(loss_and_gradients(module, [padded(step, side, left, right)]), loss_and_gradients(module, [step]))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "clip-cov"])
def test_the_order_of_the_rows_does_not_change_the_step(name: str, experience: Experience) -> None:
    """Clip-Cov draws places, so it is left out; with a share of 1 it is the same below."""
    module = dapo(METHODS[name]())
    expected = loss_and_gradients(module, [begin_step(module, experience, seed=11)])
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 7, 2, 5, 4]):
        shuffled = experience.select(torch.tensor(order))
        assert_same(loss_and_gradients(module, [begin_step(module, shuffled, seed=11)]), expected)


def test_clip_cov_that_takes_all_eligible_tokens_knows_no_order(experience: Experience) -> None:
    module = dapo(ClipCov(fraction=1.0, low=0.05, high=2.0))
    step = begin_step(module, experience, seed=11)
    assert 3 < step.extra["clip_cov"].sum() < N - 3
    shuffled = experience.select(torch.tensor([3, 0, 6, 1, 7, 2, 5, 4]))
    other = loss_and_gradients(module, [begin_step(module, shuffled, seed=12)])
    assert_same(other, loss_and_gradients(module, [step]))


GARBAGE = {"old_logp": -torch.inf, "advantages": 1e6, "old_entropy": torch.nan}


@pytest.mark.parametrize("fields", [*([field] for field in GARBAGE), list(GARBAGE)], ids="+".join)
@pytest.mark.parametrize("name", METHODS)
def test_masked_tokens_have_no_say(name: str, fields: list[str], experience: Experience) -> None:
    """Old log-probs, entropies and advantages on the masked token may be any number."""
    garbage = {key: getattr(experience, key).where(experience.mask, GARBAGE[key]) for key in fields}
    module = dapo(METHODS[name]())
    expected = loss_and_gradients(module, [begin_step(module, experience, seed=11)])
    step = begin_step(module, replace(experience, **garbage), seed=11)
    assert_same(loss_and_gradients(module, [step]), expected)
    assert all(math.isfinite(value) for value in step.metrics.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_fully_masked_step_is_zero_never_nan(name: str, experience: Experience) -> None:
    """Overlong filtering may leave nothing."""
    module = dapo(METHODS[name]())
    step = begin_step(module, replace(experience, mask=torch.zeros_like(experience.mask)), seed=11)
    for values in loss_and_gradients(module, [step]):
        assert torch.equal(values, torch.zeros_like(values))
    assert step.metrics == dict.fromkeys(step.metrics, 0.0)
    _, metrics = micro_loss(module, step)
    assert metrics == dict.fromkeys(metrics, 0.0)


@pytest.mark.parametrize("name", METHODS)
def test_prepared_tensors_are_logged_as_means_over_valid_tokens(name: str, experience: Experience) -> None:
    """By hand in numpy; and nothing else is measured."""
    module = dapo(METHODS[name]())
    step = begin_step(module, experience, seed=11)
    expected = {}
    if name in MEASURED:
        regularizer = module.policy_loss.regularizer
        raw = isinstance(regularizer, InformationBottleneck) and regularizer.part == "raw"  # a curve, and no tensor
        for own in MEASURED[name].split():
            noisy = step.advantages + step.extra.get("ib_noise", 0.0)
            measured = regularizer.weight(noisy) if raw and own == "ib_mean_weight" else step.extra[own]
            values = measured.double().numpy()
            expected[f"regularizer/{own}"] = values[experience.mask.numpy()].sum() / N
            assert abs(expected[f"regularizer/{own}"]) > 1e-3 or name == "by position"  # whose mean is 0
    if name.startswith("marginal"):  # tests/test_marginal_entropy.py
        expected["regularizer/marginal_entropy"] = step.metrics["regularizer/marginal_entropy"]
    assert step.metrics == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert not any(values.requires_grad for values in step.extra.values())


@pytest.mark.parametrize("name", METHODS)
def test_preparing_a_step_leaves_the_experience_alone(name: str, experience: Experience) -> None:
    kept = {key: getattr(experience, key).clone() for key in ("advantages", "old_logp", "old_entropy", "mask")}
    begin_step(dapo(METHODS[name]()), experience, seed=11)
    assert all(torch.equal(getattr(experience, key), values) for key, values in kept.items())
    assert experience.extra == {}


# The parts of information-bottleneck regularisation.

A, H = [[2.0, -0.5, 0.0], [-3.0, 1.0, 9.0]], [[1.0, 2.0, 3.0], [4.0, 0.5, 7.0]]
VALID = [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("settings", "raw", "centred", "uniform"),
    [
        # Ā = −0.5/5 = −0.1
        ({}, [2, -1, 0, -12, 0.5], [2.1, -0.8, 0.3, -11.6, 0.55], [-0.1, -0.2, -0.3, -0.4, -0.05]),
        # signs 1, −1, 0, −1, 1: mean 0
        ({"transform": "sign"}, [1, -2, 0, -4, 0.5], [1, -2, 0, -4, 0.5], [0, 0, 0, 0, 0]),
        # 1, −0.5, 0, −1, 1: mean 0.1
        (
            {"transform": "clip"},
            [1, -1, 0, -4, 0.5],
            [0.9, -1.2, -0.3, -4.4, 0.45],
            [0.1, 0.2, 0.3, 0.4, 0.05],
        ),
    ],
)
def test_ib_parts_by_hand(settings: dict[str, Any], raw: list, centred: list, uniform: list) -> None:
    """Five valid tokens; the sixth, with A = 9 and H = 7, is masked and does not count in Ā."""
    reversed_part = [a - b for a, b in zip(centred, uniform, strict=True)]
    parts = (("raw", raw), ("centred", centred), ("uniform", uniform), ("reversed", reversed_part))
    for part, expected in parts:
        for sign, kind in ((1, InformationBottleneck), (-1, OppositeInformationBottleneck)):
            regularizer = kind(part=part, **settings)
            step = regularizer.prepare(step_of(A, old_entropy=H, mask=VALID), alone())
            values = regularizer.objective(stats_of(step)).flatten()[step.mask]
            assert values.tolist() == pytest.approx([sign * value for value in expected], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("transform", ["none", "sign", "clip"])
def test_raw_ib_is_the_sum_of_its_parts_in_value_and_gradient(transform: Any, experience: Experience) -> None:
    results = {}
    for part in ("raw", "centred", "uniform"):
        module = dapo(InformationBottleneck(1.0, part=part, transform=transform))
        step = begin_step(module, replace(experience, advantages=experience.advantages * 1.3))
        loss = loss_and_gradients(module, [step])
        plain = loss_and_gradients(dapo(NoRegularizer()), [step])
        results[part] = [a - b for a, b in zip(loss, plain, strict=True)]
    for raw, centred, uniform in zip(results["raw"], results["centred"], results["uniform"], strict=True):
        scale = max(x.abs().max().item() for x in (raw, centred, uniform))
        torch.testing.assert_close(centred + uniform, raw, rtol=0, atol=1e-12 * scale)
        assert min(x.abs().max().item() for x in (raw, centred, uniform)) > 1e-4


def test_the_centred_objective_is_the_covariance_and_the_uniform_one_the_product_of_means() -> None:
    """Under the token mean, with 64 random tokens of which some are masked; numpy's covariance."""
    generator = np.random.default_rng(0)
    a, h = generator.normal(0.3, 1.0, (8, 8)), generator.gamma(2.0, 0.5, (8, 8))
    mask = generator.random((8, 8)) < 0.7
    step = step_of(a.tolist(), old_entropy=h.tolist(), mask=mask.astype(int).tolist())
    for part, expected in (
        ("centred", np.cov(a[mask], h[mask], bias=True)[0, 1]),
        ("uniform", a[mask].mean() * h[mask].mean()),
        ("raw", (a * h)[mask].mean()),
        ("reversed", np.cov(a[mask], h[mask], bias=True)[0, 1] - a[mask].mean() * h[mask].mean()),
    ):
        regularizer = InformationBottleneck(part=part)  # type: ignore[arg-type]
        objective = regularizer.objective(stats_of(regularizer.prepare(step, alone())))
        assert objective.flatten()[step.mask].mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("transform", ["none", "sign", "clip"])
def test_the_uniform_gradient_is_the_mean_advantage_times_the_naive_one(transform: Any, experience: Experience) -> None:
    """Lengths differ, so the token mean of group-normalised advantages is not 0, nor that of their signs."""
    plain = loss_and_gradients(dapo(NoRegularizer()), [begin_step(dapo(NoRegularizer()), experience)])
    gradients = {}
    for regularizer in (EntropyBonus(1.0), InformationBottleneck(1.0, part="uniform", transform=transform, clip=0.4)):
        module = dapo(regularizer)
        loss = loss_and_gradients(module, [begin_step(module, experience)])
        gradients[type(regularizer)] = [a - b for a, b in zip(loss, plain, strict=True)]
    a = experience.advantages[experience.mask].numpy()
    mean = {"none": a, "sign": np.sign(a), "clip": np.clip(a, -0.4, 0.4)}[transform].mean()
    assert abs(mean) > 0.01
    for uniform, naive in zip(gradients[InformationBottleneck], gradients[EntropyBonus], strict=True):
        torch.testing.assert_close(uniform, mean * naive, rtol=0, atol=1e-12 * naive.abs().max().item())


def test_the_mean_advantage_counts_the_tokens_of_all_ranks() -> None:
    """This rank: advantages 2, 4. The other one: three tokens that sum to −1. Ā = (6 − 1)/(2 + 3) = 1."""
    others = iter([-1.0, 3.0])

    class TwoRanks(Ranks):
        def sum(self, value: Tensor) -> Tensor:
            return value + next(others)

    regularizer = InformationBottleneck(part="uniform")
    step = regularizer.prepare(step_of([[2.0, 4.0]]), alone(ranks=TwoRanks()))
    assert step.extra["ib_mean_weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("part", ["raw", "centred", "uniform"])
def test_the_mean_advantage_is_a_curve_and_travels_with_the_tokens_only_where_it_is_used(
    part: str, experience: Experience
) -> None:
    module = dapo(InformationBottleneck(0.5, part=part))
    step = begin_step(module, experience)
    assert ("ib_mean_weight" in step.extra) == (part != "raw")
    mean = experience.advantages[experience.mask].mean().item()
    assert abs(mean) > 0.01
    assert step.metrics["regularizer/ib_mean_weight"] == pytest.approx(mean, rel=1e-6)


def test_the_opposite_has_the_opposite_gradient_of_ib(experience: Experience) -> None:
    plain = loss_and_gradients(dapo(NoRegularizer()), [begin_step(dapo(NoRegularizer()), experience)])
    ib, opposite = (
        loss_and_gradients(module, [begin_step(module, experience)])
        for module in (dapo(InformationBottleneck(0.5)), dapo(OppositeInformationBottleneck(0.5)))
    )
    for one, other, none in zip(ib, opposite, plain, strict=True):
        assert (one - none).abs().max() > 1e-4
        torch.testing.assert_close(one - none, none - other, rtol=0, atol=1e-12 * max(1.0, one.abs().max().item()))


# IBRO.


def test_ibros_weight_by_hand() -> None:
    """β = 2: λ = 2·Hᵃ/H − 1 = −1, 0, 0.5, 1; and 1 where the answer made the token less certain. J = −λH."""
    entropy, shown = tensor(1.0, 2.0, 0.4, 0.5, 0.5), tensor(0.0, 1.0, 0.3, 0.5, 0.8)
    stats = stats_of(step_of([[0.0] * 5]), entropy=entropy, hindsight_entropy=shown)
    torch.testing.assert_close(IBRO().objective(stats), tensor(1.0, 0.0, -0.2, -0.5, -0.5))
    # A looser bound: λ = 2·1.6 − 1 = 2.2. And β = 4: λ = −1, 1, 2, 3, 3.
    assert IBRO(max_ratio=2.0).objective(stats)[0, 4].item() == pytest.approx(-1.1, rel=1e-12)
    torch.testing.assert_close(IBRO(beta=4.0).objective(stats), tensor(1.0, -2.0, -0.8, -1.5, -1.5))


def test_where_the_answer_determines_the_token_its_entropy_is_kept_in_full() -> None:
    """λ = −1 for any entropy: the term is the naive bonus there."""
    entropy = torch.logspace(-8, 1, 40, dtype=torch.float64)[None].requires_grad_()
    stats = stats_of(step_of([[0.0] * 40]), entropy=entropy, hindsight_entropy=torch.zeros(1, 40))
    objective = IBRO(beta=3.0).objective(stats)
    (grad,) = torch.autograd.grad(objective.sum(), entropy)
    assert torch.equal(objective, entropy)
    assert torch.equal(grad, torch.ones_like(entropy))


@pytest.mark.parametrize("beta", [2.0, 3.5])
def test_ibros_weight_lies_between_minus_one_and_beta_minus_one_and_is_fixed(beta: float) -> None:
    """The gradient with respect to H is −λ itself: none flows through the ratio, although H is in it."""
    generator = torch.Generator().manual_seed(0)
    entropy, shown = (torch.rand(1, 400, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    entropy[0, :3] = torch.tensor([0.0, 1e-12, 1e-300])
    shown[0, 2] = 0.0
    entropy.requires_grad_()
    objective = IBRO(beta=beta).objective(stats_of(step_of([[0.0] * 400]), entropy, hindsight_entropy=shown))
    (grad,) = torch.autograd.grad(objective.sum(), entropy)
    lam = -grad[0]
    assert objective.isfinite().all()
    assert ((lam >= -1) & (lam <= beta - 1)).all()
    assert lam[:2].tolist() == [beta - 1, beta - 1], "entropy next to 0 without the answer, and some with it"
    expected = beta * torch.minimum(shown / entropy.detach(), torch.ones(()))[0, 3:] - 1
    torch.testing.assert_close(lam[3:], expected, rtol=1e-12, atol=1e-12)


def test_ibros_two_terms_by_hand() -> None:
    """J = H − β·Hᵃ, with gradients 1 and −β."""
    entropy, shown = tensor(1.0, 2.0, 0.0).requires_grad_(), tensor(0.5, 2.5, 0.25).requires_grad_()
    objective = IBRO(beta=2.0, form="two-term").objective(
        stats_of(step_of([[0.0] * 3]), entropy, hindsight_entropy=shown)
    )
    assert objective.tolist() == [[0.0, -3.0, -0.5]]
    grads = torch.autograd.grad(objective.sum(), (entropy, shown))
    assert [grad.tolist() for grad in grads] == [[[1.0] * 3], [[-2.0] * 3]]


def test_hindsight_entropies_are_those_of_each_sequence_on_its_own(experience: Experience) -> None:
    """In both forms; only the two-term one has a gradient."""
    shown = [f"{text}{answer}>{text}" for text, answer in zip(TEXTS, ANSWERS, strict=True)]
    expected = one_by_one(tokens_of(text) for text in shown)[1].detach()
    weighted, two_term = dapo(METHODS["ibro weighted"]()), dapo(METHODS["ibro two-term"]())
    prepared = begin_step(weighted, experience).extra["hindsight_entropy"]
    torch.testing.assert_close(prepared, expected, rtol=1e-12, atol=1e-13)
    assert not prepared.requires_grad
    step = begin_step(two_term, experience)
    assert "hindsight_entropy" not in step.extra
    computed = flat(token_stats(two_term, step).extra["hindsight_entropy"], step.lengths)
    torch.testing.assert_close(computed.detach(), expected, rtol=1e-12, atol=1e-13)
    assert computed.requires_grad


@pytest.mark.parametrize("form", ["weighted", "two-term"])
def test_ibro_pays_for_its_entropies_only_while_its_coefficient_is_positive(form: Any, experience: Experience) -> None:
    regularizer = IBRO(0.0, form=form, template=TEMPLATE)
    step = regularizer.prepare(experience, alone())  # whose score() would raise
    assert step is experience
    module = dapo(regularizer)
    assert token_stats(module, begin_step(module, experience)).entropy is None


# Prompts that show the answer.


class Characters:
    """A tokenizer of one token per character, with a BOS token (1) before raw text and a visible chat template."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, text)]}

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join("<s>" if token == 1 else chr(token) for token in token_ids)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt


def shown_text(template: str, prompt: Prompt) -> str:
    """What the model reads before the response."""
    response = FlatSequences.collate([[9, 9]], [[7]])
    row = HindsightTemplate(template).sequences([prompt], response, Characters())
    ids = row.pad().input_ids[0].tolist()
    assert ids[-1] == 7
    return "".join("^" if token == 1 else chr(token) for token in ids[:-1])


def test_a_raw_prompt_is_filled_into_the_template() -> None:
    prompt = Prompt("p", "ignored", (9,), answer=42, content="6*7?")
    assert shown_text("{prompt}\nIt is {answer}.", prompt) == "^6*7?\nIt is 42."
    assert shown_text("{answer} <- {prompt}{prompt}", prompt) == "^42 <- 6*7?6*7?"


def test_a_part_of_the_answer_or_of_the_meta_data_can_be_shown() -> None:
    prompt = Prompt(
        "p", "", (9,), answer={"target": 5, "moves": ["+7", "-3"]}, meta={"solution": "*2=6"}, content="3>5:"
    )
    assert shown_text("{prompt}{answer[target]}", prompt) == "^3>5:5"
    assert shown_text("{prompt}{answer[moves][1]}", prompt) == "^3>5:-3"
    assert shown_text("{prompt}{meta[solution]}!", prompt) == "^3>5:*2=6!"
    assert shown_text("{prompt}{answer[target]} {meta[solution]}", prompt) == "^3>5:5 *2=6"


def test_braces_are_kept_in_prompts_and_answers_and_written_double_in_templates() -> None:
    prompt = Prompt("p", "", (9,), answer="{x}", content="f{answer} {0} }{ {{")
    assert shown_text("{{{prompt}}} = {answer}", prompt) == "^{f{answer} {0} }{ {{} = {x}"


def test_in_a_chat_the_answer_goes_into_the_last_user_message() -> None:
    """Through the chat template, which writes its own special tokens: no second BOS."""
    messages = [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "Let me"},
    ]
    prompt = Prompt("p", "", (9,), answer=4, content=messages)
    expected = "<system>Be {brief}.<user>1+1?<assistant>2<user>2+2? (4)<assistant>Let me"
    assert shown_text("{prompt} ({answer})", prompt) == expected
    assert messages[3] == {"role": "user", "content": "2+2?"}, "the prompt itself does not change"


def test_a_real_chat_template_is_applied() -> None:
    tokenizer = NumberPath(size=12).tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    prompt = Prompt("p", "", (9,), answer=4, content=[{"role": "user", "content": "3:"}])
    shown = HindsightTemplate("{prompt}{answer}").sequences([prompt], FlatSequences.collate([[1]], [[7, 8]]), tokenizer)
    assert shown.pad().input_ids.tolist() == [[*tokens_of(">3:4="), 7, 8]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_responses_stay_as_they_are_behind_the_new_prompt(side: Any) -> None:
    """Row by row, whichever side of a micro-batch is padded, also where an answer is long or a response short."""
    prompts = [Prompt(str(n), "", (1,) * (n + 1), answer="9" * (5 - 2 * n), content="ab"[:n]) for n in range(3)]
    responses = [[5], [6, 0, 6, 5], [0, 0]]  # 0 is what is padded with, too
    given = Sequences.collate([prompt.token_ids for prompt in prompts], responses, padding_side=side)
    shown = HindsightTemplate("{prompt}{answer}").sequences(prompts, given.flatten(), Characters()).pad()
    for row, (text, response) in enumerate(zip(["99999", "a999", "ab9"], responses, strict=True)):
        length = int(shown.lengths[row])
        start = int(shown.starts[row])
        assert shown.input_ids[row, start : start + length].tolist() == [1, *map(ord, text), *response]
        assert shown.input_ids[row][shown.is_response[row]].tolist() == response
    assert torch.equal(shown.response_mask, given.response_mask)
    assert torch.equal(shown.response_lengths, given.response_lengths)


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "The answer is {answer}.",
        "{prompt} {solution}",
        "{prompt} {answer} {gold}",
        "{prompt} {}",
        "{0} {answer}",
        "",
        "no fields",
        "{prompt} {answer",
        "{prompt} {answer} }",
        "{{prompt}} {answer}",
    ],
)
def test_a_template_that_cannot_be_right_is_refused_by_name(template: str) -> None:
    for build in (HindsightTemplate, lambda text: IBRO(template=text)):
        with pytest.raises(ConfigError) as refused:
            build(template)
        assert refused.value.setting == "template"


@pytest.mark.parametrize(
    ("template", "answer", "content"),
    [
        ("{prompt}{answer[target]}", 5, "3>5:"),
        ("{prompt}{answer[target]}", {"goal": 5}, "3>5:"),
        ("{prompt}{answer[3]}", [5], "3>5:"),
        ("{prompt}{answer.target}", {"target": 5}, "3>5:"),
        ("{prompt}{meta[solution]}", 5, "3>5:"),
        ("{prompt}{answer}", 5, [{"role": "system", "content": "3>5:"}]),
        ("{prompt}{answer:d}", "5", "3>5:"),
        ("{prompt}{answer!x}", 5, "3>5:"),
        ("{prompt}{answer[]}", 5, "3>5:"),
    ],
)
def test_a_template_that_does_not_fit_a_prompt_says_which(template: str, answer: Any, content: Any) -> None:
    prompt = Prompt("train/17", "", (9,), answer=answer, meta={"other": 1}, content=content)
    with pytest.raises(ConfigError, match="train/17") as refused:
        HindsightTemplate(template).content(prompt)
    assert refused.value.setting == "template"


# Clip-Cov and KL-Cov.


def test_token_covariances_by_hand_decide_what_clip_cov_may_choose() -> None:
    """Ā = 0, mean log-prob −2: c = 3·1.5 = 4.5, −1·−1 = 1, −1·−1.5 = 1.5, −1·1 = −1. Between 1 and 5: the first and
    the third. The masked token would have had c = 3·1."""
    step = step_of([[3.0, -1.0, -1.0, -1.0, 3.0]], [[-0.5, -3.0, -3.5, -1.0, -1.0]], mask=[[1, 1, 1, 1, 0]])
    chosen = ClipCov(fraction=1.0).prepare(step, alone()).extra["clip_cov"]
    assert chosen.tolist() == [True, False, True, False, False]
    for low, high, expected in ((1.0, 4.5, [2]), (0.5, 5.0, [0, 1, 2]), (-2.0, 1.25, [1, 3]), (5.0, 6.0, [])):
        chosen = ClipCov(fraction=1.0, low=low, high=high).prepare(step, alone()).extra["clip_cov"]
        assert chosen.nonzero().squeeze(-1).tolist() == expected


def many(rows: int = 40) -> Experience:
    """``rows`` × 10 tokens, the last two masked; c = ±2.5 · ±0.8 is −2 in the fifth and sixth column, else 2."""
    a, logp = [[2.5, -2.5] * 5] * rows, [[-1.2, -2.8, -1.2, -2.8, -2.8, -1.2, -1.2, -2.8, -1.2, -2.8]] * rows
    return step_of(a, logp, mask=[[1] * 8 + [0] * 2] * rows)


def test_clip_cov_draws_its_share_of_the_valid_tokens_among_the_eligible() -> None:
    """320 valid tokens, 240 of them with c = 2: 0.05 of the valid ones are 16."""
    eligible = torch.tensor(([True] * 4 + [False] * 2 + [True] * 2 + [False] * 2) * 40)
    chosen = ClipCov(fraction=0.05).prepare(many(), alone()).extra["clip_cov"]
    assert chosen.sum() == 16
    assert not (chosen & ~eligible).any()
    everything = ClipCov(fraction=1.0).prepare(many(), alone()).extra["clip_cov"]
    assert torch.equal(everything, eligible)


@pytest.mark.parametrize(("fraction", "count"), [(2e-4, 1), (1 / 320, 1), (2 / 320, 2), (0.0099, 3), (0.75, 240)])
def test_clip_cov_draws_at_least_one_token(fraction: float, count: int) -> None:
    assert ClipCov(fraction=fraction).prepare(many(), alone()).extra["clip_cov"].sum() == count


def test_clip_cov_draws_nothing_if_nothing_is_eligible() -> None:
    assert not ClipCov(low=3.0, high=4.0).prepare(many(), alone()).extra["clip_cov"].any()


def test_clip_covs_draw_is_a_function_of_the_seed() -> None:
    def draw(seed: int) -> Tensor:
        torch.rand(seed % 97 + 1)  # the global generator moves on, the draw does not
        return ClipCov(fraction=0.05).prepare(many(), alone(seed=seed)).extra["clip_cov"]

    assert torch.equal(draw(5), draw(5))
    draws = {tuple(draw(seed).tolist()) for seed in (5, 6, 7, 2**62, 2**63 - 1)}
    assert len(draws) == 5
    ever = torch.stack([draw(seed) for seed in range(300)]).any(dim=0)
    assert ever.sum() == 240, "every eligible token has a chance"


def test_a_modules_clip_cov_draws_anew_in_every_step_and_again_the_same(experience: Experience) -> None:
    rollout = replace(experience, iteration=3)
    module = dapo(ClipCov(fraction=0.1, low=-5.0, high=5.0), mini_batch_prompts=4, update_epochs=3)

    def draws() -> list[list]:
        return [
            step.extra["clip_cov"].tolist()
            for step in module.updater.steps(rollout, module.policy_loss, module.context())
        ]

    first = draws()
    assert draws() == first
    assert len({str(draw) for draw in first}) == 3


def test_clip_covs_tokens_have_no_policy_gradient_and_count_in_the_denominator() -> None:
    """Ratio 1: each token's loss is −A, its gradient −A/N. Two of four tokens are drawn; N stays 4."""
    step = step_of([[3.0, -1.0, -1.0, -1.0]], [[-0.5, -3.0, -3.5, -1.0]])
    module = dapo(ClipCov(fraction=1.0))
    step = begin_step(module, step)
    micro = step.micro_batch()
    logp = micro.old_logp.clone().requires_grad_()
    loss, _ = module.policy_loss(stats_of(step, logp=logp), micro)
    (grad,) = torch.autograd.grad(loss, logp)
    assert step.num_tokens == 4
    assert loss.item() == pytest.approx((1.0 + 1.0) / 4, rel=1e-12)
    torch.testing.assert_close(grad, tensor(0.0, 0.25, 0.0, 0.25))


def test_kl_cov_holds_the_tokens_with_the_highest_covariance() -> None:
    """c = 4.5, 1, 1.5, −1 and a masked token's 30: half of four tokens, then a quarter, then at least one."""
    step = step_of([[3.0, -1.0, -1.0, -1.0, 30.0]], [[-0.5, -3.0, -3.5, -1.0, -1.0]], mask=[[1, 1, 1, 1, 0]])
    for fraction, expected in ((0.5, [0, 2]), (0.75, [0, 1, 2]), (0.25, [0]), (2e-3, [0]), (1.0, [0, 1, 2, 3])):
        held = KLCov(fraction=fraction).prepare(step, alone()).extra["kl_cov"]
        assert held.nonzero().squeeze(-1).tolist() == expected


def test_kl_cov_adds_beta_times_the_absolute_log_ratio_to_the_held_tokens() -> None:
    """log r = 0.1, 0.1, −0.1, 0.1; β = 0.5; tokens 0 and 2 are held: +0.05 each, gradients +0.5 and −0.5."""
    step = step_of([[3.0, -1.0, -1.0, -1.0]], [[-0.5, -3.0, -3.5, -1.0]])
    regularizer = KLCov(fraction=0.5, kl_coef=0.5)
    step = regularizer.prepare(step, alone())
    logp = (step.micro_batch().old_logp + tensor(0.1, 0.1, -0.1, 0.1)).requires_grad_()
    plain = tensor(1.0, 2.0, 3.0, 4.0)
    shaped = regularizer.shape_policy_loss(plain, stats_of(step, logp=logp))
    torch.testing.assert_close(shaped.detach(), tensor(1.05, 2.0, 3.05, 4.0))
    (grad,) = torch.autograd.grad(shaped.sum(), logp)
    assert grad.tolist() == [[0.5, 0.0, -0.5, 0.0]]


# 80/20.


def test_only_the_most_uncertain_tokens_are_learned_from() -> None:
    """Ten valid tokens, a fifth of them: entropies 0.9 and 0.8. The masked tokens' are higher still."""
    h = [[0.1, 0.9, 0.3, 7.0, 0.5, 0.2], [0.4, 0.6, 0.7, 0.8, 0.0, 8.0]]
    mask = [[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]
    module = dapo(TopEntropyTokens())
    step = begin_step(module, step_of([[1.0] * 6, [-2.0] * 6], old_entropy=h, mask=mask))
    micro = step.micro_batch()
    assert micro.extra["top_entropy"].nonzero().tolist() == [[0, 1], [1, 3]]
    logp = micro.old_logp.clone().requires_grad_()
    loss, _ = module.policy_loss(stats_of(step, logp=logp), micro)
    (grad,) = torch.autograd.grad(loss, logp)
    expected = torch.zeros(2, 6, dtype=torch.float64)
    expected[0, 1], expected[1, 3] = -0.1, 0.2  # −A/N with N = 10, not 2
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx((-1.0 + 2.0) / 10, rel=1e-12)


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (35, 7), (100, 20), (999, 199)])
def test_exactly_a_fifth_of_the_valid_tokens_is_chosen_even_among_equals(tokens: int, count: int) -> None:
    """The first tokens of a group share one state, so equal entropies are common."""
    for h in ([0.5] * 1000, [float(n % 7) for n in range(1000)]):
        step = step_of([[1.0] * 1000], old_entropy=[h], mask=[[1] * tokens + [0] * (1000 - tokens)])
        chosen = TopEntropyTokens().prepare(step, alone()).extra["top_entropy"]
        assert chosen.sum() == count
        assert not (chosen & ~step.mask).any()
        rest = step.old_entropy[step.mask & ~chosen]
        assert not len(rest) or step.old_entropy[chosen].min() >= rest.max()


@pytest.mark.parametrize("method", [TopEntropyTokens, KLCov])
def test_rounding_does_not_choose_between_equal_tokens(method: type[TopEntropyTokens] | type[KLCov]) -> None:
    """Of three rows that begin alike, up to rounding, the first groups' are chosen, whatever their order."""
    generator = torch.Generator().manual_seed(0)
    name = "top_entropy" if method is TopEntropyTokens else "kl_cov"
    for _ in range(5):
        noise = 1e-6 * torch.rand(3, 3, generator=generator)
        order = torch.randperm(3, generator=generator)
        same = torch.tensor([[3.0, 1.0, 1.0]] * 3) + noise
        step = step_of([[3.0, 0.0, 0.0]] * 3, old_entropy=same.tolist(), old_logp=same.tolist())
        chosen = method(fraction=0.23).prepare(replace(step, groups=order), alone()).extra[name]
        assert order[chosen.view(3, 3)[:, 0]].sort().values.tolist() == [0, 1], chosen


def test_all_tokens_are_learned_from_with_a_fraction_of_one(experience: Experience) -> None:
    all_of_them, none = dapo(TopEntropyTokens(fraction=1.0)), dapo(NoRegularizer())
    assert_same(
        loss_and_gradients(all_of_them, [begin_step(all_of_them, experience)]),
        loss_and_gradients(none, [begin_step(none, experience)]),
    )


# Entropy-shaped advantages.


def test_shaped_advantages_by_hand() -> None:
    """min(0.4·H, |A|/2) on top: 0.4·0.5 = 0.2; |2|/2 = 1 below 0.4·10; for A = −2 as well, towards 0; 0 stays 0."""
    step = step_of([[2.0, 2.0, -2.0, -2.0, 0.0]], old_entropy=[[0.5, 10.0, 0.5, 10.0, 3.0]])
    shaped = EntropyShapedAdvantage().prepare(step, alone())
    torch.testing.assert_close(shaped.advantages, tensor(2.2, 3.0, -1.8, -1.0, 0.0)[0])
    torch.testing.assert_close(shaped.extra["advantage_addition"], tensor(0.2, 1.0, 0.2, 1.0, 0.0)[0])
    other = EntropyShapedAdvantage(scale=1.0, kappa=4.0).prepare(step, alone())
    torch.testing.assert_close(other.advantages, tensor(2.5, 2.5, -1.5, -1.5, 0.0)[0])


@pytest.mark.parametrize("kappa", [1.5, 2.0, 10.0])
def test_shaping_keeps_signs_and_zeros_and_stays_within_its_bound(kappa: float) -> None:
    generator = np.random.default_rng(1)
    a, h = generator.normal(size=(20, 20)), generator.gamma(1.0, 2.0, size=(20, 20))
    a[generator.random(a.shape) < 0.2] = 0.0
    shaped = EntropyShapedAdvantage(kappa=kappa).prepare(step_of(a.tolist(), old_entropy=h.tolist()), alone())
    new = shaped.advantages.view(20, 20).numpy()
    np.testing.assert_array_equal(np.sign(new), np.sign(a))
    assert (new - a >= 0).all()
    assert (np.abs(new - a) <= np.abs(a) / kappa * (1 + 1e-12)).all()
    np.testing.assert_allclose(new, a + np.minimum(0.4 * h, np.abs(a) / kappa), rtol=1e-12)


def test_shaping_takes_the_old_entropy_and_no_gradient(experience: Experience) -> None:
    """Else the policy would be paid for the entropy itself."""
    module = dapo(EntropyShapedAdvantage())
    step = begin_step(module, experience)
    stats = token_stats(module, step)
    assert stats.entropy is None
    assert not stats.advantages.requires_grad
    expected = torch.minimum(0.4 * experience.old_entropy, experience.advantages.abs() / 2)
    difference = flat(stats.advantages, step.lengths) - experience.advantages
    torch.testing.assert_close(difference[step.mask], expected[step.mask])


# Bad settings.


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (lambda: InformationBottleneck(part="center"), "part"),
        (lambda: OppositeInformationBottleneck(part="both"), "part"),
        (lambda: OppositeInformationBottleneck(transform="Sign"), "transform"),
        (lambda: OppositeInformationBottleneck(clip=0.0), "clip"),
        (lambda: InformationBottleneck(clip=math.inf), "clip"),
        (lambda: InformationBottleneck(clip=math.nan), "clip"),
        (lambda: OppositeInformationBottleneck(coef=-1.0), "coef"),
        (lambda: IBRO(coef=-1.0), "coef"),
        (lambda: IBRO(beta=-1.0), "beta"),
        (lambda: IBRO(beta=math.inf), "beta"),
        (lambda: IBRO(max_ratio=-1.0), "max_ratio"),
        (lambda: IBRO(max_ratio=math.nan), "max_ratio"),
        (lambda: IBRO(form="two_term"), "form"),
        (lambda: IBRO(template="{prompt}"), "template"),
        *((lambda f=f, k=k: k(fraction=f), "fraction") for k in (ClipCov, KLCov) for f in (0.0, -0.1, 1.1, math.nan)),
        *((lambda f=f: TopEntropyTokens(fraction=f), "fraction") for f in (0.0, -0.1, 1.1, math.nan)),
        (lambda: ClipCov(low=5.0, high=1.0), "low"),
        (lambda: ClipCov(low=1.0, high=1.0), "low"),
        (lambda: ClipCov(low=math.nan), "low"),
        (lambda: KLCov(kl_coef=-1.0), "kl_coef"),
        (lambda: KLCov(kl_coef=math.inf), "kl_coef"),
        (lambda: EntropyShapedAdvantage(scale=-0.1), "scale"),
        (lambda: EntropyShapedAdvantage(scale=math.nan), "scale"),
        (lambda: EntropyShapedAdvantage(kappa=0.9), "kappa"),
        (lambda: EntropyShapedAdvantage(kappa=math.nan), "kappa"),
        *((lambda w=w: PositiveAdvantageWeight(w), "weight") for w in (-0.1, math.nan, math.inf, "1", AdaptiveKL())),
        (lambda: EntroPIC(positive=-1.0), "positive"),
        (lambda: EntroPIC(negative=math.nan), "negative"),
        *((lambda b=b: EntropyRatioClip(low=b), "low") for b in (0.0, -0.1, 1.1, math.nan, "0.1", None)),
        *((lambda b=b: EntropyRatioClip(high=b), "high") for b in (0.0, -0.1, math.nan, "0.1", None)),
    ],
)
def test_bad_settings_are_refused_by_name(build: Callable[[], object], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build()
    assert refused.value.setting == setting


def test_defaults_are_those_of_the_papers() -> None:
    opposite, ibro, clip_cov, kl_cov, shaped = (
        OppositeInformationBottleneck(),
        IBRO(),
        ClipCov(),
        KLCov(),
        EntropyShapedAdvantage(),
    )
    assert (opposite.coef, opposite.part, opposite.transform) == (0.005, "raw", "none")
    assert (ibro.coef, ibro.beta.value, ibro.form, ibro.max_ratio) == (0.005, 2.0, "weighted", 1.0)
    assert (clip_cov.fraction, clip_cov.low, clip_cov.high) == (2e-4, 1.0, 5.0)
    assert (kl_cov.fraction, kl_cov.kl_coef.value) == (2e-3, 1.0)
    assert TopEntropyTokens().fraction == 0.2
    assert (shaped.scale.value, shaped.kappa) == (0.4, 2.0)


# Weights by the sign of the advantage, and the entropy ratio.


def test_weights_scale_the_policy_loss_by_the_sign_of_the_advantage() -> None:
    stats = stats_of(step_of([[2.0, -1.0, 0.0]]))
    loss = tensor(-2.0, 1.0, 0.0)
    assert PositiveAdvantageWeight(0.5).shape_policy_loss(loss, stats).tolist() == [[-1.0, 1.0, 0.0]]
    assert EntroPIC(0.5, 2.0).shape_policy_loss(loss, stats).tolist() == [[-1.0, 2.0, 0.0]]


def test_the_weights_of_entropic_move_against_each_other_and_both_towards_the_target() -> None:
    """Target 0.3, kp 1, ki 0.1. Entropy 0.1: e = 0.2, so 1 ∓ (0.2 + 0.02); 0.5: e = −0.2, sum 0, so 1 ± 0.2."""
    method = EntroPIC()
    for measured, positive, negative in ((0.1, 0.78, 1.22), (0.5, 1.2, 0.8), (0.3, 1.0, 1.0)):
        for coefficient in method.coefficients.values():
            coefficient.observe(measured)
        values = {name: coefficient.value for name, coefficient in method.coefficients.items()}
        assert values == pytest.approx({"coef": 0.0, "positive": positive, "negative": negative}, rel=1e-12)
    assert all(isinstance(weight, EntropyBand) for weight in method.weights.values())


def test_the_entropy_ratio_decides_by_hand_and_is_a_curve() -> None:
    """Old entropy 1: 0.95 and 1.05 are out as the bounds themselves, 0.951 and 1.049 are in. Where both are 0, 1e-8
    each: ratio 1."""
    step = step_of([[1.0] * 5], old_entropy=[[1.0, 1.0, 1.0, 1.0, 0.0]])
    stats = stats_of(step, entropy=tensor(0.9499, 0.951, 1.049, 1.0501, 0.0))
    method = EntropyRatioClip()
    assert (method.low.value, method.high.value) == (0.05, 0.05)
    outside = [True, False, False, True, False]
    assert method.outside(stats).tolist() == [outside]
    assert method.measure(stats)["entropy_ratio_clipped"].tolist() == [outside]
    loss = tensor(1.0, 2.0, 3.0, 4.0, 5.0).requires_grad_()
    shaped = method.shape_policy_loss(loss, stats)
    assert shaped.tolist() == loss.tolist()
    (gradient,) = torch.autograd.grad(shaped.sum(), loss)
    assert gradient.tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0]]


def test_the_share_of_clipped_entropy_ratios_is_logged_over_the_steps_tokens(experience: Experience) -> None:
    module = dapo(EntropyRatioClip(low=0.2, high=0.1))
    step = begin_step(module, experience)
    stats, (_, metrics) = token_stats(module, step), micro_loss(module, step)
    share = (module.regularizer.outside(stats) & stats.mask).sum().item() / N
    assert 0.1 < share < 0.9
    assert metrics["regularizer/entropy_ratio_clipped"] == pytest.approx(share, rel=1e-6)


def test_entropies_are_computed_for_a_method_that_shapes_by_them(experience: Experience) -> None:
    for method, has_entropy in ((EntropyRatioClip(), True), (EntroPIC(), False), (NoRegularizer(), False)):
        module = dapo(method)
        stats = token_stats(module, begin_step(module, experience))
        assert (stats.entropy is not None) == has_entropy


def test_the_defaults_of_the_weights_are_controllers_and_a_number_is_constant() -> None:
    assert isinstance(PositiveAdvantageWeight().weight, EntropySteps)
    assert isinstance(PositiveAdvantageWeight(0.5).weight, Constant)
    assert PositiveAdvantageWeight().coefficients.keys() == {"coef", "weight"}


def test_the_former_name_of_the_opposite_says_that_it_is_no_ces() -> None:
    with pytest.warns(FutureWarning, match=r"now OppositeInformationBottleneck: .*not the Conditional Entropy Shaping"):
        former = CorrectPathEntropySuppression(0.5, part="centred")
    assert isinstance(former, OppositeInformationBottleneck)
    assert (former.coef, former.part) == (0.5, "centred")


def test_a_hindsight_prompt_longer_than_the_model_is_refused() -> None:
    """BOS, prompt, shown answer and response: 1 + 2 + 3 + 4 tokens. Learned positions would end in an IndexError."""

    prompt = Prompt("p", "ab", (97, 98), answer="xyz", content="ab")
    responses = FlatSequences.collate([[97, 98]], [[1, 2, 3, 4]])
    template = HindsightTemplate("{answer}{prompt}")
    assert template.sequences([prompt], responses, Characters(), max_length=10).lengths.tolist() == [10]
    with pytest.raises(ConfigError, match=r"^template: .* up to 10 tokens.* positions for 8"):
        template.sequences([prompt], responses, Characters(), max_length=8)


def test_a_prompt_of_tokens_alone_cannot_show_an_answer() -> None:
    """Without a word, all prompts of all rollouts from tokens would become one: the template with "None" in it."""
    rollout = Rollout.from_tokens([[1, 2], [3]], [[4], [5]], rewards=[1.0, 0.0])
    with pytest.raises(ConfigError, match=r"^template: .*prompt 0 has tokens and no text"):
        HindsightTemplate(TEMPLATE).sequences(rollout.prompts, rollout.sequences, TOKENIZER)


def test_masked_tokens_are_not_chosen_in_place_of_certain_ones() -> None:
    """Of valid tokens with entropy 0, all are learned from with a fraction of one."""
    mask = [[0, 1, 0, 1, 0, 1, 0]]
    step = step_of([[1.0] * 7], old_entropy=[[0.0] * 7], mask=mask)
    chosen = TopEntropyTokens(fraction=1.0).prepare(step, alone()).extra["top_entropy"]
    assert chosen.int().tolist() == mask[0]
