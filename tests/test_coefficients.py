"""Coefficients that move during training: sequences worked out by hand, and what becomes of them in a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.quick import slow_unless
from helpers.rollouts import rollouts
from helpers.updates import dapo, ppo
from helpers.updates import fit as train
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import AEnt, EntropyBonus, NoRegularizer
from ibro_lightning.regularizers.coefficients import (
    AdaptiveClip,
    AdaptiveKL,
    Coefficient,
    Constant,
    Cosine,
    EntropyBand,
    EntropySteps,
    Linear,
    Stages,
    TargetEntropy,
    as_coefficient,
)
from ibro_lightning.update import ReferenceKL

CONTROLLERS = {
    "constant": lambda: Constant(0.3),
    "linear": lambda: Linear(0.1, 0.5, 7),
    "cosine": lambda: Cosine(0.5, 0.1, 7),
    "target": lambda: TargetEntropy(target=0.2, step=0.01, start=0.02),
    "band": lambda: EntropyBand(proportional=0.3, integral=0.2, start=0.05),
    "adaptive": lambda: AdaptiveKL(start=0.1, target=0.2, horizon=60),
    "stages": lambda: Stages([0.5, 0.4, 0.3, 0.2], [2, 4, 8]),
    "falling band": lambda: EntropyBand(proportional=0.3, integral=0.2, start=0.05, raises_entropy=False),
    "steps": lambda: EntropySteps(target=0.2),
    "adaptive clip": lambda: AdaptiveClip(target=0.2),
}
MEASURED = [0.3, 0.05, 0.1, 0.2, 0.7, 0.0, 0.15, 0.01, 0.4, 0.2]


def values_over(coefficient: Coefficient, measured: Sequence[float], samples: int = 1) -> list[float]:
    """The coefficient in each iteration, after it has observed."""
    values = []
    for one in measured:
        coefficient.start_iteration()
        coefficient.observe(one, samples)
        values.append(coefficient.value)
    return values


# Schedules.


def test_a_constant_ignores_what_is_measured() -> None:
    coefficient = Constant(0.3)
    assert coefficient.value == 0.3
    assert values_over(coefficient, [0.0, 5.0, math.inf]) == [0.3, 0.3, 0.3]


def test_linear_goes_straight_from_start_to_end_and_stays_there() -> None:
    """0.4 → 0.2 in 4 iterations: a step of 0.05; the first iteration has the start, the fifth the end."""
    coefficient = Linear(0.4, 0.2, 4)
    assert coefficient.value == 0.4
    assert values_over(coefficient, [1.0] * 7) == pytest.approx([0.4, 0.35, 0.3, 0.25, 0.2, 0.2, 0.2], rel=1e-12)


def test_cosine_is_flat_at_both_ends_and_halfway_in_the_middle() -> None:
    """½(1 + cos(πk/4)) for k = 0..4 is 1, ½ + √2/4, ½, ½ − √2/4, 0."""
    quarter = math.sqrt(2) / 4
    shape = [1.0, 0.5 + quarter, 0.5, 0.5 - quarter, 0.0, 0.0]
    down, up = Cosine(0.9, 0.1, 4), Cosine(0.1, 0.9, 4)
    assert (down.value, up.value) == pytest.approx((0.9, 0.1), rel=1e-12)
    assert values_over(down, [1.0] * 6) == pytest.approx([0.1 + 0.8 * s for s in shape], rel=1e-12)
    assert values_over(up, [1.0] * 6) == pytest.approx([0.9 - 0.8 * s for s in shape], rel=1e-12)


def test_schedules_follow_the_iteration_alone() -> None:
    for schedule in (Linear, Cosine):
        low, high = schedule(0.0, 1.0, 3), schedule(0.0, 1.0, 3)
        assert values_over(low, [0.0] * 5) == values_over(high, [9.0] * 5, samples=100)


@pytest.mark.parametrize("schedule", [Linear, Cosine])
def test_a_schedule_of_one_iteration_jumps_after_it(schedule: type[Linear] | type[Cosine]) -> None:
    assert values_over(schedule(0.5, 0.0, 1), [1.0] * 3) == [0.5, 0.0, 0.0]


# Controllers.


def test_target_entropy_steps_up_below_the_target_and_down_above_it() -> None:
    """Steps of 0.01 from 0.02; above the target the coefficient still moves, but the term is off."""
    coefficient = TargetEntropy(target=0.2, step=0.01, start=0.02)
    measured = [0.1, 0.19, 0.3, 0.05, 0.21, 0.25, 0.1]
    moved = [0.03, 0.04, 0.03, 0.04, 0.03, 0.02, 0.03]
    seen = []
    for one, state in zip(measured, moved, strict=True):
        coefficient.observe(one)
        assert coefficient.state["coef"] == pytest.approx(state, rel=1e-12)
        seen.append(coefficient.value)
    assert seen == pytest.approx([0.03, 0.04, 0.0, 0.04, 0.0, 0.0, 0.03], rel=1e-12)
    assert [value == 0.0 for value in seen] == [one > 0.2 for one in measured]


def test_target_entropy_defaults_are_those_of_the_report() -> None:
    """Skywork-OR1: target 0.2, steps of 0.005, from 0."""
    assert values_over(TargetEntropy(), [0.1, 0.1, 0.3, 0.1]) == pytest.approx([0.005, 0.01, 0.0, 0.01], rel=1e-12)


def test_target_entropy_is_active_exactly_at_its_target() -> None:
    coefficient = TargetEntropy(target=0.25, step=0.01, start=0.5)
    coefficient.observe(0.25)
    assert coefficient.value > 0
    coefficient.observe(math.nextafter(0.25, 1.0))
    assert coefficient.value == 0.0


def test_target_entropy_never_gets_negative_nor_owes_steps() -> None:
    """Long above the target, the coefficient waits at 0: the first iteration below it counts at once."""
    coefficient = TargetEntropy(target=0.2, step=0.01)
    assert values_over(coefficient, [0.9] * 50) == [0.0] * 50
    assert coefficient.state["coef"] == 0.0
    assert values_over(coefficient, [0.1]) == [0.01]


def test_target_entropy_stops_at_its_maximum_and_comes_down_from_there() -> None:
    coefficient = TargetEntropy(target=0.2, step=0.01, start=0.01, maximum=0.025)
    assert values_over(coefficient, [0.1] * 9)[-1] == 0.025
    coefficient.observe(0.3)
    assert coefficient.state["coef"] == pytest.approx(0.015, rel=1e-12)


def test_stages_begin_in_their_iteration() -> None:
    """0.5 in iterations 1 and 2, 1 in 3 and 4, then 0."""
    stages = Stages([0.5, 1.0, 0.0], [3, 5])
    assert stages.value == 0.5
    assert values_over(stages, [1.0] * 6) == [0.5, 0.5, 1.0, 1.0, 0.0, 0.0]
    assert stages.bounds == (0.0, 1.0)
    assert values_over(Stages([0.7], []), [1.0] * 2) == [0.7, 0.7]


def test_entropy_steps_go_down_below_the_target_up_above_it_and_rest_at_it() -> None:
    """Steps of 0.05 from 1, within [0.9, 1.1]."""
    steps = EntropySteps(target=0.25, minimum=0.9, maximum=1.1)
    measured = [0.1, 0.1, 0.1, 0.25, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5]
    expected = [0.95, 0.9, 0.9, 0.9, 0.95, 1.0, 1.05, 1.1, 1.1, 1.1]
    assert values_over(steps, measured) == pytest.approx(expected, rel=1e-12)
    assert steps.bounds == (0.9, 1.1)


@pytest.mark.parametrize("kind", [EntropyBand, EntropySteps, TargetEntropy])
def test_a_controller_without_an_upper_limit_goes_on(kind: type[Coefficient]) -> None:
    coefficient = kind(maximum=math.inf)
    values = values_over(coefficient, [5.0] * 200 if kind is EntropySteps else [0.0] * 20_000)
    assert values[-1] > max(values[len(values) // 2], 1.0)
    assert coefficient.bounds == (0.0, math.inf)


def test_the_adaptive_clip_widens_below_the_target_by_hand() -> None:
    """ε 0.6: 1/(1 − 0.6) = 2.5, so 1.5 + k with steps of 0.25, from 0 to 2.5; target 0.3."""
    clip = AdaptiveClip()
    assert clip.value == pytest.approx(1.5, rel=1e-12)
    measured = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, *[0.1] * 11]
    expected = [1.75, 2.0, 2.0, 1.75, 1.5, 1.5, *[1.75 + 0.25 * k for k in range(10)], 4.0]
    assert values_over(clip, measured) == pytest.approx(expected, rel=1e-12)
    assert clip.bounds == pytest.approx((1.5, 4.0), rel=1e-12)


def test_a_band_of_what_lowers_entropy_mirrors_the_other_at_its_start() -> None:
    settings = {"low": 0.1, "high": 0.3, "proportional": 0.5, "integral": 0.1, "start": 1.0, "maximum": 2.0}
    rising, falling = EntropyBand(**settings), EntropyBand(**settings, raises_entropy=False)
    for measured in MEASURED:
        rising.observe(measured)
        falling.observe(measured)
        assert falling.value == pytest.approx(2.0 - rising.value, rel=1e-12)


def test_entropy_band_adds_a_proportional_and_an_integral_part() -> None:
    """[0.1, 0.3], kp = 0.5, ki = 0.1, start 0.2. Errors 0.1, 0.05, 0, −0.2, 0; sums 0.1, 0.15, 0.15, −0.05, −0.05."""
    coefficient = EntropyBand(low=0.1, high=0.3, proportional=0.5, integral=0.1, start=0.2)
    assert coefficient.value == 0.2
    expected = [0.2 + 0.05 + 0.01, 0.2 + 0.025 + 0.015, 0.2 + 0.015, 0.2 - 0.1 - 0.005, 0.2 - 0.005]
    assert values_over(coefficient, [0.0, 0.05, 0.2, 0.5, 0.3]) == pytest.approx(expected, rel=1e-12)


def test_inside_the_band_the_integral_holds() -> None:
    coefficient = EntropyBand(low=0.1, high=0.3, proportional=0.5, integral=0.1, start=0.2)
    coefficient.observe(0.0)
    inside = values_over(coefficient, [0.1, 0.2, 0.3, 0.25] * 5)
    assert inside == pytest.approx([0.2 + 0.1 * 0.1] * 20, rel=1e-12)


def test_the_bands_integral_does_not_wind_up_at_the_maximum() -> None:
    """ki = 0.1, errors of 0.1: 0.01 more each time, up to 0.05. After 50 more, one error of −0.1 takes 0.01 off."""
    coefficient = EntropyBand(low=0.1, high=0.3, proportional=0.0, integral=0.1, maximum=0.055)
    assert values_over(coefficient, [0.0] * 5) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05], rel=1e-9)
    assert values_over(coefficient, [0.0] * 50) == [0.055] * 50
    assert values_over(coefficient, [0.4]) == pytest.approx([0.04], rel=1e-9)


def test_the_bands_integral_does_not_wind_up_at_zero() -> None:
    """From 0.025 down by 0.01 for each error of −0.1; 50 more change nothing; one of +0.1 brings 0.01 back."""
    coefficient = EntropyBand(low=0.1, high=0.3, proportional=0.0, integral=0.1, start=0.025)
    assert values_over(coefficient, [0.4] * 2) == pytest.approx([0.015, 0.005], rel=1e-9)
    assert values_over(coefficient, [0.4] * 50) == [0.0] * 50
    assert values_over(coefficient, [0.0]) == pytest.approx([0.015], rel=1e-9)


def test_a_large_proportional_part_at_a_limit_leaves_the_integral_alone() -> None:
    coefficient = EntropyBand(low=0.1, high=0.3, proportional=100.0, integral=0.1, start=0.4, maximum=0.5)
    assert values_over(coefficient, [0.0] * 20 + [0.2]) == pytest.approx([0.5] * 20 + [0.4], rel=1e-12)
    assert values_over(coefficient, [0.4] * 20 + [0.2]) == pytest.approx([0.0] * 20 + [0.4], rel=1e-12)


def test_adaptive_kl_is_its_formula() -> None:
    """Target 0.01, horizon 100, 50 responses: errors 0.1, 4 → 0.2, −1 → −0.2, 0 give 1.05, 1.1, 0.9, 1."""
    coefficient = AdaptiveKL(start=0.1, target=0.01, horizon=100)
    assert coefficient.value == 0.1
    measured = [0.011, 0.05, 0.0, 0.01]
    assert values_over(coefficient, measured, samples=50) == pytest.approx([0.105, 0.1155, 0.10395, 0.10395], rel=1e-12)


def test_adaptive_kl_moves_in_proportion_to_the_responses_seen() -> None:
    assert values_over(AdaptiveKL(1.0, 0.01, 1000), [1.0], samples=250) == pytest.approx([1.05], rel=1e-12)
    assert values_over(AdaptiveKL(1.0, 0.01, 1000), [1.0], samples=1000) == pytest.approx([1.2], rel=1e-12)


def test_adaptive_kl_neither_reaches_zero_nor_gets_negative() -> None:
    """More responses than the horizon count as many as it; k1 estimates may be negative too."""
    values = values_over(AdaptiveKL(0.1, 0.01, 10), [0.0, 0.02, -3.0], samples=1000)
    assert values == pytest.approx([0.08, 0.096, 0.0768], rel=1e-12)
    assert values_over(AdaptiveKL(0.1, 0.01, 100), [-5.0], samples=100) == pytest.approx([0.08], rel=1e-12)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_no_measurement_makes_a_coefficient_negative_or_infinite(name: str) -> None:
    coefficient = CONTROLLERS[name]()
    for value in values_over(coefficient, [0.0, 1e-9, 100.0, 1e6, 0.2, 0.0] * 20, samples=37):
        assert value >= 0
        assert math.isfinite(value)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_moves_nothing_but_the_iteration(name: str, measured: float) -> None:
    coefficient = CONTROLLERS[name]()
    values_over(coefficient, MEASURED[:3], samples=3)
    before = coefficient.state_dict()
    coefficient.start_iteration()
    coefficient.observe(measured, 3)
    assert coefficient.state_dict() == {**before, "iterations": before["iterations"] + 1}


# State.


@pytest.mark.parametrize("of", CONTROLLERS)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_of_another_class_a_state_gives_only_what_both_have(name: str, of: str) -> None:
    coefficient, other = CONTROLLERS[name](), CONTROLLERS[of]()
    values_over(other, MEASURED[:3], samples=3)
    fresh, saved = coefficient.state_dict(), other.state_dict()
    coefficient.load_state_dict(saved)
    assert coefficient.state_dict() == {key: saved.get(key, value) for key, value in fresh.items()}
    assert coefficient.state_dict()["iterations"] == 3


@pytest.mark.parametrize("done", [0, 1, 5])
@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_restored_coefficient_continues_identically(name: str, done: int) -> None:
    whole, first, second = (CONTROLLERS[name]() for _ in range(3))
    expected = values_over(whole, MEASURED, samples=3)
    values_over(first, MEASURED[:done], samples=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value
    assert values_over(second, MEASURED[done:], samples=3) == expected[done:]
    if name != "constant":
        assert len(set(expected)) > 3, "the example moves it"


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_saved_state_does_not_move_with_the_coefficient(name: str) -> None:
    coefficient = CONTROLLERS[name]()
    values_over(coefficient, MEASURED[:3])
    saved = coefficient.state_dict()
    kept = copy.deepcopy(saved)
    values_over(coefficient, MEASURED[3:])
    assert saved == kept
    coefficient.load_state_dict(saved)
    values_over(coefficient, MEASURED[3:])
    assert saved == kept, "nor after it was loaded"


def test_a_modules_checkpoint_holds_its_coefficients(tiny_policy: Path) -> None:
    def module() -> DAPOModule:
        regularizer = EntropyBonus(TargetEntropy(target=0.2, step=0.01))
        return DAPOModule(str(tiny_policy), regularizer=regularizer, kl=ReferenceKL(AdaptiveKL(0.1, 0.01, 100)))

    before, after = module(), module()
    for measured in (0.1, 0.1, 0.15):
        before.regularizer.coefficient.observe(measured)
        before.kl.coefficient.observe(measured, 50)
    checkpoint: dict[str, object] = {}
    before.on_save_checkpoint(checkpoint)
    before.regularizer.coefficient.observe(0.1)  # what happens later is not in it
    after.on_load_checkpoint(checkpoint)
    assert after.regularizer.coef == pytest.approx(0.03, rel=1e-12)
    assert after.kl.coef == pytest.approx(0.1 * 1.1**3, rel=1e-12)


def test_a_checkpoint_without_coefficients_leaves_them_as_they_are(tiny_policy: Path) -> None:
    module = DAPOModule(str(tiny_policy), regularizer=EntropyBonus(Linear(0.3, 0.1, 2)))
    module.on_load_checkpoint({})
    assert module.regularizer.coef == 0.3


def test_resuming_with_another_class_of_coefficient_starts_it_anew(tiny_policy: Path) -> None:
    """Someone goes on from a checkpoint with a controller in place of the plain number."""
    checkpoint: dict[str, object] = {}
    DAPOModule(str(tiny_policy), regularizer=EntropyBonus(0.1)).on_save_checkpoint(checkpoint)
    module = DAPOModule(str(tiny_policy), regularizer=EntropyBonus(TargetEntropy(start=0.3)))
    module.on_load_checkpoint(checkpoint)
    assert module.regularizer.coef == 0.3


# Settings.


def test_a_number_is_a_constant_and_an_object_stays_itself() -> None:
    assert as_coefficient(0.25, "x", "entropy").value == 0.25
    moving = Linear(0.1, 0.2, 3)
    assert as_coefficient(moving, "x", "entropy") is moving
    regularizer = EntropyBonus(moving)
    moving.start_iteration()
    moving.start_iteration()
    assert regularizer.coef == moving.value == pytest.approx(0.1 + 0.1 / 3)


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (lambda: Constant(-0.1), "coef"),
        (lambda: Constant(math.nan), "coef"),
        (lambda: as_coefficient(-1.0, "coef", "KL"), "coef"),
        (lambda: as_coefficient(math.inf, "coef", "KL"), "coef"),
        (lambda: ReferenceKL(coef=-1.0), "coef"),
        (lambda: EntropyBonus(math.nan), "coef"),
        *((lambda c=c: c(-0.1, 1.0, 3), "start") for c in (Linear, Cosine)),
        *((lambda c=c: c(0.1, -1.0, 3), "end") for c in (Linear, Cosine)),
        *((lambda c=c: c(0.1, math.inf, 3), "end") for c in (Linear, Cosine)),
        *((lambda c=c: c(0.1, 1.0, 0), "iterations") for c in (Linear, Cosine)),
        (lambda: TargetEntropy(target=-0.1), "target"),
        (lambda: TargetEntropy(step=-0.1), "step"),
        (lambda: TargetEntropy(start=-0.1), "start"),
        (lambda: TargetEntropy(start=math.nan), "start"),
        (lambda: TargetEntropy(maximum=-1.0), "maximum"),
        (lambda: TargetEntropy(start=0.2, maximum=0.1), "maximum"),
        (lambda: TargetEntropy(maximum=math.nan), "maximum"),
        (lambda: EntropyBand(low=-0.1), "low"),
        (lambda: EntropyBand(low=0.4, high=0.3), "low"),
        (lambda: EntropyBand(low=math.nan), "low"),
        (lambda: EntropyBand(high=math.inf), "high"),
        (lambda: EntropyBand(high=math.nan), "high"),
        (lambda: EntropyBand(proportional=-1.0), "proportional"),
        (lambda: EntropyBand(integral=-1.0), "integral"),
        (lambda: EntropyBand(start=-1.0), "start"),
        (lambda: EntropyBand(start=0.5, maximum=0.4), "maximum"),
        (lambda: EntropyBand(raises_entropy="yes"), "raises_entropy"),
        *((lambda v=v: Stages(v, [2]), "values") for v in ([], "12", None, [1.0, -0.1], [1.0, math.nan], ["1", 2])),
        *(
            (lambda s=s: Stages([1, 2, 3], s), "starts")
            for s in ([], [2], "23", None, [3, 2], [2, 2], [1, 2], [2, 3.5])
        ),
        *((lambda n=n: EntropySteps(**{n: -0.1}), n) for n in ("target", "step", "start", "minimum")),
        (lambda: EntropySteps(minimum=1.1), "minimum"),
        (lambda: EntropySteps(maximum=0.9), "maximum"),
        *((lambda n=n: AdaptiveClip(**{n: -0.1}), n) for n in ("epsilon", "target", "step", "start", "maximum")),
        *((lambda e=e: AdaptiveClip(e), "epsilon") for e in (0.0, 1.0, math.nan, "0.6")),
        (lambda: AdaptiveClip(start=3.0), "maximum"),
        (lambda: AdaptiveKL(start=-0.1), "start"),
        (lambda: AdaptiveKL(target=0.0), "target"),
        (lambda: AdaptiveKL(target=math.nan), "target"),
        (lambda: AdaptiveKL(horizon=0), "horizon"),
    ],
)
def test_bad_settings_are_refused_by_name(build: object, setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build()  # type: ignore[operator]
    assert refused.value.setting == setting


# Whole runs.

# Entropy of the tiny policy is near 3 nats, its KL to the reference near 0: these move in every iteration.
ADAPTIVE = "{class_path: AdaptiveKL, init_args: {start: 0.5, target: 0.01, horizon: 100}}"
MOVING = {
    "linear": "{class_path: Linear, init_args: {start: 0.5, end: 0.1, iterations: 4}}",
    "target": "{class_path: TargetEntropy, init_args: {target: 10.0, step: 0.1}}",
    "band": "{class_path: ibro_lightning.regularizers.coefficients.EntropyBand, "
    "init_args: {low: 4.0, high: 5.0, proportional: 0.05, integral: 0.1}}",
}


def with_settings(workspace: Path, line: str) -> str:
    """A recipe beside tiny.yaml with ``line`` among the module's settings, in place of its regulariser."""
    text = (workspace / "tiny.yaml").read_text()
    old = "regularizer: {class_path: InformationBottleneck}"
    assert old in text
    (workspace / "changed.yaml").write_text(text.replace(old, line))
    return "changed.yaml"


