"""The policy loss is weighted for a sampler that is not quite the policy: by hand, for every level and mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers.flat import flat, span
from helpers.models import TinyQwen2, TinySource
from helpers.quick import slow_unless
from helpers.rollouts import TEMPERATURE, make_rollout
from helpers.sampler_scores import LENGTHS, noise, rollout_of, sampler_near, scores
from helpers.updates import (
    CUTS,
    assert_same,
    begin_step,
    fit,
    micro_loss,
    ppo,
    scored_first,
    summed,
    token_losses,
    value_loss,
)
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.modules import DAPOModule
from ibro_lightning.ranks import Ranks
from ibro_lightning.regularizers import (
    ClipCov,
    EntropyBonus,
    InformationBottleneck,
    KLCov,
    NoRegularizer,
    TopEntropyTokens,
)
from ibro_lightning.types import Completion, Group, Prompt, RewardResult
from ibro_lightning.update import PlainLoop, ReferenceKL, Updater
from ibro_lightning.update.correction import SamplerCorrection, refuse_missing_logp, sampled_tokens
from ibro_lightning.update.gradient_share import regularizer_share
from ibro_lightning.update.surrogates import LOSSES

torch.set_num_threads(1)
LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "mask")
"""The rows of PROMPTS and RESPONSES as a rollout sorts them."""


def dapo(correction: SamplerCorrection | None, **settings: Any) -> DAPOModule:
    module = DAPOModule(TinyQwen2(), sampler_correction=correction, **settings)
    module.configure_model()
    return module


"""log(π_old / π_sampler) of each response, mean over its tokens: some are inside of all bounds, some outside."""


def apart(module: Any) -> Rollout:
    """From a sampler that is not quite the policy."""
    logp, _ = module.scorer.score(make_rollout().sequences, TEMPERATURE)
    return rollout_of(sampler_near(logp).clamp(max=0.0))  # noise must not make a probability above 1


def off_policy(module: Any) -> Experience:
    """Three policies: the one that learns, the one that the rollout was scored with, and the sampler's; one response
    takes no part in the loss, and one token of another."""
    experience = scored_first(module).prepare(make_rollout())
    mask = experience.mask.clone()
    mask[span(LENGTHS, 1)][2] = mask[span(LENGTHS, 4)] = False
    old_logp = experience.old_logp + noise(1, 0.3)
    return replace(experience, old_logp=old_logp, mask=mask, sampler_logp=sampler_near(old_logp))


def weights_by_hand(old: np.ndarray, sampler: np.ndarray, valid: np.ndarray, settings: Any) -> np.ndarray:
    """One response's weights; 0 where a ratio is out of bounds and dropped."""
    log_ratio = old - sampler
    if settings["level"] == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio[valid].sum())
    elif settings["level"] == "geometric":
        log_ratio = np.full_like(log_ratio, log_ratio[valid].mean())
    ratio, cap = np.exp(log_ratio), settings.get("cap", 2.0)
    if np.abs(old - sampler)[valid].mean() > settings.get("max_difference", np.inf):
        return np.zeros_like(ratio)
    if settings["mode"] == "truncate":
        return np.minimum(ratio, cap)
    floor = settings.get("floor") if settings.get("floor") is not None else 1 / cap
    return np.where((floor <= ratio) & (ratio <= cap), ratio, 0.0)


def rows_by_hand(experience: Experience) -> list[tuple[np.ndarray, ...]]:
    """``(logp, entropy, old, sampler, valid, advantages)`` of each response that takes part in the loss."""
    rows = []
    for row, (logp, entropy) in enumerate(scores()):
        fixed = (experience.old_logp, experience.sampler_logp, experience.mask, experience.advantages)
        old, sampler, valid, advantages = (values[span(LENGTHS, row)].numpy() for values in fixed)
        if valid.any():
            rows.append((logp, entropy, old, sampler, valid, advantages))
    return rows


def loss_and_gradients(module: Any, step: Experience, cut: Sequence[Sequence[int]] = CUTS[0]) -> list[Tensor]:
    parts = [step.select(torch.tensor(rows)) for rows in cut]
    return summed(lambda micro: micro_loss(module, micro), parts, list(module.policy.parameters()))


