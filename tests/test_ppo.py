"""PPO: the critic, its advantages and its loss, two optimizers in one run; and DAPO's critic-free relatives."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    Qwen2ForTokenClassification,
)

from helpers.flat import flat, span, wide
from helpers.models import TinyOPT, TinySource, gpt2, gpt2_critic, qwen2, qwen2_critic, with_a_head
from helpers.rollouts import (
    GROUPS,
    PROMPTS,
    RESPONSES,
    TEMPERATURE,
    make_rollout,
    padded_further,
    reference_scores,
    rollouts,
    sequences,
    with_late,
)
from helpers.updates import adamw, begin_step, dapo, fit, micro_loss, ppo, scored_first, token_losses, value_loss
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience, TokenStats
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import (
    cispo_surrogate,
    clipped_surrogate,
    dppo_surrogate,
    dr_grpo_advantages,
    gmpo_surrogate,
    group_advantages,
    gspo_surrogate,
    reinforce_plus_plus_advantages,
    rloo_advantages,
)
from ibro_lightning.models import Critic, PolicyOptions, PretrainedPolicy, Qwen2FromScratch
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule
from ibro_lightning.regularizers import EntropyBonus, InformationBottleneck
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import RewardResult
from ibro_lightning.update.surrogates import LOSSES
from ibro_lightning.update.whitening import whiten

torch.set_num_threads(1)
LENGTHS = make_rollout().sequences.response_lengths


def reference_values(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
    """A value before each response token and one after the last, one unpadded sequence at a time."""
    values = []
    for prompt, response in rows:
        with torch.no_grad():
            outputs = model(torch.tensor([[*prompt, *response]])).logits[0, :, 0]
        values.append(outputs.double().numpy()[len(prompt) - 1 :])  # the token at position i is predicted at i − 1
    return values


def rows_of(rollout: Rollout) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [(p.token_ids, c.token_ids) for p, c in zip(rollout.prompts, rollout.completions, strict=True)]


# The critic.


@pytest.mark.parametrize("build", [qwen2_critic, gpt2_critic])
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_are_those_of_each_sequence_on_its_own(build: Callable[[], Any], side: str) -> None:
    """Column t is the state before token t, column ``length`` the state after the last one, and 0 beyond."""
    critic = Critic(build())
    expected = reference_values(critic.model, list(zip(PROMPTS, RESPONSES, strict=True)))
    assert min(np.abs(row).min() for row in expected) > 1e-4
    for some in (sequences(side), padded_further(sequences(side), 2, 1), padded_further(sequences(side), 0, 3)):
        values = critic(some).detach().numpy()
        assert values.shape == (8, 7)
        for row, of_row in enumerate(expected):
            assert len(of_row) == len(RESPONSES[row]) + 1
            np.testing.assert_allclose(values[row, : len(of_row)], of_row, rtol=1e-9, atol=1e-12)
            assert (values[row, len(of_row) :] == 0).all()


class ValueOfCurrentToken(nn.Module):
    """A critic that knows only the token it stands on, with neither positions nor a head to leave out."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids][..., None])


def test_the_value_before_a_token_is_that_of_the_token_before_it() -> None:
    critic = Critic(ValueOfCurrentToken([10.0, 11.0, 12.0]))
    for side in ("left", "right"):
        some = Sequences.collate([[0, 1], [2]], [[2, 2, 0], [1]], padding_side=side)  # type: ignore[arg-type]
        assert critic(some).tolist() == [[11, 12, 12, 10], [12, 11, 0, 0]]


def test_a_critics_gradient_goes_to_its_own_tokens_alone() -> None:
    """The value after the last token is there to bootstrap from, and each row minds its own."""
    critic = Critic(ValueOfCurrentToken([10.0, 11.0, 12.0]))
    values = critic(Sequences.collate([[0, 1], [2]], [[2, 2, 0], [1]]))
    values[0, 1:3].sum().backward()
    assert critic.model.table.grad.tolist() == [0, 0, 2]


@pytest.mark.parametrize("build", [qwen2, gpt2])
def test_from_a_language_models_folder_all_values_are_zero(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "model")
    NumberPath(size=12).tokenizer().save_pretrained(tmp_path / "model")
    critic = Critic(PretrainedPolicy(str(tmp_path / "model")).build_critic(PolicyOptions()))
    values = critic(sequences())
    assert (values == 0).all()
    assert values.dtype == torch.float32
    backbone, expected = critic.model.base_model.state_dict(), model.base_model.state_dict()
    assert backbone.keys() == expected.keys()
    assert all(torch.equal(backbone[name], expected[name]) for name in expected)
    # A head of zeros must not stop learning: it has a gradient, and with it the backbone from the next step on.
    values[:, 0].sum().backward()
    assert critic.model.get_parameter("score.weight" if build is qwen2 else "classifier.weight").grad.abs().max() > 0


def test_from_scratch_the_critic_has_the_policys_backbone_and_values_of_zero() -> None:
    source = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, seed=4)
    module = PPOModule(source)
    module.configure_model()
    policy, critic = module.policy.model.base_model.state_dict(), module.critic.model.base_model.state_dict()
    assert policy.keys() == critic.keys()
    assert all(torch.equal(policy[name], critic[name]) for name in policy)
    assert (module.critic(sequences()) == 0).all()
    assert module.policy.model.config.num_labels != 1, "the critic's settings are its own"