def fit(recipe: str, folder: str, iterations: int, *arguments: str) -> None:
    main(
        [
            *("fit", "--config", recipe, "--trainer.default_root_dir", folder, "--trainer.limit_val_batches", "0"),
            *("--trainer.max_epochs", str(iterations), *arguments),
        ]
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ("band", "target"), MOVING))
def test_a_resumed_run_has_the_same_curves_and_weights_bit_for_bit(workspace: Path, name: str) -> None:
    regularizer = f"regularizer: {{class_path: EntropyBonus, init_args: {{coef: {MOVING[name]}}}}}"
    recipe = with_settings(
        workspace, f"{regularizer}\n    kl: {{class_path: ReferenceKL, init_args: {{coef: {ADAPTIVE}}}}}"
    )
    fit(recipe, "whole", 4)
    fit(recipe, "halves", 2)
    fit(recipe, "halves", 4, "--ckpt_path", "halves/checkpoints/last.ckpt")
    whole, halves = (curves(workspace / folder) for folder in ("whole", "halves"))
    for metric in ("regularizer/coef", "kl/coef"):
        assert [step for step, _ in whole[metric]] == [1, 2, 3, 4], "logged in every iteration"
        assert len({value for _, value in whole[metric]}) == 4, "it moves in every iteration"
        assert halves[metric] == whole[metric]
    ends = [load_file(workspace / folder / "model" / "model.safetensors") for folder in ("whole", "halves")]
    assert all(torch.equal(ends[0][weight], ends[1][weight]) for weight in ends[0])


