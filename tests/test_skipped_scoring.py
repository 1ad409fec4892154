"""The old log-probs of a rollout's first optimizer step are its own, and a forward pass is saved: the update is the
same as if the rollout had been scored first, and wherever anything asks for the scores earlier, it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers.flat import span
from helpers.models import TinySource
from helpers.rollouts import make_rollout
from helpers.sampler_scores import LENGTHS, noise, rollout_of, sampler_near, scores
from helpers.updates import Recorder, adamw, fit, sgd
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.cli.main import main
from ibro_lightning.models import PolicyOptions
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule
from ibro_lightning.regularizers import (
    IBRO,
    SIREN,
    AdaptiveClip,
    ClipCov,
    EntroPIC,
    EntropyBonus,
    EntropyRatioClip,
    EntropyRegularizer,
    EntropyShapedAdvantage,
    InformationBottleneck,
    KLCov,
    MarginalEntropy,
    NoRegularizer,
    OppositeInformationBottleneck,
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
    PositiveAdvantageWeight,
    StepContext,
    TopEntropyTokens,
)
from ibro_lightning.regularizers.coefficients import Constant, EntropyBand, Linear, TargetEntropy
from ibro_lightning.update import ReferenceKL
from ibro_lightning.update.correction import SamplerCorrection
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.steps import with_scores

torch.set_num_threads(1)


class EagerDAPO(DAPOModule):
    """Scores first whatever the settings are: what the other one is compared with."""

    advantages_need_scores = True


class EagerPPO(PPOModule):
    advantages_need_scores = True


EAGER: dict[type[PolicyModule], type[PolicyModule]] = {DAPOModule: EagerDAPO, PPOModule: EagerPPO}


class ByOldEntropy(EntropyRegularizer):
    """A user's: reads what the policy said before the update, and holds on to the policy that sampled."""

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return stats.entropy * (stats.old_entropy > 0.5) - (stats.logp - stats.old_logp) ** 2 + stats.old_logp


REGULARIZERS = {
    "none": NoRegularizer,
    "ib": lambda: InformationBottleneck(0.5),
    "ib centred": lambda: InformationBottleneck(0.5, part="centred"),
    "ib uniform": lambda: InformationBottleneck(0.5, part="uniform", transform="sign"),
    "ib noise": lambda: InformationBottleneck(0.5, noise=0.5),
    "marginal": lambda: MarginalEntropy(0.5, prompts=3),
    "opposite": lambda: OppositeInformationBottleneck(0.5),
    "bonus": lambda: EntropyBonus(0.3),
    "a user's": lambda: ByOldEntropy(0.3),
    "siren": lambda: SIREN(0.5, fraction=0.5),
    "hard prompts": lambda: PassRateInformationBottleneck(0.5),
    "by position": lambda: PositionCentredInformationBottleneck(0.5),
}


@cache
def sampled() -> tuple[Rollout, ...]:
    """Two iterations, from a sampler near the policy; in the second, two responses are cut."""
    logp = torch.cat([torch.tensor(of_row) for of_row, _ in scores()])
    first, second = (
        rollout_of(sampler_near(logp + noise(7, size)).clamp(max=0.0), iteration=n) for n, size in ((1, 0.0), (2, 0.1))
    )
    return first, replace(second, truncated=torch.arange(8) % 5 == 1)


