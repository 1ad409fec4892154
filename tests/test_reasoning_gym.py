"""reasoning-gym: every dataset's own answer is right, other answers are not, and no answer can run anything."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")
from reasoning_gym.factory import DATASETS

from helpers.quick import slow_unless
from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.tasks.gym_datasets import UNSEEDED, is_formula, is_inert, make_dataset
from ibro_lightning.tasks.reasoning_gym import ReasoningGymReward, ReasoningGymSource, last_tagged
from ibro_lightning.types import Completion, Problem, Prompt

# Their problems have no answer of their own: the scorer judges any solution.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# Scorers that read "9…9" around the answer as the answer: they skip other characters, or allow for any constant.
CHANGED = {
    "intermediate_integration": "2*({own})",
    "kakurasu": "0 0\n0 0",
    "quantum_lock": "A",
    "simple_integration": "2*({own})",
    "sokoban": "L",
}
NAMES = sorted(set(DATASETS) - {"composite"})


def completion(text: str) -> Completion:
    return Completion((1,), (0.0,), "stop", text, 64, 0)


def prompt(problem: Problem) -> Prompt:
    return Prompt(problem.id, "text", (1,), problem.answer)


def accuracy(problem: Problem, text: str, **options: Any) -> float:
    (result,) = ReasoningGymReward(**options)(prompt(problem), [completion(text)])
    return result.parts["accuracy"]


def problems(dataset: str, size: int = 3, **settings: Any) -> list[Problem]:
    return list(ReasoningGymSource(dataset, size=size, **settings).problems())


@cache
def first_problems(name: str) -> list[Problem]:
    return problems(name)


ANSWERED = [name for name in NAMES if name not in WITHOUT_ANSWER]


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ANSWERED[::4], ANSWERED))
def test_each_datasets_own_answer_is_right_and_a_changed_one_is_not(name: str) -> None:
    for problem in first_problems(name):
        own = problem.answer["entry"]["answer"].strip()
        sent = pickle.loads(pickle.dumps(problem))  # to the processes that judge, and to the log
        assert accuracy(sent, f"Let me think. <answer>{own}</answer>") == 1.0
        assert json.loads(json.dumps(problem.answer, default=str))["dataset"] == name
        for wrong in ("", "zzz wrong", CHANGED.get(name, "9{own}9").format(own=own), "<" * 50, "__import__('os')"):
            assert accuracy(problem, f"<answer>{wrong}</answer>") == 0.0
        assert accuracy(problem, own) == 0.0  # without the tags


@pytest.mark.parametrize("name", sorted(WITHOUT_ANSWER))
def test_datasets_without_an_answer_of_their_own_score_nonsense_as_wrong(name: str) -> None:
    (problem,) = problems(name, size=1)
    assert problem.answer["entry"]["answer"] is None
    assert accuracy(problem, "<answer>zzz wrong</answer>") == 0.0
    assert accuracy(problem, "<answer></answer>") == 0.0


def test_a_valid_solution_that_no_entry_lists_is_right() -> None:
    (problem,) = problems("graph_color", size=1, config={"min_num_vertices": 3, "max_num_vertices": 3, "num_colors": 3})
    vertices = problem.answer["entry"]["metadata"]["puzzle"]["vertices"]
    colors = {str(vertex): color for color, vertex in enumerate(vertices, start=1)}
    assert len(colors) == 3
    assert accuracy(problem, f"<answer>{json.dumps(colors)}</answer>") == 1.0
    assert accuracy(problem, f"<answer>{json.dumps(dict.fromkeys(colors, 7))}</answer>") == 0.0


@pytest.mark.parametrize(
    "name",
    [
        *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "simple_integration"),
        *("intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"),
    ],
)
def test_an_answer_that_the_scorer_would_evaluate_runs_nothing(name: str, tmp_path: Path) -> None:
    """These scorers call ``eval`` or sympy's ``parse_expr``, which calls it."""
    (problem,) = problems(name, size=1)
    mark = tmp_path / "was_here"
    for attack in (
        f"open({str(mark)!r}, 'w').write('x')",
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        f"[__import__('os').mkdir({str(mark)!r})]",
        f"(open)({str(mark)!r}, 'w')",
        f"3! + open({str(mark)!r}, 'w').write('x')",
        f"［open({str(mark)!r}, 'w')］",
        f"ｏｐｅｎ({str(mark)!r}, 'w')",
    ):
        assert accuracy(problem, f"<answer>{attack}</answer>", partial=True) == 0.0
        assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "inert"),
    [
        *(("[['1', 2.0], (-3,)]", True), ("1 0\n0 1", True), ("ABC", True), ("{1: None}", True), ("exit()", False)),
        *(("[].append", False), ("[x for x in y]", False), ("(lambda: 1)", False), ("f'{x}'", False), ("a[0]", False)),
        *(("9 ** 9 ** 9", False), ("-" * 20000 + "1", False)),
    ],
)
def test_what_eval_may_see(text: str, inert: bool) -> None:
    assert is_inert(text) == inert


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        *(("3*x**2/2 + exp(-x)*sin (2*x) + C", True), ("(5 + 3) * 1.5 - .5", True), ("log(x) + (x + 1)*(x - 1)", True)),
        *(("x.func", False), ("(1).real", False), ("open(1)", False), ("(open)(1)", False), ("exp(1)(2)", False)),
        *(("'a'", False), ("x[0]", False), ("lambda x: x", False), ("sqrt(Integral(x, x))", False), ("a__b", False)),
        *(("1\nx", False), ("ｅｘｐ(1)", False), ("x = 1", False)),
    ],
)
def test_what_sympy_may_see(text: str, formula: bool) -> None:
    assert is_formula(text) == formula


