"""Golds: what they mean, and that every one of them is tried on its verifier before training."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibro_lightning.datamodules import gold_check as golds_module
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.gold_check import usable_golds
from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.ranks import Ranks
from ibro_lightning.rewards import (
    CodeReward,
    DapoMathReward,
    GoldTrial,
    LastNumberReward,
    MathVerifyReward,
    OverlongPenalty,
    PlainResponses,
    PoolOptions,
    Reward,
    RewardByPart,
    RewardPool,
    RewardSum,
    VerifiableReward,
    dapo_score,
    judge_all,
    math_verify_score,
    perturbed,
)
from ibro_lightning.rewards.gold_trial import gives_plain_responses
from ibro_lightning.rewards.mathematics.gold_text import alternatives, canonical_gold, gold_texts
from ibro_lightning.sources import DatasetSource
from ibro_lightning.sources.prompts import PromptLimits, encode_prompts
from ibro_lightning.tasks import CountdownReward
from ibro_lightning.types import Completion, Prompt, RewardResult

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (set IBRO_DATA)")
VERIFIERS: list[VerifiableReward] = [
    LastNumberReward(),
    DapoMathReward(),
    DapoMathReward(strict=False),
    MathVerifyReward(),
]
NAMES = ["last number", "dapo", "lenient dapo", "math-verify"]


def prompt(answer: Any, prompt_id: str = "file/3", part: str = "") -> Prompt:
    return Prompt(prompt_id, "text", (1,), answer, part=part)


def accuracy(reward: Reward, answer: Any, text: str) -> float:
    (result,) = reward(prompt(answer), [Completion((1,), (0.0,), "stop", text, 64, 0)])
    return result.parts["accuracy"]


def tried(reward: Reward, answer: Any) -> str | None:
    """Why the gold is of no use; None if it is."""
    (result,) = GoldTrial(reward)(prompt(answer), [Completion((), (), "stop", "", 1, 0)])
    assert result.reward == float(result.answer is None)
    return result.answer


# What a gold means.


@pytest.mark.parametrize("gold", [["12"], '["12"]', "['12']", (12,), ["12", "12.0"], "12", 12, 12.0])
@pytest.mark.parametrize("reward", VERIFIERS, ids=NAMES)
def test_a_list_of_one_is_its_element(reward: Reward, gold: Any) -> None:
    assert accuracy(reward, gold, "Answer: 12") == 1.0
    assert accuracy(reward, gold, "Answer: 13") == 0.0
    assert tried(reward, gold) is None


@pytest.mark.parametrize("gold", [["7", "12"], '["7", "12"]', "['7', '12']", [7, "12"], (7, 12.0)])
@pytest.mark.parametrize("reward", VERIFIERS, ids=NAMES)
def test_of_a_list_any_one_is_right(reward: Reward, gold: Any) -> None:
    assert [accuracy(reward, gold, f"Answer: {n}") for n in (7, 12, 13)] == [1.0, 1.0, 0.0]
    assert accuracy(reward, gold, "Answer: 7, 12") == (1.0 if isinstance(reward, LastNumberReward) else 0.0)
    assert tried(reward, gold) is None


def test_functions_know_lists_too() -> None:
    assert dapo_score("Answer: 12", ["7", "12"]) == dapo_score("Answer: 12", '["12"]') == 1.0
    assert math_verify_score(r"\boxed{\frac{1}{2}}", ["7", "0.5"]) == 1.0
    assert math_verify_score(r"\boxed{3}", ["7", "0.5"]) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[1,2]",
        "[2,5]",
        r"[\text{a}]",
        "[x]",
        '["1", 2]',
        "(12)",
        "('a' 'b')",
        '["a", x]',
        "[,]",
        "(1, 2)",
        '"12"',
        "[]",
        '["a',
    ],
)
def test_text_that_is_no_list_of_texts_stays_as_it_is(text: str) -> None:
    """[1, 2] is an interval, or a point."""
    assert alternatives(text) == [text]


@pytest.mark.parametrize(
    ("text", "golds"),
    [
        (r'["\frac{1}{2}"]', [r"\frac{1}{2}"]),
        (r'["\\frac{1}{2}"]', [r"\frac{1}{2}"]),
        (r"['\theta', '\\theta']", [r"\theta", r"\theta"]),
        (r'["\text{no}", "x \neq \beta", "\rho", "\u", "\xi", "\underline{x}", "\infty"]',
         [r"\text{no}", r"x \neq \beta", r"\rho", r"\u", r"\xi", r"\underline{x}", r"\infty"]),
        (r'["a\\\\b", "1\/2", "\"", "it\'s"]', [r"a\\b", "1/2", '"', "it's"]),
        (r'["90\u00b0", "\ud835\udc65", "6 * 7 = 42\n#### 42"]', ["90°", "\U0001d465", "6 * 7 = 42\n#### 42"]),
        ("['12' '13']", ["12", "13"]),
        ("['12'\n '13']", ["12", "13"]),
        ("['12',]", ["12"]),
        ('[ "12" , ]', ["12"]),
        ('("12",)', ["12"]),
        ("('12', '13')", ["12", "13"]),
        ("[12]", ["12"]),
        ("[0.5]", ["0.5"]),
        ("[-3,]", ["-3"]),
        ("(7,)", ["7"]),
        ("[12.]", ["12"]),
    ],
)  # fmt: skip
def test_text_that_is_a_list_is_read_as_it_is_meant(text: str, golds: list[str]) -> None:
    assert alternatives(text) == golds


LATEX = st.lists(
    st.sampled_from([r"\frac", r"\theta", r"\neq", r"\rho", r"\u", r"\x", r"\\", r"\{", *"{}[](),'\"1a \n°𝑥"]),
    max_size=6,
).map("".join).filter(lambda text: not re.search(r"\n[A-Za-z]|\\[ux][0-9a-f]", text))  # fmt: skip


@given(st.lists(LATEX, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_list_and_its_text_mean_the_same_whoever_wrote_it(texts: list[str]) -> None:
    written = json.dumps(texts), json.dumps(texts, ensure_ascii=False), repr(texts), repr((*texts,))
    for text in (*written, str(np.array(texts, dtype=object))):
        assert alternatives(text) == texts


def test_hostile_lists_take_time_in_proportion_to_their_length() -> None:
    for text in (
        "['a'" + " " * 50_000 + "x]",
        "[" + "'a' " * 50_000 + "x]",
        '["' + "\\" * 50_001,
        "(" + "'a', " * 50_000,
    ):
        assert alternatives(text) == [text]


@pytest.mark.parametrize(
    ("gold", "texts"),
    [
        (12.0, ["12"]),
        (1e20, ["100000000000000000000"]),
        (2**53 + 1, ["9007199254740993"]),
        (-0.0, ["0"]),
        (1e-7, ["0.0000001"]),
        (Decimal("1.50"), ["1.50"]),
        (np.int64(7), ["7"]),
        (np.float64(7.0), ["7"]),
        (True, ["True"]),
    ],
)
def test_numbers_are_written_as_a_person_would(gold: Any, texts: list[str]) -> None:
    assert gold_texts(gold) == texts


@pytest.mark.parametrize(
    "gold", [None, "", "  ", [], [None], [[]], [["1"]], {}, {"a": 1}, [""], math.nan, math.inf, [math.nan], ["1", None]]
)
@pytest.mark.parametrize("reward", VERIFIERS, ids=NAMES)
def test_what_is_no_answer_is_refused(reward: Reward, gold: Any) -> None:
    with pytest.raises(RewardError, match="file/3"):
        accuracy(reward, gold, "Answer: 1")
    assert tried(reward, gold)


# The trial of a gold.


@pytest.mark.parametrize(
    "gold", ["1/2", "3:30", "5.30 p.m.", r"\frac{1}{2}", "2\\pi", "(1, 2)", "1,2,3", "x = 5", "5 or 6"]
)
def test_last_number_refuses_golds_of_which_it_would_compare_a_part(gold: str) -> None:
    assert "not a plain number" in (tried(LastNumberReward(), gold) or "")
    with pytest.raises(RewardError, match="not a plain number"):
        accuracy(LastNumberReward(), gold, gold)


@pytest.mark.parametrize(
    ("gold", "right"),
    [
        ("1,234.50", "1234.5"),
        (r"\$5", "5"),
        ("50%", "50"),
        (r"50\%", "50"),
        (".5", "0.5"),
        ("-3", "-3"),
        ("−3", "-3"),
        (r"\boxed{12}", "12"),
        ("6 * 7 = 42\n#### 42", "42"),
        ("90^\\circ", "90"),
        ("0.1", "0.1"),
        (2**60, str(2**60)),
    ],
)
def test_last_number_takes_every_spelling_of_one_number(gold: Any, right: str) -> None:
    assert tried(LastNumberReward(), gold) is None
    assert accuracy(LastNumberReward(), gold, f"so it is {right}") == 1.0


@pytest.mark.parametrize(
    ("reward", "gold", "reason"),
    [
        (DapoMathReward(), "5x - 7y + 4 = 0", "it accepts 'Answer: 6x - 7y + 4 = 0', too"),
        (DapoMathReward(), "12\nor so", "it does not accept even"),
        (DapoMathReward(), "1" * 400, "it does not accept even"),
        (DapoMathReward(), "square", "nothing is left of 'square'"),
        (DapoMathReward(strict=False), "1" * 400, "it does not accept even"),
        (MathVerifyReward(), "light blue or so", "cannot be read as mathematics"),
        (MathVerifyReward(equality="library"), "0.00000001", "it accepts"),
        (MathVerifyReward(match_types=["expr"]), r"\frac{1}{2}", "cannot be read"),
    ],
)
def test_golds_that_a_verifier_cannot_tell_from_others_are_found(reward: Reward, gold: str, reason: str) -> None:
    assert reason in (tried(reward, gold) or "")


@pytest.mark.parametrize(
    ("reward", "gold", "accepted"),
    [
        (DapoMathReward(), "x + y = 0", "y + y = 0"),
        (DapoMathReward(), "y = 2x + 3", "z = 2x + 3"),
        (DapoMathReward(), "2 + x = 5", "3 + x = 5"),
        (DapoMathReward(), r"\alpha - \beta = \pi", r"\alpha + \beta = \pi"),
        (DapoMathReward(strict=False), "y = 2x + 3", "z = 2x + 3"),
    ],
)
def test_what_stands_before_the_last_sign_of_equality_counts(reward: Reward, gold: str, accepted: str) -> None:
    assert accuracy(reward, gold, f"Answer: {accepted}") == 1.0
    assert f"it accepts {f'Answer: {accepted}'!r}, too" in (tried(reward, gold) or "")


@pytest.mark.parametrize(
    "gold", ["x = 5", "x=5", "5 cm", r"12 \text{ hours}", r"\theta = 5", "2x + 3", r"\$18.90", "3:30"]
)
@pytest.mark.parametrize("reward", VERIFIERS[1:], ids=NAMES[1:])
def test_names_and_units_of_numbers_do_not_count(reward: Reward, gold: str) -> None:
    assert tried(reward, gold) is None


READ = ["1 234", "1\u202f234", "1 1/2", "1e5", "-2.5E-3", "0x1F", "0b101", "1_000"]
READ += [r"3:00 \text{ p.m.}", "3:00 p.m.", "5 am", r"5\text{ PM}", "0.00000001", "4ab"]


@pytest.mark.parametrize("gold", READ)
def test_golds_that_math_verify_takes_for_something_else_are_read(gold: str) -> None:
    assert tried(MathVerifyReward(), gold) is None


@pytest.mark.parametrize("gold", ["2024-05-01", "05/01/2024", "1.5.2024"])
def test_a_date_reads_as_a_number_and_is_refused(gold: str) -> None:
    assert "reads as a number" in (tried(MathVerifyReward(), gold) or "")


@pytest.mark.parametrize(
    "gold", ["10x", "3am", r"1 \pm \sqrt{19}", r"1\frac{1}{2}", "2e^3", "52_8", "10-2-3", "1, 2", r"10^{5}"]
)
def test_golds_that_look_like_it_are_not(gold: str) -> None:
    assert tried(MathVerifyReward(), gold) is None


def test_the_last_digit_counts() -> None:
    """.0000672 is a gold of MATH-500; the library compares 6 decimals."""
    assert tried(MathVerifyReward(), ".0000672") is None
    assert accuracy(MathVerifyReward(), ".0000672", r"\boxed{.0000673}") == 0.0
    assert accuracy(MathVerifyReward(equality="library"), ".0000672", r"\boxed{.0000673}") == 1.0
    assert perturbed("12345678901234567890") == ("12345678901234567891",)


def test_the_base_of_a_numeral_is_part_of_the_trial() -> None:
    assert tried(MathVerifyReward(), "204_5") is None
    assert "it accepts" in (tried(MathVerifyReward(equality="library"), "204_5") or "")


@needs_data
@pytest.mark.parametrize(
    ("reward", "bad"),
    [(LastNumberReward(), 81), (DapoMathReward(), 1), (DapoMathReward(strict=False), 0)],
    ids=["last number", "DAPO", "DAPO, lenient"],
)
def test_how_many_of_math500s_golds_each_can_use(reward: Reward, bad: int) -> None:
    """74 of those that a last number cannot stand for have one, 7 have none."""
    rows = [json.loads(line) for line in (DATA / "math500_first250.jsonl").open()]
    golds = [canonical_gold(row["answer"]) for row in rows]
    assert sum(tried(reward, gold) is not None for gold in golds) == bad


@needs_data
def test_math_verify_can_use_real_golds() -> None:
    rows = [json.loads(line) for line in (DATA / "math500_first250.jsonl").open()][::8]
    assert {tried(MathVerifyReward(), canonical_gold(row["answer"])) for row in rows} == {None}


@given(st.text(alphabet="0123456789/.:,-+xyzAB\\{}_^() ", min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_perturbed_gold_is_another_text_of_the_same_length_or_a_7(gold: str) -> None:
    for other in perturbed(gold):
        assert other != gold or gold == "7"
        assert len(other) == len(gold) or other == "7"


class Own(VerifiableReward):
    """Says nothing of golds."""

    def verify(self, prompt, completion):
        return completion.text == str(prompt.answer)


class Tagged(LastNumberReward):
    """Judges in a way of its own, for which its base's plain responses mean nothing."""

    def verify(self, prompt, completion):
        return f"<answer>{prompt.answer}</answer>" in completion.text


