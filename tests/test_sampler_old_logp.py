"""``old_logp: sampler``: the old log-probs of the rows that are not in the first optimizer step are those they were
sampled with, which the weight check has found to be the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.flat import span
from helpers.models import TinySource
from helpers.sampler_scores import LENGTHS, rollout_of, sampler_near, scores
from helpers.updates import Recorder, Verified, adamw, fit, sgd
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.cli.main import main
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule
from ibro_lightning.regularizers import (
    AdaptiveClip,
    ClipCov,
    EntroPIC,
    EntropyBonus,
    EntropyRatioClip,
    EntropyRegularizer,
    InformationBottleneck,
    PositiveAdvantageWeight,
    TopEntropyTokens,
)
from ibro_lightning.regularizers.coefficients import Linear, Stages, TargetEntropy
from ibro_lightning.update import ReferenceKL
from ibro_lightning.update.correction import SamplerCorrection

torch.set_num_threads(1)


def exact() -> Tensor:
    """``[N]`` the policy's own log-probs."""
    return torch.cat([torch.tensor(of_row) for of_row, _ in scores()])


def run(kind: type[PolicyModule], rollout: Rollout, **settings: Any) -> Recorder:
    settings = {"optimizer": sgd, "regularizer": InformationBottleneck(0.5, part="centred"), **settings}
    if issubclass(kind, PPOModule):
        settings = {"critic_optimizer": adamw(0.01), "gae_lambda": 0.8, **settings}
    return fit(kind(TinySource(torch.float64), **settings), Verified([rollout]))[1]


STEPS = {
    "two": {"mini_batch_prompts": 2},
    "unequal": {"mini_batch_prompts": 3},
    "twice": {"mini_batch_prompts": 2, "update_epochs": 2},
}


