"""avg@k, pass@k, lengths and truncation of an evaluation, from responses graded by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ibro_lightning.metrics import Evaluation, SampleAccuracy
from ibro_lightning.types import Completion, Group, Prompt, RewardResult, Rollout

torch.set_num_threads(1)

# Three questions with four samples each: half right, none right, all right.
CORRECT = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
LENGTHS = [[1, 2, 3, 4], [5, 5, 5, 5], [2, 2, 2, 6]]
TRUNCATED = [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]


def rollout_of(
    correct: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """One group per row; responses of one token that end with EOS unless said otherwise."""
    groups = []
    for q, row in enumerate(correct):
        completions = tuple(
            Completion(
                token_ids=(3,) * (lengths[q][i] if lengths else 1),
                logp=(-0.5,) * (lengths[q][i] if lengths else 1),
                finish_reason="length" if truncated and truncated[q][i] else "stop",
                text="",
                max_tokens=8,
                seed=i,
            )
            for i in range(len(row))
        )
        results = tuple(RewardResult(2 * value - 1, {"accuracy": float(value)}) for value in row)
        groups.append(Group(Prompt(f"q{q}", "", (1, 2), answer=None), completions, results))
    return Rollout.from_groups(groups, name="test", iteration=0, temperature=1.0)


def evaluate(*rollouts: Rollout) -> Evaluation:
    metric = SampleAccuracy()
    for rollout in rollouts:
        metric.update(rollout)
    return metric.compute()


def test_an_evaluation_worked_out_by_hand() -> None:
    """pass@2 of the first question is 1 − C(2, 2)/C(4, 2) = 5/6, so 11/18 over the three; pass@4 is 2/3."""
    evaluation = evaluate(rollout_of(CORRECT, LENGTHS, TRUNCATED))
    assert (evaluation.questions, evaluation.samples) == (3, 4)
    assert evaluation.avg_at_k.mean == pytest.approx(0.5)
    means = {k: estimate.mean for k, estimate in evaluation.pass_at_k.items()}
    assert means == pytest.approx({1: 1 / 2, 2: 11 / 18, 4: 2 / 3})
    assert evaluation.mean_length == pytest.approx(42 / 12)
    assert evaluation.truncated == pytest.approx(3 / 12)


@pytest.mark.parametrize(
    ("k", "attempts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_pass_at_k_is_given_for_powers_of_two_and_for_k(k: int, attempts: list[int]) -> None:
    evaluation = evaluate(rollout_of([[1] + [0] * (k - 1)]))
    assert list(evaluation.pass_at_k) == attempts
    # One right sample among k: j draws without replacement find it with probability j/k.
    assert [evaluation.pass_at_k[j].mean for j in attempts] == pytest.approx([j / k for j in attempts])


def test_intervals_come_from_resampling_questions() -> None:
    """Three questions with 0, ½ and 1: all three draws hit the same extreme in 1/27 > 2.5 % of the resamples, so the
    interval is [0, 1]. Resampling the twelve samples instead would give about [0.2, 0.8]."""
    evaluation = evaluate(rollout_of(CORRECT))
    assert (evaluation.avg_at_k.low, evaluation.avg_at_k.high) == (0.0, 1.0)


def test_intervals_have_the_width_of_the_normal_approximation() -> None:
    """200 questions, half of them always right and half never: ±1.96·0.5/√200 = ±0.0693 around 0.5."""
    evaluation = evaluate(rollout_of([[1, 1]] * 100 + [[0, 0]] * 100))
    for estimate in (evaluation.avg_at_k, evaluation.pass_at_k[1], evaluation.pass_at_k[2]):
        assert estimate.mean == 0.5
        assert estimate.low == pytest.approx(0.5 - 0.0693, abs=0.01)
        assert estimate.high == pytest.approx(0.5 + 0.0693, abs=0.01)


def test_scalars_name_the_k_that_was_sampled() -> None:
    scalars = evaluate(rollout_of(CORRECT, LENGTHS, TRUNCATED)).scalars()
    assert scalars == pytest.approx({"avg@4": 0.5, "pass@4": 2 / 3, "length": 3.5, "truncated": 0.25})


def test_batches_of_any_size_add_up() -> None:
    """One rollout of three questions, or one of two and one of one: the mean is over questions, not over batches."""
    whole = evaluate(rollout_of(CORRECT, LENGTHS, TRUNCATED))
    parts = [rollout_of(CORRECT[s], LENGTHS[s], TRUNCATED[s]) for s in (slice(0, 2), slice(2, 3))]
    assert evaluate(*parts) == whole


def shards() -> tuple[SampleAccuracy, SampleAccuracy]:
    """Two ranks with uneven shares: three questions in two updates, and two in one."""
    correct, lengths = [*CORRECT, [0, 1, 0, 0], [1, 1, 1, 0]], [*LENGTHS, [8, 8, 1, 1], [3, 3, 3, 3]]
    truncated = [*TRUNCATED, [1, 1, 0, 0], [0, 0, 0, 0]]
    metrics = (SampleAccuracy(), SampleAccuracy())
    for metric, cuts in zip(metrics, ([slice(0, 2), slice(2, 3)], [slice(3, 5)]), strict=True):
        for s in cuts:
            metric.update(rollout_of(correct[s], lengths[s], truncated[s]))
    return metrics


def assert_is_the_evaluation_of_both(evaluation: Evaluation) -> None:
    """Five questions with 2, 0, 4, 1, 3 right ones of 4; pass@2 = 1 − C(4−c, 2)/6; 72 tokens; 5 cut responses."""
    assert evaluation.questions == 5
    assert evaluation.avg_at_k.mean == pytest.approx(10 / 20)
    assert evaluation.pass_at_k[2].mean == pytest.approx((5 / 6 + 0 + 1 + 3 / 6 + 1) / 5)
    assert evaluation.pass_at_k[4].mean == pytest.approx(4 / 5)
    assert evaluation.mean_length == pytest.approx(72 / 20)
    assert evaluation.truncated == pytest.approx(5 / 20)


def test_merged_shards_equal_one_evaluation() -> None:
    """Averaging the two shards' own means, 0.5 and 0.5, would not tell; their pass@2 would: 11/18 and 3/4."""
    first, second = shards()
    second.merge_state(first)  # torchmetrics puts the incoming state in front
    assert_is_the_evaluation_of_both(second.compute())


