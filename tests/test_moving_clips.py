"""Clip ratios and weights that move: bounds at every value, one measurement for all, state and curves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from helpers.rollouts import rollouts, with_shown_tokens
from helpers.updates import dapo, ppo, sgd
from helpers.updates import fit as train
from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.regularizers import (
    IBRO,
    SIREN,
    STEER,
    EntropyBonus,
    EntropyRatioClip,
    EntropyRegularizer,
    EntropyShapedAdvantage,
    KLCov,
    PositiveAdvantageWeight,
)
from ibro_lightning.regularizers.coefficients import (
    AdaptiveClip,
    AdaptiveKL,
    Coefficient,
    Constant,
    Cosine,
    EntropyBand,
    Linear,
    Stages,
    TargetEntropy,
    TrackedNumber,
    as_coefficient,
)
from ibro_lightning.regularizers.siren import Anchor
from ibro_lightning.update import CISPOLoss, DPPOLoss, GMPOLoss, GSPOLoss, PolicyLoss, ReferenceKL, SAPOLoss


class Recorder(Coefficient):
    """Notes what it is given; its value is that of a number in its state."""

    def __init__(self, start: float) -> None:
        super().__init__(now=start)
        self.seen: list[tuple[float, int]] = []

    @property
    def value(self) -> float:
        return self.state["now"]

    def move(self, measured: float, samples: int) -> None:
        self.seen.append((measured, samples))
        self.state["now"] += 0.01


class TwoWeights(EntropyRegularizer):
    """A regulariser of one's own with a second number that moves."""

    def __init__(self, coef: Coefficient | float = 0.1, further: Coefficient | float = 0.5) -> None:
        super().__init__(coef)
        self.further = as_coefficient(further, "further", "entropy")

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, "further": self.further}

    def objective(self, stats: Any) -> torch.Tensor:
        return self.further.value * stats.entropy


@pytest.mark.parametrize("module", [dapo, ppo])
def test_all_that_follows_entropy_is_given_the_same_entropy_and_the_kl_its_own(module: Any) -> None:
    own = {name: Recorder(0.2) for name in ("coef", "further", "low", "high", "kl")}
    regularizer = TwoWeights(own["coef"], own["further"])
    trained = module(
        regularizer=regularizer,
        clip_ratio_low=own["low"],
        clip_ratio_high=own["high"],
        kl=ReferenceKL(own["kl"]),
    )
    _, recorder = train(trained, rollouts(3))
    entropies = [metrics["policy/entropy"] for metrics in recorder.metrics]
    for name in ("coef", "further", "low", "high"):
        assert [measured for measured, _ in own[name].seen] == pytest.approx(entropies, rel=1e-6), name
    kls = [metrics["kl/reference"] for metrics in recorder.metrics]
    assert [measured for measured, _ in own["kl"].seen] == pytest.approx(kls, rel=1e-6)
    assert all(seen.state["iterations"] == 3 for seen in own.values())
    # The curve shows the value that the update used: of entropy's, the one after this iteration's measurement.
    for name in ("regularizer/coef", "regularizer/further", "update/clip_ratio_low", "update/clip_ratio_high"):
        assert [metrics[name] for metrics in recorder.metrics] == pytest.approx([0.21, 0.22, 0.23], rel=1e-12), name
    assert [metrics["kl/coef"] for metrics in recorder.metrics] == pytest.approx([0.2, 0.21, 0.22], rel=1e-12)


def test_a_coefficient_that_serves_twice_moves_once_an_iteration() -> None:
    shared = Recorder(0.2)
    train(dapo(regularizer=TwoWeights(0.1, shared), clip_ratio_low=shared, clip_ratio_high=shared), rollouts(2))
    assert shared.state == pytest.approx({"iterations": 2.0, "now": 0.22})
    assert len(shared.seen) == 2


def test_a_number_has_no_curve_and_no_state_of_its_own() -> None:
    trained = dapo(clip_ratio_low=0.1)
    assert set(trained.policy_loss.coefficients) == {"regularizer"}
    _, recorder = train(trained, rollouts(1))
    assert not {name for name in recorder.metrics[0] if "clip_ratio" in name}


