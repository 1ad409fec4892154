"""The statistics of a study: means over seeds, paired differences, and how sure both are.

A seed is the unit: each arm has one number per seed, and arms that share a seed share prompts, random numbers and base
policy, so that differences are paired. Everything is from scipy and statsmodels, which say more than p-values of a
single test. rliable 1.2 (Agarwal et al. 2021), whose measures these are, is not used: its formulas are these few lines,
its intervals are percentiles of a bootstrap over runs that cover far too little for a handful of seeds
(``benchmarks/study_coverage.py``), and it brings arch and seaborn along.

What the intervals and tests really hold is in ``docs/studies.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibro_lightning.errors import ConfigError
from ibro_lightning.resampling import sign_flip_p_value
from ibro_lightning.studies.extras import extra_packages
from ibro_lightning.studies.power import minimum_detectable_difference

Values = np.ndarray[Any, np.dtype[np.float64]]
"""``[seeds]``, in the metric's unit; NaN where a seed has no result."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; both ends are NaN where there are too few seeds for one."""

    estimate: float
    low: float
    high: float
    count: int
    """How many seeds it is from."""

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies inside; an interval that does not exist contains everything."""
        return not (value < self.low or value > self.high)


def mean_interval(values: Values, level: float = 0.95) -> Interval:
    """The mean over seeds with Student's t interval.

    Args:
        values: ``[seeds]``; NaNs are left out.
    """
    with extra_packages():
        from scipy import stats
    kept = _finite(values)
    count = len(kept)
    mean = float(kept.mean()) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf(0.5 + level / 2, count - 1) * kept.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def interquartile_mean(values: Values) -> float:
    """The mean of the middle half: a quarter of the seeds, rounded down, is left out at either end (Agarwal et al.
    2021, doi 10.48550/arXiv.2108.13264; ``scipy.stats.trim_mean``). With 3 seeds it is the mean. NaNs are left out."""
    with extra_packages():
        from scipy import stats
    kept = _finite(values)
    return float(stats.trim_mean(kept, 0.25)) if len(kept) else math.nan


def interquartile_interval(values: Values, level: float = 0.95) -> Interval:
    """The interquartile mean with a bootstrap interval over seeds (``scipy.stats.bootstrap``, percentiles).

    The percentiles are those that Hesterberg (2015, doi 10.1080/00031305.2015.1089789) takes in place of 2.5 and
    97.5 %, so that few seeds give a wider interval; plain ones cover 75 % with 3 seeds and 90 % with 5. No bootstrap
    can leave the range of the values, so that with fewer than 5 seeds there is no interval: it would cover less than
    it says.
    """
    with extra_packages():
        from scipy import stats
    kept = np.sort(_finite(values))
    count = len(kept)
    middle = interquartile_mean(kept)
    if count < FEWEST_FOR_BOOTSTRAP:
        return Interval(middle, math.nan, math.nan, count)
    if kept[0] == kept[-1]:
        return Interval(middle, middle, middle, count)
    tail = stats.norm.cdf(-math.sqrt(count / (count - 1)) * stats.t.ppf(0.5 + level / 2, count - 1))
    found = stats.bootstrap(
        (kept,),
        lambda draws, axis: stats.trim_mean(draws, 0.25, axis=axis),
        confidence_level=1 - 2 * tail,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(middle, float(found.low), float(found.high), count)


FEWEST_FOR_BOOTSTRAP = 5
"""Seeds below which no bootstrap interval is given."""


@dataclass(frozen=True)
class PairedDifference:
    """One arm's results minus the reference's, seed by seed."""

    difference: Interval
    """The mean difference with its t interval."""
    sd: float
    """Standard deviation of the differences over seeds; NaN for fewer than 2 pairs."""
    correlation: float
    """Of the two arms over seeds: what pairing gained; NaN where one of them is constant."""
    p_value: float
    """Of the two-sided sign-flip test (:func:`.sign_flip_p_value`), not corrected."""
    effect_size: float
    """Hedges' g of the differences: mean / sd, times the correction for few pairs; NaN where the sd is 0."""
    better: int
    """Seeds on which the other arm has the higher value."""
    worse: int
    better_share: Interval
    """better / (better + worse) with the exact interval of Clopper and Pearson."""
    probability_of_improvement: float
    """That a run of the other arm has a higher value than a run of the reference, whatever their seeds (Agarwal et al.
    2021); ties count half."""
    detectable: float
    """The difference that 80 % of studies with this sd and number of pairs find, at ``detectable_level``."""
    detectable_level: float


