"""Estimates over k samples per question against brute force, and intervals and p-values against what they promise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise, product
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ibro_lightning.functional import avg_at_k, bootstrap_interval, majority_at_k, pass_at_k, sign_flip_p_value
from ibro_lightning.resampling import student_quantile

torch.set_num_threads(1)

TABLES = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=k, max_size=k), min_size=1, max_size=4)
)
"""Accuracies of up to 7 samples to up to 4 questions; half right is possible."""


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_pass_at_j_is_the_share_of_all_choices_of_j_samples_that_hold_a_right_one(table: list[list[float]]) -> None:
    for j in range(1, len(table[0]) + 1):
        shares = []
        for row in table:
            hits = [any(value >= 1 for value in chosen) for chosen in combinations(row, j)]
            shares.append(sum(hits) / len(hits))
        assert pass_at_k(torch.tensor(table), j).tolist() == pytest.approx(shares, abs=1e-12)


def test_pass_at_j_of_many_samples_does_not_overflow() -> None:
    """1 − C(1000, 500)/C(1024, 500): the binomials have 300 digits."""
    correct = torch.tensor([[1] * 24 + [0] * 1000])
    exact = 1 - Fraction(math.comb(1000, 500), math.comb(1024, 500))
    assert pass_at_k(correct, 500).item() == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("j", [0, 4])
def test_pass_at_j_needs_j_samples(j: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the number of samples 3, got {j}"):
        pass_at_k(torch.ones(1, 3), j)


def test_avg_at_k_is_the_mean_accuracy_of_each_question() -> None:
    table = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert avg_at_k(table).tolist() == [0.5, 0.0, 1.0]


def majority_by_hand(votes: Sequence[int], correct: Sequence[float]) -> float:
    """Every answer's accuracies; those of the answers with the most votes, each answer counting once."""
    accuracies: dict[int, list[float]] = defaultdict(list)
    for vote, accuracy in zip(votes, correct, strict=True):
        if vote >= 0:
            accuracies[vote].append(accuracy)
    most = max(map(len, accuracies.values()), default=0)
    return mean(mean(values) for values in accuracies.values() if len(values) == most) if most else 0.0


VOTES = st.integers(1, 9).flatmap(
    lambda k: st.lists(
        st.lists(
            st.tuples(st.sampled_from([-2, -1, 0, 1, 2, 9]), st.sampled_from([0.0, 0.25, 1.0])), min_size=k, max_size=k
        ),
        min_size=1,
        max_size=4,
    )
)


@settings(max_examples=150, deadline=None)
@given(VOTES)
def test_the_majority_is_that_of_a_count_by_hand(table: list[list[tuple[int, float]]]) -> None:
    votes = torch.tensor([[vote for vote, _ in row] for row in table])
    correct = torch.tensor([[accuracy for _, accuracy in row] for row in table])
    expected = [majority_by_hand(*zip(*row, strict=True)) for row in table]
    assert majority_at_k(votes, correct).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_majority_of_no_question_is_empty() -> None:
    assert majority_at_k(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4)).shape == (0,)


# The interval of the mean.


def studies(questions: int, k: int, a: float, b: float, count: int) -> tuple[Tensor, float]:
    """``[count, questions]`` avg@k of questions whose difficulties come from Beta(a, b), and the true mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        solved = torch.distributions.Beta(a, b).sample((count, questions)).double()
        return torch.distributions.Binomial(k, solved).sample() / k, a / (a + b)


def percentile_interval(scores: Tensor) -> tuple[float, float]:
    """What one would write first."""
    rows = torch.randint(len(scores), (2000, len(scores)), generator=torch.Generator().manual_seed(0))
    low, high = scores[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def coverage(intervals: Sequence[tuple[float, float]], truth: float) -> float:
    return mean(low <= truth <= high for low, high in intervals)


@pytest.mark.parametrize(
    ("questions", "k", "a", "b", "count"),
    [
        (30, 32, 0.3, 1.2, 2000),  # AIME-like: most questions are never solved
        pytest.param(40, 32, 1.0, 0.6, 2000, marks=pytest.mark.slow),  # AMC-like
        pytest.param(30, 32, 1.0, 1.0, 2000, marks=pytest.mark.slow),
        pytest.param(30, 2, 0.3, 1.2, 2000, marks=pytest.mark.slow),  # a quick look: few samples
        (253, 4, 0.5, 0.5, 500),
    ],
)
def test_intervals_hold_the_true_mean_as_often_as_they_say(
    questions: int, k: int, a: float, b: float, count: int
) -> None:
    """95 %, up to three standard errors of the simulation (1.5 points at 2000 studies, 3 at 500) and, as tails are
    widened and scores are discrete, a point on the safe side."""
    scores, truth = studies(questions, k, a, b, count)
    intervals = [bootstrap_interval(study) for study in scores]
    error = math.sqrt(0.95 * 0.05 / count)
    assert 0.95 - 3 * error < coverage(intervals, truth) < 0.96 + 3 * error
    # Neither end is the weak one: each should miss 2.5 %.
    for missed in (mean(high < truth for _, high in intervals), mean(low > truth for low, _ in intervals)):
        assert missed < 0.025 + 3 * math.sqrt(0.025 * 0.975 / count)


def test_intervals_hold_where_plain_percentiles_do_not() -> None:
    """30 questions, 9 % solved on average, most of them never: percentiles hold 90 % and not 95."""
    scores, truth = studies(30, 4, 0.15, 1.5, 1000)
    assert coverage([bootstrap_interval(study) for study in scores], truth) == pytest.approx(0.95, abs=0.021)
    assert coverage([percentile_interval(study) for study in scores], truth) < 0.92


def test_intervals_of_few_questions_are_wide_enough() -> None:
    """Ten questions, normal scores: 93 %; with normal tails in place of Student's it would be 90."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        scores = torch.randn(1500, 10, dtype=torch.float64)
    assert coverage([bootstrap_interval(study, resamples=1000) for study in scores], 0.0) > 0.92