SETTINGS: list[dict[str, Any]] = [
    {"level": level, "mode": mode, "cap": cap} for level, mode, cap in itertools.product(LEVELS, MODES, [1.2, 2.0])
]
SETTINGS += [{"level": level, "mode": "mask", "cap": 1.5, "floor": 0.9} for level in LEVELS]
SETTINGS += [
    {"level": level, "mode": "truncate", "cap": 1.1, "max_difference": 0.25} for level in ("token", "sequence")
]


# The quick tests have every setting with the clipped surrogate, and every surrogate with one setting.
@pytest.mark.parametrize(
    ("settings", "surrogate"),
    slow_unless(lambda case: case[1] == "ppo" or case[0] is SETTINGS[0], itertools.product(SETTINGS, LOSSES)),
    ids=lambda one: "-".join(map(str, one.values())) if isinstance(one, dict) else None,
)
def test_the_steps_loss_by_hand_for_each_level_and_mode(settings: dict[str, Any], surrogate: Any) -> None:
    """Σ w·L / N − 0.3·Σ H / N: the bonus has no weight, and dropped tokens still count in N. A response that differs by
    more than ``max_difference`` has no bonus either, and counts in N. The same for any cut."""
    module = dapo(SamplerCorrection(**settings), surrogate=surrogate, regularizer=EntropyBonus(0.3))
    experience = off_policy(module)
    total = tokens = bounded = 0
    for logp, entropy, old, sampler, valid, advantages in rows_by_hand(experience):
        weights = weights_by_hand(old, sampler, valid, settings)
        losses = token_losses(surrogate, logp, old, valid, advantages[0])
        mismatched = np.abs(old - sampler)[valid].mean() > settings.get("max_difference", np.inf)
        total += (weights * losses - (0.0 if mismatched else 0.3) * entropy)[valid].sum()
        tokens += valid.sum()
        bounded += np.isin(weights, [0.0, settings["cap"]])[valid].sum()
    assert tokens == experience.mask.sum()
    assert 0 < bounded < tokens, "some ratios are out of bounds, and some are not"

    step = begin_step(module, experience)
    whole, *others = (loss_and_gradients(module, step, cut) for cut in CUTS)
    assert whole[0].item() == pytest.approx(total / tokens, rel=1e-9)
    for other in others:
        assert_same(other, whole)


def test_the_expected_losses_differ_so_that_none_stands_for_another() -> None:
    values = set()
    for settings in [None, *SETTINGS]:
        module = dapo(None if settings is None else SamplerCorrection(**settings))
        step = begin_step(module, off_policy(module))
        values.add(round(micro_loss(module, step)[0].item(), 7))
    assert len(values) == 1 + len(SETTINGS)


