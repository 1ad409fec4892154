"""What a study can find with its number of seeds, before it has run; scipy is imported when asked."""

from __future__ import annotations

import math

from ibro_lightning.errors import ConfigError, check_at_least, check_count
from ibro_lightning.studies.extras import extra_packages


def minimum_detectable_difference(paired_sd: float, seeds: int, level: float = 0.05, power: float = 0.8) -> float:
    """The mean paired difference that a two-sided paired t-test finds in a share ``power`` of such studies.

    From the noncentral t distribution (``scipy.special.nctdtr``). A sign-flip test has nearly this power from 8 seeds
    on (``benchmarks/study_coverage.py``) and none where :func:`smallest_p_value` is above the level.

    Args:
        paired_sd: standard deviation over seeds of the differences between two arms, in the metric's unit.
        seeds: number of pairs.
        level: of the test; divide it by the number of comparisons for what is left after Holm's correction.

    Returns:
        a difference in the metric's unit; infinite for fewer than 2 seeds, NaN where ``paired_sd`` is.

    >>> round(minimum_detectable_difference(2.5, 16), 2)
    1.87
    """
    check_count("seeds", seeds)
    for name, share in (("level", level), ("power", power)):
        if not 0 < share < 1:
            raise ConfigError(name, share, "write a number between 0 and 1, such as 0.05 for level and 0.8 for power")
    if math.isnan(paired_sd):
        return paired_sd
    check_at_least("paired_sd", paired_sd, 0)
    if paired_sd == 0:
        return 0.0
    if seeds < 2:
        return math.inf
    with extra_packages():
        from scipy import optimize
    high = 1.0
    while power_of(high, seeds, level) < power:
        high *= 2
    return float(optimize.brentq(lambda effect: power_of(effect, seeds, level) - power, 0.0, high)) * paired_sd


def power_of(effect: float, seeds: int, level: float = 0.05) -> float:
    """The chance that a two-sided paired t-test of ``seeds`` ≥ 2 differences with mean ``effect`` ≥ 0, in standard
    deviations, falls below ``level``."""
    with extra_packages():
        from scipy import special
    freedom = seeds - 1
    critical = float(special.stdtrit(freedom, 1 - level / 2))
    shift = effect * math.sqrt(seeds)
    wrong_side = float(special.nctdtr(freedom, shift, -critical))
    # scipy 1.17 gives NaN for some chances below 1e-15; TTestPower of statsmodels 0.15 passes that on as its result.
    return 1 - float(special.nctdtr(freedom, shift, critical)) + (0.0 if math.isnan(wrong_side) else wrong_side)


def smallest_p_value(pairs: int) -> float:
    """The smallest p-value that a two-sided sign-flip test of ``pairs`` differences can give: 2 / 2**pairs.

    >>> smallest_p_value(5)
    0.0625
    """
    check_count("pairs", pairs, 0)
    return min(1.0, 2.0 / 2**pairs)


def pairs_needed(level: float, comparisons: int = 1) -> int:
    """The fewest pairs with which a sign-flip test can reach ``level`` after Holm's correction for ``comparisons``.

    >>> pairs_needed(0.05), pairs_needed(0.05, 6)
    (6, 8)
    """
    pairs = 1
    while smallest_p_value(pairs) > level / comparisons:
        pairs += 1
    return pairs