class Says(Own):
    def plain_responses(self, prompt):
        return PlainResponses((str(prompt.answer),), ("something else",))


class Renamed(DapoMathReward):
    """Judges as its base does."""

    def __init__(self) -> None:
        super().__init__(strict=False)


def test_nobody_is_made_to_take_part() -> None:
    takes_part = [gives_plain_responses(reward) for reward in (Own(), Tagged(), OverlongPenalty(4), CodeReward())]
    assert takes_part == [False] * 4
    assert all(map(gives_plain_responses, (Says(), Renamed(), *VERIFIERS)))
    prompts = [prompt("1/2"), prompt({"any": "thing"}, "file/4")]
    for reward in (Own(), Tagged(), CountdownReward()):
        assert usable_golds(reward, prompts, setting="source") == prompts


@pytest.mark.parametrize(
    "answer",
    [
        "23",
        None,
        {"numbers": [1, 2]},
        {"numbers": [], "target": 3},
        {"numbers": ["1", "2"], "target": 3},
        {"numbers": [1, 2], "target": "3"},
        {"numbers": [1, 2], "target": 2.5},
        {"numbers": [1, 2], "target": math.nan},
        {"numbers": 12, "target": 3},
        {"numbers": [1, True], "target": 2},
    ],
)
def test_a_countdown_problem_that_is_none_is_an_error_of_the_data(answer: Any) -> None:
    with pytest.raises(RewardError, match=r"CountdownReward needs .*'file/3'"):
        accuracy(CountdownReward(), answer, "<answer>1 + 2</answer>")