def test_a_resumed_run_goes_on_with_its_clips_and_weights_bit_for_bit(workspace: Path) -> None:
    """Entropy is near 3 nats: all of them move in every iteration."""
    recipe = with_settings(
        workspace,
        "regularizer: {class_path: EntroPIC, init_args: {positive: {class_path: EntropySteps, init_args: {target: 9, "
        "step: 0.1}}}}\n    clip_ratio_high: {class_path: AdaptiveClip, init_args: {epsilon: 0.1, target: 9}}\n"
        "    clip_ratio_low: {class_path: Linear, init_args: {start: 0.3, end: 0.1, iterations: 4}}",
    )
    fit(recipe, "whole", 4)
    fit(recipe, "halves", 2)
    fit(recipe, "halves", 4, "--ckpt_path", "halves/checkpoints/last.ckpt")
    whole, halves = (curves(workspace / folder) for folder in ("whole", "halves"))
    for name in ("regularizer/positive", "update/clip_ratio_high", "update/clip_ratio_low"):
        assert len({value for _, value in whole[name]}) == 4, name
        assert halves[name] == whole[name]
    ends = [load_file(workspace / folder / "model" / "model.safetensors") for folder in ("whole", "halves")]
    assert all(torch.equal(ends[0][weight], ends[1][weight]) for weight in ends[0])