@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_is_weighted_like_the_loss(level: Any) -> None:
    """At the policy that the rollout came from, where nothing is clipped: −Σ w·A·∇logπ / N."""
    settings = {"level": level, "mode": "truncate"}
    module = dapo(SamplerCorrection(**settings))
    step = begin_step(module, scored_first(module).prepare(apart(module)))
    by_hand = torch.zeros_like(step.advantages)
    for row, (_, _, old, sampler, valid, advantages) in enumerate(rows_by_hand(step)):
        by_hand[span(LENGTHS, row)] = torch.tensor(weights_by_hand(old, sampler, valid, settings) * advantages)
    logp, _ = module.policy(step.sequences.pad(), temperature=TEMPERATURE)
    loss = -(by_hand * flat(logp, LENGTHS)).sum() / step.mask.sum()
    expected = torch.autograd.grad(loss, list(module.policy.parameters()))
    assert_same(loss_and_gradients(module, step)[1:], expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_sampler_that_is_the_policy_changes_nothing(settings: dict[str, Any]) -> None:
    """To the last bit."""
    losses = []
    for correction in (None, SamplerCorrection(**settings)):
        module = dapo(correction)
        experience = off_policy(module)
        step = begin_step(module, replace(experience, sampler_logp=experience.old_logp))
        losses.append(loss_and_gradients(module, step))
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


def test_none_knows_nothing_of_the_sampler() -> None:
    module = dapo(None)
    experience = off_policy(module)
    expected = sum(
        token_losses("ppo", logp, old, valid, advantages[0])[valid].sum()
        for logp, _, old, _, valid, advantages in rows_by_hand(experience)
    ) / int(experience.mask.sum())
    step = begin_step(module, experience)
    assert loss_and_gradients(module, step)[0].item() == pytest.approx(expected, rel=1e-9)
    elsewhere = replace(step, sampler_logp=noise(9, 3.0))
    assert all(map(torch.equal, loss_and_gradients(module, elsewhere), loss_and_gradients(module, step)))


def test_token_level_truncation_is_the_default() -> None:
    assert SamplerCorrection() == SamplerCorrection("token", "truncate", 2.0, None)
    module = DAPOModule(TinyQwen2())
    assert module.policy_loss.sampler_correction == SamplerCorrection()


def test_what_takes_no_part_in_the_loss_has_no_say_in_a_responses_weight() -> None:
    """Rows of whole-response levels: the masked token's ratio would change the weight of all others."""
    for level in ("sequence", "geometric"):
        module = dapo(SamplerCorrection(level=level))
        step = begin_step(module, off_policy(module))
        garbage = torch.where(step.mask, step.sampler_logp, -7.0)
        expected = loss_and_gradients(module, step)
        assert_same(loss_and_gradients(module, replace(step, sampler_logp=garbage)), expected)


def test_a_penalty_to_a_reference_is_not_weighted() -> None:
    """It is an expectation of its own, of the policy that learns."""
    differences = []
    for correction in (None, SamplerCorrection()):
        losses = []
        for kl in (None, ReferenceKL(0.5, policy=TinySource(seed=1))):  # type: ignore[arg-type]
            module = dapo(correction, kl=kl)
            losses.append(loss_and_gradients(module, begin_step(module, off_policy(module)))[0])
        differences.append((losses[1] - losses[0]).item())
    assert differences[0] == pytest.approx(differences[1], rel=1e-9)
    assert abs(differences[0]) > 1e-3


def test_a_step_of_which_nothing_is_left_has_no_gradient_and_no_nan() -> None:
    module = dapo(SamplerCorrection(mode="mask", cap=1.0), regularizer=NoRegularizer())
    step = begin_step(module, off_policy(module))
    assert all((value == 0).all() for value in loss_and_gradients(module, step))


# Log-probs that are not finite, and rollouts that have none.

BROKEN = [(0, 0, -math.inf), (0, 3, math.nan), (2, 1, math.inf), (5, 0, math.nan)]
"""Row, token, and what the sampler says of it."""


def with_broken(rollout: Rollout, broken: Sequence[tuple[int, int, float]] = BROKEN) -> Rollout:
    sampler_logp = rollout.sampler_logp.clone()
    for row, token, value in broken:
        sampler_logp[span(LENGTHS, row)][token] = value
    return replace(rollout, sampler_logp=sampler_logp)


@pytest.mark.parametrize(
    "correction", [None, *({"level": level, "mode": m} for level in LEVELS for m in MODES)], ids=str
)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_token_without_a_finite_log_prob_leaves_loss_and_denominator(correction: Any, aggregation: Any) -> None:
    """As if it had been masked out by hand, for any cut into micro-batches."""
    module = scored_first(
        dapo(
            None if correction is None else SamplerCorrection(**correction),
            aggregation=aggregation,
            regularizer=EntropyBonus(0.3),
        )
    )
    sound = apart(module)
    by_hand = module.prepare(sound)
    mask = by_hand.mask.clone()
    for row, token, _ in BROKEN:
        mask[span(LENGTHS, row)][token] = False
    expected = loss_and_gradients(module, begin_step(module, replace(by_hand, mask=mask)))
    experience = module.prepare(with_broken(sound))
    assert torch.equal(experience.mask, mask)
    assert torch.equal(experience.advantages, by_hand.advantages), "the reward of a response stays what it is"
    step = begin_step(module, experience)
    assert step.num_tokens == int(by_hand.mask.sum()) - len(BROKEN)
    for cut in CUTS:
        assert_same(loss_and_gradients(module, step, cut), expected)


@given(data=st.data())
@examples(max_examples=25, deadline=None)
def test_any_tokens_may_lack_a_log_prob(data: st.DataObject) -> None:
    """What is left out follows from the mask alone, whatever the sampler says there."""
    sampler_logp = data.draw(st.lists(st.sampled_from([-0.5, math.nan, -math.inf, math.inf]), min_size=6, max_size=6))
    tokens = torch.tensor(data.draw(st.lists(st.booleans(), min_size=6, max_size=6))).view(2, 3)
    values = torch.tensor(sampler_logp).view(2, 3)
    kept = sampled_tokens(values.flatten(), tokens.flatten()).view(2, 3)
    known = tokens & torch.isfinite(values)
    assert torch.equal(kept, known if known.any() else tokens)
    weights = SamplerCorrection()(torch.full((2, 3), -0.5), values, tokens)
    assert torch.equal(weights.weights, known.float())
    assert torch.equal(weights.non_finite, tokens & ~known)


def test_the_other_methods_denominators_leave_such_tokens_out_too() -> None:
    """Clip-Cov, KL-Cov and 80/20 choose a share of the tokens that take part; IB's split takes means over them."""
    sound = apart(dapo(None))
    for regularizer in (
        ClipCov(fraction=0.3),
        KLCov(fraction=0.3),
        TopEntropyTokens(fraction=0.3),
        InformationBottleneck(),
    ):
        module = scored_first(dapo(SamplerCorrection(), regularizer=regularizer))
        by_hand = module.prepare(sound)
        mask = by_hand.mask.clone()
        for row, token, _ in BROKEN:
            mask[span(LENGTHS, row)][token] = False
        hand = begin_step(module, replace(by_hand, mask=mask))
        step = begin_step(module, module.prepare(with_broken(sound)))
        assert step.extra.keys() == hand.extra.keys()
        for name in step.extra.keys() - {"sampler_logp"}:
            assert torch.equal(step.extra[name], hand.extra[name]), name
        assert_same(loss_and_gradients(module, step), loss_and_gradients(module, hand))


def test_in_ppo_such_a_token_stays_in_the_trajectory_and_leaves_both_losses_and_the_whitening() -> None:
    module = scored_first(ppo(gae_lambda=0.8))
    logp, _ = module.scorer.score(make_rollout().sequences, TEMPERATURE)
    sound = rollout_of(logp - 0.1)
    plain, broken = module.prepare(sound), module.prepare(with_broken(sound))
    assert torch.equal(plain.extra["returns"], broken.extra["returns"]), "GAE runs over all tokens"
    mask = broken.mask
    assert int(plain.mask.sum() - mask.sum()) == len(BROKEN)
    assert broken.advantages[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert broken.advantages[mask].var(unbiased=False).item() == pytest.approx(1, rel=1e-6)
    step = begin_step(module, broken)
    loss, _ = value_loss(module, step)
    values = flat(module.critic(step.sequences.pad()), LENGTHS)
    by_hand = 0.5 * ((values - broken.extra["returns"]) ** 2)[mask].mean()  # no value has moved yet: nothing is clipped
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-9)


NO_LOGP = {
    "nan": lambda logp: torch.full_like(logp, math.nan),
    "zeros": torch.zeros_like,
    "minus infinity": lambda logp: torch.full_like(logp, -math.inf),
}


@pytest.mark.parametrize("kind", NO_LOGP)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_rollout_without_sampler_log_probs_is_refused_in_one_line(kind: str, steps: int) -> None:
    module = dapo(SamplerCorrection(), update_epochs=steps)
    rollout = rollout_of(NO_LOGP[kind](noise(1, 1.0)))
    with pytest.raises(ConfigError) as refused:
        fit(module, [rollout])
    line = str(refused.value)
    assert line.startswith("sampler_correction: 'SamplerCorrection' - the sampler's log-probs of 8 of 8 responses are ")
    assert "sampler_correction: null" in line
    assert "\n" not in line


def all_but_the_first(logp: Tensor, filler: float) -> Tensor:
    firsts = LENGTHS.cumsum(0) - LENGTHS
    return torch.full_like(logp, filler).index_copy(0, firsts, logp[firsts])


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (lambda logp: torch.full_like(logp, -1e-9), "8 of 8 responses are 0 on every token"),
        (lambda logp: all_but_the_first(logp, 0.0), "responses are 0 on every token or on all but one"),
        (lambda logp: torch.full_like(logp, -1e9), r"are 1e\+09 nats per token from the policy's"),
        (lambda logp: all_but_the_first(logp, -1e9), "nats per token from the policy's"),
        (lambda logp: -logp, "of the sampler's log-probs are above 0"),
        (lambda logp: torch.full_like(logp, 0.01), "of the sampler's log-probs are above 0"),
    ],
    ids=["-1e-9", "0 behind the first", "-1e9", "-1e9 behind the first", "positive", "0.01"],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_log_probs_that_nobody_drew_by_are_refused(fill: Any, words: str, steps: int) -> None:
    module = dapo(SamplerCorrection(), update_epochs=steps)
    logp, _ = module.scorer.score(make_rollout().sequences, TEMPERATURE)
    with pytest.raises(ConfigError, match=words):
        fit(module, [rollout_of(fill(logp.detach()))])