@pytest.mark.parametrize("kind", [PolicyLoss, GSPOLoss, CISPOLoss, GMPOLoss, DPPOLoss])
def test_a_clip_that_moves_clips_as_the_number_that_it_has_come_to(kind: type[PolicyLoss]) -> None:
    generator = torch.Generator().manual_seed(1)
    logp, old_logp, advantages = (torch.randn(3, 5, generator=generator).double() for _ in range(3))
    mask = torch.ones(3, 5, dtype=torch.bool)
    stats = TokenStats(logp, None, old_logp, None, advantages, mask)
    low, high = Linear(0.1, 0.5, 2), Cosine(0.4, 0.2, 2)
    moving = kind(clip_ratio_low=low, clip_ratio_high=high)
    for expected_low, expected_high in ((0.1, 0.4), (0.3, 0.3), (0.5, 0.2), (0.5, 0.2)):
        moving.start_iteration()
        fixed = kind(clip_ratio_low=expected_low, clip_ratio_high=expected_high)
        assert (moving.clip_ratio_low, moving.clip_ratio_high) == pytest.approx((expected_low, expected_high))
        torch.testing.assert_close(moving.surrogate(stats)[0], fixed.surrogate(stats)[0])


@pytest.mark.parametrize(
    ("settings", "setting", "parts"),
    [
        ({"clip_ratio_low": Linear(0.2, 1.0, 5)}, "clip_ratio_low", ["Linear", "become 1", "between 0 and 1"]),
        ({"clip_ratio_low": Linear(0.0, 0.2, 5)}, "clip_ratio_low", ["become 0"]),
        ({"clip_ratio_low": Constant(1.5)}, "clip_ratio_low", ["1.5"]),
        ({"clip_ratio_low": EntropyBand(start=0.2, minimum=0.1)}, "clip_ratio_low", ["EntropyBand", "become 1"]),
        ({"clip_ratio_high": TargetEntropy(start=0.2)}, "clip_ratio_high", ["TargetEntropy", "become 0"]),
        ({"clip_ratio_high": EntropyBand(start=0.2)}, "clip_ratio_high", ["become 0", "positive"]),
        ({"clip_ratio_high": AdaptiveKL()}, "clip_ratio_high", ["KL", "entropy"]),
        ({"clip_ratio_low": Recorder(1.5)}, "clip_ratio_low", ["Recorder", "become 1.5"]),
    ],
)
@pytest.mark.parametrize("module", [dapo, ppo])
def test_a_coefficient_that_could_leave_the_bounds_is_refused_early(
    module: Any, settings: Mapping[str, Any], setting: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        module(**settings)
    assert refused.value.setting == setting
    assert all(part in str(refused.value) for part in parts)


def test_cispo_may_come_to_have_no_lower_bound() -> None:
    loss = CISPOLoss(clip_ratio_low=Linear(0.5, 1.0, 1))
    loss.start_iteration()
    loss.start_iteration()
    assert loss.clip_ratio_low == 1.0
    with pytest.raises(ConfigError):
        CISPOLoss(clip_ratio_low=Linear(0.5, 1.5, 1))


def test_one_of_unknown_bounds_is_refused_when_it_leaves_them() -> None:
    coefficient = Recorder(0.985)
    loss = PolicyLoss(clip_ratio_low=coefficient)
    coefficient.observe(1.0)
    assert loss.clip_ratio_low == pytest.approx(0.995)
    coefficient.observe(1.0)
    with pytest.raises(ConfigError, match="Recorder has moved it there") as refused:
        _ = loss.clip_ratio_low
    assert refused.value.setting == "clip_ratio_low"


def test_bounds_hold_what_the_coefficients_do() -> None:
    found = [0.0] * 9 + [3.0] * 30
    for coefficient in (
        Constant(0.3),
        Linear(0.4, 0.1, 7),
        Cosine(0.1, 0.4, 7),
        TargetEntropy(start=0.1, step=0.1, maximum=0.4),
        EntropyBand(start=0.2, proportional=2.0, integral=0.5, minimum=0.1, maximum=0.6),
    ):
        low, high = coefficient.bounds
        values = []
        for measured in found:
            coefficient.start_iteration()
            coefficient.observe(measured)
            values.append(coefficient.value)
        assert (min(values), max(values)) == pytest.approx((low, high), rel=1e-12)
    assert AdaptiveKL().bounds is None


@pytest.mark.parametrize("minimum", [-0.1, 0.3, math.nan, "0.1", None])
def test_the_minimum_of_a_band_is_refused_by_name(minimum: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        EntropyBand(start=0.2, minimum=minimum)
    assert refused.value.setting == "minimum"


def moving_module() -> Any:
    return dapo(
        regularizer=TwoWeights(0.1, Linear(0.5, 0.1, 10)),
        clip_ratio_low=Linear(0.1, 0.3, 10),
        clip_ratio_high=EntropyBand(low=5, high=6, start=0.3, integral=0.02, minimum=0.1),
    )


def test_a_checkpoint_restores_all_of_them() -> None:
    first, second = moving_module(), moving_module()
    for measured in (1.0, 2.0, 7.0):
        first.policy_loss.start_iteration()
        for coefficient in first.policy_loss.entropy_observers:
            coefficient.observe(measured)
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    names = ["regularizer", "regularizer/further", "update/clip_ratio_high", "update/clip_ratio_low"]
    assert sorted(checkpoint["coefficients"]) == names
    states = [{n: c.state_dict() for n, c in m.policy_loss.coefficients.items()} for m in (first, second)]
    assert states[0] == states[1]
    assert (second.policy_loss.clip_ratio_low, second.policy_loss.clip_ratio_high) == (
        first.policy_loss.clip_ratio_low,
        first.policy_loss.clip_ratio_high,
    )


def test_on_an_earlier_checkpoint_a_clips_schedule_counts_the_runs_iterations() -> None:
    """Checkpoints before this version hold ``regularizer`` and ``kl`` alone."""
    module = moving_module()
    module.on_load_checkpoint({"coefficients": {"regularizer": {"iterations": 5.0}}})
    assert module.policy_loss.clip_ratio_low == pytest.approx(0.1 + 0.2 * 4 / 10)
    assert module.regularizer.further.value == pytest.approx(0.5 - 0.4 * 4 / 10)


def test_old_scores_come_first_where_a_clip_follows_entropy() -> None:
    assert not PolicyLoss(EntropyBonus(0.1)).needs_scores
    assert PolicyLoss(clip_ratio_high=Recorder(0.3)).needs_scores
    assert PolicyLoss(TwoWeights(0.1, Recorder(0.3))).needs_scores
    assert not PolicyLoss(TwoWeights(0.1, 0.3)).needs_scores


# Weights and bounds of methods.

MOVING: dict[str, tuple[Callable[[Any], EntropyRegularizer], Any]] = {
    # a method with one of its numbers, which falls from 0.8 to 0.4 in two iterations
    "kl_coef": (lambda number: KLCov(0.5, kl_coef=number), lambda method: method.kl_coef.value),
    "scale": (lambda number: EntropyShapedAdvantage(scale=number), lambda method: method.scale.value),
    "beta": (lambda number: with_shown_tokens(IBRO(0.5, beta=number)), lambda method: method.beta.value),
    "w_min": (lambda number: STEER(number), lambda method: method.w_min.value),
    "low": (lambda number: EntropyRatioClip(low=number), lambda method: method.low.value),
    "high": (lambda number: EntropyRatioClip(high=number), lambda method: method.high.value),
}


@pytest.mark.parametrize("name", MOVING)
def test_a_methods_number_moves_is_a_curve_and_survives_in_the_checkpoint(name: str) -> None:
    build, value_of = MOVING[name]
    module = dapo(regularizer=build(Linear(0.8, 0.4, 2)), mini_batch_prompts=2)
    _, recorder = train(module, rollouts(3))
    assert [metrics[f"regularizer/{name}"] for metrics in recorder.metrics] == pytest.approx([0.8, 0.6, 0.4])
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    resumed = dapo(regularizer=build(Linear(0.8, 0.4, 4)))
    resumed.on_load_checkpoint(checkpoint)
    assert value_of(resumed.regularizer) == pytest.approx(0.6), "iteration 3 of 4"


@pytest.mark.parametrize("name", MOVING)
def test_a_plain_number_of_a_method_is_no_curve(name: str) -> None:
    assert list(MOVING[name][0](0.5).coefficients) == ["coef"]


@pytest.mark.parametrize("name", MOVING)
def test_an_update_with_a_number_that_moves_is_that_with_what_it_has_come_to(name: str) -> None:
    build, _ = MOVING[name]
    settings: dict[str, Any] = {"mini_batch_prompts": 2, "optimizer": sgd, "warmup_steps": 0}
    moving, fixed = (
        train(dapo(regularizer=build(number), **settings), rollouts(1))[1].weights[-1]
        for number in (Linear(0.6, 0.1, 5), 0.6)
    )
    for key, value in fixed.items():
        torch.testing.assert_close(moving[key], value, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("build", "setting", "parts"),
    [
        (lambda: KLCov(kl_coef=-1.0), "kl_coef", ["-1.0", "0 or more"]),
        (lambda: EntropyShapedAdvantage(scale=-1.0), "scale", ["-1.0"]),
        (lambda: IBRO(beta=AdaptiveKL()), "beta", ["AdaptiveKL", "KL"]),
        (lambda: STEER(Linear(0.5, 1.5, 3)), "w_min", ["Linear", "become 1.5", "above 0 and up to 1"]),
        (lambda: STEER(TargetEntropy()), "w_min", ["become 0"]),
        (lambda: EntropyRatioClip(low=1.5), "low", ["1.5", "above 0 and up to 1, such as 0.05"]),
        (lambda: EntropyRatioClip(high=Linear(0.0, 0.1, 3)), "high", ["become 0", "positive"]),
        (lambda: PolicyLoss(dual_clip=Linear(10.0, 1.0, 3)), "dual_clip", ["become 1 ", "number above 1"]),
        # α of a clip would be 1.5, and a number that is measured once is no coefficient.
        (lambda: EntropyBonus(AdaptiveClip()), "coef", ["AdaptiveClip", "clip_ratio_high"]),
        (lambda: PolicyLoss(clip_ratio_low=AdaptiveClip()), "clip_ratio_low", ["AdaptiveClip", "clip_ratio_high"]),
        (lambda: EntropyBonus(Anchor()), "coef", ["0 or more"]),
        # A coefficient is named by its class.
        (
            lambda: SAPOLoss(clip_ratio_high=AdaptiveClip()),
            "clip_ratio_high",
            ["'AdaptiveClip' - SAPOLoss"],
        ),
        # A probability cannot change by 1.
        (lambda: DPPOLoss(clip_ratio_high=1.0), "clip_ratio_high", ["1.0", "between 0 and 1, such as 0.28"]),
        (lambda: DPPOLoss(clip_ratio_high=AdaptiveClip()), "clip_ratio_high", ["become 1.5"]),
    ],
)
def test_numbers_of_methods_are_refused_by_name(
    build: Callable[[], object], setting: str, parts: Sequence[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        build()
    assert refused.value.setting == setting
    assert all(part in str(refused.value) for part in parts), str(refused.value)


def test_a_dual_clip_that_moves_is_a_curve_and_bounds_the_loss() -> None:
    """Ratio 5 at A = −1: the loss is 5, or c where that is smaller."""
    module = dapo(dual_clip=Linear(4.0, 2.0, 2))
    stats = TokenStats(
        *(torch.tensor([[5.0]]).log(), None, torch.zeros(1, 1), None),
        *(torch.tensor([[-1.0]]), torch.ones(1, 1, dtype=torch.bool)),
    )
    losses = []
    for _ in range(3):
        module.policy_loss.start_iteration()
        losses.append(module.policy_loss.surrogate(stats)[0].item())
    assert losses == pytest.approx([4.0, 3.0, 2.0])
    assert list(module.policy_loss.coefficients) == ["regularizer", "update/dual_clip"]


@pytest.mark.parametrize("number", [Linear(0.1, 0.3, 5), Cosine(0.1, 0.3, 5), Stages([0.1, 0.3], [2]), 0.1])
def test_schedules_measure_nothing_and_need_no_scores(number: Any) -> None:
    for loss in (
        PolicyLoss(EntropyBonus(number)),
        PolicyLoss(clip_ratio_high=number),
        PolicyLoss(PositiveAdvantageWeight(number)),
        PolicyLoss(SIREN(number)),
    ):
        assert not loss.needs_scores
    assert PolicyLoss(EntropyBonus(EntropyBand())).needs_scores


def test_another_epsilon_than_the_lower_clip_ratio_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"clip_ratio_low is 0\.2 and AdaptiveClip's epsilon 0\.6"):
        PolicyLoss(clip_ratio_high=AdaptiveClip())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PolicyLoss(clip_ratio_low=0.6, clip_ratio_high=AdaptiveClip())