def test_the_anchor_of_siren_is_that_of_the_whole_runs_first_step_after_resuming(workspace: Path) -> None:
    recipe = with_settings(workspace, "regularizer: {class_path: SIREN, init_args: {coef: 20.0}}")
    fit(recipe, "whole", 4)
    fit(recipe, "halves", 2)
    fit(recipe, "halves", 4, "--ckpt_path", "halves/checkpoints/last.ckpt")
    whole, halves = (curves(workspace / folder) for folder in ("whole", "halves"))
    anchors = [value for _, value in whole["regularizer/anchor"]]
    assert len(anchors) == 4
    assert len(set(anchors)) == 1
    assert anchors[0] > 0
    for name in ("regularizer/anchor", "regularizer/siren_entropy", "regularizer/siren_pull", "update/regularizer"):
        assert halves[name] == whole[name], name
    assert len({value for _, value in whole["regularizer/siren_entropy"]}) == 4, "it moves, the anchor does not"
    ends = [load_file(workspace / folder / "model" / "model.safetensors") for folder in ("whole", "halves")]
    assert all(torch.equal(ends[0][weight], ends[1][weight]) for weight in ends[0])


@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("module", [dapo, ppo])
def test_a_schedule_of_the_kl_keeps_pace_with_one_of_the_regularizer(module: Any, placement: Any) -> None:
    """0.4 → 0.1 in 3 iterations: every iteration uses its own value, of β as of α."""
    kl = ReferenceKL(Linear(0.4, 0.1, 3), placement=placement)
    _, recorder = train(module(regularizer=EntropyBonus(Linear(0.4, 0.1, 3)), kl=kl), rollouts(4))
    for name in ("regularizer/coef", "kl/coef"):
        assert [metrics[name] for metrics in recorder.metrics] == pytest.approx([0.4, 0.3, 0.2, 0.1], rel=1e-12), name