def test_a_large_mismatch_of_precision_is_believed() -> None:
    """4 nats a token are corrected for; rounding above 0 is, too."""
    for shift, steps in itertools.product((-4.0, 5e-4), (1, 2)):
        module = dapo(SamplerCorrection(), update_epochs=steps)
        logp, _ = module.scorer.score(make_rollout().sequences, TEMPERATURE)
        sampler_logp = (logp.detach() + shift).clamp(max=5e-4)
        _, recorder = fit(module, [rollout_of(sampler_logp)])
        assert recorder.metrics[0]["sampler/non_finite"] == 0


@pytest.mark.parametrize("kind", NO_LOGP)
def test_without_a_correction_it_trains_at_full_size(kind: str) -> None:
    module = scored_first(dapo(None))
    sound = apart(module)
    offline = replace(sound, sampler_logp=NO_LOGP[kind](sound.sampler_logp))
    expected = loss_and_gradients(module, begin_step(module, module.prepare(sound)))
    assert_same(loss_and_gradients(module, begin_step(module, module.prepare(offline))), expected)
    _, recorder = fit(dapo(None), [offline])
    assert recorder.metrics[0]["sampler/non_finite"] == (0 if kind == "zeros" else int(LENGTHS.sum()))
    assert all(math.isfinite(value) for value in recorder.metrics[0].values())