@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_where_they_are_the_policys_own_the_update_is_the_same(
    kind: type[PolicyModule], steps: str, budget: int
) -> None:
    settings = {**STEPS[steps], "micro_batch_tokens": budget}
    of_policy, of_sampler = (run(kind, rollout_of(exact()), **settings, old_logp=of) for of in ("policy", "sampler"))
    for name, value in of_policy.weights[-1].items():
        torch.testing.assert_close(of_sampler.weights[-1][name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert any(not torch.equal(of_sampler.weights[0][name], value) for name, value in of_sampler.weights[-1].items())
    one, other = of_policy.metrics[0], of_sampler.metrics[0]
    assert one.keys() == other.keys()
    for name in one:  # all but what is measured over the first step alone
        if name.startswith(("update/", "advantage/", "critic/", "regularizer/")) and name != "update/scored_first":
            assert other[name] == pytest.approx(one[name], rel=1e-9, abs=1e-9), name
    assert other["update/scored_first"] == 0


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_no_forward_pass_comes_before_the_update(kind: type[PolicyModule]) -> None:
    module = kind(TinySource(torch.float64), mini_batch_prompts=2, old_logp="sampler")
    module.configure_model()
    with_gradients: list[bool] = []
    module.policy.register_forward_pre_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    rollout = rollout_of(exact())
    module.prepare(rollout)
    assert with_gradients == []
    module.advantages_need_scores = True
    module.prepare(rollout)
    assert with_gradients == [False]


def test_later_steps_compare_with_what_sampled_and_weigh_it_with_1() -> None:
    """The sampler is off by up to a nat, so that the policy's own would be seen."""
    module = DAPOModule(TinySource(torch.float64), mini_batch_prompts=2, old_logp="sampler", optimizer=sgd)
    module.configure_model()
    rollout = rollout_of(sampler_near(exact()).clamp(max=0.0))
    experience = module.prepare(rollout)
    first = module.updater.first_step(rollout)
    assert experience.old_logp is None
    others = ~torch.isin(rollout.groups, first)
    of_others = others.repeat_interleave(LENGTHS)  # [N]
    known = experience.other_rows
    assert torch.equal(known.logp[of_others], rollout.sampler_logp[of_others])
    assert known.logp[~of_others].isnan().all()
    assert known.entropy.isnan().all()
    assert not known.scored.any()
    steps = module.updater.steps(experience, module.policy_loss, module.context())
    taken = iter(steps)
    step = next(taken)
    own = exact()[~of_others]
    steps.keep(replace(step, old_logp=own, old_entropy=own + 9))
    assert torch.equal(steps.experience.scored, ~others)
    second = next(taken)
    assert second.old_entropy is None
    assert torch.equal(second.old_logp, rollout.sampler_logp[of_others])
    micro = second.micro_batch()
    weights = SamplerCorrection()(micro.old_logp, micro.sampler_logp, micro.mask).weights
    assert torch.equal(weights, micro.mask.to(weights.dtype))
    stats = module.policy_loss.stats(micro, module.context())
    assert stats.old_entropy is None
    assert (stats.logp - stats.old_logp).abs().max() > 0.5


def test_curves_of_scores_are_those_of_the_first_step_and_the_others_of_the_whole_rollout() -> None:
    rollout = rollout_of(sampler_near(exact()).clamp(max=0.0))
    module = DAPOModule(TinySource(torch.float64), mini_batch_prompts=2)
    module.configure_model()
    seen = torch.isin(rollout.groups, module.updater.first_step(rollout))
    for in_first_step in (True, False):
        rollout.sampler_logp[span(LENGTHS, seen.tolist().index(in_first_step))][0] = torch.nan
    recorder = run(DAPOModule, rollout, mini_batch_prompts=2, old_logp="sampler")
    found = recorder.metrics[0]
    rows = [of_row for of_row, is_seen in zip(scores(), seen.tolist(), strict=True) if is_seen]
    tokens = sum(len(logp) for logp, _ in rows)
    assert found["policy/entropy"] == pytest.approx(sum(entropy.sum() for _, entropy in rows) / tokens, rel=1e-9)
    assert found["policy/logp"] == pytest.approx(sum(logp.sum() for logp, _ in rows) / tokens, rel=1e-9)
    compared = seen.repeat_interleave(LENGTHS) & rollout.sampler_logp.isfinite()
    difference = (exact() - rollout.sampler_logp)[compared]
    assert found["sampler/logp_difference_max"] == pytest.approx(difference.abs().max().item(), rel=1e-9)
    assert found["sampler/kl_k1"] == pytest.approx(-difference.mean().item(), rel=1e-9)
    assert found["sampler/non_finite"] == 2
    product = found["ib/cov_advantage_entropy"] + found["ib/mean_advantage_times_mean_entropy"]
    advantages = module.prepare(rollout).advantages
    mask = compared  # a token without a log-prob takes no part
    entropies = torch.cat([torch.tensor(entropy) for _, entropy in scores()])
    assert found["ib/mean_product"] == pytest.approx((advantages * entropies)[mask].mean().item(), rel=1e-6)
    assert product == pytest.approx(found["ib/mean_product"], rel=1e-9)
    whole = rollout.sampler_logp.isfinite()
    assert found["advantage/mean"] == pytest.approx(advantages[whole].mean().item(), rel=1e-6)
    assert all(value == value for value in found.values()), "no nan"


class HoldsOn(EntropyRegularizer):
    """To the policy that sampled; its gradient is nan where an old log-prob is, also under a mask."""

    reads_old_entropy = False

    def objective(self, stats: TokenStats) -> Tensor:
        return -((stats.logp - stats.old_logp) ** 2)


def test_tokens_without_a_log_prob_are_left_out_and_spoil_no_gradient() -> None:
    rollout = rollout_of(exact())
    rollout.sampler_logp[LENGTHS.cumsum(0) - LENGTHS] = torch.nan  # every first token
    rollout.sampler_logp[span(LENGTHS, 3)][1] = -torch.inf
    settings = {"mini_batch_prompts": 2, "update_epochs": 2, "regularizer": HoldsOn(0.5)}
    made = [run(DAPOModule, rollout, old_logp=of, **settings) for of in ("policy", "sampler")]
    for name, value in made[0].weights[-1].items():
        torch.testing.assert_close(made[1].weights[-1][name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert made[1].metrics[0]["update/skipped_steps"] == 0


class ByOldEntropy(EntropyRegularizer):
    """A user's, who knows nothing of the setting."""

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return stats.entropy * (stats.old_entropy > 0.5)


NEEDED: dict[str, Any] = {
    "a moving coefficient": {"regularizer": EntropyBonus(TargetEntropy())},
    "ClipCov": {"regularizer": ClipCov()},
    "80/20": {"regularizer": TopEntropyTokens()},
    "the entropy ratio": {"regularizer": EntropyRatioClip()},
    "a moving clip": {"clip_ratio_high": AdaptiveClip()},
    "a user's": {"regularizer": ByOldEntropy(0.3)},
    "a reference": {"kl": lambda: ReferenceKL(0.1)},
}


MEASURES_NOTHING: dict[str, dict[str, Any]] = {
    "a schedule of α": {"regularizer": InformationBottleneck(Linear(0.5, 0.1, 5))},
    "a schedule of a clip": {"clip_ratio_high": Linear(0.2, 0.3, 5)},
    "a weight in stages": {"regularizer": PositiveAdvantageWeight(Stages([1.0, 0.5], [2]))},
    "constant weights": {"regularizer": EntroPIC(0.5, 1.5)},
}


@pytest.mark.parametrize("name", MEASURES_NOTHING)
def test_what_measures_nothing_needs_no_forward_pass_before_the_update(name: str) -> None:
    module = DAPOModule(TinySource(torch.float64), mini_batch_prompts=2, old_logp="sampler", **MEASURES_NOTHING[name])
    module.configure_model()
    passes: list[bool] = []
    module.policy.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    module.policy_loss.start_iteration()
    module.prepare(rollout_of(exact()))
    assert passes == []


@pytest.mark.parametrize("name", NEEDED)
def test_what_needs_the_scores_of_the_whole_rollout_has_them(name: str) -> None:
    settings = {key: value() if key == "kl" else value for key, value in NEEDED[name].items()}
    recorder = run(DAPOModule, rollout_of(exact()), old_logp="sampler", mini_batch_prompts=2, **settings)
    assert recorder.metrics[0]["update/scored_first"] == 1
    expected = sum(entropy.sum() for _, entropy in scores()) / sum(len(entropy) for _, entropy in scores())
    assert recorder.metrics[0]["policy/entropy"] == pytest.approx(expected, rel=1e-9)


def test_log_probs_that_nobody_filled_in_are_refused_as_ever() -> None:
    for logp in (torch.full_like(exact(), torch.nan), torch.zeros_like(exact())):
        with pytest.raises(ConfigError, match="log-probs of 8 of 8 responses are"):
            run(DAPOModule, rollout_of(logp), old_logp="sampler", mini_batch_prompts=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"old_logp": "engine"}, "old_logp: engine .* write policy or sampler"),
        ({"old_logp": "sampler", "sampler_correction": None}, "old_logp: sampler .* set it, or write policy"),
    ],
)
def test_a_wrong_value_is_refused(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        DAPOModule(TinySource(), **settings)
    assert raised.value.field == "old_logp"
    assert settings["old_logp"] in str(raised.value)


UNVERIFIED: dict[str, tuple[dict[str, Any], str]] = {
    "no check": ({"check": None}, "nothing verifies"),
    "a check that sees little": ({"check": WeightCheck(tolerance=0.5)}, "differ by 0.5 nats"),
    "a coarse engine": ({"dtype": "bfloat16"}, "the engine computes in bfloat16, the policy in float32"),
}


@pytest.mark.parametrize("name", UNVERIFIED)
def test_what_nobody_verifies_is_refused_before_anything_is_trained(name: str) -> None:
    settings, message = UNVERIFIED[name]
    module = DAPOModule(TinySource(), old_logp="sampler")
    with pytest.raises(ConfigError, match=message) as raised:
        fit(module, Verified([rollout_of(exact())], **settings))
    assert raised.value.field == "old_logp"
    fit(DAPOModule(TinySource(), old_logp="policy"), Verified([rollout_of(exact())], **settings))


def test_rollouts_of_earlier_weights_are_refused() -> None:
    data = Verified([rollout_of(exact())])
    data.max_staleness = 1
    with pytest.raises(ConfigError, match=r"those of earlier weights: write old_logp: policy") as raised:
        fit(DAPOModule(TinySource(), old_logp="sampler"), data)
    assert raised.value.field == "old_logp"


def test_rollouts_of_a_foreign_datamodule_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight_check of a RolloutDataModule"):
        fit(DAPOModule(TinySource(), old_logp="sampler"), [rollout_of(exact())])


def test_a_coarse_policy_is_refused() -> None:
    module = DAPOModule(TinySource(), old_logp="sampler")
    with pytest.raises(ConfigError, match="the policy in bfloat16: write float32 for both"):
        fit(module, Verified([rollout_of(exact())]), precision="bf16-mixed")


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_the_command_line_names_the_key(workspace: Any, flags: list[str], capsys: pytest.CaptureFixture) -> None:
    refused = ["--model.old_logp", "sampler", "--data.weight_check", "null"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", *refused, *flags])
    assert "error: model.old_logp: 'sampler' - nothing verifies" in capsys.readouterr().err


def test_a_run_of_the_command_line_takes_them(workspace: Any) -> None:
    """The embedded engine's, verified in float32: the weights differ from those of old_logp: policy by rounding."""
    from safetensors.torch import load_file

    weights = {}
    for of in ("policy", "sampler"):
        flags = ["--trainer.default_root_dir", of, "--model.old_logp", of]
        main(["fit", "--config", "tiny.yaml", *flags])
        weights[of] = load_file(workspace / of / "model" / "model.safetensors")
    for name, value in weights["policy"].items():
        torch.testing.assert_close(weights["sampler"][name], value, rtol=0, atol=1e-4, msg=name)
