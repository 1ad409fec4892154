"""The statistics of studies, against values computed by hand and against scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

import study_coverage
from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.power import minimum_detectable_difference, pairs_needed, smallest_p_value
from ibro_lightning.studies.statistics import (
    hedges_g,
    holm,
    interquartile_interval,
    interquartile_mean,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)

NAN = math.nan
EIGHT = np.array([0.81, 0.84, 0.79, 0.86, 0.83, 0.80, 0.85, 0.82])


def test_the_mean_of_three_seeds_has_student_s_interval() -> None:
    """1, 2, 3: mean 2, sd 1, and 4.3027 / sqrt(3) = 2.4841 to either side. The missing seed is left out."""
    interval = mean_interval(np.array([1.0, NAN, 2.0, 3.0]))
    assert interval.count == 3
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_the_interval_of_the_mean_is_scipy_s() -> None:
    expected = stats.ttest_1samp(EIGHT, 0.0).confidence_interval(0.9)
    interval = mean_interval(EIGHT, 0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize("values", [[], [0.5], [NAN, 0.5]])
def test_fewer_than_two_seeds_have_no_interval(values: list[float]) -> None:
    interval = mean_interval(np.array(values))
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.contains(1e9)


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    """Of 8 sorted values the two lowest and two highest are left out, of 5 one each, of 3 none."""
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == 3.5
    assert interquartile_mean(np.array([9.0, 1, 2, 3, -9])) == 2.0
    assert interquartile_mean(np.array([0.0, 1, 5])) == 2.0
    assert math.isnan(interquartile_mean(np.array([NAN])))


def test_the_interquartile_mean_has_an_interval_inside_the_values_from_five_seeds_on() -> None:
    interval = interquartile_interval(EIGHT)
    assert EIGHT.min() <= interval.low < interval.estimate < interval.high <= EIGHT.max()
    assert interval == interquartile_interval(EIGHT[::-1].copy())  # whatever their order
    assert interquartile_interval(np.full(6, 0.5)).low == 0.5
    assert math.isnan(interquartile_interval(EIGHT[:4]).low)


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 1, 1, 3: mean 1.5, sd 1; all positive, so 2 of 16 pairs of signs go as far. Hedges' factor for 3
    degrees of freedom is Γ(3/2) / (√(3/2) Γ(1)) = 0.7236. Of the 16 pairs of runs, the other arm is higher in 10
    and ties in two."""
    reference, other = np.array([0.0, 1, 2, 4]), np.array([1.0, 2, 3, 7])
    found = paired_difference(reference, other)
    assert (found.difference.estimate, found.sd) == (1.5, 1.0)
    assert found.p_value == 2 / 16
    assert found.effect_size == pytest.approx(1.5 * 0.7236, abs=1e-4)
    assert (found.better, found.worse) == (4, 0)
    assert found.better_share.low == pytest.approx(0.025 ** (1 / 4))  # Clopper and Pearson, 4 of 4
    assert found.probability_of_improvement == 11 / 16