def test_single_responses_of_other_origin_are_left_out_and_named_once() -> None:
    module = dapo(SamplerCorrection())
    rollout = apart(module)
    sampler_logp = rollout.sampler_logp.clone()
    sampler_logp[span(LENGTHS, 3)] = math.nan
    rollouts = [replace(rollout, sampler_logp=sampler_logp, iteration=number) for number in (1, 2)]
    with pytest.warns(UserWarning, match=r"iteration 1: 1 responses have no sampler log-probs") as warned:
        _, recorder = fit(module, rollouts)
    assert len([w for w in warned if "no sampler log-probs" in str(w.message)]) == 1
    assert [metrics["sampler/non_finite"] for metrics in recorder.metrics] == [len(scores()[3][0])] * 2
    sampler_logp = rollout.sampler_logp.clone()
    sampler_logp[span(LENGTHS, 3)] = 0.0  # not a sampler that was certain: the policy was not
    with pytest.raises(ConfigError, match=r"log-probs of 1 of 8 responses are 0 on every token"):
        fit(dapo(SamplerCorrection()), [replace(rollout, sampler_logp=sampler_logp)])


@pytest.mark.parametrize("logp", [(), None, (None, None), (math.nan, math.nan)])
def test_completions_may_come_without_log_probs(logp: Any) -> None:
    group = Group(
        Prompt("p", "text", (1,), "1"),
        (Completion((3, 4), logp, "stop", "x", 8, 0), Completion((5,), (-0.5,), "stop", "y", 8, 0)),
        (RewardResult(1.0, {"accuracy": 1.0}), RewardResult(-1.0, {"accuracy": 0.0})),
    )
    rollout = Rollout.from_groups([group], name="train", iteration=1, temperature=1.0)
    assert rollout.sampler_logp[:2].isnan().all()
    assert rollout.sampler_logp[2:].tolist() == [-0.5]


def test_another_number_of_log_probs_than_of_tokens_is_refused() -> None:
    prompt, result = Prompt("p", "text", (1,), "1"), RewardResult(1.0, {"accuracy": 1.0})
    group = Group(prompt, (Completion((3, 4), (-0.5,), "stop", "x", 8, 0),), (result,))
    with pytest.raises(RolloutError, match="prompt 'p' has 2 tokens and 1 log-probs"):
        Rollout.from_groups([group], name="train", iteration=1, temperature=1.0)


# What the curves show.


