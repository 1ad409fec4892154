"""The table of samples: what was asked and answered, what was right, and what the verifier made of it."""

from __future__ import annotations

from dataclasses import replace

from helpers.rollouts import groups_of, make_rollout
from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.samples import _table
from ibro_lightning.types import Group


def judged(answers: bool) -> Rollout:
    """Two responses to a prompt with a gold, one of them cut."""
    (group, *_) = groups_of(make_rollout())
    results = [replace(group.results[0], reward=1.0, parts={"accuracy": 1.0}), replace(group.results[0], reward=-1.0)]
    if answers:
        results = [replace(results[0], answer="42", why="exact"), replace(results[1], answer="", why="no answer")]
    texts = [replace(group.completions[0], text="so it is 42"), replace(group.completions[0], text="a | b")]
    prompt = replace(group.prompt, text="6 * 7?", answer=["42", "42.0"])
    return Rollout.from_groups(
        [Group(prompt, tuple(texts), tuple(results))], name="train", iteration=1, temperature=1.0
    )


def test_gold_answer_and_reason_stand_beside_the_response() -> None:
    table = _table(judged(answers=True), 8, 500)
    assert table.columns == ["prompt", "response", "gold", "answer", "why", "tokens", "reward", "accuracy"]
    (first, second) = table.rows
    assert first[:5] == ["6 * 7?", "so it is 42", "['42', '42.0']", "42", "exact"]
    assert second[3:5] == ["", "no answer"]
    assert "| so it is 42 | \\['42', '42.0'\\] | 42 | exact |" in table.markdown


def test_a_verifier_that_reports_no_answer_has_no_columns_for_it() -> None:
    table = _table(judged(answers=False), 8, 500)
    assert table.columns == ["prompt", "response", "gold", "tokens", "reward", "accuracy"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_long_gold_is_shortened() -> None:
    (row, *_) = _table(judged(answers=True), 8, 6).rows
    assert row[2] == "['42', …"