def test_an_exported_critic_comes_back_with_exactly_its_values(tiny_policy: Path, tmp_path: Path) -> None:
    """And the policy beside it with its own weights; the critic's folder is the one of the run that is continued."""
    module = PPOModule(str(tiny_policy))
    module.configure_model()
    with_a_head(module.critic.model)
    for parameter in module.critic.model.base_model.parameters():
        parameter.data.mul_(1.1)  # not the policy's any more
    assert module.export(tmp_path / "model") == tmp_path / "model"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "critic"}

    again = PPOModule(str(tmp_path / "model"), critic=str(tmp_path / "critic"))
    again.configure_model()
    assert torch.equal(again.critic(sequences()), module.critic(sequences()))
    assert again.critic(sequences()).abs().max() > 0.1
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.source_folders == (tmp_path / "model", tmp_path / "critic")
    AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")  # as anyone would

    fresh = PPOModule(str(tmp_path / "model"), critic=str(tiny_policy))
    fresh.configure_model()
    assert (fresh.critic(sequences()) == 0).all(), "a language model's folder has no head"


def test_an_architecture_without_a_token_classifier_is_refused(tmp_path: Path) -> None:
    source = TinyOPT()
    with pytest.raises(ConfigError, match=r"^critic: .*no critic can be made of it"):
        source.build_critic(PolicyOptions())
    source.model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^critic: '{tmp_path}' - no critic can be made of it"):
        PretrainedPolicy(str(tmp_path)).build_critic(PolicyOptions())


def test_a_critics_folder_that_is_missing_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"^critic: 'no/such/folder'"):
        PPOModule(TinySource(), critic="no/such/folder")


def test_a_critic_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    qwen2(vocab_size=24).save_pretrained(tmp_path)
    NumberPath(size=12).tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^critic: "):
        PPOModule(TinySource(), critic=str(tmp_path)).configure_model()


@pytest.mark.parametrize("weights", [True, False])
def test_a_folder_that_cannot_be_a_critics_is_refused_in_one_line(tmp_path: Path, weights: bool) -> None:
    config = qwen2().config
    config.num_labels = 3
    (Qwen2ForTokenClassification(config) if weights else config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^critic: "):
        PretrainedPolicy(str(tmp_path)).build_critic(PolicyOptions())


# Advantages and returns.


def test_the_reward_stands_on_the_last_token_and_nowhere_else() -> None:
    rollout = make_rollout()
    rewards = ppo().prepare(rollout).token_rewards
    for row, completion in enumerate(rollout.completions):
        expected = [0.0] * len(completion.token_ids)
        expected[-1] = rollout.rewards[row].item()
        assert rewards[span(LENGTHS, row)].tolist() == expected


def textbook_gae(
    reward: float, values: Sequence[float], *, gamma: float, lam: float, bootstrap: bool
) -> tuple[list[float], list[float]]:
    """Backwards over one response; ``values`` holds one more than there are tokens."""
    length = len(values) - 1
    advantages, returns = [0.0] * length, [0.0] * length
    following = 0.0
    for t in reversed(range(length)):
        last = t == length - 1
        next_value = (values[t + 1] if bootstrap else 0.0) if last else values[t + 1]
        delta = (reward if last else 0.0) + gamma * next_value - values[t]
        following = delta + gamma * lam * following
        advantages[t], returns[t] = following, following + values[t]
    return advantages, returns


GAE_SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gamma and lambda": {"gamma": 0.9, "gae_lambda": 0.7},
    "the critic's lambda is its own": {"gae_lambda": 0.5, "critic_gae_lambda": 1.0},
    "lambda follows the length": {"length_adaptive_alpha": 0.5, "gae_lambda": 0.9},
    "lambda follows the length, decoupled": {"length_adaptive_alpha": 0.5, "critic_gae_lambda": 0.25, "gamma": 0.9},
    "cut responses bootstrap": {"bootstrap_truncated": True, "gamma": 0.9, "gae_lambda": 0.7},
}