def test_scorers_that_accept_wrong_answers_are_corrected() -> None:
    (halting,) = problems("game_of_life_halting", size=1)
    own = halting.answer["entry"]["answer"]
    assert make_dataset("game_of_life_halting", {"seed": 0}).score_answer("rubbish", halting.answer["entry"]) == 1.0
    other = {"True": "False", "False": "True"}[own]
    assert [accuracy(halting, f"<answer>{text}</answer>") for text in (own, own.lower(), other, "rubbish")] == [
        1,
        1,
        0,
        0,
    ]

    (puzzle,) = problems("puzzle24", size=1)
    numbers = puzzle.answer["entry"]["metadata"]["numbers"]
    assert sorted(numbers) != [1, 1, 4, 6]
    assert accuracy(puzzle, "<answer>6 * 4 * 1 * 1</answer>") == 0.0


def test_partial_credit_and_threshold() -> None:
    """Spelling a word backward with the right letters in a wrong order earns a fraction."""
    (problem,) = problems("sentence_reordering", size=1)
    text = f"<answer>{' '.join(problem.answer['entry']['answer'].split()[::-1])}</answer>"
    fraction = accuracy(problem, text, partial=True)
    assert 0.0 < fraction < 1.0
    assert accuracy(problem, text) == 0.0
    assert accuracy(problem, text, threshold=fraction) == 1.0
    (result,) = ReasoningGymReward(partial=True, correct=3.0, incorrect=1.0)(prompt(problem), [completion(text)])
    assert result.reward == pytest.approx(1.0 + 2.0 * fraction, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(("<answer> 5 </answer>", "5"), ("<answer>4</answer> no <answer>5\n6</answer>", "5\n6"), ("5", ""), ("", "")),
        *(("<answer>5</answer> or <answer>6", "5"), ("<answer>4 <answer>5</answer>", "5"), ("</answer>5<answer>", "")),
        *(("<answer>5</answer> end </answer>", "5"), ("<answer>" * 200_000, ""), ("</answer>" * 200_000, "")),
    ],
)
def test_the_last_closed_tag_holds_the_answer(text: str, answer: str) -> None:
    assert last_tagged(text, "answer") == answer


def test_the_answer_is_reported_for_votes() -> None:
    (problem,) = problems("maze", size=1)
    results = ReasoningGymReward()(prompt(problem), [completion("<answer> a \n  b </answer>"), completion("a b")])
    assert [result.answer for result in results] == ["a b", ""]
    (whole,) = ReasoningGymReward(tag=None)(prompt(problem), [completion(f" {problem.answer['entry']['answer']}\n")])
    assert whole.parts["accuracy"] == 1.0
    (other,) = ReasoningGymReward(tag="out")(prompt(problem), [completion("<answer>1</answer><out>2</out>")])
    assert other.answer == "2"


def test_an_odd_answer_is_wrong_and_a_broken_entry_is_an_error() -> None:
    (problem,) = problems("prime_factorization", size=1)
    assert accuracy(problem, "<answer>two times three</answer>") == 0.0  # its scorer raises ValueError
    entry = {**problem.answer["entry"], "answer": "no number", "metadata": {}}
    with pytest.raises(RewardError, match=r"prime_factorization/0/0.*broken"):
        ReasoningGymReward().verify(
            Prompt(problem.id, "", (1,), {**problem.answer, "entry": entry}), completion("<answer>x</answer>")
        )
    for answer in ("8", {"dataset": "gcd"}, {"dataset": "gcd", "config": {}, "entry": {"question": "?"}}):
        with pytest.raises(RewardError, match="prompt 'p'"):
            ReasoningGymReward().verify(Prompt("p", "", (1,), answer), completion("<answer>8</answer>"))