def paired_difference(
    reference: Values, other: Values, *, level: float = 0.05, comparisons: int = 1, power: float = 0.8
) -> PairedDifference:
    """Compare two arms over the seeds that both have.

    Args:
        reference: ``[seeds]``, NaN where that seed is missing.
        other: ``[seeds]``, the same seeds in the same order.
        level: of the interval (1 − level) and the tests.
        comparisons: how many comparisons share the level; the detectable difference is for ``level / comparisons``,
            with which Holm's correction begins.

    Raises:
        ConfigError: the two are of different length.
    """
    if reference.shape != other.shape:
        raise ConfigError("other", other.shape, f"write the same seeds as the reference, which has {reference.shape}")
    both = np.isfinite(reference) & np.isfinite(other)
    before, after = reference[both], other[both]
    differences = after - before
    count = len(differences)
    sd = float(differences.std(ddof=1)) if count > 1 else math.nan
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(
        difference=mean_interval(differences, 1 - level),
        sd=sd,
        correlation=_correlation(before, after),
        p_value=sign_flip_p_value(differences) if count else math.nan,
        effect_size=hedges_g(differences),
        better=better,
        worse=worse,
        better_share=_share(better, better + worse, 1 - level),
        probability_of_improvement=probability_of_improvement(before, after),
        detectable=minimum_detectable_difference(sd, max(count, 1), level / comparisons, power),
        detectable_level=level / comparisons,
    )


def hedges_g(differences: Values) -> float:
    """Cohen's d of paired differences (mean / sd), corrected for its bias in small samples (Hedges 1981,
    doi 10.3102/10769986006002107, the exact factor). NaN for fewer than 2 pairs or equal differences."""
    kept = _finite(differences)
    if len(kept) < 2 or (sd := float(kept.std(ddof=1))) <= 1e-12 * float(np.abs(kept).max()):
        return math.nan
    freedom = len(kept) - 1
    if freedom == 1:
        return 0.0  # the factor's limit: two pairs say nothing about the size of an effect in standard deviations
    log_factor = math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2) - 0.5 * math.log(freedom / 2)
    return float(kept.mean()) / sd * math.exp(log_factor)


def probability_of_improvement(reference: Values, other: Values) -> float:
    """Share of all pairs of runs in which the other arm's value is higher; ties count half. It is the Mann-Whitney
    statistic divided by the number of pairs (Agarwal et al. 2021); NaN without values."""
    before, after = _finite(reference), _finite(other)
    if not len(before) or not len(after):
        return math.nan
    higher = (after[:, None] > before).mean() + 0.5 * (after[:, None] == before).mean()  # over [seeds, seeds]
    return float(higher)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's method (``statsmodels.stats.multitest.multipletests``): if each is compared with
    the level, the chance of any false discovery among them is at most the level. NaNs, comparisons without results so
    far, stay NaN and count: the correction is for all that are planned."""
    with extra_packages():
        from statsmodels.stats.multitest import multipletests
    corrected = np.array(p_values, dtype=np.float64)
    given = np.isfinite(corrected)
    if given.any():
        corrected[given] = multipletests(np.where(given, corrected, 1.0), method="holm")[1][given]
    return [float(p) for p in corrected]


def _share(count: int, of: int, level: float) -> Interval:
    with extra_packages():
        from scipy import stats
    if not of:
        return Interval(math.nan, math.nan, math.nan, 0)
    found = stats.binomtest(count, of).proportion_ci(level, method="exact")
    return Interval(count / of, float(found.low), float(found.high), of)


def _correlation(before: Values, after: Values) -> float:
    if len(before) < 3 or np.ptp(before) == 0 or np.ptp(after) == 0:
        return math.nan
    return float(np.corrcoef(before, after)[0, 1])


def _finite(values: Values) -> Values:
    given = np.asarray(values, dtype=np.float64)
    return given[np.isfinite(given)]