@pytest.mark.parametrize("correction", [None, SamplerCorrection(), SamplerCorrection(mode="mask", cap=1.2)], ids=str)
def test_how_far_sampler_and_policy_are_apart_is_measured_with_and_without(
    correction: SamplerCorrection | None,
) -> None:
    """By numpy, before anything is cut or dropped, over all response tokens: those out of the loss, too."""
    module = dapo(correction, overlong_filter=True)
    rollout = replace(apart(module), truncated=torch.arange(8) == 4)
    _, recorder = fit(module, [rollout])
    (metrics,) = recorder.metrics
    assert metrics["update/steps"] == 1
    log_ratio = np.concatenate([logp for logp, _ in scores()]) - rollout.sampler_logp.numpy()
    ratio = np.exp(log_ratio)
    dropped = (ratio < 1 / 1.2) | (ratio > 1.2)
    expected = {
        "sampler/ratio_mean": ratio.mean(),
        "sampler/ratio_max": ratio.max(),
        "sampler/effective_sample_size": ratio.sum() ** 2 / (ratio.size * (ratio**2).sum()),
        "sampler/kl_k1": -log_ratio.mean(),
        "sampler/kl_k3": (ratio - 1 - log_ratio).mean(),
        "sampler/logp_difference_mean": np.abs(log_ratio).mean(),
        "sampler/logp_difference_max": np.abs(log_ratio).max(),
        "sampler/non_finite": 0.0,
        "sampler/masked_share": dropped.mean() if correction is not None and correction.mode == "mask" else 0.0,
    }
    assert 0 < dropped.mean() < 1
    assert {name: value for name, value in metrics.items() if name.startswith("sampler/")} == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_mismatched_responses_are_counted_and_have_no_policy_loss(steps: int) -> None:
    """By hand: those whose mean absolute difference is above the bound; their tokens are ``masked_share``. Two of them
    differ by 0.28 in either direction, and by 0.15 in the plain mean."""
    module = dapo(SamplerCorrection(max_difference=0.25), mini_batch_prompts=None if steps == 1 else 2)
    rollout = apart(module)
    differences = [
        np.abs(rollout.sampler_logp[span(LENGTHS, row)].numpy() - logp) for row, (logp, _) in enumerate(scores())
    ]
    above = [difference.mean() > 0.25 for difference in differences]
    assert 0 < sum(above) < 8
    _, recorder = fit(module, [rollout])
    (metrics,) = recorder.metrics
    assert metrics["sampler/mismatched_responses"] == sum(above)
    tokens = sum(len(d) for d, dropped in zip(differences, above, strict=True) if dropped)
    assert metrics["sampler/masked_share"] == pytest.approx(tokens / sum(map(len, differences)), rel=1e-9)


def test_mismatched_responses_are_out_of_every_term_of_the_loss() -> None:
    """Where all responses differ by more, the loss with a bonus and a KL penalty is 0, and so is its gradient."""
    settings = {"regularizer": EntropyBonus(0.3), "kl": ReferenceKL(0.5, policy=TinyQwen2(seed=1))}
    module, free = (dapo(SamplerCorrection(max_difference=bound), **settings) for bound in (1e-9, 50.0))
    values = []
    for one in (module, free):
        step = begin_step(one, off_policy(one))
        value, *gradients = loss_and_gradients(one, step)
        values.append(value.item())
        assert any(bool(gradient.any()) for gradient in gradients) == (one is free)
    assert values[0] == 0
    assert values[1] != 0


def test_the_measured_share_of_the_regularizer_leaves_mismatched_responses_out() -> None:
    """Without an advantage the bonus is the whole loss: its share of the gradient is 1."""
    module = dapo(SamplerCorrection(max_difference=0.25), regularizer=EntropyBonus(0.3))
    step = scored_first(module).prepare(apart(module))
    step = replace(step, advantages=torch.zeros_like(step.advantages))
    updater = Updater(PlainLoop({"policy": module.policy}, []), module.updater.budget)
    share = regularizer_share(updater, step, module.policy_loss, module.context())
    assert share == pytest.approx(1.0, rel=1e-9)