def test_countdown_takes_whole_numbers_however_they_are_typed() -> None:
    assert accuracy(CountdownReward(), {"numbers": (1.0, 2), "target": 3.0}, "<answer>1 + 2</answer>") == 1.0


# All golds of a source.

PROMPTS = [prompt(answer, f"file/{n}") for n, answer in enumerate(["7", "1/2", "8", "3:30", "7", "1/2"])]


def test_the_first_bad_gold_is_named_with_what_to_do() -> None:
    reward = RewardSum([LastNumberReward(), OverlongPenalty(4)])
    with pytest.raises(ConfigError) as refused:
        usable_golds(reward, PROMPTS, setting="source")
    line = str(refused.value)
    assert line.startswith(
        "source: 'file/1' - 3 of 6 golds are of no use to their verifier; the first is '1/2': LastNumberReward"
    )
    for part in ("'1/2'", "LastNumberReward", "answer_column", "or on_bad_gold: drop"):
        assert part in line
    assert "\n" not in line


def test_bad_golds_can_be_dropped_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        kept = usable_golds(LastNumberReward(), PROMPTS, setting="source", on_bad_gold="drop")
    assert [one.id for one in kept] == ["file/0", "file/2", "file/4"]
    assert "data.source: dropped 3 of 6 golds" in caplog.text
    with pytest.raises(ConfigError, match="2 of 2 golds"):
        usable_golds(LastNumberReward(), [PROMPTS[1], PROMPTS[3]], setting="source", on_bad_gold="drop")