SCORES = st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.sampled_from([0.5, 0.8, 0.95, 0.99, 0.999]))
def test_the_interval_holds_the_mean_of_the_sample_and_stays_within_the_scores(
    scores: list[float], level: float
) -> None:
    low, high = bootstrap_interval(torch.tensor(scores), level=level, resamples=500)
    assert min(scores) - 1e-12 <= low <= mean(scores) + 1e-12
    assert mean(scores) - 1e-12 <= high <= max(scores) + 1e-12


@settings(max_examples=40, deadline=None)
@given(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_the_questions_does_not_matter(scores: list[float], random: object) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert bootstrap_interval(torch.tensor(shuffled)) == bootstrap_interval(torch.tensor(scores))


@settings(max_examples=40, deadline=None)
@given(SCORES, st.sampled_from([1 / 3, 0.1, 7.0, 100.0]), st.sampled_from([0.0, -0.3, 5.0]))
def test_scaled_and_shifted_scores_have_the_scaled_and_shifted_interval(
    scores: list[float], scale: float, shift: float
) -> None:
    """Also by a third, where sums that are equal differ in their last bits: on the many resamples that have just the
    sample's mean (a fifth of those of five questions) the bias must not depend on how they round."""
    low, high = bootstrap_interval(torch.tensor(scores, dtype=torch.float64))
    other = bootstrap_interval(scale * torch.tensor(scores, dtype=torch.float64) + shift)
    assert other == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-9)


def test_mirrored_scores_have_the_mirrored_interval() -> None:
    """Accuracies and error rates tell the same story, up to the resamples that are drawn."""
    scores = torch.tensor([0.0] * 12 + [0.25] * 5 + [0.5] * 4 + [1.0] * 9)
    low, high = bootstrap_interval(scores, resamples=50_000)
    mirrored = bootstrap_interval(1 - scores, resamples=50_000)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=0.006)


def test_wider_levels_have_wider_intervals() -> None:
    scores = torch.linspace(0, 1, 25) ** 2
    ends = [bootstrap_interval(scores, level=level) for level in (0.5, 0.8, 0.9, 0.95, 0.99)]
    assert all(b[0] < a[0] and a[1] < b[1] for a, b in pairwise(ends))


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_equal_scores_leave_no_doubt(value: float, count: int) -> None:
    scores = torch.full((count,), value, dtype=torch.float64)
    assert bootstrap_interval(scores) == (value, value)


def test_no_question_has_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval(torch.zeros(0)))


def test_tiny_differences_are_not_lost() -> None:
    """Spreads whose squares a double cannot hold."""
    low, high = bootstrap_interval(torch.tensor([0.0, 1.0, 1.0, 3.0], dtype=torch.float64) * 1e-200)
    assert 0 <= low < 1.25e-200 < high <= 3e-200


@pytest.mark.parametrize(
    ("share", "freedom", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.975, 5, 2.57058),
        (0.975, 10, 2.22814),
        (0.975, 29, 2.04523),
        (0.975, 100, 1.98397),
        (0.95, 1, 6.31375),
        (0.95, 2, 2.91999),
        (0.95, 29, 1.69913),
        (0.995, 29, 2.75639),
    ],
)
def test_quantiles_of_students_t_are_those_of_the_tables(share: float, freedom: int, value: float) -> None:
    assert student_quantile(share, freedom) == pytest.approx(value, abs=0.001)
    assert student_quantile(1 - share, freedom) == pytest.approx(-value, abs=0.001)