def test_the_coefficient_is_what_the_update_used(workspace: Path) -> None:
    """A schedule that is 0 in the first iteration and 0.4 in the second: without and with the term."""
    schedule = "class_path: Linear, init_args: {start: 0.0, end: 0.4, iterations: 1}"
    line = f"regularizer: {{class_path: EntropyBonus, init_args: {{coef: {{{schedule}}}}}}}"
    fit(with_settings(workspace, line), "moving", 2)
    moving = curves(workspace / "moving")
    assert moving["regularizer/coef"] == [(1, 0.0), (2, pytest.approx(0.4))]
    assert [step for step, _ in moving["update/regularizer"]] == [2]


def test_a_target_sees_the_entropy_of_the_policy_that_sampled(workspace: Path) -> None:
    """The first rollout's entropy is just above the target, or just below it: that alone decides."""
    cases = "regularizer: {class_path: EntropyBonus, init_args: {coef: {class_path: TargetEntropy, init_args: {%s}}}}"
    fit(with_settings(workspace, cases % "target: 0.0, step: 0.25"), "probe", 1)
    ((_, entropy),) = curves(workspace / "probe")["policy/entropy"]
    for name, target, expected in (("below", entropy - 1e-4, 0.0), ("above", entropy + 1e-4, 0.25)):
        fit(with_settings(workspace, cases % f"target: {target}, step: 0.25"), name, 1)
        assert curves(workspace / name)["regularizer/coef"] == [(1, expected)]