def test_each_distinct_gold_is_tried_once_and_each_part_by_its_own_reward() -> None:
    seen: list[tuple[str, Any]] = []

    def watching(requests: Any) -> list[list[RewardResult]]:
        seen.extend((type(trial.verifier).__name__, one.answer) for trial, one, _ in requests)
        return [trial(one, responses) for trial, one, responses in requests]

    reward = RewardByPart({"a": LastNumberReward(), "b": RewardSum([DapoMathReward(), OverlongPenalty(4)])})
    prompts = [prompt(answer, f"{part}/{n}", part) for n in range(3) for part in "ab" for answer in ("7",)]
    prompts.append(prompt("1/2", "b/9", "b"))
    assert usable_golds(reward, prompts, watching, setting="source") == prompts
    assert sorted(seen) == [("DapoMathReward", "1/2"), ("DapoMathReward", "7"), ("LastNumberReward", "7")]


def test_the_text_7_and_the_number_7_are_different_golds() -> None:
    class TextOnly(Says):
        def plain_responses(self, prompt):
            if not isinstance(prompt.answer, str):
                raise ValueError("a text is needed")
            return super().plain_responses(prompt)

    with pytest.raises(ConfigError, match=r"'file/1'.*a text is needed"):
        usable_golds(TextOnly(), [prompt("7", "file/0"), prompt(7, "file/1")], setting="source")


