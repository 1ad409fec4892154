"""Noise on advantages: as much as was asked for, one draw per number, and a function of run, iteration and response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.rollouts import make_rollout
from helpers.run_comparison import differences
from helpers.updates import adamw, dapo, fit, ppo, sgd
from ibro_lightning.batches import FlatSequences
from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.batches.response_seeds import response_seeds
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.ranks import ALONE
from ibro_lightning.regularizers import InformationBottleneck, OppositeInformationBottleneck, StepContext
from ibro_lightning.regularizers.advantage_noise import advantage_noise, with_noise
from ibro_lightning.update import PolicyLoss

torch.set_num_threads(1)


def step_of(advantages: Sequence[Sequence[float]], iteration: int = 1, **others: Any) -> Experience:
    """Two responses per group, each with tokens of its own."""
    lengths, rows = [len(row) for row in advantages], range(len(advantages))
    tokens = torch.tensor([a for row in advantages for a in row], dtype=torch.float64)
    settings = {"mask": torch.ones(len(tokens), dtype=torch.bool), "groups": torch.tensor([row // 2 for row in rows])}
    return Experience(
        sequences=FlatSequences.collate([[1]] * len(rows), [[row + 3, *[1] * 9][: lengths[row]] for row in rows]),
        old_logp=None,
        old_entropy=None,
        advantages=tokens,
        temperature=1.0,
        iteration=iteration,
        **{**settings, **others},
    )


def noise_of(step: Experience, noise: float = 1.0, purpose: str = "ib") -> Tensor:
    return advantage_noise(step, noise, ALONE, purpose)


def responses(count: int, seed: int = 0) -> list[list[float]]:
    """Of DAPO: one advantage each, of 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    values, lengths = torch.randn(count, generator=generator), torch.randint(1, 6, (count,), generator=generator)
    return [[value] * length for value, length in zip(values.tolist(), lengths.tolist(), strict=True)]


def deviation(values: Tensor) -> float:
    return values.std(correction=0).item()


# How much.


def test_responses_with_one_advantage_get_one_draw_of_the_asked_for_deviation() -> None:
    step = step_of([[3 * a for a in row] for row in responses(4000)])
    found = noise_of(step, 0.5)
    rows = torch.stack([part[0] for part in found.split(step.lengths.tolist())])
    assert torch.equal(found, step.per_token(rows))
    standard = rows / (0.5 * deviation(step.advantages))
    assert abs(standard.mean()) < 4 / math.sqrt(4000)
    assert standard.square().mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 4000))
    assert (standard.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.03)
    own = torch.stack([part[0] for part in step.advantages.split(step.lengths.tolist())])
    assert abs(torch.corrcoef(torch.stack([rows, own]))[0, 1]) < 4 / math.sqrt(4000)


def test_tokens_with_advantages_of_their_own_get_a_draw_each() -> None:
    generator = torch.Generator().manual_seed(1)
    step = step_of(torch.randn(500, 8, generator=generator).tolist())
    found = noise_of(step, 2.0) / (2.0 * deviation(step.advantages))
    assert abs(found.mean()) < 4 / math.sqrt(4000)
    assert found.square().mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 4000))
    columns = torch.corrcoef(found.reshape(500, 8).T)
    assert (columns - torch.eye(8)).abs().max() < 4.5 / math.sqrt(500)


def test_each_response_by_its_own_advantages() -> None:
    step = step_of([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [-1.0], [0.5, 0.5]])
    first, second, third, fourth = noise_of(step).split([3, 3, 1, 2])
    assert len(set(first.tolist())) == len(set(fourth.tolist())) == 1
    assert len(set(second.tolist())) == 3
    assert len({*first.tolist(), *second.tolist(), *third.tolist(), *fourth.tolist()}) == 1 + 3 + 1 + 1


def test_tokens_outside_the_loss_have_no_noise_and_no_say() -> None:
    step = step_of([[1.0, 1.0, 1.0], [-1.0, -1.0], [0.5]])
    mask = torch.tensor([True, False, True, True, True, True])
    clean = noise_of(replace(step, mask=mask))
    garbage = torch.where(mask, step.advantages, torch.nan)
    assert torch.equal(noise_of(replace(step, mask=mask, advantages=garbage)), clean)
    assert clean[1] == 0.0
    assert clean[0] == clean[2] != 0.0
    valid = step.advantages[mask]
    ratio = clean[0] / noise_of(step)[0]
    assert ratio.item() == pytest.approx(deviation(valid) / deviation(step.advantages), rel=1e-12)