def test_the_source_is_reproducible_split_and_free_of_duplicates(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"size": 60, "config": {"min_words": 1, "max_words": 1}, "seed": 5}
    everything = problems("letter_counting", **settings)
    assert [p.id for p in everything] == [p.id for p in problems("letter_counting", **settings)]
    questions = [p.question for p in everything]
    assert len(set(questions)) == len(questions) < 60  # the words of one short text repeat
    train = problems("letter_counting", split="train", heldout_fraction=0.3, **settings)
    heldout = problems("letter_counting", split="heldout", heldout_fraction=0.3, **settings)
    assert {p.question for p in train} | {p.question for p in heldout} == set(questions)
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert train
    assert heldout
    assert {p.id.rpartition("/")[0] for p in everything} == {"letter_counting/5"}
    assert everything[0].meta == {"dataset": "letter_counting", "difficulty": {"words": (1, 1)}}


@pytest.mark.parametrize("name", sorted(UNSEEDED))
def test_problems_depend_on_neither_the_order_of_sets_nor_the_global_random_numbers(name: str) -> None:
    random.seed(7)
    state = random.getstate()
    assert [p.question for p in problems(name)] == [p.question for p in first_problems(name)]
    assert random.getstate() == state


def test_a_composite_mixes_datasets_and_is_scored_by_each_ones_scorer() -> None:
    parts = [{"name": name, "weight": 1.0, "config": {}} for name in ("knights_knaves", "n_queens", "maze")]
    mixed = problems("composite", size=12, config={"datasets": parts})
    assert {p.meta["dataset"] for p in mixed} == {"knights_knaves", "n_queens", "maze"}
    for problem in mixed:
        assert accuracy(problem, f"<answer>{problem.answer['entry']['answer']}</answer>") == 1.0
        assert accuracy(problem, "<answer>[exit()]</answer>", partial=True) == 0.0


def test_prompts_with_template_system_and_examples() -> None:
    settings = {"size": 4, "template": "Q: {question}", "examples": 2, "config": {"min_word_len": 3, "max_word_len": 3}}
    (first, *_) = problems("spell_backward", system="Be brief.", **settings)
    roles = [message["role"] for message in first.prompt]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert first.prompt[-1]["content"] == f"Q: {first.question}"
    shown = first.prompt[1]["content"]
    word = shown.rpartition(": ")[2]
    assert first.prompt[2]["content"] == f"<answer>{word[::-1]}</answer>"
    assert shown.removeprefix("Q: ") not in {p.question for p in problems("spell_backward", **settings)}
    (plain, *_) = problems("spell_backward", example_answer="= {answer}", **settings)
    assert plain.prompt[1]["content"] == f"= {word[::-1]}"
    (raw, *_) = problems("spell_backward", chat=False, system="Be brief.", **settings)
    assert raw.prompt.startswith(f"Be brief.\n\n{shown}\n<answer>{word[::-1]}</answer>\n\nQ: ")
    assert raw.prompt.endswith(f"Q: {raw.question}")


@pytest.mark.parametrize(
    ("settings", "setting", "words"),
    [
        ({"dataset": "knight_knave"}, "dataset", "knights_knaves"),
        ({"dataset": "qqqq"}, "dataset", "zebra_puzzles"),
        ({"dataset": "maze", "config": {"grid": 3}}, "config", "grid"),
        ({"dataset": "maze", "config": {"min_dist": -1}}, "config", "min_dist"),
        ({"dataset": "maze", "config": {"seed": 3}}, "config.seed", "write it as seed"),
        ({"dataset": "maze", "size": 0}, "size", "1 or more"),
        ({"dataset": "maze", "template": "{problem}"}, "template", "{question}"),
        ({"dataset": "maze", "example_answer": "42"}, "example_answer", "{answer}"),
        ({"dataset": "composite"}, "config", "dataset"),
    ],
)
def test_wrong_settings_of_the_source(settings: dict[str, Any], setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ReasoningGymSource(**settings)
    assert error.value.setting == setting
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_settings_of_the_reward_and_examples_without_answers() -> None:
    for settings, setting in (
        ({"threshold": 0.0}, "threshold"),
        ({"tag": "<answer>"}, "tag"),
        ({"correct": -2.0}, "correct"),
    ):
        with pytest.raises(ConfigError, match=setting):
            ReasoningGymReward(**settings)
    with pytest.raises(ConfigError, match=r"^examples"):
        problems("graph_color", examples=1)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'ibro-lightning\[reasoning-gym\]'"):
        ReasoningGymReward()


def test_importing_the_tasks_loads_neither_their_libraries_nor_torch() -> None:
    code = "import pickle, sys, ibro_lightning.tasks as tasks; pickle.dumps(tasks.NumberPathReward()); "
    code += "print({'reasoning_gym', 'torch', 'datasets', 'pyarrow', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