class OneOfTwo(Ranks):
    """A rank whose neighbour found what it was told to find."""

    def all_or_none(self) -> Any:
        return nullcontext()

    def gather(self, item: Any) -> list[Any]:
        shares: list[list[str | None]] = [[None, "no plain number"], ["no plain number"]]  # of 7 and 3:30; of 1/2
        assert [reason is None for reason in item] == [reason is None for reason in shares[self.rank]]
        return shares


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_the_golds_and_drop_the_same_prompts(rank: int) -> None:
    """Rank 0 tries the first and the third gold, rank 1 the second; both hear of both."""
    prompts = [prompt(answer, f"file/{n}") for n, answer in enumerate(["7", "1/2", "3:30", "7"])]
    ranks = OneOfTwo(rank, 2)
    kept = usable_golds(LastNumberReward(), prompts, setting="source", on_bad_gold="drop", ranks=ranks)
    assert [one.id for one in kept] == ["file/0", "file/3"]


def test_it_takes_a_bounded_time_unless_all_must_be_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(golds_module, "_CHUNK", 2)
    prompts = [prompt(str(n), f"file/{n}") for n in range(8)] + [prompt("1/2", "file/8")]
    now = iter(range(1000))
    monkeypatch.setattr(golds_module.time, "monotonic", lambda: float(next(now)))
    with caplog.at_level("INFO"):
        assert usable_golds(LastNumberReward(), prompts, setting="source", budget_s=4.0) == prompts
    assert "data.source: 4 of 9 golds tried on their verifier in time" in caplog.text
    kept = usable_golds(LastNumberReward(), prompts, setting="source", budget_s=4.0, on_bad_gold="drop")
    assert len(kept) == 8