OWN = """
from ibro_lightning.functional import HeadFunctional
from ibro_lightning.regularizers import EntropyRegularizer


class TopProbability(HeadFunctional):
    def value(self, logits, rows):
        return logits.softmax(dim=1).amax(dim=1)


class Modest(EntropyRegularizer):
    needs_entropy = False

    def __init__(self, coef: float = 0.5):
        super().__init__(coef)

    def functionals(self, context):
        return {"top_probability": TopProbability()}

    def objective(self, stats):
        return -stats.extra["top_probability"]
"""


@pytest.mark.parametrize("fused_head", ["true", "false"])
def test_a_regulariser_of_ones_own_asks_the_head_for_a_functional_of_ones_own(workspace: Path, fused_head: str) -> None:
    (workspace / "modest.py").write_text(OWN)
    recipe = with_settings(workspace, "regularizer: {class_path: modest.Modest}")
    fit(recipe, "run", 2, "--model.policy_options.fused_head", fused_head)
    found = curves(workspace / "run")
    assert [step for step, _ in found["regularizer/top_probability"]] == [1, 2]
    for (_, objective), (_, told) in zip(
        found["update/regularizer"], found["regularizer/top_probability"], strict=True
    ):
        assert objective == pytest.approx(-told, rel=1e-5)
        assert 0 < told < 1