def run(
    kind: type[PolicyModule],
    *,
    rollouts: Sequence[Rollout] | None = None,
    dtype: torch.dtype = torch.float64,
    trainer: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Recorder:
    settings = {"optimizer": sgd, **settings}
    if issubclass(kind, PPOModule):
        settings = {"critic_optimizer": adamw(0.01), "gae_lambda": 0.8, **settings}
    module = kind(TinySource(dtype), **settings)
    _, recorder = fit(module, rollouts or sampled(), **(trainer or {}))
    recorder.module = module  # type: ignore[attr-defined]
    return recorder


def assert_same_run(skipped: Recorder, scored: Recorder, tolerance: float, share: float = 0) -> None:
    """The same weights after each iteration, and the same curves; ``share`` of the rollout is scored first."""
    for before, after in zip(skipped.weights, scored.weights, strict=True):
        for name, value in after.items():
            torch.testing.assert_close(before[name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert any(not torch.equal(skipped.weights[0][name], value) for name, value in skipped.weights[-1].items())
    for before, after in zip(skipped.metrics, scored.metrics, strict=True):
        assert (before["update/scored_first"], after["update/scored_first"]) == (share, 1)
        one, other = (
            {k: v for k, v in m.items() if not k.startswith("time/") and k != "update/scored_first"}
            for m in (before, after)
        )
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True)
        assert (before["update/approx_kl"] == 0) == (before["update/steps"] == 1)
        assert {"policy/entropy", "policy/logp", "sampler/ratio_mean", "ib/mean_product"} <= before.keys()
        assert before["policy/entropy"] > 0.1
        assert before["policy/logp"] < -0.1


@pytest.mark.parametrize(
    ("name", "budget"),
    # How a step is cut does not depend on the regulariser: one that reads statistics of the step, and one that reads
    # old scores, see every cut.
    [(name, 20) for name in REGULARIZERS] + [(name, cut) for name in ("ib centred", "a user's") for cut in (1, 10_000)],
)
@pytest.mark.parametrize("kind", EAGER)
def test_the_update_and_its_curves_are_those_of_scoring_first(kind: type[PolicyModule], name: str, budget: int) -> None:
    runs = [
        run(k, regularizer=REGULARIZERS[name](), micro_batch_tokens=budget, overlong_filter=True)
        for k in (kind, EAGER[kind])
    ]
    assert_same_run(*runs, tolerance=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "gspo": {"surrogate": "gspo", "aggregation": "seq-mean-token-mean"},
    "cispo": {"surrogate": "cispo"},
    "gmpo": {"surrogate": "gmpo", "aggregation": "seq-mean-token-mean"},
    "dppo": {"surrogate": "dppo"},
    "sapo": {"surrogate": "sapo", "aggregation": "seq-mean-token-mean"},
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", "aggregation_max_tokens": 6},
    "reinforce++": {"advantage": "reinforce++"},
    "all groups in one step": {"mini_batch_prompts": 4},
    "more than there are": {"mini_batch_prompts": 100},
    "no correction": {"sampler_correction": None},
    "whole sequences dropped": {"sampler_correction": SamplerCorrection("sequence", "mask")},
    "a head of full logits": {"policy_options": PolicyOptions(fused_head=False)},
    "checkpointing": {"policy_options": PolicyOptions(gradient_checkpointing=True)},
    "a coefficient object": {"regularizer": EntropyBonus(Constant(0.3))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_the_options_are(name: str) -> None:
    runs = [run(kind, micro_batch_tokens=20, **OPTIONS[name]) for kind in (DAPOModule, EagerDAPO)]
    assert_same_run(*runs, tolerance=1e-10)


SEVERAL: dict[str, tuple[dict[str, Any], float]] = {
    "two steps": ({"mini_batch_prompts": 2}, 0.5),
    "two unequal steps": ({"mini_batch_prompts": 3}, 0.25),
    "four steps": ({"mini_batch_prompts": 1}, 0.75),
    "two epochs": ({"update_epochs": 2}, 0.0),
    "two epochs of two steps": ({"mini_batch_prompts": 2, "update_epochs": 2}, 0.5),
}


@pytest.mark.parametrize("budget", [1, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ib centred", pytest.param("a user's", marks=pytest.mark.slow)])
@pytest.mark.parametrize("several", SEVERAL)
@pytest.mark.parametrize("kind", EAGER)
def test_with_several_steps(kind: type[PolicyModule], several: str, name: str, budget: int) -> None:
    """Only the rows of other steps are scored before the update; a second pass still has the scores of before."""
    settings, share = SEVERAL[several]
    made = [
        run(k, regularizer=REGULARIZERS[name](), micro_batch_tokens=budget, **settings) for k in (kind, EAGER[kind])
    ]
    assert_same_run(*made, tolerance=1e-10, share=share)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_single_and_mixed_precision(precision: str) -> None:
    settings = {"dtype": torch.float32, "regularizer": EntropyBonus(0.3), "micro_batch_tokens": 20}
    runs = [run(kind, trainer={"precision": precision}, **settings) for kind in (DAPOModule, EagerDAPO)]
    assert_same_run(*runs, tolerance=1e-6)


def test_a_rollout_without_a_finite_gradient_is_still_measured() -> None:
    """The update that is left out is the one that measures."""
    metrics = []
    for kind in (DAPOModule, EagerDAPO):
        module = kind(TinySource())
        module.configure_model()
        for parameter in module.policy.parameters():
            parameter.register_hook(lambda gradient: gradient * math.inf)
        with pytest.warns(UserWarning, match="not finite"):
            _, recorder = fit(module, sampled()[:1])
        assert recorder.metrics[0]["update/skipped_steps"] == 1
        metrics.append({k: v for k, v in recorder.metrics[0].items() if k.startswith(("policy/", "ib/", "sampler/"))})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-10)
    assert metrics[0]["policy/entropy"] > 0.1


def with_infinite_advantages(kind: type[PolicyModule]) -> type[PolicyModule]:
    """In the first optimizer step, which is not taken."""

    class Infinite(kind):
        def prepare(self, rollout: Rollout) -> Experience:
            experience = super().prepare(rollout)
            first = experience.per_token(torch.isin(experience.groups, self.updater.first_step(rollout)))
            return replace(experience, advantages=experience.advantages.masked_fill(first, torch.inf))

    return Infinite


def with_an_infinite_gradient(kind: type[PolicyModule]) -> type[PolicyModule]:
    """In the first optimizer step, whose forward pass has scored its rows all the same."""

    class Infinite(kind):
        backwards = 0

        def on_before_backward(self, loss: Tensor) -> None:
            self.backwards += 1
            if self.backwards == 1:
                weight = self.policy.model.lm_head.weight
                weight.register_hook(lambda grad: grad * (math.inf if self.backwards == 1 else 1.0))

    return Infinite


@pytest.mark.parametrize("faulty", [with_infinite_advantages, with_an_infinite_gradient])
@pytest.mark.parametrize("kind", EAGER)
def test_a_first_step_that_is_left_out_has_scores_all_the_same(kind: type[PolicyModule], faulty: Any) -> None:
    """Those of before the second step moves the policy: the second pass needs them, and the curves."""
    made = []
    for k in (kind, EAGER[kind]):
        with pytest.warns(UserWarning, match="not finite"):
            made.append(run(faulty(k), rollouts=sampled()[:1], mini_batch_prompts=2, update_epochs=2))
        assert made[-1].metrics[0]["update/skipped_steps"] >= 1
    assert_same_run(*made, tolerance=1e-10, share=0.5)


@pytest.mark.parametrize("budget", [1, 20, 10_000])
@pytest.mark.parametrize("kind", EAGER)
def test_every_micro_batch_goes_through_the_policy_once_instead_of_twice(kind: type[PolicyModule], budget: int) -> None:
    passes = {}
    for k in (kind, EAGER[kind]):
        module = k(TinySource(), micro_batch_tokens=budget)
        module.configure_model()
        calls: list[bool] = []
        module.policy.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        rewards = torch.tensor([1.0, -1.0] * 4)  # groups without an advantage would run without gradients
        fit(module, [replace(sampled()[0], rewards=rewards)])
        passes[k] = calls
        micro_batches = len(module.scorer.budget.micro_batches(make_rollout().sequences))
    assert passes[kind] == [True] * micro_batches
    assert passes[EAGER[kind]] == [False] * micro_batches + [True] * micro_batches


# Where it is not skipped.


class ReadsOldEntropy(InformationBottleneck):
    prepare_needs_scores = True

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return super().prepare(step, context).with_extra(surprise=step.old_entropy - step.old_logp)


class ReadsNoScores(InformationBottleneck):
    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return super().prepare(step, context).with_extra(size=step.advantages.abs())


class OwnPrepareDAPO(DAPOModule):
    advantages_need_scores = True

    def prepare(self, rollout: Rollout) -> Experience:
        experience = super().prepare(rollout)
        return replace(experience, advantages=experience.advantages * experience.old_entropy)


class OwnAdvantages(DAPOModule):
    advantages_need_scores = True

    def advantages(self, experience: Experience) -> Tensor:
        return super().advantages(experience) - experience.old_logp


class OwnPreparePPO(PPOModule):
    advantages_need_scores = True

    def prepare(self, rollout: Rollout) -> Experience:
        experience = super().prepare(rollout)
        return replace(experience, advantages=experience.advantages * experience.old_entropy)


class OtherLoss(PolicyLoss):
    """Reads no scores from before the update: it is skipped."""

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        return -stats.logp * stats.advantages, {}


SHOWN = "{prompt}{answer}>{prompt}"
CASES: dict[str, tuple[type[PolicyModule], dict[str, Any], float]] = {
    "DAPO": (DAPOModule, {}, 0.0),
    "PPO": (PPOModule, {}, 0.0),
    "a loss of one's own": (DAPOModule, {"surrogate": OtherLoss}, 0.0),
    "a prepare that reads no scores": (DAPOModule, {"regularizer": ReadsNoScores()}, 0.0),
    "two epochs": (DAPOModule, {"update_epochs": 2}, 0.0),
    "two epochs of PPO": (PPOModule, {"update_epochs": 2}, 0.0),
    "two steps": (DAPOModule, {"mini_batch_prompts": 2}, 0.5),
    "two unequal steps": (DAPOModule, {"mini_batch_prompts": 3}, 0.25),
    "a penalty in the loss": (DAPOModule, {"kl": lambda: ReferenceKL(0.1)}, 1.0),
    "a penalty in the reward": (PPOModule, {"kl": lambda: ReferenceKL(0.1, "reward")}, 1.0),
    "a schedule": (DAPOModule, {"regularizer": EntropyBonus(Linear(0.1, 0.2, 5))}, 0.0),
    "a target": (DAPOModule, {"regularizer": EntropyBonus(TargetEntropy())}, 1.0),
    "a band": (PPOModule, {"regularizer": InformationBottleneck(EntropyBand())}, 1.0),
    "ClipCov": (DAPOModule, {"regularizer": ClipCov()}, 1.0),
    "KLCov": (DAPOModule, {"regularizer": KLCov()}, 1.0),
    "80/20": (PPOModule, {"regularizer": TopEntropyTokens()}, 1.0),
    "shaped": (DAPOModule, {"regularizer": EntropyShapedAdvantage()}, 1.0),
    "the entropy ratio": (DAPOModule, {"regularizer": EntropyRatioClip()}, 0.0),
    "weights": (PPOModule, {"regularizer": EntroPIC(0.5, 1.5)}, 0.0),
    "a weight that moves": (PPOModule, {"regularizer": PositiveAdvantageWeight()}, 1.0),
    "a clip that moves": (DAPOModule, {"clip_ratio_high": AdaptiveClip()}, 1.0),
    "IBRO": (DAPOModule, {"regularizer": IBRO(template=SHOWN)}, 1.0),
    "a prepare of one's own": (DAPOModule, {"regularizer": ReadsOldEntropy()}, 1.0),
    "a subclass's prepare": (OwnPrepareDAPO, {}, 1.0),
    "a subclass's advantages": (OwnAdvantages, {}, 1.0),
    "a subclass of PPO": (OwnPreparePPO, {}, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_come_first_where_anything_reads_them(name: str) -> None:
    kind, settings, share = CASES[name]
    first = share == 1
    built = {key: value() if key == "kl" else value for key, value in settings.items()}
    module = kind(TinySource(), **built)
    module.configure_model()
    rollout = sampled()[0]
    assert module.scores_first(rollout) == first
    experience = module.prepare(rollout)
    assert (experience.old_logp is not None) == (experience.old_entropy is not None) == first
    assert (experience.other_rows is not None) == (0 < share < 1)
    if not first:
        return
    for number, found in enumerate((experience.old_logp, experience.old_entropy)):
        expected = torch.cat([torch.tensor(of_row[number]) for of_row in scores()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "IBRO"])  # whose prompts these rollouts lack
def test_what_is_done_is_what_the_curves_say(name: str) -> None:
    kind, settings, share = CASES[name]
    recorder = run(kind, rollouts=sampled()[:1], **{k: v() if k == "kl" else v for k, v in settings.items()})
    assert recorder.metrics[0]["update/scored_first"] == share
    expected = sum(entropy.sum() for _, entropy in scores()) / sum(len(entropy) for _, entropy in scores())
    assert recorder.metrics[0]["policy/entropy"] == pytest.approx(expected, rel=1e-9)


def test_a_subclass_reads_real_scores_in_its_advantages() -> None:
    """0.71·H and so on; with zeros in their place nothing would be learned."""
    module = OwnPrepareDAPO(TinySource())
    module.configure_model()
    experience = module.prepare(sampled()[0])
    plain = DAPOModule(TinySource())
    plain.configure_model()
    for row, (_, entropy) in enumerate(scores()):
        own = span(LENGTHS, row)
        advantage = plain.prepare(sampled()[0]).advantages[own][0].item()
        expected = torch.tensor(advantage * entropy)
        torch.testing.assert_close(experience.advantages[own], expected, rtol=1e-9, atol=1e-12)


def test_while_the_critic_warms_up_the_policy_is_scored_for_the_curves() -> None:
    """No update of the policy comes that could do it."""
    recorder = run(PPOModule, critic_warmup_iterations=1)
    assert [metrics["update/scored_first"] for metrics in recorder.metrics] == [1, 0]
    assert recorder.unchanged(0, 1, "policy.")
    assert not recorder.unchanged(1, 2, "policy.")
    eager = run(EagerPPO, critic_warmup_iterations=1)
    for one, other in zip(recorder.metrics, eager.metrics, strict=True):
        for name in ("policy/entropy", "policy/logp", "sampler/kl_k3", "ib/cov_advantage_entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-9)


def test_statistics_of_ones_own_see_the_old_scores() -> None:
    """A regulariser's hook that gets the micro-batch before anyone wrote its scores into it would read zeros."""

    class BySurprise(EntropyRegularizer):
        def statistics(self, micro: MicroBatch, context: StepContext) -> Mapping[str, Tensor]:
            return {"surprise": micro.old_entropy + micro.old_logp}

        def objective(self, stats: TokenStats) -> Tensor:
            assert stats.entropy is not None
            return stats.extra["surprise"] * stats.entropy

    runs = [run(kind, regularizer=BySurprise(0.5)) for kind in (DAPOModule, EagerDAPO)]
    for name, value in runs[1].weights[-1].items():
        torch.testing.assert_close(runs[0].weights[-1][name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [*EAGER, *EAGER.values()])
def test_a_constant_coefficient_counts_the_iterations_in_any_case(kind: type[PolicyModule]) -> None:
    """A run that goes on with a schedule takes it up where the run is."""
    module = run(kind, regularizer=InformationBottleneck(0.5)).module  # type: ignore[attr-defined]
    assert module.regularizer.coefficient.state["iterations"] == 2
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    resumed = DAPOModule(TinySource(), regularizer=InformationBottleneck(Linear(0.0, 1.0, 10)))
    resumed.on_load_checkpoint(checkpoint)
    resumed.regularizer.coefficient.start_iteration()
    assert resumed.regularizer.coef == pytest.approx(0.2), "the third iteration's"


class ForgotToSay(InformationBottleneck):
    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return step.with_extra(surprise=step.old_entropy - step.old_logp)


def test_a_prepare_that_reads_scores_that_are_not_there_is_told_what_to_set() -> None:
    with pytest.raises(TypeError) as raised:
        run(DAPOModule, regularizer=ForgotToSay(0.5))
    assert "ForgotToSay sets prepare_needs_scores = True" in raised.value.__notes__[0]


def test_a_rollout_whose_only_step_is_left_out_is_measured_all_the_same() -> None:
    """The advantages are infinite, so that the step that would have scored it is not taken."""
    metrics = []
    for kind in (DAPOModule, EagerDAPO):

        class Infinite(kind):
            def advantages(self, experience: Experience) -> Tensor:
                return super().advantages(experience) * torch.inf

        with pytest.warns(UserWarning, match="policy advantage"):
            recorder = run(Infinite, rollouts=sampled()[:1])
        metrics.append({k: v for k, v in recorder.metrics[0].items() if k.startswith(("policy/", "sampler/"))})
        assert recorder.metrics[0]["update/skipped_steps"] == 1
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-10)
    assert metrics[0]["policy/entropy"] > 0.1


@pytest.mark.parametrize("settings", [{"update_epochs": 2}, {"mini_batch_prompts": 2}])
def test_a_second_step_on_scores_that_nobody_kept_is_refused(settings: dict[str, Any]) -> None:
    module = DAPOModule(TinySource(), **settings)
    module.configure_model()
    steps = module.updater.steps(module.prepare(sampled()[0]), module.policy_loss, module.context())
    taken = iter(steps)
    first = next(taken)
    assert first.old_logp is first.old_entropy is None
    with pytest.raises(RuntimeError, match=r"steps\.keep\(step\)"):
        next(taken)


def test_a_step_that_is_not_scored_cannot_be_kept() -> None:
    module = DAPOModule(TinySource())
    module.configure_model()
    steps = module.updater.steps(module.prepare(sampled()[0]), module.policy_loss, module.context())
    with pytest.raises(AssertionError, match=r"that update\(\) returns"):
        steps.keep(next(iter(steps)))


def test_scores_are_written_where_their_rows_are() -> None:
    """Rows 5 and 4 of a padded micro-batch, with one token and two; the rest, and the step's own tensors, stay."""
    module = DAPOModule(TinySource())
    module.configure_model()
    experience = module.prepare(sampled()[0])
    logp, entropy = torch.tensor([[1.0, 9.0], [2.0, 3.0]]).double(), torch.tensor([[4.0, 9.0], [5.0, 6.0]]).double()
    scored = with_scores(experience, [(torch.tensor([5, 4]), logp, entropy)])
    expected_logp, expected_entropy = (torch.zeros(int(LENGTHS.sum()), dtype=torch.float64) for _ in range(2))
    expected_logp[span(LENGTHS, 5)], expected_logp[span(LENGTHS, 4)] = logp[0, 0], logp[1]
    expected_entropy[span(LENGTHS, 5)], expected_entropy[span(LENGTHS, 4)] = entropy[0, 0], entropy[1]
    assert torch.equal(scored.old_logp, expected_logp)
    assert torch.equal(scored.old_entropy, expected_entropy)
    assert experience.old_logp is None
    assert with_scores(experience, []) is experience


def test_a_run_from_the_command_line_says_which_it_was(workspace: Path) -> None:
    """The workspace's recipe takes two steps per rollout, of half of the groups each."""
    shown = {}
    for name, flags in (("two", []), ("one", ["--model.mini_batch_prompts", "null"])):
        main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", name, *flags])
        events = EventAccumulator(str(workspace / name))
        events.Reload()
        shown[name] = [event.value for event in events.Scalars("update/scored_first")]
        assert [event.value for event in events.Scalars("policy/entropy")] == pytest.approx([2.5, 2.5], abs=0.5)
    assert shown == {"two": [0.5, 0.5], "one": [0, 0]}