def test_without_a_spread_of_advantages_there_is_no_noise() -> None:
    assert not noise_of(step_of([[0.0, 0.0], [0.0]])).any()
    assert not noise_of(step_of([[0.5, 0.5], [0.5]])).any()
    nothing = step_of([[1.0, 2.0], [0.0]])
    assert not noise_of(replace(nothing, mask=torch.zeros_like(nothing.mask))).any()


def test_responses_without_tokens_have_none() -> None:
    assert noise_of(step_of([[], []])).shape == (0,)
    some = step_of([[], [1.0], [-1.0, -1.0]])
    assert (noise_of(some) != 0).all()
    assert not with_noise(some, 0.5, ALONE).advantages.isnan().any()


# Where it comes from.


def test_it_depends_on_seed_iteration_purpose_group_and_response_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    step = step_of(responses(6))
    found = noise_of(step)
    torch.manual_seed(99)  # torch's generator is not read
    assert torch.equal(noise_of(step), found)
    assert not (noise_of(replace(step, iteration=2)) == found).any()
    assert not (noise_of(step, purpose="advantage") == found).any()
    assert not (noise_of(replace(step, groups=step.groups + 1)) == found).any()
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert not (noise_of(step) == found).any()


def test_neither_order_nor_ranks_nor_steps_change_a_draw() -> None:
    """Whole groups of a rollout, on a rank or in a step."""
    step = step_of(responses(8))
    seeds = response_seeds(step, "any")
    for rows in ([7, 2, 4, 0, 1, 5, 6, 3], [0, 1, 4, 5], [6, 7], [2, 3]):
        assert torch.equal(response_seeds(step.select(torch.tensor(rows)), "any"), seeds[rows])
    assert len(set(seeds.tolist())) == 8


def test_equal_responses_to_a_prompt_have_draws_of_their_own() -> None:
    sequences = FlatSequences.collate([[1]] * 4, [[5, 2], [5, 2], [5, 2], [7, 2]])
    step = replace(step_of([[1.0, 1.0]] * 4, groups=torch.tensor([0, 0, 1, 1])), sequences=sequences)
    assert len(set(response_seeds(step, "any").tolist())) == 4


# In IB's term.


def alone() -> StepContext:
    return StepContext(policy=lambda *_: (), score=lambda *_: ())  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("kind", [InformationBottleneck, OppositeInformationBottleneck])
def test_noise_in_the_term_of_ib_is_on_its_advantages_before_they_are_transformed(kind: Any) -> None:
    step = step_of([[1.0, 1.0], [-1.0], [0.5], [-0.5, -0.5]])
    noise = noise_of(step, 0.8)
    sign = 1 if kind is InformationBottleneck else -1
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    for transform in ("none", "sign"):
        regularizer = kind(0.5, transform=transform, noise=0.8)
        prepared = regularizer.prepare(step, alone())
        assert torch.equal(prepared.extra["ib_noise"], noise)
        assert torch.equal(prepared.advantages, step.advantages), "the policy loss has none"
        micro = prepared.micro_batch()
        stats: Any = replace(_stats(micro), entropy=_padded(step, entropy))
        weight = step.advantages + noise
        expected = sign * (weight.sign() if transform == "sign" else weight) * entropy
        assert torch.equal(regularizer.objective(stats)[micro.mask], expected)
        assert prepared.metrics["regularizer/ib_mean_weight"] == pytest.approx(
            (sign * expected / entropy).mean().item(), rel=1e-12
        )


def _stats(micro: Any) -> Any:
    zeros = torch.zeros_like(micro.advantages)
    return TokenStats(zeros, zeros, zeros, zeros, micro.advantages, micro.mask, micro.extra)


def _padded(step: Experience, values: Tensor) -> Tensor:
    return step.with_extra(values=values).micro_batch().extra["values"]


@pytest.mark.parametrize("kind", [InformationBottleneck, OppositeInformationBottleneck])
def test_rows_without_an_advantage_run_backward_only_where_noise_moves_them(kind: Any) -> None:
    step = step_of([[1.0, 1.0], [-1.0], [0.0], [0.0, 0.0]])
    for noise, rows in ((0.0, [True, True, False, False]), (0.5, [True] * 4)):
        regularizer = kind(0.5, noise=noise)
        assert regularizer.zero_without_advantage == (noise == 0)
        assert PolicyLoss(regularizer).rows_with_gradient(step).tolist() == rows
    assert PolicyLoss(kind(0.0, noise=0.5)).rows_with_gradient(step).tolist() == [True, True, False, False]
    assert PolicyLoss().rows_with_gradient(with_noise(step, 0.5, ALONE)).all()


# Everywhere.