def test_progress_is_shown_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(golds_module, "_CHUNK", 1)
    now = iter(range(0, 10000, 6))
    monkeypatch.setattr(golds_module.time, "monotonic", lambda: float(next(now)))
    with caplog.at_level("INFO"):
        usable_golds(LastNumberReward(), PROMPTS[::2], setting="source", budget_s=1000.0, on_bad_gold="refuse")
    assert "data.source: 1 of 2 golds tried on their verifier" in caplog.text


def test_what_hangs_on_a_gold_is_stopped_by_the_pool_and_the_gold_refused() -> None:
    class Hangs(VerifiableReward):  # here, so that workers need not import this module
        deadline_s = 0.3

        def verify(self, prompt, completion):
            while prompt.answer == "forever":
                pass
            return completion.text == prompt.answer

        def plain_responses(self, prompt):
            return PlainResponses((prompt.answer,))

    hangs = Hangs()
    prompts = [prompt("7", "file/0"), prompt("forever", "file/1"), prompt("8", "file/2")]
    with RewardPool([hangs], PoolOptions(workers=1)) as pool:
        kept = usable_golds(hangs, prompts, pool, setting="source", on_bad_gold="drop")
        assert [one.id for one in kept] == ["file/0", "file/2"]
        ((result,),) = judge_all(hangs, [(prompts[0], [Completion((1,), (0.0,), "stop", "7", 8, 0)])], pool)
        assert result.parts["accuracy"] == 1


def test_a_setting_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^on_bad_gold: 'skip' - write refuse or drop"):
        Collector(on_bad_gold="skip")


# From files.

LISTS = [["12"], ["9"], ["1/2"], ["7", "7.0", "8"]]


@pytest.mark.parametrize("kind", ["lists", "json", "python"])
def test_lists_in_files_are_alternatives(tmp_path: Path, kind: str) -> None:
    write = {"lists": list, "json": json.dumps, "python": str}[kind]
    rows = [{"question": f"{n}?", "answer": write(gold)} for n, gold in enumerate(LISTS)]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [problem.answer for problem in DatasetSource(str(path)).problems()]
    assert found == ["12", "9", "1/2", ["7", "8"]], "in one spelling, once each, and a list of one is its element"
    raw = [problem.answer for problem in DatasetSource(str(path), answer_format="raw").problems()]
    assert raw == [row["answer"] for row in rows]
    for reward in (DapoMathReward(), MathVerifyReward()):
        for answer, right in zip([*found, *raw], ["12", "9", "1/2", "8"] * 2, strict=True):
            assert accuracy(reward, answer, f"Answer: {right}") == 1.0