def test_a_bound_that_nothing_exceeds_changes_nothing_but_that_it_is_counted() -> None:
    runs = [
        fit(module, [apart(module)])[1]
        for module in (dapo(SamplerCorrection()), dapo(SamplerCorrection(max_difference=5.0)))
    ]
    assert runs[1].metrics[0].pop("sampler/mismatched_responses") == 0
    timeless = [{n: v for n, v in run.metrics[0].items() if not n.startswith("time")} for run in runs]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(runs[0].weights[-1][n], value) for n, value in runs[1].weights[-1].items())


def test_a_response_with_a_broken_token_is_judged_by_the_others() -> None:
    old, sampler = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.2, math.nan, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    kept = SamplerCorrection(max_difference=0.11)(old, sampler, mask)  # (0.2 + 0)/2
    dropped = SamplerCorrection(max_difference=0.09)(old, sampler, mask)
    assert kept.masked.tolist() == [[False] * 3]
    assert dropped.masked.tolist() == [[True, False, True]]
    assert not dropped.weights.any()
    assert kept.non_finite.tolist() == dropped.non_finite.tolist() == [[False, True, False]]


def test_log_probs_that_are_not_finite_are_counted_and_the_step_is_taken() -> None:
    module = dapo(SamplerCorrection())
    rollout = apart(module)
    broken = rollout.sampler_logp.clone()
    for row, token, value in ((0, 0, -math.inf), (2, 1, math.nan), (5, 0, math.inf)):
        broken[span(LENGTHS, row)][token] = value
    _, recorder = fit(module, [replace(rollout, sampler_logp=broken)])
    (metrics,) = recorder.metrics
    assert metrics["sampler/non_finite"] == 3
    assert metrics["update/skipped_steps"] == 0
    assert not recorder.unchanged(0, 1, "policy.")
    for name in ("ratio_mean", "ratio_max", "effective_sample_size", "kl_k1", "kl_k3"):
        assert math.isfinite(metrics[f"sampler/{name}"])


def test_ppos_policy_loss_is_weighted_and_its_value_loss_is_not() -> None:
    """With a sampler that is far off everywhere, truncated at 2: twice the policy loss, the same critic's."""
    metrics = []
    for correction in (None, SamplerCorrection()):
        module = ppo(sampler_correction=correction, gae_lambda=0.8)
        logp, _ = module.scorer.score(make_rollout().sequences, TEMPERATURE)
        _, recorder = fit(module, [rollout_of(logp - 3.0)])
        metrics.append(recorder.metrics[0])
    plain, weighted = metrics
    assert weighted["update/policy_loss"] == pytest.approx(2 * plain["update/policy_loss"], rel=1e-9, abs=1e-12)
    assert weighted["critic/loss"] == plain["critic/loss"]
    assert weighted["sampler/ratio_max"] == pytest.approx(math.exp(3.0), rel=1e-6)


# Settings.


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"cap": 0.99}, "cap: 0.99"),
        ({"cap": -1.0}, "cap: -1.0"),
        ({"cap": math.nan}, "cap: nan"),
        ({"floor": 0.5}, "floor: 0.5"),
        ({"mode": "mask", "floor": 1.1}, "floor: 1.1"),
        ({"mode": "mask", "floor": -0.1}, "floor: -0.1"),
        ({"mode": "mask", "floor": math.nan}, "floor: nan"),
        ({"level": "word"}, "level: 'word'"),
        ({"mode": "cut"}, "mode: 'cut'"),
        ({"max_difference": 0.0}, "max_difference: 0.0"),
        ({"max_difference": -1.0}, "max_difference: -1.0"),
        ({"max_difference": math.nan}, "max_difference: nan"),
        ({"max_difference": math.inf}, "max_difference: inf"),
        ({"max_difference": "0.5"}, "max_difference: '0.5'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: Any, name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SamplerCorrection(**settings)
    assert str(refused.value).startswith(f"{name} - ")


FLAG = "--model.sampler_correction"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a recipe and flags come to."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "tiny.yaml", *arguments, "--print_config"])
    assert not stop.value.code
    out = capsys.readouterr().out
    return " ".join(out[out.index("sampler_correction:") :].split())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "level: token mode: truncate cap: 2.0 floor: null"),
        ([f"{FLAG}.level", "sequence", f"{FLAG}.mode", "mask"], "level: sequence mode: mask cap: 2.0 floor: null"),
        (
            [f"{FLAG}.mode", "mask", f"{FLAG}.cap", "5", f"{FLAG}.floor", "0.5"],
            "level: token mode: mask cap: 5.0 floor: 0.5",
        ),
        ([FLAG, "null"], "null"),
    ],
)
def test_settings_are_read_from_the_command_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert printed(capsys, *flags).startswith(f"sampler_correction: {expected} ")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{level: geometric, cap: 1.5}", "level: geometric mode: truncate cap: 1.5 floor: null"),
        ("{mode: mask, floor: 0.25}", "level: token mode: mask cap: 2.0 floor: 0.25"),
        ("null", "null"),
    ],
)
def test_settings_are_read_from_a_recipe(
    workspace: Path, capsys: pytest.CaptureFixture[str], written: str, expected: str
) -> None:
    recipe, anchor = (workspace / "tiny.yaml").read_text(), "    mini_batch_prompts: 2\n"
    assert anchor in recipe
    (workspace / "tiny.yaml").write_text(recipe.replace(anchor, f"{anchor}    sampler_correction: {written}\n"))
    assert printed(capsys).startswith(f"sampler_correction: {expected} ")


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ([f"{FLAG}.cap", "0.5"], "cap: 0.5 - "),
        ([f"{FLAG}.floor", "0.5"], "floor: 0.5 - "),
        ([f"{FLAG}.level", "word"], "level: 'word' - write one of token, sequence, geometric"),
        ([f"{FLAG}.mode", "cut"], "mode: 'cut' - write truncate or mask"),
    ],
)
def test_bad_settings_on_the_command_line_end_in_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], start: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "tiny.yaml", *flags])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    line = errors[errors.index("error:") :]
    assert line.count("\n") == 1
    assert line.startswith(f"error: model.sampler_correction.{start}")