def test_no_noise_is_the_same_rollout_itself() -> None:
    step = step_of(responses(4))
    assert with_noise(step, 0.0, ALONE) is step
    prepared = InformationBottleneck(0.5).prepare(step, alone())
    assert prepared.extra == {}
    assert prepared.advantages is step.advantages


def test_dapo_has_one_draw_per_response_on_the_advantages_of_its_estimator() -> None:
    plain, noisy = dapo(), dapo(advantage_noise=0.7)
    rollout = make_rollout(iteration=3)
    before, after = plain.prepare(rollout), noisy.prepare(rollout)
    assert torch.equal(after.advantages, before.advantages + advantage_noise(before, 0.7, ALONE, "advantage"))
    added = (after.advantages - before.advantages).split(after.lengths.tolist())
    assert all((row - row[0]).abs().max() < 1e-12 for row in added)
    assert all((row != 0).all() for row in added)
    assert torch.equal(before.rewards, after.rewards)  # type: ignore[arg-type]


def test_ppo_has_one_draw_per_token_and_leaves_the_critic_alone() -> None:
    settings: dict[str, Any] = {"gae_lambda": 0.9, "critic_optimizer": sgd}
    plain, noisy = ppo(**settings), ppo(**settings, advantage_noise=0.7)
    for module in (plain, noisy):
        _moved(module.critic)
    rollout = make_rollout(iteration=3)
    before, after = plain.prepare(rollout), noisy.prepare(rollout)
    added = after.advantages - before.advantages
    torch.testing.assert_close(added, advantage_noise(before, 0.7, ALONE, "advantage"), rtol=1e-9, atol=1e-12)
    assert len(added.unique()) == len(added)
    for name in ("values", "returns"):
        assert torch.equal(before.extra[name], after.extra[name])


def _moved(critic: Any) -> None:
    """Values of a fresh critic are all 0, and advantages of a response then one number."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.parametrize("algorithm", ["DAPO", "PPO"])
def test_micro_batches_change_neither_noise_nor_update(algorithm: str) -> None:
    def weights(micro_batch_tokens: int) -> dict[str, Tensor]:
        settings: dict[str, Any] = {
            "regularizer": InformationBottleneck(0.5, noise=0.5),
            "advantage_noise": 0.5,
            "micro_batch_tokens": micro_batch_tokens,
            "mini_batch_prompts": 2,
            "update_epochs": 2,
            "optimizer": sgd,
            "warmup_steps": 0,
        }
        module = dapo(**settings) if algorithm == "DAPO" else ppo(**settings, critic_optimizer=adamw(0.01))
        _, recorder = fit(module, [make_rollout(iteration=n) for n in (1, 2)])
        assert not recorder.unchanged(0, 2, "policy.")
        return recorder.weights[-1]

    whole, one_by_one = weights(10_000), weights(1)
    for name, value in whole.items():
        torch.testing.assert_close(one_by_one[name], value, rtol=1e-9, atol=1e-11)


WITH_ALL = """
model:
  init_args:
    advantage_noise: 0.5
    regularizer:
      class_path: MarginalEntropy
      init_args: {gamma: 0.1, base: {class_path: InformationBottleneck, init_args: {coef: 0.5, noise: 0.5}}}
trainer: {limit_val_batches: 0, enable_progress_bar: false}
"""


@pytest.mark.slow
def test_a_resumed_run_has_the_same_noise_bit_for_bit(workspace: Path) -> None:
    """And the same probes of MarginalEntropy."""
    (workspace / "all.yaml").write_text(WITH_ALL)

    def run(folder: str, *argv: str) -> None:
        main(["fit", "--config", "tiny.yaml", "--config", "all.yaml", "--trainer.default_root_dir", folder, *argv])

    run("whole", "--trainer.max_epochs", "3")
    run("parts", "--trainer.max_epochs", "1")
    (Path("parts") / "config.yaml").unlink()
    run("parts", "--trainer.max_epochs", "3", "--ckpt_path", "last")
    assert not [line for line in differences(Path("whole"), Path("parts")) if "curve" in line or "safetensors" in line]


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, True, "0.5"])
def test_wrong_noise_is_refused(wrong: Any) -> None:
    cases = {
        "noise": lambda: InformationBottleneck(noise=wrong),
        "advantage_noise": lambda: dapo(advantage_noise=wrong),
        " advantage_noise": lambda: ppo(advantage_noise=wrong),
    }
    for name, build in cases.items():
        with pytest.raises(ConfigError) as refused:
            build()
        assert str(refused.value).startswith(f"{name.strip()}: {wrong!r} - write 0 or more")
