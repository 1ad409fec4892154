"""avg@k, pass@k, maj@k, lengths, truncation and read answers of an evaluation, from responses graded by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from helpers.processes import logs, run_ranks
from ibro_lightning.batches import Rollout
from ibro_lightning.evaluation.metrics import Evaluation, SampleAccuracy
from ibro_lightning.types import Completion, FinishReason, Group, Prompt, RewardResult

torch.set_num_threads(1)

# Three questions with four samples each: half right, none right, all right.
CORRECT = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
LENGTHS = [[1, 2, 3, 4], [5, 5, 5, 5], [2, 2, 2, 6]]
TRUNCATED = [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]


def rollout_of(
    correct: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[Sequence[int]] | None = None,
    answers: Sequence[Sequence[str | None]] | None = None,
    late: Sequence[Sequence[int]] | None = None,
    timed_out: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """One group per row; responses of one token that end with EOS, from a verifier that says no more than right or
    wrong, unless said otherwise."""

    def finish(q: int, i: int) -> FinishReason:
        return "length" if truncated and truncated[q][i] else "deadline" if late and late[q][i] else "stop"

    groups = []
    for q, row in enumerate(correct):
        completions = tuple(
            Completion(
                token_ids=(3,) * (lengths[q][i] if lengths else 1),
                logp=(-0.5,) * (lengths[q][i] if lengths else 1),
                finish_reason=finish(q, i),
                text="",
                max_tokens=8,
                seed=i,
            )
            for i in range(len(row))
        )
        results = tuple(
            RewardResult(
                2 * value - 1,
                {"accuracy": float(value)},
                answers[q][i] if answers else None,
                bool(timed_out and timed_out[q][i]),
            )
            for i, value in enumerate(row)
        )
        groups.append(Group(Prompt(f"q{q}", "", (1, 2), answer=None), completions, results))
    return Rollout.from_groups(groups, name="test", iteration=0, temperature=1.0)


def evaluate(*rollouts: Rollout) -> Evaluation:
    metric = SampleAccuracy()
    for rollout in rollouts:
        metric.update(rollout)
    return metric.compute()


def test_an_evaluation_worked_out_by_hand() -> None:
    """pass@2 of the first question is 1 − C(2, 2)/C(4, 2) = 5/6, so 11/18 over the three; pass@3 and pass@4 are 2/3."""
    evaluation = evaluate(rollout_of(CORRECT, LENGTHS, TRUNCATED))
    assert (evaluation.questions, evaluation.samples) == (3, 4)
    assert evaluation.avg_at_k.mean == pytest.approx(0.5)
    means = {k: estimate.mean for k, estimate in evaluation.pass_at_k.items()}
    assert means == pytest.approx({1: 1 / 2, 2: 11 / 18, 3: 2 / 3, 4: 2 / 3})
    assert evaluation.mean_length == pytest.approx(42 / 12)
    assert evaluation.truncated == pytest.approx(3 / 12)


@pytest.mark.parametrize(
    ("k", "curves"), [(1, [1]), (2, [2]), (3, [2, 3]), (6, [2, 4, 6]), (8, [2, 4, 8]), (32, [2, 4, 8, 16, 32])]
)
def test_pass_at_j_is_given_for_every_j_and_drawn_for_powers_of_two_and_for_k(k: int, curves: list[int]) -> None:
    evaluation = evaluate(rollout_of([[1] + [0] * (k - 1)]))
    # One right sample among k: j draws without replacement find it with probability j/k.
    means = {j: estimate.mean for j, estimate in evaluation.pass_at_k.items()}
    assert means == pytest.approx({j: j / k for j in range(1, k + 1)})
    # pass@1 is avg@k, and has no curve of its own beside it.
    drawn = {name: value for name, value in evaluation.scalars().items() if name.startswith("pass@")}
    assert drawn == pytest.approx({f"pass@{j}": j / k for j in curves})


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
    expected = {"avg@4": 0.5, "pass@2": 11 / 18, "pass@4": 2 / 3, "length": 3.5, "truncated": 0.25, "timed_out": 0.0}
    assert scalars == pytest.approx({**expected, "accuracy": 0.5, "coverage": 2 / 3})


@pytest.mark.parametrize("k", [1, 2, 4])
def test_monitors_have_names_that_do_not_change_with_k(k: int) -> None:
    correct, answers = [[1] * k, [0] * k, [1] + [0] * (k - 1)], [["7"] * k] * 3
    rollout = rollout_of(correct, [[3] * k] * 3, [[0] * k] * 3, answers)
    scalars = evaluate(rollout).scalars()
    same = {"accuracy": f"avg@{k}", "coverage": f"pass@{k}", "majority": f"maj@{k}"}
    assert {name: scalars[name] for name in same} == {name: scalars[other] for name, other in same.items()}
    assert scalars["accuracy"] == pytest.approx((1 + 1 / k) / 3)
    assert scalars["coverage"] == pytest.approx(2 / 3)


# The first question's samples say 7, 7, 3 and nothing; the second's two answers have a vote each; nobody reads the
# third's, although a verifier may call such a response right.
ANSWERS = [["7", "7", "3", ""], ["5", "", "6", ""], ["", "", "", ""]]
ANSWERED = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_the_answer_given_most_often_is_judged() -> None:
    """7 wins and is right; 5 and 6 draw, and one of them is right; no vote at all is wrong. Five of twelve are read."""
    evaluation = evaluate(rollout_of(ANSWERED, answers=ANSWERS))
    assert evaluation.maj_at_k is not None
    assert evaluation.maj_at_k.mean == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert evaluation.maj_at_k.low <= 0.5 <= evaluation.maj_at_k.high
    assert evaluation.extracted == pytest.approx(5 / 12)
    assert evaluation.scalars()["maj@4"] == pytest.approx(0.5)
    assert evaluation.scalars()["extracted"] == pytest.approx(5 / 12)


def test_the_same_answer_to_two_questions_is_two_answers() -> None:
    """Votes are counted within a question: three times "1" is right for the first, and wrong for the second."""
    evaluation = evaluate(rollout_of([[1, 1, 0], [0, 0, 1]], answers=[["1", "1", "2"], ["1", "1", "2"]]))
    assert evaluation.maj_at_k is not None
    assert evaluation.maj_at_k.mean == 0.5


@pytest.mark.parametrize(
    "answers",
    [None, [["7", "7", "3", ""], ["5", "", None, ""], ["", "", "", ""]]],
    ids=["of no response", "of all but one"],
)
def test_a_verifier_that_does_not_say_what_it_read_gets_no_majority(
    answers: list[list[str | None]] | None,
) -> None:
    evaluation = evaluate(rollout_of(ANSWERED, answers=answers))
    assert (evaluation.maj_at_k, evaluation.extracted) == (None, None)
    assert not {"maj@4", "extracted"} & evaluation.scalars().keys()


def test_stopped_verifications_are_counted() -> None:
    marks = [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    evaluation = evaluate(
        rollout_of(ANSWERED[:2], answers=ANSWERS[:2], timed_out=marks[:2]),
        rollout_of(ANSWERED[2:], answers=ANSWERS[2:], timed_out=marks[2:]),
    )
    assert evaluation.timed_out == 3
    assert evaluation.scalars()["timed_out"] == 3.0


def test_responses_that_the_deadline_cut_count_as_truncated() -> None:
    late = [[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert evaluate(rollout_of(CORRECT, LENGTHS, TRUNCATED, late=late)).truncated == pytest.approx(5 / 12)


def test_partial_accuracies_count_in_the_mean_and_not_as_passed() -> None:
    evaluation = evaluate(rollout_of([[0.5, 0.5], [1, 0.25]], answers=[["a", "a"], ["b", "c"]]))
    assert evaluation.avg_at_k.mean == pytest.approx((0.5 + 0.625) / 2)
    assert evaluation.pass_at_k[2].mean == pytest.approx(0.5)
    assert evaluation.maj_at_k is not None
    assert evaluation.maj_at_k.mean == pytest.approx((0.5 + 0.625) / 2)


def test_groups_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of responses"):
        evaluate(rollout_of([[1, 0], [1]]))
    with pytest.raises(ValueError, match="3 responses to a prompt, after 2"):
        evaluate(rollout_of([[1, 0], [1, 1]]), rollout_of([[1, 0, 0], [1, 1, 1]]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no response was evaluated"):
        SampleAccuracy().compute()


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
    """An all-gather of two ranks in one process: the other rank's states, in the order in which they are asked for."""
    states = [getattr(other, name) for name in other._reductions]
    theirs = iter([torch.cat(state) if isinstance(state, list) else state for state in states])

    def gather(mine: Tensor, group: object = None) -> list[Tensor]:
        return [mine, next(theirs)]

    return gather