# Whole runs.


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_coarse_sampler_shows_in_the_curves_and_the_correction_in_the_weights(workspace: Path) -> None:
    """An engine in bfloat16 for a policy in float32."""
    quick = ["fit", "--config", "tiny.yaml", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "3"]
    quick += ["--data.engine", "HFEngine", "--data.engine.dtype", "bfloat16"]
    weights = {}
    runs = {"plain": [FLAG, "null"], "token": [], "mask": [f"{FLAG}.mode", "mask", f"{FLAG}.cap", "1"]}
    for name, flags in runs.items():
        main([*quick, *flags, "--trainer.default_root_dir", name])
        logged = curves(workspace / name)
        for metric in ("ratio_mean", "ratio_max", "effective_sample_size", "kl_k1", "kl_k3", "masked_share"):
            assert [step for step, _ in logged[f"sampler/{metric}"]] == [1, 2, 3]
        for _, ratio in logged["sampler/ratio_mean"]:
            assert ratio == pytest.approx(1, abs=0.05)
        for _, share in logged["sampler/effective_sample_size"]:
            assert 0.99 < share < 1
        assert {value for _, value in logged["sampler/non_finite"]} == {0.0}
        dropped = [value for _, value in logged["sampler/masked_share"]]
        assert min(dropped) > 0.5 if name == "mask" else max(dropped) == 0
        weights[name] = load_file(workspace / name / "model" / "model.safetensors")
    for one, other in itertools.combinations(weights, 2):
        assert any(not torch.equal(weights[one][name], weights[other][name]) for name in weights[one]), (one, other)


@pytest.mark.parametrize("apart", [-12.0, 12.0])
def test_a_mean_difference_that_no_precision_explains_is_refused_in_either_direction(apart: float) -> None:
    old_logp, tokens, lengths = torch.full((8,), -14.0), torch.ones(8, dtype=torch.bool), torch.tensor([4, 4])
    with pytest.raises(ConfigError, match="are 12 nats per token from the policy's on average"):
        refuse_missing_logp(old_logp + apart, old_logp, tokens, lengths)
    assert refuse_missing_logp(old_logp + apart / 2, old_logp, tokens, lengths) == 0


class OthersHaveLogProbs(Ranks):
    def sum(self, value: Tensor) -> Tensor:
        return value + 5


def test_tokens_without_log_probs_are_left_out_if_any_rank_has_some() -> None:
    nothing, tokens = torch.full((6,), torch.nan), torch.ones(6, dtype=torch.bool)
    assert sampled_tokens(nothing, tokens).all()
    assert not sampled_tokens(nothing, tokens, OthersHaveLogProbs()).any()
