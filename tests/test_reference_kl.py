"""A KL penalty to a reference policy: in the reward or in the loss, of any estimator, fixed or adaptive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.flat import flat, span
from helpers.models import TinySource
from helpers.rollouts import GROUPS, TEMPERATURE, make_rollout, reference_scores, rollouts
from helpers.updates import CUTS, adamw, assert_same, begin_step, fit, micro_loss, scored_first, summed, token_stats
from ibro_lightning.batches.experience import Experience
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import LoRAOptions, PolicyOptions
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule
from ibro_lightning.regularizers import NoRegularizer
from ibro_lightning.regularizers.coefficients import AdaptiveKL
from ibro_lightning.studies.curves import read_curves
from ibro_lightning.update import ReferenceKL

torch.set_num_threads(1)
BETA = 0.3
ORDER = sorted(range(8), key=lambda row: GROUPS[row])
"""The rows of PROMPTS and RESPONSES as a rollout sorts them."""


def elsewhere(**settings: Any) -> ReferenceKL:
    """A reference that is another policy, so that there is something to measure from the start."""
    return ReferenceKL(policy=TinySource(seed=1), **{"coef": BETA, **settings})  # type: ignore[arg-type]


def build(kind: type[PolicyModule], kl: ReferenceKL | None, **settings: Any) -> Any:
    module = kind(TinySource(), kl=kl, **settings)
    module.configure_model()
    return module


def scores(model: Any) -> list[np.ndarray]:
    """Log-probs of each response of the rollout, one unpadded sequence at a time."""
    of_rows = reference_scores(model, TEMPERATURE)
    return [of_rows[row][0] for row in ORDER]


def by_hand(estimator: str, logp: np.ndarray, reference: np.ndarray) -> np.ndarray:
    log_ratio = logp - reference
    return {
        "k1": log_ratio,
        "k2": 0.5 * log_ratio**2,
        "k3": np.exp(-log_ratio) - 1 + log_ratio,
        "k3_k2_grad": np.exp(-log_ratio) - 1 + log_ratio,
    }[estimator]


def penalties(estimator: str) -> list[np.ndarray]:
    """Of each response of the rollout, from the initial policy to the reference of :func:`elsewhere`."""
    mine, theirs = TinySource().model, TinySource(seed=1).model
    return [by_hand(estimator, a, b) for a, b in zip(scores(mine), scores(theirs), strict=True)]


# The two placements, by hand.


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_k2_grad"])
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_in_the_reward_every_token_pays_for_itself(kind: type[PolicyModule], estimator: Any) -> None:
    rollout = make_rollout()
    experience = build(kind, elsewhere(placement="reward", estimator=estimator)).prepare(rollout)
    for row, kl in enumerate(penalties(estimator)):
        expected = -BETA * kl
        expected[-1] += rollout.rewards[row].item()
        own = experience.token_rewards[span(experience.lengths, row)]
        np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)
        assert np.abs(kl).min() > 1e-6


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_dapo_compares_rewards_less_their_penalties(estimator: Any) -> None:
    """(R_i − β Σ_t KL_t), less its group's mean, over its group's standard deviation."""
    rollout = make_rollout()
    experience = build(DAPOModule, elsewhere(placement="reward", estimator=estimator)).prepare(rollout)
    totals = [r - BETA * kl.sum() for r, kl in zip(rollout.rewards.tolist(), penalties(estimator), strict=True)]
    for first in range(0, 8, 2):
        pair = totals[first : first + 2]
        for row in (first, first + 1):
            expected = (totals[row] - np.mean(pair)) / (np.std(pair, ddof=1) + 1e-6)
            own = experience.advantages[span(experience.lengths, row)]
            np.testing.assert_allclose(own[0], expected, rtol=1e-6)
    assert experience.micro_batch().advantages[6, 0] != 0, "equal rewards, unequal penalties"


@pytest.mark.parametrize("estimator", ["k1", "k3_k2_grad"])
def test_ppo_sums_penalties_into_advantages_and_returns(estimator: Any) -> None:
    """With λ = γ = 1 a token's return is the rest of its penalties and the reward."""
    rollout = make_rollout()
    module = build(PPOModule, elsewhere(placement="reward", estimator=estimator), whiten_advantages=False)
    experience = module.prepare(rollout)
    for row, kl in enumerate(penalties(estimator)):
        returns = rollout.rewards[row].item() - BETA * np.cumsum(kl[::-1])[::-1]
        own = span(experience.lengths, row)
        values = experience.extra["values"][own].numpy()
        np.testing.assert_allclose(experience.extra["returns"][own], returns, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(experience.advantages[own], returns - values, rtol=1e-9, atol=1e-9)


def step_of(module: Any) -> Experience:
    """A step whose ratios are not 1."""
    experience = scored_first(module).prepare(make_rollout())
    noise = torch.randn(experience.old_logp.shape, generator=torch.Generator().manual_seed(1)).double()  # [N]
    result: Experience = begin_step(module, replace(experience, old_logp=experience.old_logp + 0.3 * noise))
    return result


def policy_gradient(module: Any, step: Experience, cut: Sequence[Sequence[int]] = CUTS[0]) -> list[Tensor]:
    """The step's loss, then the gradients of the policy's parameters."""
    parts = [step.select(torch.tensor(rows)) for rows in cut]
    return summed(lambda micro: micro_loss(module, micro), parts, list(module.policy.parameters()))


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_k2_grad"])
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_in_the_loss_the_penalty_is_aggregated_like_the_loss(kind: type[PolicyModule], estimator: Any) -> None:
    """L = L_PG + β Σ KL / N, and its gradient β Σ c·∇logπ / N, whatever the cut into micro-batches."""
    plain, module = build(kind, None), build(kind, elsewhere(estimator=estimator))
    step = step_of(module)
    assert torch.equal(step.advantages, step_of(plain).advantages), "rewards know nothing of it"
    without, with_penalty = policy_gradient(plain, step_of(plain)), policy_gradient(module, step)
    each = penalties(estimator)
    tokens = sum(map(len, each))
    penalty = sum(kl.sum() for kl in each) / tokens
    assert with_penalty[0].item() - without[0].item() == pytest.approx(BETA * penalty, rel=1e-9)

    # dk2 = log r · dlogπ, dk3 = (1 − r') · dlogπ, and k3_k2_grad is k3 with the gradient of k2.
    slopes = torch.zeros_like(step.old_logp)
    for row, (a, b) in enumerate(zip(scores(TinySource().model), scores(TinySource(seed=1).model), strict=True)):
        slopes[span(step.lengths, row)] = torch.tensor(1 - np.exp(b - a) if estimator == "k3" else a - b)
    stats = token_stats(plain, step)
    loss, _ = plain.policy_loss(stats, step.micro_batch())
    loss = loss + BETA * (slopes * flat(stats.logp, step.lengths)).sum() / tokens
    assert_same(with_penalty[1:], torch.autograd.grad(loss, list(plain.policy.parameters())))
    for cut in CUTS[1:]:
        assert_same(policy_gradient(module, step, cut), with_penalty)


def test_in_the_loss_the_penalty_follows_the_aggregation() -> None:
    """A mean over responses of their token means weighs short ones more."""
    settings: dict[str, Any] = {"aggregation": "seq-mean-token-mean"}
    plain, module = build(DAPOModule, None, **settings), build(DAPOModule, elsewhere(), **settings)
    difference = policy_gradient(module, step_of(module))[0] - policy_gradient(plain, step_of(plain))[0]
    assert difference.item() == pytest.approx(BETA * np.mean([kl.mean() for kl in penalties("k3")]), rel=1e-9)


def test_the_loss_knows_nothing_of_a_penalty_in_the_reward() -> None:
    module = build(DAPOModule, elsewhere(placement="reward"))
    step = step_of(module)
    plain = build(DAPOModule, None)
    expected = policy_gradient(plain, replace(step, extra={}))
    assert_same(policy_gradient(module, step), expected)


def test_a_method_that_replaces_the_policy_loss_leaves_the_penalty_in_place() -> None:
    class Nothing(NoRegularizer):
        def shape_policy_loss(self, loss: Tensor, stats: Any) -> Tensor:
            return torch.zeros_like(loss)

    module = build(DAPOModule, elsewhere(), regularizer=Nothing())
    each = penalties("k3")
    expected = BETA * sum(kl.sum() for kl in each) / sum(map(len, each))
    assert policy_gradient(module, step_of(module))[0].item() == pytest.approx(expected, rel=1e-9)


# The exact KL, over the whole vocabulary.


def distributions(model: Any) -> list[Tensor]:
    """``log p [t, V]`` of each response of the rollout, one unpadded sequence at a time."""
    rollout, rows = make_rollout(), []
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        logits = model(tokens).logits[0].double() / TEMPERATURE
        rows.append(logits.log_softmax(dim=-1)[len(prompt.token_ids) - 1 : -1])
    return rows


def exact_penalties(model: Any) -> list[Tensor]:
    """Σ_v π(v)·(log π(v) − log π_ref(v)) of each response's tokens, to the reference of :func:`elsewhere`."""
    with torch.no_grad():
        others = distributions(TinySource(seed=1).model)
    return [(p.exp() * (p - r)).sum(dim=-1) for p, r in zip(distributions(model), others, strict=True)]


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_exact_in_the_reward_is_the_sum_over_the_vocabulary(kind: type[PolicyModule], fused_head: bool) -> None:
    rollout, module = make_rollout(), build(kind, elsewhere(placement="reward", estimator="exact"))
    module.policy._fused_head = module.kl.on(module.device)._fused_head = fused_head
    experience = module.prepare(rollout)
    assert "reference_logp" not in experience.extra
    for row, kl in enumerate(exact_penalties(TinySource().model)):
        own = span(experience.lengths, row)
        torch.testing.assert_close(experience.extra["reference_kl"][own], kl.detach(), rtol=1e-9, atol=1e-12)
        expected = -BETA * kl.detach()
        expected[-1] += rollout.rewards[row]
        torch.testing.assert_close(experience.token_rewards[own], expected, rtol=1e-9, atol=1e-12)
    other = build(kind, elsewhere(placement="reward", estimator="k1"))
    other.policy._fused_head = fused_head
    sampled = other.prepare(rollout)
    assert torch.equal(experience.old_logp, sampled.old_logp)
    assert torch.equal(experience.old_entropy, sampled.old_entropy)


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_exact_in_the_loss_has_the_gradient_of_the_whole_vocabulary(kind: type[PolicyModule]) -> None:
    """L = L_PG + β Σ KL / N, whatever the cut into micro-batches; by autograd through full logits."""
    plain, module = build(kind, None), build(kind, elsewhere(estimator="exact"))
    without, with_penalty = policy_gradient(plain, step_of(plain)), policy_gradient(module, step_of(module))
    each = torch.cat(exact_penalties(plain.policy.model))
    assert (with_penalty[0] - without[0]).item() == pytest.approx(BETA * each.mean().item(), rel=1e-9)
    of_penalty = torch.autograd.grad(BETA * each.mean(), list(plain.policy.parameters()))
    assert max(gradient.abs().max() for gradient in of_penalty) > 1e-4
    for both, policy_loss, penalty in zip(with_penalty[1:], without[1:], of_penalty, strict=True):
        size = both.abs().max().item()  # transformers' RMSNorm rounds to float32, padded and unpadded differently
        torch.testing.assert_close(both, policy_loss + penalty, rtol=0, atol=1e-6 * size)
    for cut in CUTS[1:]:
        assert_same(policy_gradient(module, step_of(module), cut), with_penalty)
    _, metrics = micro_loss(module, step_of(module))
    assert not any("exact" in name for name in metrics), "it is the curve kl/reference, and none of the regulariser's"


@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_exact_in_the_loss_passes_gradcheck(fast_mode: bool) -> None:
    """In the head's weight (``fast_mode``: in a random direction); what comes before it rounds to float32."""
    module = build(DAPOModule, elsewhere(estimator="exact"))
    step, name = step_of(module), "model.lm_head.weight"
    weight = module.policy.get_parameter(name).detach().clone().requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        def policy(*args: Any, **options: Any) -> Any:
            return torch.func.functional_call(module.policy, {name: weight}, args, options, tie_weights=False)

        micro = step.micro_batch()
        value, _ = module.policy_loss(module.policy_loss.stats(micro, replace(module.context(), policy=policy)), micro)
        return value

    assert torch.autograd.gradcheck(loss, weight, fast_mode=fast_mode)


@pytest.mark.parametrize(("placement", "passes"), [("reward", 1), ("loss", 3)])
def test_exact_runs_the_reference_once_for_scores_and_in_the_loss_with_every_pass_of_the_update(
    placement: Any, passes: int
) -> None:
    module = DAPOModule(TinySource(), kl=elsewhere(placement=placement, estimator="exact"), update_epochs=2)
    module.configure_model()
    calls: list[int] = []
    module.kl.on(torch.device("cpu")).model.register_forward_pre_hook(lambda *_: calls.append(1))
    backbone = module.kl.on(torch.device("cpu")).model.base_model
    backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    module.kl.on(torch.device("cpu"))._linear_head()
    calls.clear()
    fit(module, rollouts(1))
    assert len(calls) == passes


# The reference itself.


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_the_reference_is_no_part_of_what_is_trained_or_saved(kind: type[PolicyModule]) -> None:
    plain, module = build(kind, None), build(kind, elsewhere())
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    assert len(list(module.modules())) == len(list(plain.modules()))
    reference = module.kl.on(torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in module.policy.parameters())
    mine = {parameter.data_ptr() for parameter in module.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in reference.parameters()}


@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_the_policy_leaves_its_reference_only_by_learning(kind: type[PolicyModule], placement: Any) -> None:
    """KL is 0 to the last bit in the first iteration, and the reference's weights stay what they were."""
    source = TinySource()
    module = kind(source, kl=ReferenceKL(0.1, placement), optimizer=adamw(0.01), mini_batch_prompts=2)
    _, recorder = fit(module, rollouts(2))
    first, second = recorder.metrics
    assert first["kl/reference"] == 0
    assert second["kl/reference"] > 1e-4
    assert first["kl/coef"] == second["kl/coef"] == 0.1
    reference = module.kl.on(module.device).model.state_dict()
    assert all(torch.equal(reference[name], value) for name, value in source.model.state_dict().items())
    assert not recorder.unchanged(0, 1, "policy.")
    assert not recorder.unchanged(1, 2, "policy.")


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_strong_penalty_keeps_the_policy_near_its_reference(placement: Any) -> None:
    """Eight iterations on the same rollout: without a penalty the policy runs away, with one it does not."""
    distance = {}
    for coef in (0.0, 3.0):
        kl = ReferenceKL(coef, placement, estimator="k1" if placement == "reward" else "k3_k2_grad")
        module = DAPOModule(TinySource(), kl=kl, optimizer=adamw(0.005), advantage="reinforce++")
        fit(module, rollouts(8))
        end = ReferenceKL(0.0, estimator="k2")
        end.setup(module.policy_source, PolicyOptions())
        with torch.no_grad():
            sequences = make_rollout().sequences.pad()
            logp, _ = module.policy(sequences, temperature=TEMPERATURE)
            reference, _ = end.on(module.device)(sequences, temperature=TEMPERATURE)
        distance[coef] = end.penalty(logp, reference).sum().item()
    assert distance[3.0] < 0.5 * distance[0.0]


# Settings.


def test_k1_in_the_loss_is_refused_for_its_gradient_is_nothing_on_average() -> None:
    with pytest.raises(ConfigError, match=r"^estimator: 'k1' - .*k2, k3, k3_k2_grad or exact"):
        ReferenceKL(placement="loss", estimator="k1")
    assert ReferenceKL(placement="reward", estimator="k1").estimator == "k1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"placement": "advantage"}, "placement: 'advantage'"),
        ({"estimator": "k4"}, "estimator: 'k4'"),
        ({"coef": -0.1}, "coef: -0.1"),
        ({"coef": math.nan}, "coef: nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ReferenceKL(**settings)
    assert str(refused.value).startswith(named)


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    kl = ReferenceKL(policy=TinySource(vocab_size=24))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^policy: .*24 tokens and the policy 23"):
        DAPOModule(TinySource(), kl=kl).configure_model()


# An adaptive coefficient.


@pytest.mark.parametrize("estimator", ["k3_k2_grad", "exact"])
@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_adaptive_coefficient_follows_what_was_measured(placement: Any, estimator: Any) -> None:
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon) once per iteration, n = 8 responses, first KL = 0."""
    coef = AdaptiveKL(start=0.5, target=0.01, horizon=20)
    module = DAPOModule(TinySource(), kl=ReferenceKL(coef, placement, estimator), optimizer=adamw(0.01))
    _, recorder = fit(module, rollouts(3))
    beta = 0.5
    for metrics in recorder.metrics:
        beta *= 1 + min(max(metrics["kl/reference"] / 0.01 - 1, -0.2), 0.2) * 8 / 20
    assert module.kl is not None
    assert module.kl.coef == pytest.approx(beta, rel=1e-9)
    assert recorder.metrics[0]["kl/reference"] == pytest.approx(0, abs=1e-14)
    assert recorder.metrics[-1]["kl/reference"] > 0.01
    assert coef.state["iterations"] == 3


def test_the_adaptive_coefficient_waits_for_the_policy_to_train() -> None:
    """While only the critic trains, the policy is its reference: their KL is 0 because nothing has happened."""
    coef = AdaptiveKL(start=0.5, target=0.01, horizon=20)
    module = PPOModule(TinySource(), kl=ReferenceKL(coef), critic_warmup_iterations=2)
    _, recorder = fit(module, rollouts(3))
    assert [metrics["kl/coef"] for metrics in recorder.metrics] == [0.5, 0.5, 0.5]
    assert coef.state["iterations"] == 1


def test_the_logged_coefficient_is_the_one_that_was_used_in_the_reward() -> None:
    coef = AdaptiveKL(start=0.5, target=0.01, horizon=20)
    module = DAPOModule(TinySource(), kl=ReferenceKL(coef, "reward"))
    _, recorder = fit(module, rollouts(1))
    assert recorder.metrics[0]["kl/coef"] == 0.5


def test_the_coefficients_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    def new() -> DAPOModule:
        coef = AdaptiveKL(start=0.5, target=0.01, horizon=20)
        return DAPOModule(TinySource(), kl=ReferenceKL(coef), optimizer=adamw(0.01))

    module = new()
    trainer, _ = fit(module, rollouts(2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["coefficients"]["kl"] == module.kl.coefficient.state
    assert module.kl.coef != 0.5
    again = new()
    again.on_load_checkpoint(checkpoint)
    assert again.kl.coef == module.kl.coef
    assert again.kl.coefficient.state["iterations"] == 2
    again.on_load_checkpoint({})  # a checkpoint of a run without any
    build(DAPOModule, None).on_load_checkpoint(checkpoint)  # and one that has more than this run


# Whole runs, as a recipe asks for them.

RECIPE = """
    kl:
      class_path: ReferenceKL
      init_args:
        placement: {placement}
        coef:
          class_path: ibro_lightning.regularizers.coefficients.AdaptiveKL
          init_args: {{start: 0.1, horizon: 100}}
"""


def with_kl(workspace: Path, placement: str) -> str:
    recipe, anchor = (workspace / "tiny.yaml").read_text(), "    mini_batch_prompts: 2\n"
    assert anchor in recipe
    name = f"kl_{placement}.yaml"
    (workspace / name).write_text(recipe.replace(anchor, anchor + RECIPE.format(placement=placement).lstrip("\n")))
    return name


@pytest.mark.parametrize("placement", ["loss", pytest.param("reward", marks=pytest.mark.slow)])
def test_a_resumed_run_with_an_adaptive_penalty_ends_with_the_same_weights(workspace: Path, placement: str) -> None:
    """The reference is the policy before training, not the one that a checkpoint holds."""
    recipe = with_kl(workspace, placement)
    quick = ["fit", "--config", recipe, "--trainer.limit_val_batches", "0", "--trainer.default_root_dir"]
    main([*quick, "whole", "--trainer.max_epochs", "3"])
    main([*quick, "halves", "--trainer.max_epochs", "2"])
    main([*quick, "halves", "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    states = [
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["coefficients"]["kl"]
        for run in ("whole", "halves")
    ]
    assert states[0] == states[1]
    assert states[0]["iterations"] == 3
    whole, halves = (load_file(Path(run) / "model" / "model.safetensors") for run in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize("module", ["DAPOModule", "PPOModule"])
def test_two_iterations_with_the_exact_kl_from_the_command_line(workspace: Path, module: str) -> None:
    kl = ["--model.kl", "ReferenceKL", "--model.kl.estimator", "exact", "--model.kl.coef", "0.5"]
    quick = ["--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"]
    main(["fit", "--config", "tiny.yaml", "--model", module, *kl, *quick])
    measured = [point for point in read_curves(Path("run")) if point.metric == "kl/reference"]
    assert len(measured) == 2
    assert measured[1].value > 1e-4


def test_a_run_does_not_move_its_reference_away(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_once = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0"]
    main(fit_once)
    with pytest.raises(SystemExit):
        main([*fit_once, "--model.kl", "ReferenceKL", "--model.kl.policy", "run/model"])
    assert "it holds the run that this run starts from" in capsys.readouterr().err


def test_the_reference_is_loaded_once() -> None:
    module = build(DAPOModule, elsewhere())
    reference = module.kl.on(module.device)
    module.configure_model()
    assert module.kl.on(module.device) is reference


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_exact_kl_of_a_policy_with_adapters_begins_at_0_and_moves(placement: Any) -> None:
    """Its logits are there whole, while the reference without adapters has a linear head."""
    pytest.importorskip("peft")
    options = PolicyOptions(lora=LoRAOptions(rank=2))
    kl = ReferenceKL(0.1, placement, "exact")
    module = DAPOModule(TinySource(), kl=kl, optimizer=adamw(0.02), policy_options=options)
    _, recorder = fit(module, rollouts(2))
    first, second = (metrics["kl/reference"] for metrics in recorder.metrics)
    assert first == pytest.approx(0, abs=1e-9)
    assert second > 1e-6
