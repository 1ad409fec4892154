"""Small programs by example: problems that are what they say, and splits that share no function."""

from __future__ import annotations

import pytest

from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards import CodeReward
from ibro_lightning.tasks import SmallProgramsSource
from ibro_lightning.types import Completion, Prompt


def function_of(problem):
    scope = {}
    exec(problem.meta["solution"], scope)
    return scope["f"]


def all_problems(**settings):
    return list(SmallProgramsSource(**{"num_problems": 400, **settings}).problems())


def test_the_prompt_shows_values_of_the_solution_and_the_tests_ask_for_more():
    for problem in all_problems(examples=3, tests=2):
        f = function_of(problem)
        shown = dict(part[2:].split(")=") for part in problem.prompt.split())
        assert len(shown) == 3
        assert all(f(int(x)) == int(value) for x, value in shown.items())
        exec("\n".join(problem.answer["tests"]), {"f": f})
        assert len(set(problem.answer["tests"])) == 5
        assert {f"assert f({x}) == {value}" for x, value in shown.items()} < set(problem.answer["tests"])


def test_no_function_occurs_twice_or_is_constant_or_large():
    values = [tuple(map(function_of(problem), range(13))) for problem in all_problems(operations=3)]
    assert len(set(values)) == len(values) > 100
    assert all(len(set(row)) > 1 and max(map(abs, row)) <= 999 for row in values)


def test_splits_share_no_function_and_lose_none():
    values = {
        split: {tuple(map(function_of(problem), range(13))) for problem in all_problems(split=split)}
        for split in ("train", "heldout", "all")
    }
    assert values["train"].isdisjoint(values["heldout"])
    assert values["train"] | values["heldout"] == values["all"]
    assert 0.05 < len(values["heldout"]) / len(values["all"]) < 0.3


def test_problems_are_a_function_of_the_seed():
    assert all_problems(seed=1) == all_problems(seed=1)
    assert {p.id for p in all_problems(seed=1)} != {p.id for p in all_problems(seed=2)}


def test_the_sandbox_accepts_the_solution_and_refuses_another_function():
    problem, other = all_problems()[:2]
    prompt = Prompt(problem.id, problem.prompt, (0,), problem.answer)
    reward = CodeReward(fenced=False)

    def accuracy(text):
        return float(reward.verify(prompt, Completion((1,), (0.0,), "stop", text, 16, 0)).accuracy)

    assert accuracy(problem.meta["solution"]) == 1.0
    assert accuracy(other.meta["solution"]) == 0.0
    assert accuracy("f=lambda x:") == 0.0


def test_more_values_than_there_are_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"max_argument.*at least 9"):
        SmallProgramsSource(examples=5, tests=5, max_argument=8)