@pytest.mark.parametrize("module", [dapo, ppo])
@pytest.mark.parametrize("name", ["AEnt", "RenyiBonus"])
def test_methods_of_the_head_move_either_module(module: Any, name: str) -> None:
    from ibro_lightning import regularizers

    weights = {}
    for kind in (name, "NoRegularizer"):
        method = getattr(regularizers, kind)
        trained = module(regularizer=method(0.5) if kind == name else method())
        train(trained, rollouts(2))
        weights[kind] = [parameter.detach().clone() for parameter in trained.policy.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))


@pytest.mark.parametrize("dropped", [-0.1, 1, 30, float("nan"), "0.3", None, True])
def test_the_share_that_aent_drops_is_refused_by_name(dropped: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        AEnt(dropped=dropped)
    assert refused.value.setting == "dropped"


def test_every_iteration_logs_the_coefficient_also_of_methods_without_one(workspace: Path) -> None:
    assert NoRegularizer().coef == 0
    fit(with_settings(workspace, "regularizer: {class_path: TopEntropyTokens}"), "run", 2)
    assert curves(workspace / "run")["regularizer/coef"] == [(1, 0.0), (2, 0.0)]


@pytest.mark.parametrize(
    "text",
    [
        "--model.regularizer.coef={class_path: Linear, init_args: {start: 0.5, end: 0.1, iterations: 2}}",
        "--model.regularizer.coef.class_path ibro_lightning.regularizers.coefficients.Linear "
        "--model.regularizer.coef.init_args.start 0.5 --model.regularizer.coef.init_args.end 0.1 "
        "--model.regularizer.coef.init_args.iterations 2",
        "--model.regularizer.coef Linear --model.regularizer.coef.start 0.5 --model.regularizer.coef.end 0.1 "
        "--model.regularizer.coef.iterations 2",
    ],
    ids=["as a mapping", "class_path and init_args", "short name, flat settings"],
)
def test_the_command_line_can_name_a_coefficient(workspace: Path, text: str) -> None:
    fit("tiny.yaml", "run", 2, *([text] if "=" in text else text.split()))
    assert curves(workspace / "run")["regularizer/coef"] == [(1, pytest.approx(0.5)), (2, pytest.approx(0.3))]
    assert "ibro_lightning.regularizers.coefficients.Linear" in (workspace / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["Nope"],
            [
                "Nope",
                "AdaptiveClip, AdaptiveKL, Constant, Cosine, EntropyBand, EntropySteps, Linear, Stages, TargetEntropy",
            ],
        ),
        (["Linear", "--model.regularizer.coef.start", "0.1"], ["coef.end", "missing"]),
        (["TargetEntropy", "--model.regularizer.coef.targt", "0.1"], ["targt", "target"]),
        # Ours is found only behind the first member of the union `Coefficient | float`.
        (["TargetEntropy", "--model.regularizer.coef.target", "-1"], ["target: -1", "0 or more"]),
    ],
    ids=["unknown class", "missing settings", "misspelt setting", "bad value"],
)
def test_a_bad_coefficient_is_refused_in_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "tiny.yaml", "--model.regularizer.coef", *arguments])
    assert stop.value.code == 2
    line = capsys.readouterr().err.split("error:")[-1]
    assert line.count("\n") == 1
    for part in parts:
        assert part in line