def gather_with(other: SampleAccuracy) -> Callable[..., list[Tensor]]:
    """An all-gather of two ranks in one process: what the other rank holds under the same dtype and shape."""
    states = [torch.cat(state) for state in (other.correct, other.lengths, other.truncated)]

    def gather(mine: Tensor, group: object = None) -> list[Tensor]:
        (theirs,) = [s for s in states if (s.dtype, s.dim()) == (mine.dtype, mine.dim())]
        return [mine, theirs]

    return gather


def test_ranks_with_uneven_shares_compute_the_same_evaluation_as_one_process() -> None:
    """compute() itself gathers, and then sees tensors where one process has lists."""
    first, second = shards()
    first.dist_sync_fn, first.distributed_available_fn = gather_with(second), lambda: True
    assert_is_the_evaluation_of_both(first.compute())


def test_a_reset_metric_starts_again() -> None:
    metric = SampleAccuracy()
    metric.update(rollout_of(CORRECT))
    metric.compute()
    metric.reset()
    metric.update(rollout_of([[1, 1]]))
    evaluation = metric.compute()
    assert (evaluation.questions, evaluation.samples, evaluation.avg_at_k.mean) == (1, 2, 1.0)


def test_a_second_compute_sees_what_was_added_in_between() -> None:
    """torchmetrics keeps the last result; an update must drop it."""
    metric = SampleAccuracy()
    metric.update(rollout_of([[0, 0]]))
    assert metric.compute().avg_at_k.mean == 0.0
    metric.update(rollout_of([[1, 1]]))
    assert metric.compute().avg_at_k.mean == 0.5


def test_json_holds_plain_numbers() -> None:
    """evaluation.json is written from this."""
    report = evaluate(rollout_of([[1, 1], [1, 1]], [[2, 2], [2, 2]])).to_json()
    sure = {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert report == {
        "questions": 2,
        "samples": 2,
        "avg_at_k": sure,
        "pass_at_k": {1: sure, 2: sure},
        "mean_length": 2.0,
        "truncated": 0.0,
    }
    assert type(report["mean_length"]) is type(report["avg_at_k"]["mean"]) is float
