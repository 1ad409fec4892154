"""Two evaluations compared question by question, in Python and on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ibro_lightning import resampling
from ibro_lightning.batches import Rollout
from ibro_lightning.cli.main import main
from ibro_lightning.evaluation.compare import compare, compare_evaluations
from ibro_lightning.evaluation.record import EvaluationRecord
from ibro_lightning.functional import bootstrap_interval
from ibro_lightning.runs.samples_manifest import mark_complete
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

Sets = Mapping[str, Mapping[str, Sequence[float]]]
"""``{set: {question: accuracies of its samples}}``"""

FIRST: Sets = {
    "amc": {"q0": [1, 0], "q1": [0, 0], "q2": [1, 1], "q3": [0, 0], "only here": [1, 1]},
    "aime": {"q0": [0, 0], "q1": [0, 1]},
    "mine": {"q0": [1]},
}
SECOND: Sets = {
    "aime": {"q0": [0, 0, 0, 0], "q1": [1, 1, 1, 1]},
    "amc": {"q3": [1, 0], "q2": [1, 1], "q1": [1, 0], "q0": [1, 1]},
    "theirs": {"q0": [1]},
}
"""On amc ½, 0, 1, 0 become 1, ½, 1, ½; on aime 0, ½ become 0, 1."""


def evaluated(folder: Path, sets: Sets, *, complete: bool = True, gold: int = 7, rewards: str = "symbolic") -> Path:
    """What an evaluation leaves, in batches of two questions."""
    record = EvaluationRecord(folder, {"weights": str(folder), "rewards": rewards})
    for name, questions in sets.items():
        rows = list(questions.items())
        for batch, start in enumerate(range(0, len(rows), 2)):
            groups = [group(question, accuracies, gold) for question, accuracies in rows[start : start + 2]]
            record.write(name, batch, Rollout.from_groups(groups, name=name, iteration=0, temperature=1.0))
    folder.with_name(folder.name + ".json").write_text("{}")
    if complete:
        mark_complete(folder)
    return folder


def group(question: str, accuracies: Sequence[float], gold: int) -> Group:
    samples = tuple(Completion((3,), (-0.5,), "stop", "7", 8, seed) for seed in range(len(accuracies)))
    results = tuple(RewardResult(2 * value - 1, {"accuracy": float(value)}) for value in accuracies)
    return Group(Prompt(question, "what?", (1, 2), gold), samples, results)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        evaluated(tmp_path / "a" / "evaluations" / "validate", FIRST),
        evaluated(tmp_path / "b" / "evaluations" / "validate", SECOND),
    )


def test_questions_are_paired_by_their_ids() -> None:
    """The difference of the shared four is ½, ½, 0, ½: mean 3/8, and of 8 pairs of signs two go as far."""
    result = compare(
        {"q0": 0.5, "q1": 0.0, "q2": 1.0, "q3": 0.0, "only here": 1.0},
        {"q3": 0.5, "q2": 1.0, "q1": 0.5, "q0": 1.0, "only there": 0.0},
    )
    assert (result.questions, result.first, result.second, result.difference) == (4, 0.375, 0.75, 0.375)
    assert result.p_value == 0.25
    assert (result.low, result.high) == bootstrap_interval(torch.tensor([0.5, 0.5, 0.0, 0.5]))
    assert result.per_question == {"q0": (0.5, 1.0), "q1": (0.0, 0.5), "q2": (1.0, 1.0), "q3": (0.0, 0.5)}


def test_the_other_way_round_is_the_opposite() -> None:
    """The interval as far as the resamples of mirrored scores are mirrored."""
    a = {str(n): n % 5 / 4 for n in range(40)}
    b = {str(n): n % 3 / 2 for n in range(40)}
    there, back = compare(a, b), compare(b, a)
    assert back.difference == -there.difference
    assert back.p_value == there.p_value
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.02)
    assert there.low < there.difference < there.high


def test_the_same_policy_twice_does_not_differ() -> None:
    scores = {str(n): n / 7 for n in range(7)}
    result = compare(scores, scores)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_sees_a_small_gain_that_two_intervals_do_not() -> None:
    """20 questions of all difficulties, each 5 points better: the two intervals overlap almost wholly."""
    first = {str(n): n / 21 for n in range(20)}
    second = {name: score + 0.05 for name, score in first.items()}
    result = compare(first, second)
    assert result.p_value < 0.0002
    assert (result.low, result.high) == pytest.approx((0.05, 0.05))


def test_shared_sets_are_compared_each_and_together(pair: tuple[Path, Path]) -> None:
    """Of all six questions the differences are ½, ½, 0, ½, 0, ½: of 16 pairs of signs two go as far."""
    results = compare_evaluations(*pair)
    assert list(results) == ["aime", "amc", "all"]
    assert (results["amc"].questions, results["amc"].difference, results["amc"].p_value) == (4, 0.375, 0.25)
    assert (results["aime"].questions, results["aime"].difference, results["aime"].p_value) == (2, 0.25, 1.0)
    both = results["all"]
    assert (both.questions, both.p_value) == (6, 0.125)
    assert both.difference == pytest.approx(2 / 6)
    assert both.per_question["aime/q1"] == (0.5, 1.0)
    assert both.per_question["amc/q1"] == (0.0, 0.5)


def test_evaluations_are_named_by_their_results_or_by_their_folders(pair: tuple[Path, Path]) -> None:
    by_results = compare_evaluations(*(path.with_name("validate.json") for path in pair))
    assert by_results == compare_evaluations(*pair)


def test_one_shared_set_needs_no_sum(tmp_path: Path) -> None:
    a, b = (evaluated(tmp_path / name, {"amc": FIRST["amc"], name: {"q": [1]}}) for name in "ab")
    assert list(compare_evaluations(a, b)) == ["amc"]


def test_an_evaluation_that_was_moved_aside_can_be_compared(tmp_path: Path) -> None:
    evaluated(tmp_path / "validate", {"amc": {"q0": [0, 0], "q1": [0, 1]}})
    record = EvaluationRecord(tmp_path / "validate", {"weights": "others"})
    assert not record.continues
    new = evaluated(tmp_path / "new", {"amc": {"q0": [0, 1], "q1": [1, 1]}})
    for name in ("validate.1", "validate.1.json"):
        assert compare_evaluations(tmp_path / name, new)["amc"].difference == 0.5


def test_the_command_prints_the_comparison_and_writes_it(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "compare",
            *(str(path.with_name("validate.json")) for path in pair),
            "--json",
            str(tmp_path / "out" / "c.json"),
        ]
    )
    header, aime, amc, both, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["set", "questions", "first", "second", "difference", "p"]
    assert amc.split()[:6] == ["amc", "4", "37.5", "%", "75.0", "%"]
    assert amc.split()[6] == "+37.5"
    assert amc.split()[-1] == "0.2500"
    assert aime.split()[:2] == ["aime", "2"]
    assert both.split()[:2] == ["all", "6"]
    written = json.loads((tmp_path / "out" / "c.json").read_text())
    assert written["amc"]["per_question"]["q0"] == [0.5, 1.0]
    assert written["amc"]["difference"] == 0.375
    low, high = written["amc"]["low"], written["amc"]["high"]
    assert f"[{100 * low:+.1f}, {100 * high:+.1f}]" in amc


def test_an_earlier_comparison_and_with_overwrite_any_file_is_moved_aside(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    arguments = ["compare", *map(str, pair), "--json", str(file)]
    main(arguments)
    first = file.read_bytes()
    main(arguments)
    assert (tmp_path / "c.json.1").read_bytes() == file.read_bytes() == first
    file.write_text('{"mine": {}}')
    with pytest.raises(SystemExit):
        main(arguments)
    assert file.read_text() == '{"mine": {}}'
    main([*arguments, "--overwrite"])
    assert (tmp_path / "c.json.2").read_text() == '{"mine": {}}'
    assert file.read_bytes() == first


def refusal(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, paths)])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.startswith("error: compare: ")
    assert errors.count("\n") == 1
    return errors


def test_what_is_no_evaluation_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing in (tmp_path / "none", tmp_path / "none.json", tmp_path, pair[0] / "amc"):
        error = refusal(capsys, pair[0], missing)
        assert str(missing) in error
        assert "no evaluation there: name evaluations/validate.json" in error


def test_an_unfinished_evaluation_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = evaluated(tmp_path / "half", SECOND, complete=False)
    error = refusal(capsys, pair[0], half)
    assert str(half) in error
    assert "not finished: run the same command again" in error


def test_evaluations_of_different_sets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (evaluated(tmp_path / name, {name: {"q0": [1]}}) for name in ("amc", "aime"))
    error = refusal(capsys, a, b)
    assert "['amc']" in error
    assert "['aime']" in error
    assert "they share no set" in error


def test_evaluations_of_different_questions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (evaluated(tmp_path / name, {"amc": {name: [1]}}) for name in ("q0", "q1"))
    assert "no question in common" in refusal(capsys, a, b)


def test_questions_of_one_name_with_two_answers_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids number the rows of a file: another file of that name has other questions under them."""
    other = evaluated(tmp_path / "other", SECOND, gold=8)
    assert "aime/q0' - the answer is 7 in one and 8 in the other: two questions" in refusal(capsys, pair[0], other)


