"""How often the report's intervals contain the truth, and how often its tests cry wolf, with a handful of seeds.

    python benchmarks/study_coverage.py [--studies 4000] [--outcomes normal skewed]

Simulates studies whose truth is known, with 3, 5, 8 and 16 seeds per arm. Outcomes of a seed are normal; skewed (most
seeds end well, a few far below: an exponential tail); bounded (accuracies near the ceiling, a beta distribution); or
unequal (the reference is skewed, the others are normal with its mean and spread, so that differences are skewed, which
neither test nor interval allows for).
Two arms share seeds with a correlation of 0, 0.5 or 0.9 (a Gaussian copula). It prints, in percent:

- ``mean``, ``IQM``: the share of 95 % intervals that contain the true mean, and the true interquartile mean;
- ``plain``: the same of the usual percentile bootstrap of the interquartile mean, which the report does not use;
- ``difference``: the same of the mean paired difference, whose truth is 0;
- ``sign flip``: how often the test of two equal arms gives p ≤ 0.05;
- ``family``: how often any of five arms that are all equal to the reference has a Holm-corrected p ≤ 0.05;
- ``power t``, ``power sign``: how often a difference as large as the detectable one is found, by the interval and by
  the sign-flip test.

The functions are those that the report calls, but with 16 seeds signs are drawn 2,000 times in place of 20,000. The
numbers are reproducible: every row has a seed of its own. It takes half an hour of CPU time.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ibro_lightning.resampling import sign_flip_p_value
from ibro_lightning.studies.power import minimum_detectable_difference
from ibro_lightning.studies.statistics import holm, interquartile_interval, mean_interval

Array = np.ndarray[Any, np.dtype[np.float64]]
OUTCOMES: dict[str, Any] = {
    "normal": stats.norm(loc=0.8, scale=0.03),
    "skewed": stats.expon(loc=-0.9, scale=0.03),  # negated: a tail towards low accuracies
    "bounded": stats.beta(16.0, 1.2),  # mean 0.93, skewness −1.3
    "unequal": stats.expon(loc=-0.9, scale=0.03),  # the first arm; the others are normal with its mean and sd
}
NEGATED = ("skewed", "unequal")
SEEDS, CORRELATIONS, LEVEL, FAMILY = (3, 5, 8, 16), (0.0, 0.5, 0.9), 0.05, 5


def draw(outcome: str, correlation: float, shape: tuple[int, int, int], generator: np.random.Generator) -> Array:
    """Outcomes ``[studies, arms, seeds]``; any two arms of a seed have that correlation before the transformation."""
    studies, _, seeds = shape
    shared = generator.standard_normal((studies, 1, seeds))
    normal = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * generator.standard_normal(shape)
    values: Array = OUTCOMES[outcome].ppf(stats.norm.cdf(normal))
    values = -values if outcome in NEGATED else values
    if outcome == "unequal":
        values[:, 1:] = truth(outcome)[0] + OUTCOMES[outcome].std() * normal[:, 1:]
    return values


def truth(outcome: str) -> tuple[float, float]:
    """Mean and interquartile mean of an outcome's distribution."""
    middle = OUTCOMES[outcome].ppf(np.linspace(0.25, 0.75, 20_001)).mean()
    sign = -1.0 if outcome in NEGATED else 1.0
    return sign * float(OUTCOMES[outcome].mean()), sign * float(middle)


def share(found: Sequence[bool]) -> float:
    return 100 * float(np.mean(found)) if len(found) else float("nan")


def simulate(outcome: str, correlation: float, seeds: int, studies: int) -> dict[str, float]:
    """One row of the table, in percent; NaN where the report gives no interval."""
    generator = np.random.default_rng([list(OUTCOMES).index(outcome), round(10 * correlation), seeds])
    arms = draw(outcome, correlation, (studies, 1 + FAMILY, seeds), generator)
    differences = arms[:, 1] - arms[:, 0]  # [studies, seeds]
    # As the distribution of a difference has no simple sd, it is taken from many draws.
    pairs = draw(outcome, correlation, (200_000, 2, 1), generator)
    found = minimum_detectable_difference(float((pairs[:, 1] - pairs[:, 0]).std()), seeds, LEVEL)
    mean, middle = truth(outcome)
    few = studies // 4  # a bootstrap or a family of tests takes milliseconds
    iqm = [interquartile_interval(row) for row in arms[:few, 0]]
    return {
        "mean": share([mean_interval(row).contains(mean) for row in arms[:, 0]]),
        "IQM": share([i.contains(middle) for i in iqm if np.isfinite(i.low)]),
        "plain": share([plain(row)[0] <= middle <= plain(row)[1] for row in arms[:few, 0]]),
        "difference": share([mean_interval(row).contains(0.0) for row in differences]),
        "sign flip": share([sign_flip_p_value(row, resamples=2000) <= LEVEL for row in differences]),
        "family": share([min(holm(family(row))) <= LEVEL for row in arms[:few]]),
        "power t": share([not mean_interval(row + found).contains(0.0) for row in differences]),
        "power sign": share([sign_flip_p_value(row + found, resamples=2000) <= LEVEL for row in differences]),
    }


def plain(row: Array) -> tuple[float, float]:
    """The percentile bootstrap interval of the interquartile mean; ``[seeds]``."""
    draws = np.random.default_rng(0).integers(len(row), size=(1000, len(row)))
    low, high = np.quantile(stats.trim_mean(row[draws], 0.25, axis=1), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def family(study: Array) -> list[float]:
    """P-values of every arm after the first against the first; ``[arms, seeds]``."""
    return [sign_flip_p_value(arm - study[0], resamples=2000) for arm in study[1:]]


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies per row")
    parser.add_argument("--outcomes", nargs="+", choices=OUTCOMES, default=[*OUTCOMES])
    arguments = parser.parse_args()
    holm([0.5])  # imports statsmodels, whose multipletests collects garbage in each of a hundred thousand calls:
    gc.freeze()  # that is quick where there is little to visit
    header: list[str] = []
    for outcome in arguments.outcomes:
        for seeds in SEEDS:
            for correlation in CORRELATIONS:
                row = simulate(outcome, correlation, seeds, arguments.studies)
                if not header:
                    header = ["outcome", "seeds", "correlation", *row]
                    say("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
                cells = ["–" if np.isnan(value) else f"{value:.1f}" for value in row.values()]
                say("| " + " | ".join([outcome, str(seeds), f"{correlation:g}", *cells]) + " |")


if __name__ == "__main__":
    main()