# The paired test.


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.0, 0.0], 1.0),  # nothing differs
        ([], 1.0),
        ([0.5], 1.0),  # +0.5 and -0.5 are equally far from 0
        ([1, 1], 0.5),  # 2 of 4 signs
        ([1, 1, 1, 0], 0.25),  # 2 of 8; the 0 has no sign
        ([1, -1, 1], 1.0),  # every sum is at least as far from 0 as 1
        ([3, 1, 1], 0.25),  # only ±5
        ([3, -1, 1], 0.75),  # |sum| = 3: all but ±(3−1−1) = ±1
        ([0.1] * 10, 2 / 1024),
        ([0.1, 0.2, -0.1, -0.2], 1.0),  # every sum is as far from 0 as 0, although this one is rounded to 3e-17
    ],
)
def test_p_values_worked_out_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip_p_value(torch.tensor(differences, dtype=torch.float64)) == p
    assert sign_flip_p_value(-torch.tensor(differences, dtype=torch.float64)) == p


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8), st.sampled_from([1.0, 1 / 3, 0.1]))
def test_p_values_are_the_share_of_all_signs_with_a_sum_as_far_from_zero(differences: list[int], unit: float) -> None:
    """In units of a third, too: sums that are equal must count as equal."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = sum(value >= abs(sum(differences)) for value in sums) / len(sums)
    assert sign_flip_p_value(torch.tensor(differences).double() * unit) == pytest.approx(expected)


def test_sampled_p_values_are_near_the_exact_ones() -> None:
    """20 differences: all 2²⁰ signs can still be tried here."""
    differences = torch.randn(20, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.35
    sums = torch.zeros(1, dtype=torch.float64)
    for difference in differences:
        sums = torch.cat([sums + difference, sums - difference])
    exact = (sums.abs() >= differences.sum().abs() - 1e-12).double().mean().item()
    assert 0.01 < exact < 0.3
    sampled = sign_flip_p_value(differences)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sampled == sign_flip_p_value(differences), "the same differences have the same p-value"
    assert sampled == sign_flip_p_value(-differences)


def test_a_sampled_p_value_is_never_zero() -> None:
    """The observed signs are one of the ways, so a test of 20,000 draws cannot say less than 1/20,001."""
    assert sign_flip_p_value(torch.ones(100)) == pytest.approx(1 / 20_001)


def test_few_draws_and_many_questions_are_a_share_of_all_draws() -> None:
    """Draws are made in pieces: 2,500 are not a multiple of one."""
    p = sign_flip_p_value(torch.tensor([1.0] * 30 + [-1.0] * 30), resamples=2500)
    assert p == 1.0, "a sum of 0 is never nearer to 0 than another"


def test_p_values_without_a_difference_are_uniform() -> None:
    """Of 12 questions whose differences have any size: p ≤ x in a share x of all studies."""
    generator = torch.Generator().manual_seed(11)
    p = torch.tensor([sign_flip_p_value(torch.randn(12, generator=generator).exp2() * s) for s in signs(1000, 12)])
    for level in (0.01, 0.05, 0.1, 0.25, 0.5, 0.9):
        assert (p <= level).double().mean().item() == pytest.approx(
            level, abs=3 * math.sqrt(level * (1 - level) / 1000)
        )


def signs(count: int, questions: int) -> Tensor:
    return torch.randint(2, (count, questions), generator=torch.Generator().manual_seed(3)).double() * 2 - 1


def test_two_evaluations_of_one_policy_are_told_apart_no_more_often_than_the_level_says() -> None:
    """12 questions with 4 samples; p-values of such coarse scores can only be larger than uniform ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        solved = torch.distributions.Beta(1.0, 1.0).sample((1000, 12)).double()
        first, second = (torch.distributions.Binomial(4, solved).sample() / 4 for _ in range(2))
    p = torch.tensor([sign_flip_p_value(row) for row in second - first])
    for level in (0.05, 0.1, 0.25):
        assert 0.4 * level < (p <= level).double().mean().item() < level + 3 * math.sqrt(level * (1 - level) / 1000)


def test_a_policy_that_is_better_on_most_questions_is_found() -> None:
    """Of ten that differ, one is worse by ¼ and nine are better: 7 of the 512 pairs of signs go as far."""
    differences = torch.tensor([0.25, 0.5, 0.0, 0.25, 0.75, -0.25, 0.5, 0.25, 0.0, 0.5, 0.25, 0.25])
    assert sign_flip_p_value(differences) == 7 / 512
    assert bootstrap_interval(differences)[0] > 0


def test_the_interval_of_skewed_scores_is_shifted_as_edgeworths_expansion_says() -> None:
    """To second order, z standard errors from the mean lie at z + skewness·(2z² + 1)/(6√n); the middle of both ends is
    the mean shifted by the second term. Without the correction of the bias, that would be 2z² − 1."""
    scores = -(1 - (torch.arange(100, dtype=torch.float64) + 0.5) / 100).log()  # exponential
    low, high = bootstrap_interval(scores, resamples=50_000)
    deviation = scores.std(unbiased=False).item()
    skewness = ((scores - scores.mean()) ** 3).mean().item() / deviation**3
    z = 1.98422 * math.sqrt(100 / 99)  # Student's t with 99 degrees of freedom
    middle = scores.mean().item() + deviation / 10 * skewness * (2 * z**2 + 1) / 60
    assert (low + high) / 2 == pytest.approx(middle, abs=0.0025)