@pytest.mark.parametrize("gold", [["12", ""], ["12", None], ["  "]])
def test_an_empty_alternative_is_an_error_with_its_line(tmp_path: Path, gold: list[Any]) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"question": "one?", "answer": gold}) + "\n")
    problems = list(DatasetSource(str(path)).problems()) if None in gold else []
    if problems:  # not a list of answers: it stays as it is, and no verifier takes it
        assert tried(DapoMathReward(), problems[0].answer)
    else:
        with pytest.raises(ConfigError, match=r"lists\.jsonl, line 1: no value there"):
            list(DatasetSource(str(path)).problems())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_answer_and_lists_of_answers_may_be_mixed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mixed.{suffix}"
    golds: list[Any] = ["12", ["1", "2"], 7, ["9"], '["3", "4"]']
    if suffix == "parquet":
        stored = pa.array(
            ["12" if gold == "12" else gold if isinstance(gold, str) else json.dumps(gold) for gold in golds]
        )
        questions = [f"{n}?" for n in range(len(golds))]
        pq.write_table(pa.table({"question": questions, "answer": stored.cast(pa.json_())}), path)
    else:
        path.write_text("".join(json.dumps({"question": f"{n}?", "answer": g}) + "\n" for n, g in enumerate(golds)))
    assert [p.answer for p in DatasetSource(str(path)).problems()] == ["12", ["1", "2"], "7", "9", ["3", "4"]]


@pytest.mark.parametrize(
    ("stored", "words"),
    [("[1,2]", "a list or the text '[1, 2]'"), ("true", "a truth value here, but a plain value in data row 1: types")],
)
def test_what_a_column_of_mixed_types_does_not_tell_is_refused(tmp_path: Path, stored: str, words: str) -> None:
    path = tmp_path / "mixed.parquet"
    pq.write_table(pa.table({"question": ["a?", "b?"], "answer": pa.array(["12", stored]).cast(pa.json_())}), path)
    with pytest.raises(ConfigError, match=r"data row 2: .*arrow\.json") as refused:
        list(DatasetSource(str(path)).problems())
    assert words in str(refused.value)


def test_other_lists_and_objects_stay_as_they_are(tmp_path: Path) -> None:
    """For rewards of one's own, and for unit tests."""
    path = tmp_path / "other.jsonl"
    rows = [{"question": f"{n}?", "answer": gold} for n, gold in enumerate([[{"a": 1}], [["1"], ["2"]], [True]])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [problem.answer for problem in DatasetSource(str(path)).problems()] == [row["answer"] for row in rows]


class Characters:
    """A tokenizer, as far as raw prompts need one."""

    chat_template = None

    def __call__(self, text: Any, **settings: Any) -> Any:
        return {"input_ids": [ord(character) for character in text]}


def test_a_bad_gold_of_a_file_is_found_by_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "halves.jsonl"
    rows = [{"question": f"{n}?", "answer": gold} for n, gold in enumerate(["4", "3:30", "5"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DatasetSource(str(path), chat=False)
    prompts = encode_prompts(source, Characters(), PromptLimits(), setting="source")
    with pytest.raises(ConfigError, match=r"^source: 'halves/1' - 1 of 3 golds"):
        usable_golds(LastNumberReward(), prompts, setting="source")


class OneOfTwoWithFive(OneOfTwo):
    """The second gold of five is bad: rank 0 tries the first, the third and the fifth."""

    def gather(self, item: Any) -> list[Any]:
        shares: list[list[str | None]] = [[None, None, None], ["no plain number", None]]
        assert [reason is None for reason in item] == [reason is None for reason in shares[self.rank]]
        return shares


@pytest.mark.parametrize("rank", [0, 1])
def test_the_reason_of_another_rank_belongs_to_the_gold_that_it_tried(rank: int) -> None:
    prompts = [prompt(answer, f"file/{n}") for n, answer in enumerate(["7", "1/2", "8", "9", "10"])]
    ranks = OneOfTwoWithFive(rank, 2)
    kept = usable_golds(LastNumberReward(), prompts, setting="source", on_bad_gold="drop", ranks=ranks)
    assert [one.id for one in kept] == ["file/0", "file/2", "file/3", "file/4"]