def test_seeds_that_one_arm_lacks_are_no_pairs() -> None:
    found = paired_difference(np.array([0.1, NAN, 0.3, 0.5]), np.array([0.2, 0.9, NAN, 0.8]))
    assert found.difference.count == 2
    assert found.difference.estimate == pytest.approx(0.2)
    nothing = paired_difference(np.array([NAN, 0.1]), np.array([0.1, NAN]))
    assert nothing.difference.count == 0
    assert math.isnan(nothing.p_value)
    with pytest.raises(ConfigError, match=r"^other: .*the same seeds as the reference"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_the_interval_and_the_probability_of_improvement_are_scipy_s() -> None:
    other = EIGHT + np.array([0.01, -0.01, 0.02, 0.0, 0.03, 0.01, -0.02, 0.02])
    expected = stats.ttest_rel(other, EIGHT).confidence_interval(0.95)
    found = paired_difference(EIGHT, other)
    assert (found.difference.low, found.difference.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    u = stats.mannwhitneyu(other, EIGHT).statistic
    assert probability_of_improvement(EIGHT, other) == pytest.approx(u / 64)
    assert found.correlation == pytest.approx(stats.pearsonr(EIGHT, other).statistic)


def test_the_effect_size_tends_to_mean_by_sd_and_needs_a_spread() -> None:
    many = np.tile([0.0, 2.0], 5000)
    assert hedges_g(many) == pytest.approx(many.mean() / many.std(ddof=1), rel=1e-4)
    assert math.isnan(hedges_g(np.full(5, 0.1 + 0.2)))
    assert math.isnan(hedges_g(np.array([1.0])))


def test_holm_s_correction_by_hand() -> None:
    """0.01 · 4, 0.02 · 3, and 0.03 · 2, which may not be below the one before. The fourth comparison has no data so
    far: it was planned, so it counts."""
    assert holm([0.02, 0.03, NAN, 0.01]) == pytest.approx([0.06, 0.06, NAN, 0.04], nan_ok=True)
    assert holm([0.03125, NAN]) == pytest.approx([0.0625, NAN], nan_ok=True)
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [3, 5, 8, 16, 40])
def test_the_detectable_difference_has_the_power_that_statsmodels_computes(seeds: int) -> None:
    found = minimum_detectable_difference(2.5, seeds)
    assert TTestPower().power(found / 2.5, nobs=seeds, alpha=0.05) == pytest.approx(0.8, abs=1e-6)
    assert minimum_detectable_difference(5.0, seeds) == pytest.approx(2 * found)
    assert (
        minimum_detectable_difference(2.5, seeds, 0.01) > found < minimum_detectable_difference(2.5, seeds, 0.05, 0.9)
    )


def test_two_pairs_and_none() -> None:
    """statsmodels 0.15 gives NaN for the large effects that two pairs need."""
    assert minimum_detectable_difference(1.0, 2) == pytest.approx(11.55, abs=0.01)
    assert minimum_detectable_difference(1.0, 1) == math.inf
    assert minimum_detectable_difference(0.0, 8) == 0.0
    assert math.isnan(minimum_detectable_difference(NAN, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, 0), "seeds: 0"),
        ((-1.0, 3), "paired_sd: -1"),
        ((1.0, 3, 5.0), "level: 5"),
        ((1.0, 3, 0.05, 80), "power: 80"),
    ],
)
def test_impossible_studies_are_refused(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minimum_detectable_difference(*values)  # type: ignore[arg-type]


def test_few_pairs_cannot_reach_the_level() -> None:
    """Five pairs give 2 / 32 = 0.0625 at best; with six comparisons it takes 2 / 2**n <= 0.05 / 6, so 8 pairs."""
    assert smallest_p_value(5) == 0.0625
    assert smallest_p_value(0) == 1.0
    assert pairs_needed(0.05) == 6
    assert pairs_needed(0.05, 6) == 8


def test_the_simulation_of_coverage_knows_its_truth() -> None:
    """Means and interquartile means that it compares with are those of what it draws, whatever the correlation."""
    for outcome in study_coverage.OUTCOMES:
        drawn = study_coverage.draw(outcome, 0.9, (2, 1, 40_000), np.random.default_rng(0))
        mean, middle = study_coverage.truth(outcome)
        assert drawn.mean() == pytest.approx(mean, abs=2e-3)
        assert interquartile_mean(drawn.ravel()) == pytest.approx(middle, abs=2e-3)
    first, second = study_coverage.draw("normal", 0.9, (1, 2, 20_000), np.random.default_rng(0))[0]
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.9, abs=0.01)


def test_a_row_of_the_simulation() -> None:
    row = study_coverage.simulate("normal", 0.5, 5, studies=40)
    assert row["sign flip"] == 0.0  # five pairs cannot reach the level
    assert row["mean"] > 80