def test_samples_that_cannot_be_read_are_named(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (pair[1] / "amc" / "batch_0001.parquet").write_bytes(b"PAR1 and no more")
    error = refusal(capsys, *pair)
    assert str(pair[1]) in error
    assert "cannot be read" in error


def test_the_command_needs_two_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a"])
    assert stop.value.code == 2
    assert "second" in capsys.readouterr().err


def test_another_verifier_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The difference is then not the policy's alone."""
    paths = [evaluated(tmp_path / name, FIRST, rewards=name) for name in ("symbolic", "strict")]
    main(["compare", *map(str, paths)])
    assert "note: the two evaluations differ in rewards, too" in capsys.readouterr().out
    main(["compare", str(paths[0]), str(paths[0])])
    assert "note" not in capsys.readouterr().out


WITHOUT_TORCH = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "lightning", "transformers", "datasets"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
runpy.run_module("ibro_lightning", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--version"], 0, "ibro-lightning 0."),
        ([], 0, "usage: python -m ibro_lightning COMMAND"),
        (["compare", "--help"], 0, "usage: python -m ibro_lightning compare"),
        (["export", "--help"], 0, "usage: python -m ibro_lightning export"),
        (["export"], 2, "error: ckpt_path: missing - write a checkpoint"),
        (["comapre", "a", "b"], 2, "did you mean compare?"),
        (["compare", "nowhere", "nowhere"], 2, "compare: 'nowhere' - no evaluation there"),
        (["compare", "a/evaluations/validate.json", "b/evaluations/validate", "--json", "c.json"], 0, "aime"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_torch_imports_none(
    pair: tuple[Path, Path], arguments: list[str], code: int, expected: str
) -> None:
    """In a process of its own, in which torch cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pair[0].parents[2])
    assert done.returncode == code, done.stderr
    assert expected in (done.stdout or done.stderr)


def test_intervals_take_the_draws_that_earlier_versions_took_from_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(7, (500, 7), generator=generator)
    again = np.random.RandomState(3)
    assert np.array_equal(resampling._draws(again, 7, (500, 7)), rows.numpy())
    assert np.array_equal(resampling._draws(again, 2, (9, 4)), torch.randint(2, (9, 4), generator=generator).numpy())