def test_ranks_with_uneven_shares_compute_the_same_evaluation_as_one_process() -> None:
    """compute() itself gathers, and then sees tensors where one process has lists."""
    first, second = shards()
    first.dist_sync_fn, first.distributed_available_fn = gather_with(second), lambda: True
    assert_is_the_evaluation_of_both(first.compute())


SHARES = (([[4, 1], [0]], [[2], [3, 6], [5]]), ([[6, 5, 4], [0, 1, 2, 3]], []))
"""Seven questions, in batches, on two ranks: uneven shares, and a rank without any."""
RIGHT = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0.5, 0, 0, 0], [1, 0, 1, 0]]
READ = [list("aabb"), ["", "", "", ""], list("7777"), list("1234"), list("5556"), ["", "x", "", ""], list("8989")]


def questions(indices: Sequence[int]) -> Rollout:
    """Some of seven questions; the verification of each one's first sample was stopped."""
    return rollout_of(
        [RIGHT[q] for q in indices],
        [[q + 1, 20_000 + q, 3, 4] for q in indices],
        [[q % 2, 0, 0, 1] for q in indices],
        [READ[q] for q in indices],
        timed_out=[[1, 0, 0, 0] for _ in indices],
    )


def on_rank() -> None:
    """Both pairs of shares, one after the other; each rank writes what it computed."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = []
    for shares in SHARES:
        metric = SampleAccuracy()
        for batch in shares[rank]:
            metric.update(questions(batch))
        results.append(metric.compute().to_json())
    Path(f"rank{rank}.json").write_text(json.dumps(results))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_with_uneven_shares_and_with_none_compute_what_one_computes(tmp_path: Path) -> None:
    """Bit for bit, the intervals included, on both ranks; the other two shares leave a rank without a question."""
    assert run_ranks(2, on_rank, folder=tmp_path) == [0, 0], logs(tmp_path)
    alone = json.loads(json.dumps(evaluate(questions(range(7))).to_json()))
    assert alone["questions"] == 7
    assert alone["timed_out"] == 7
    assert alone["maj_at_k"]["low"] < alone["maj_at_k"]["mean"] < alone["maj_at_k"]["high"]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [alone, alone]


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
        "maj_at_k": None,
        "mean_length": 2.0,
        "truncated": 0.0,
        "extracted": None,
        "timed_out": 0,
    }
    assert type(report["mean_length"]) is type(report["avg_at_k"]["mean"]) is float