@pytest.mark.parametrize("name", GAE_SETTINGS)
def test_advantages_and_returns_are_those_of_the_textbook(name: str) -> None:
    """Then whitened over all tokens of the loss, which leaves the returns alone."""
    settings = GAE_SETTINGS[name]
    rollout = make_rollout(truncated=[1, 4])
    module = ppo(whiten_advantages=False, **settings)
    gamma, lam = settings.get("gamma", 1.0), settings.get("gae_lambda", 1.0)
    alpha = settings.get("length_adaptive_alpha")
    advantages, returns = np.zeros((8, 6)), np.zeros((8, 6))
    all_values = reference_values(module.critic.model, rows_of(rollout))
    for row, values in enumerate(all_values):
        length = len(values) - 1
        bootstrap = settings.get("bootstrap_truncated", False) and row in (1, 4)
        of_policy = min(max(1 - 1 / (alpha * length), 0.0), 1.0) if alpha else lam
        reward = rollout.rewards[row].item()
        kwargs = {"gamma": gamma, "bootstrap": bootstrap}
        advantages[row, :length], _ = textbook_gae(reward, values, lam=of_policy, **kwargs)
        of_critic = settings.get("critic_gae_lambda", lam)
        _, returns[row, :length] = textbook_gae(reward, values, lam=of_critic, **kwargs)

    experience = module.prepare(rollout)
    np.testing.assert_allclose(wide(experience.advantages, LENGTHS), advantages, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(wide(experience.extra["returns"], LENGTHS), returns, rtol=1e-6, atol=1e-8)
    for row, values in enumerate(all_values):
        np.testing.assert_allclose(experience.extra["values"][span(LENGTHS, row)], values[:-1], rtol=1e-9)

    experience = ppo(overlong_filter=True, **settings).prepare(rollout)
    counted = wide(experience.mask, LENGTHS).numpy()
    valid = advantages[counted]
    whitened = np.where(counted, (advantages - valid.mean()) / np.sqrt(valid.var() + 1e-8), 0.0)
    assert not experience.mask.all()
    np.testing.assert_allclose(wide(experience.advantages, LENGTHS), whitened, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(wide(experience.extra["returns"], LENGTHS), returns, rtol=1e-6, atol=1e-8)


def test_bootstrapping_concerns_truncated_responses_alone() -> None:
    rollout = make_rollout(truncated=[1, 4])
    ended, bootstrapped = (
        ppo(bootstrap_truncated=flag, whiten_advantages=False).prepare(rollout).extra["returns"]
        for flag in (False, True)
    )
    values = reference_values(ppo().critic.model, rows_of(rollout))
    for row in range(8):
        gain = values[row][-1] if row in (1, 4) else 0.0  # γ = λ = 1: the whole of it reaches every token
        own = span(LENGTHS, row)
        np.testing.assert_allclose(bootstrapped[own] - ended[own], gain, atol=1e-12)


def test_with_lambda_and_gamma_one_returns_are_the_rewards_whatever_the_critic_thinks() -> None:
    rollout = make_rollout()
    experience = ppo().prepare(rollout)
    expected = rollout.rewards.double().repeat_interleave(LENGTHS)
    torch.testing.assert_close(experience.extra["returns"], expected, rtol=0, atol=1e-12)


def test_after_whitening_the_ib_objective_is_the_covariance() -> None:
    """Ā = 0, so that nothing of mean(A·H) is a uniform bonus; without whitening something is."""
    rollout = make_rollout()
    for whitened in (True, False):
        module = scored_first(ppo(whiten_advantages=whitened, gae_lambda=0.8))
        experience = module.prepare(rollout)
        metrics = module.experience_metrics(experience, rollout)
        a, h = experience.advantages.numpy(), experience.old_entropy.numpy()
        assert metrics["ib/mean_product"] == pytest.approx((a * h).mean(), rel=1e-9)
        assert abs(np.cov(a, h, bias=True)[0, 1]) > 0.01
        difference = metrics["ib/mean_product"] - np.cov(a, h, bias=True)[0, 1]
        assert abs(difference) < 1e-12 if whitened else abs(difference) > 0.01
        if whitened:
            assert metrics["advantage/mean"] == pytest.approx(0, abs=1e-12)
            assert metrics["advantage/std"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 10_000])
def test_prepare_does_not_depend_on_the_token_budget(micro_batch_tokens: int) -> None:
    rollout = make_rollout()
    expected, actual = (ppo(micro_batch_tokens=n).prepare(rollout) for n in (16384, micro_batch_tokens))
    assert not actual.extra["values"].requires_grad
    torch.testing.assert_close(actual.advantages, expected.advantages, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual.extra["values"], expected.extra["values"], rtol=1e-9, atol=1e-12)


def test_explained_variance_is_measured_against_the_rewards_that_came() -> None:
    """Not against bootstrapped returns, which the critic would explain by agreeing with itself."""
    rollout = make_rollout(truncated=[1, 4])
    module = scored_first(ppo(gamma=0.9, gae_lambda=0.3, bootstrap_truncated=True))
    experience = module.prepare(rollout)
    metrics = module.experience_metrics(experience, rollout)
    values, came, returns = [], [], []
    for row, of_row in enumerate(reference_values(module.critic.model, rows_of(rollout))):
        length, reward = len(of_row) - 1, rollout.rewards[row].item()
        values += of_row[:-1].tolist()
        came += [reward * 0.9 ** (length - 1 - t) for t in range(length)]
        returns += experience.extra["returns"][span(LENGTHS, row)].tolist()
    expected = 1 - np.var(np.subtract(came, values)) / np.var(came)
    assert abs(expected) > 0.01
    assert metrics["critic/explained_variance"] == pytest.approx(expected, rel=1e-6)
    assert metrics["critic/value"] == pytest.approx(np.mean(values), rel=1e-6)
    assert metrics["critic/return"] == pytest.approx(np.mean(returns), rel=1e-6)


# The value loss.


@pytest.fixture(scope="module")
def moved() -> tuple[PPOModule, Experience]:
    """A critic that has moved since the rollout by more than the clip allows here and by less there."""
    module = ppo(gae_lambda=0.8, overlong_filter=True)
    experience = module.prepare(make_rollout(truncated=[4]))
    with_a_head(module.critic.model, seed=8)
    return module, experience


@pytest.mark.parametrize("value_clip", [0.5, 0.1, None])
def test_the_value_loss_is_the_formula_written_out(
    moved: tuple[PPOModule, Experience], value_clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """½ Σ max((V − R)², (clip(V, V_old ± c) − R)²) / N over the tokens of the loss (row 4 is filtered out)."""
    module, experience = moved
    monkeypatch.setattr(module.value_loss, "clip", value_clip)
    loss, metrics = value_loss(module, begin_step(module, experience))
    total = clipped = tokens = 0
    for row, values in enumerate(reference_values(module.critic.model, rows_of(make_rollout()))):
        for t, value in enumerate(values[:-1]):
            if row == 4:
                continue
            old, target = (experience.extra[name][span(LENGTHS, row)][t].item() for name in ("values", "returns"))
            squared = (value - target) ** 2
            if value_clip is not None:
                inside = (min(max(value, old - value_clip), old + value_clip) - target) ** 2
                clipped += inside > squared
                squared = max(squared, inside)
            total, tokens = total + 0.5 * squared, tokens + 1
    assert tokens == sum(map(len, RESPONSES)) - len(rows_of(make_rollout())[4][1])
    assert clipped == 0 if value_clip is None else 0 < clipped < tokens
    assert loss.item() == pytest.approx(total / tokens, rel=1e-9)
    assert metrics["critic/loss"] == pytest.approx(total / tokens, rel=1e-9)
    assert metrics["critic/clipped"] == pytest.approx(clipped / tokens, rel=1e-6)


# Two networks, two optimizers.


def test_the_critic_warms_up_alone_and_only_policy_updates_are_counted() -> None:
    """Two optimizer steps per rollout, four rollouts, the first two for the critic alone."""
    module = ppo(
        critic_warmup_iterations=2,
        mini_batch_prompts=2,
        warmup_steps=3,
        optimizer=adamw(0.01),
        critic_optimizer=adamw(0.04),
    )
    trainer, recorder = fit(module, rollouts(4))
    assert [recorder.unchanged(i, i + 1, "policy.") for i in range(4)] == [True, True, False, False]
    assert [recorder.unchanged(i, i + 1, "critic.") for i in range(4)] == [False] * 4
    assert trainer.global_step == 4
    steps = [{state["step"].item() for state in optimizer.state.values()} for optimizer in trainer.optimizers]
    assert steps == [{4.0}, {8.0}]
    # Each learning rate rises over the steps of its own optimizer; of two steps the mean is reported.
    assert [metrics.get("update/lr") for metrics in recorder.metrics] == [
        None,
        None,
        pytest.approx(0.01 * 1.5 / 4),
        pytest.approx(0.01 * 3.5 / 4),
    ]
    assert [metrics["critic/lr"] for metrics in recorder.metrics] == pytest.approx([0.015, 0.035, 0.04, 0.04])
    for metrics in recorder.metrics:
        assert {"critic/loss", "critic/clipped", "critic/grad_norm", "critic/explained_variance"} <= metrics.keys()
        assert metrics["update/steps"] == 2
    assert "update/policy_loss" not in recorder.metrics[1]
    assert "update/policy_loss" in recorder.metrics[2]


def test_the_critic_learns_what_responses_are_worth() -> None:
    """All there is to know: before its first token a response is worth its group's mean, after that its own reward."""
    module = ppo(critic_warmup_iterations=80, critic_optimizer=adamw(0.02), value_clip=None)
    _, recorder = fit(module, rollouts(80))
    came, best = [], []
    for row, (_, response) in enumerate(rows_of(make_rollout())):
        reward, pair = SORTED_REWARDS[row], SORTED_REWARDS[row // 2 * 2 : row // 2 * 2 + 2]
        came += [reward] * len(response)
        best += [sum(pair) / 2] + [reward] * (len(response) - 1)
    ceiling = 1 - np.var(np.subtract(came, best)) / np.var(came)
    explained = [metrics["critic/explained_variance"] for metrics in recorder.metrics]
    assert explained[0] < 0.2
    assert 0.7 < ceiling < 0.8
    assert explained[-1] == pytest.approx(ceiling, abs=0.01)


def test_neither_networks_loss_reaches_the_other() -> None:
    module = ppo(regularizer=InformationBottleneck(0.5), gae_lambda=0.8)
    step = begin_step(module, module.prepare(make_rollout()))
    value_loss(module, step)[0].backward()
    assert all(parameter.grad is None for parameter in module.policy.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in module.critic.parameters())
    module.zero_grad()
    micro_loss(module, step)[0].backward()
    assert all(parameter.grad is None for parameter in module.critic.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in module.policy.parameters())
    shared = {p.data_ptr() for p in module.policy.parameters()} & {p.data_ptr() for p in module.critic.parameters()}
    assert not shared


def test_within_a_rollout_neither_optimizer_disturbs_the_other() -> None:
    """One epoch of two steps, twice over: the policy's are the same whether the critic moves, and the reverse."""
    weights = {}
    for name, policy_rate, critic_rate in (("both", 0.01, 0.02), ("policy", 0.01, 0.0), ("critic", 0.0, 0.02)):
        module = ppo(
            optimizer=lambda p, rate=policy_rate: torch.optim.AdamW(p, lr=rate, weight_decay=0.0),
            critic_optimizer=lambda p, rate=critic_rate: torch.optim.AdamW(p, lr=rate, weight_decay=0.0),
            mini_batch_prompts=2,
            update_epochs=2,
            max_grad_norm=0.1,  # each network is clipped to it on its own
        )
        _, recorder = fit(module, rollouts(1))
        assert recorder.unchanged(0, 1, "policy.") == (name == "critic")
        assert recorder.unchanged(0, 1, "critic.") == (name == "policy")
        weights[name] = recorder.weights[-1]
    for network in ("policy", "critic"):
        mine = [key for key in weights["both"] if key.startswith(network)]
        assert all(torch.equal(weights["both"][key], weights[network][key]) for key in mine)


def broken_critic(**settings: Any) -> PPOModule:
    module = ppo(**settings)
    for parameter in module.critic.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    return module


def test_a_step_of_the_critics_without_a_finite_gradient_is_left_out_and_the_policys_is_not() -> None:
    _, recorder = fit(broken_critic(), rollouts(1))
    assert recorder.unchanged(0, 1, "critic.")
    assert not recorder.unchanged(0, 1, "policy.")
    assert recorder.metrics[0]["critic/skipped_steps"] == 1
    assert recorder.metrics[0]["update/skipped_steps"] == 0


def test_left_out_steps_of_the_critic_are_counted_and_said() -> None:
    with pytest.warns(UserWarning, match="2 of 4 optimizer steps .*not finite"):
        _, recorder = fit(broken_critic(mini_batch_prompts=2), rollouts(1))
    assert recorder.metrics[0]["critic/skipped_steps"] == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gamma", 2.0),
        ("gamma", -0.1),
        ("gamma", math.nan),
        ("gae_lambda", 1.01),
        ("critic_gae_lambda", -1.0),
        ("value_clip", 0.0),
        ("value_clip", -0.5),
        ("length_adaptive_alpha", 0.0),
        ("critic_warmup_iterations", -1),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: {value} - write"):
        PPOModule(TinySource(), **{setting: value})


@pytest.mark.parametrize("kind", [PPOModule, DAPOModule])
def test_half_precision_that_needs_gradient_scaling_is_refused(
    kind: type[PolicyModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU Lightning turns 16-mixed into bf16-mixed before anyone sees it."""
    module = kind(TinySource())
    module.configure_model()
    monkeypatch.setattr(kind, "trainer", SimpleNamespace(precision="16-mixed"))
    with pytest.raises(ConfigError, match=r"trainer\.precision: '16-mixed' - .*bf16-mixed"):
        module.configure_optimizers()


def test_an_optimizer_of_the_critics_that_refuses_its_settings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^critic_optimizer: .*-1"):
        fit(ppo(critic_optimizer=adamw(-1.0)), rollouts(1))


# Whole runs.


@pytest.fixture
def ppo_workspace(workspace: Path) -> Path:
    """The workspace with ``ppo.yaml``: one response per prompt, the first iteration for the critic alone."""
    recipe = (workspace / "tiny.yaml").read_text()
    for old, new in (
        ("class_path: DAPOModule", "class_path: PPOModule"),
        (
            "mini_batch_prompts: 2",
            "mini_batch_prompts: 8\n"
            "    critic_optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.0e-2}}\n"
            "    critic_warmup_iterations: 1",
        ),
        ("prompts_per_rollout: 4", "prompts_per_rollout: 16"),
        ("group_size: 4", "group_size: 1"),
        ("    dynamic_sampling: {max_rounds: 2, on_exhausted: fill, max_skips: 1000000}\n", ""),
    ):
        assert old in recipe
        recipe = recipe.replace(old, new)
    (workspace / "ppo.yaml").write_text(recipe)
    return workspace


def saved(run: Path, network: str) -> dict[str, Tensor]:
    return load_file(run / network / "model.safetensors")


def identical(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_ends_with_the_same_policy_and_critic_bit_for_bit(ppo_workspace: Path) -> None:
    quick = ["fit", "--config", "ppo.yaml", "--trainer.limit_val_batches", "0", "--trainer.default_root_dir"]
    main([*quick, "whole", "--trainer.max_epochs", "4"])
    main([*quick, "halves", "--trainer.max_epochs", "2"])

    checkpoint = torch.load("halves/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2, "the first iteration's steps were the critic's"
    policy, critic = checkpoint["optimizer_states"]
    assert {state["step"].item() for state in policy["state"].values()} == {2.0}
    assert {state["step"].item() for state in critic["state"].values()} == {4.0}
    assert len(checkpoint["lr_schedulers"]) == 2
    exported = saved(Path("halves"), "critic")
    assert exported["score.weight"].abs().max() > 0
    assert all(torch.equal(checkpoint["state_dict"][f"critic.model.{name}"], exported[name]) for name in exported)

    main([*quick, "halves", "--trainer.max_epochs", "4", "--ckpt_path", "halves/checkpoints/last.ckpt"])
    for network in ("model", "critic"):
        whole, halves = saved(Path("whole"), network), saved(Path("halves"), network)
        assert identical(whole, halves)
    assert not identical(saved(Path("halves"), "critic"), exported)


def test_a_run_can_stop_and_go_on_while_its_critic_warms_up(ppo_workspace: Path, tiny_policy: Path) -> None:
    settings = ["--model.critic_warmup_iterations", "2", "--trainer.limit_val_batches", "0"]
    warmup = ["fit", "--config", "ppo.yaml", *settings, "--trainer.default_root_dir"]
    main([*warmup, "whole", "--trainer.max_epochs", "3"])
    main([*warmup, "halves", "--trainer.max_epochs", "1"])
    assert identical(saved(Path("halves"), "model"), load_file(tiny_policy / "model.safetensors"))
    assert saved(Path("halves"), "critic")["score.weight"].abs().max() > 0
    main([*warmup, "halves", "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    for network in ("model", "critic"):
        assert identical(saved(Path("whole"), network), saved(Path("halves"), network))


def test_there_are_checkpoints_while_the_critic_warms_up(ppo_workspace: Path) -> None:
    settings = ["--model.critic_warmup_iterations", "2", "--checkpoint.keep_last", "null", "--trainer.max_epochs", "3"]
    main(["fit", "--config", "ppo.yaml", "--trainer.limit_val_batches", "0", *settings])
    names = sorted(path.name for path in Path("run/checkpoints").glob("*.ckpt"))
    assert names == [f"iteration_00000{number}.ckpt" for number in (1, 2, 3)] + ["last.ckpt"]


# DAPO's critic-free relatives.


SORTED_REWARDS = [-1.0, 1.0, 1.0, -0.5, 1.0, 0.0, 0.1, 0.1]
ADVANTAGES = {
    "grpo": [-math.sqrt(0.5), math.sqrt(0.5)] + [math.sqrt(0.5), -math.sqrt(0.5)] * 2 + [0.0, 0.0],
    "dr_grpo": [-1.0, 1.0, 0.75, -0.75, 0.5, -0.5, 0.0, 0.0],
    "rloo": [-2.0, 2.0, 1.5, -1.5, 1.0, -1.0, 0.0, 0.0],
}


@pytest.mark.parametrize("name", [*ADVANTAGES, "reinforce++"])
def test_each_advantage_by_hand_and_as_its_function(name: Any) -> None:
    rollout = make_rollout()
    assert rollout.rewards.tolist() == pytest.approx(SORTED_REWARDS)
    experience = dapo(advantage=name).prepare(rollout)
    if name == "reinforce++":
        # Undiscounted, each token's reward to go is its response's reward.
        each = np.repeat(SORTED_REWARDS, LENGTHS)
        by_hand = (np.array(SORTED_REWARDS) - each.mean()) / np.sqrt(each.var() + 1e-8)
        mask = experience.sequences.pad().response_mask
        function = flat(reinforce_plus_plus_advantages(wide(experience.token_rewards, LENGTHS), mask), LENGTHS)
    else:
        by_hand = np.array(ADVANTAGES[name])
        functions = {"grpo": group_advantages, "dr_grpo": dr_grpo_advantages, "rloo": rloo_advantages}
        function = functions[name](rollout.rewards.double(), rollout.groups).repeat_interleave(LENGTHS)
    np.testing.assert_allclose(experience.advantages, np.repeat(by_hand, LENGTHS), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(experience.advantages, function, rtol=1e-9, atol=1e-9)


def shaped_rollout(right: Sequence[float], penalty: float = 1e-3, span: float | None = 2.0) -> Rollout:
    """The rollout with these accuracies, ±1 rewards, and the first response of every group penalised a little."""
    rollout = make_rollout()
    accuracy = torch.tensor(right)
    first = torch.tensor([row == 0 or group != rollout.groups[row - 1] for row, group in enumerate(rollout.groups)])
    rewards = 2 * accuracy - 1 - penalty * first
    parts = {"accuracy": accuracy, "overlong": -penalty * first.float()}
    results = tuple(
        RewardResult(r, {"accuracy": a}, None, False, span) for r, a in zip(rewards.tolist(), right, strict=True)
    )
    return replace(rollout, rewards=rewards, reward_parts=parts, results=results)


@pytest.mark.parametrize("name", [*ADVANTAGES, "reinforce++"])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_a_rollout_whose_accuracy_does_not_differ_learns_shaping_at_its_own_size(name: Any, accuracy: float) -> None:
    """A penalty of 0.001 has advantages of that order, whatever divides; divided by its own deviation they were 1."""
    module = dapo(advantage=name)
    experience = module.prepare(shaped_rollout([accuracy] * 8))
    largest = experience.advantages[experience.mask].abs().max().item()
    assert 1e-4 < largest < 2.1e-3
    if name == "grpo":
        doubled = module.prepare(shaped_rollout([accuracy] * 8, penalty=2e-3)).advantages
        torch.testing.assert_close(doubled, 2 * experience.advantages, rtol=1e-3, atol=1e-9)


def test_generalised_advantages_of_such_a_rollout_are_not_whitened_to_the_size_of_right_and_wrong() -> None:
    module = ppo()
    experience = module.prepare(shaped_rollout([0.0] * 8))
    small = 1e-3 * torch.randn(experience.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = small - small[experience.mask].mean()
    whitened = whiten(small, experience, module.ranks)
    torch.testing.assert_close(whitened[experience.mask], centred[experience.mask], rtol=1e-7, atol=1e-15)
    differing = module.prepare(shaped_rollout([0.0] * 7 + [1.0]))
    spread = whiten(small, differing, module.ranks)[experience.mask].std(unbiased=False)
    assert spread.item() == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("name", ["grpo", "reinforce++", "gae"])
def test_where_accuracy_differs_the_published_formula_stands(name: Any) -> None:
    """For grpo in that group alone, for the whole rollout's deviation if any two responses differ."""
    module = ppo() if name == "gae" else dapo(advantage=name)
    rollout = shaped_rollout([0.0, 1.0] + [0.0] * 6, penalty=0.25)
    experience = module.prepare(rollout)
    unknown = module.prepare(replace(rollout, reward_parts={}))
    groups = rollout.groups.repeat_interleave(LENGTHS)  # [N]
    rows = groups == 0 if name == "grpo" else slice(None)
    torch.testing.assert_close(experience.advantages[rows], unknown.advantages[rows], rtol=0, atol=0)
    if name == "grpo":
        rest = experience.advantages[groups > 0]
        assert rest.abs().max() < 0.25 < unknown.advantages[groups > 0].abs().max()


def test_only_advantages_relative_to_a_group_need_groups() -> None:
    sizes = {name: DAPOModule(TinySource(), advantage=name).min_group_size for name in [*ADVANTAGES, "reinforce++"]}
    assert sizes == {"grpo": 2, "dr_grpo": 2, "rloo": 2, "reinforce++": 1}
    assert DAPOModule.min_group_size == 2
    assert PPOModule(TinySource()).min_group_size == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"advantage": "gae"}, "advantage: 'gae'"),
        ({"surrogate": "trpo"}, "surrogate: 'trpo'"),
        ({"aggregation": "mean"}, "aggregation: 'mean'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "aggregation_max_tokens: None"),
        ({"aggregation": "seq-mean-token-sum-norm", "aggregation_max_tokens": 0}, "aggregation_max_tokens: 0"),
        ({"overlong_filter": "no"}, "overlong_filter: 'no'"),
        ({"lr_scheduler": 3}, "lr_scheduler: 3"),
    ],
)
def test_options_that_do_not_exist_or_lack_a_number_are_refused_by_name(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        DAPOModule(TinySource(), **settings)
    assert str(refused.value).startswith(named)


def test_each_surrogate_reaches_the_loss_with_the_modules_clips() -> None:
    logp = torch.tensor([[3.0, 0.1, 5.0, 1.5]]).log()
    advantages, mask = torch.tensor([[1.0, -1.0, -1.0, 1.0]]), torch.ones(1, 4).bool()
    stats = TokenStats(logp, None, torch.zeros(1, 4), torch.zeros(1, 4), advantages, mask)
    bounds = {"clip_ratio_low": 0.5, "clip_ratio_high": 1.0}
    expected = {
        "ppo": clipped_surrogate(logp, stats.old_logp, advantages, dual_clip=4.0, **bounds),
        "gspo": gspo_surrogate(logp, stats.old_logp, advantages, mask, dual_clip=4.0, **bounds),
        "cispo": cispo_surrogate(logp, stats.old_logp, advantages, **bounds),
        "gmpo": gmpo_surrogate(logp, stats.old_logp, advantages, mask, **bounds),
        "dppo": dppo_surrogate(logp, stats.old_logp, advantages, clip_ratio_low=0.5, clip_ratio_high=0.9),
    }
    for name, result in expected.items():
        dual_clip = {"dual_clip": 4.0} if name in ("ppo", "gspo") else {}  # the others have none
        own = {"clip_ratio_high": 0.9} if name == "dppo" else {}  # a probability changes by less than 1
        loss, metrics = dapo(surrogate=name, **dual_clip, **{**bounds, **own}).policy_loss.surrogate(stats)
        torch.testing.assert_close(loss, result.loss)
        assert torch.equal(metrics["update/clipped_high"], result.clipped_high)
    assert len({tuple(result.loss[0].tolist()) for result in expected.values()}) == len(expected)


def off_policy(module: DAPOModule, seed: int = 1) -> Experience:
    """Ratios spread around 1, one response left out of the loss and one with a masked token."""
    experience = scored_first(module).prepare(make_rollout(truncated=[4]))
    noise = torch.randn(experience.old_logp.shape, generator=torch.Generator().manual_seed(seed)).double()
    mask = experience.mask.clone()
    mask[span(LENGTHS, 1)][2] = False
    return replace(experience, old_logp=experience.old_logp + 0.5 * noise, mask=mask)


@pytest.mark.parametrize("surrogate", LOSSES)
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_the_steps_loss_by_hand_for_each_surrogate_and_aggregation(surrogate: Any, aggregation: Any) -> None:
    """With a bonus of 0.3·H beside it, aggregated alike."""
    module = dapo(
        surrogate=surrogate,
        aggregation=aggregation,
        aggregation_max_tokens=12 if aggregation == "seq-mean-token-sum-norm" else None,
        regularizer=EntropyBonus(0.3),
        overlong_filter=True,
        sampler_correction=None,
    )
    experience = off_policy(module)
    order = sorted(range(8), key=lambda row: GROUPS[row])
    scores = [reference_scores(module.policy.model, TEMPERATURE)[row] for row in order]
    sums, counts = [], []
    for row, (logp, entropy) in enumerate(scores):
        own = span(LENGTHS, row)
        valid = experience.mask[own].numpy()
        if not valid.any():
            continue
        old, advantage = experience.old_logp[own].numpy(), experience.advantages[own][0].item()
        losses = token_losses(surrogate, logp, old, valid, advantage) - 0.3 * entropy
        sums.append(losses[valid].sum())
        counts.append(valid.sum())
    assert len(sums) == 7
    expected = {
        "token-mean": sum(sums) / sum(counts),
        "seq-mean-token-sum": sum(sums) / 7,
        "seq-mean-token-mean": sum(s / n for s, n in zip(sums, counts, strict=True)) / 7,
        "seq-mean-token-sum-norm": sum(sums) / 7 / 12,
    }[aggregation]

    step = begin_step(module, experience)
    loss, _ = micro_loss(module, step)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_expected_losses_differ_so_that_none_stands_for_another() -> None:
    """The examples above would be worthless if two options gave the same number."""
    values = set()
    for surrogate in LOSSES:
        for aggregation in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            options = {"aggregation": aggregation, "aggregation_max_tokens": 12, "sampler_correction": None}
            module = dapo(surrogate=surrogate, **options)
            step = begin_step(module, off_policy(module))
            values.add(round(micro_loss(module, step)[0].item(), 4))
    assert len(values) == 4 * len(LOSSES)


def test_reinforce_needs_no_groups_in_a_real_run(workspace: Path) -> None:
    arguments = ["--model.advantage", "reinforce++", "--data.group_size", "1", "--data.prompts_per_rollout", "8"]
    root = ["--data.dynamic_sampling", "null", "--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "0"]
    main(["fit", "--config", "tiny.yaml", "--model.mini_batch_prompts", "8", *arguments, *root])
    checkpoint = torch.load(workspace / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


def test_a_critic_whose_folder_lacks_weights_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    """transformers would go on with what it has, and zeros or noise for the rest."""
    folder = tmp_path / "critic"
    shutil.copytree(tiny_policy, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "down_proj" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    module = PPOModule(str(tiny_policy), critic=str(folder))
    with pytest.raises(ConfigError, match=r"^critic: .*not complete.*down_proj.*missing"):
        module.configure_model()


@pytest.mark.parametrize("span", [0.5, 6.0])
def test_the_least_deviation_of_a_rollout_whose_accuracy_does_not_differ_is_half_the_span(span: float) -> None:
    module = ppo()
    experience = module.prepare(shaped_rollout([0.0] * 8, span=span))
    small = 1e-3 * torch.randn(experience.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = small - small[experience.mask].mean()
    whitened = whiten(small, experience, module.ranks)
    torch.testing.assert_close(whitened[experience.mask], centred[experience.mask] / (span / 2), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("span", [0.5, 6.0])
def test_the_least_deviation_of_a_group_whose_accuracy_does_not_differ_is_half_the_span(span: float) -> None:
    """Of two rewards 0.001 apart, each is 0.0005 from their mean."""
    rollout = shaped_rollout([0.0] * 8, span=span)
    advantages = dapo(advantage="grpo").prepare(rollout).advantages[LENGTHS.cumsum(0) - 1]
    size = 5e-4 / (span / 2)
    first = torch.tensor([row == 0 or group != rollout.groups[row - 1] for row, group in enumerate(rollout.groups)])
    torch.testing.assert_close(advantages.double(), torch.where(first, -size, size).double(), rtol=1e-3, atol=0)


def test_a_late_response_is_no_truncated_one_to_bootstrap() -> None:
    rollout = with_late({1: 2}, truncated=[4])
    ended, bootstrapped = (
        ppo(bootstrap_truncated=flag, whiten_advantages=False).prepare(rollout).extra["returns"]
        for flag in (False, True)
    )
    lengths = rollout.sequences.response_lengths
    assert torch.equal(ended != bootstrapped, (torch.arange(8) == 4).repeat_interleave(lengths))


def test_the_accuracy_of_a_stopped_verification_is_no_outcome() -> None:
    rollout = shaped_rollout([1.0] + [0.0] * 7)
    results = (replace(rollout.results[0], timed_out=True), *rollout.results[1:])
    assert rollout.outcomes.tolist() == [1.0] + [0.0] * 7
    outcomes = replace(rollout, results=results).outcomes
    assert outcomes.isnan().tolist() == [True] + [False] * 7
    assert outcomes[1:].tolist() == [0.0] * 7
